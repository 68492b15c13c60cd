//! Expert weights on the device: blocks of 4 columns x 4 inputs, padded with zeros, in pages.

use super::context::Gpu;
use crate::error::{Error, Result};
use crate::kernels::matmul::LANE_COLUMNS;
use crate::model::config::MoeConfig;
use crate::model::weights::{MoeWeights, WeightFormat};
use crate::plan::LayerPlan;
use crate::plan::pages::WeightPage;
use rayon::prelude::*;
use std::collections::HashMap;

/// A layer's weights in device buffers, by the names that plans bind them by.
pub(super) struct DeviceWeights {
    /// Matrices, in pages.
    pub(super) pages: HashMap<&'static str, Vec<wgpu::Buffer>>,
    /// Everything else.
    pub(super) vectors: HashMap<&'static str, wgpu::Buffer>,
}

/// All buffers may be copied: adding and removing experts moves them on the device.
pub(super) const USAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

impl DeviceWeights {
    pub(super) async fn upload(gpu: &Gpu, plan: &LayerPlan, weights: &MoeWeights) -> Result<Self> {
        let c = plan.config();
        let mut pages = HashMap::new();
        let router = router_rows(weights).concat();
        for matrix in plan.matrices() {
            let source = match matrix.name {
                "router_matrix" => PackedRows::router(c, &router),
                name => PackedRows::of(name, c, weights),
            };
            let mut buffers = Vec::new();
            for page in &matrix.pages {
                buffers.push(upload_page(gpu, matrix.name, matrix.format, page, |e, n| source.row(e, n)).await?);
            }
            pages.insert(matrix.name, buffers);
        }
        let mut vectors = HashMap::new();
        for (name, words) in vectors_of(c, weights) {
            vectors.insert(name, gpu.filled_buffer(name, bytemuck::cast_slice(&words), USAGE).await?);
        }
        Ok(Self { pages, vectors })
    }

    /// The buffer of this name, or a page of it.
    pub(super) fn find(&self, name: &str, page: usize) -> Option<&wgpu::Buffer> {
        match self.pages.get(name) {
            Some(pages) => pages.get(page),
            None => self.vectors.get(name),
        }
    }
}

/// Where the packed rows of a matrix come from.
pub(super) struct PackedRows<'a> {
    /// Alternate with those of `second` if there is one.
    first: &'a [f32],
    second: Option<&'a [f32]>,
    rows: usize,
    inputs: usize,
}

impl<'a> PackedRows<'a> {
    pub(super) fn of(name: &str, c: &MoeConfig, weights: &'a MoeWeights) -> Self {
        let [h, i, d] = [c.hidden_size(), c.intermediate_size(), c.expert_size()].map(|n| n as usize);
        let s = c.extras().shared.map_or(0, |shared| shared.intermediate_size) as usize;
        let x = &weights.extras;
        let empty: &[f32] = &[];
        let gated = |gate: &'a [f32], up: &'a [f32], is_gated: bool, rows, inputs| Self {
            first: if is_gated { gate } else { up },
            second: is_gated.then_some(up),
            rows,
            inputs,
        };
        let plain = |first: &'a [f32], rows, inputs| Self { first, second: None, rows, inputs };
        match name {
            "gate_up_weights" => gated(&weights.gate_proj, &weights.up_proj, c.activation().is_gated(), i, d),
            "down_weights" => plain(&weights.down_proj, d, i),
            "shared_gate_up_weights" => {
                let is_gated = c.extras().shared.is_some_and(|shared| shared.activation.is_gated());
                gated(&x.shared_gate_proj, &x.shared_up_proj, is_gated, s, h)
            }
            "shared_down_weights" => plain(&x.shared_down_proj, h, s),
            "latent_in_weights" => plain(x.latent_in.as_deref().unwrap_or(empty), d, h),
            _ => plain(x.latent_out.as_deref().unwrap_or(empty), h, d),
        }
    }

    /// All rows of the router, as the matrix of one expert.
    pub(super) fn router(c: &MoeConfig, rows: &'a [f32]) -> Self {
        let inputs = c.hidden_size() as usize;
        Self { first: rows, second: None, rows: rows.len() / inputs, inputs }
    }

    /// Packed row `column` of an expert; `None`: padding.
    pub(super) fn row(&self, expert: usize, column: usize) -> Option<&'a [f32]> {
        let (from, row) = match self.second {
            Some(second) if !column.is_multiple_of(2) => (second, column / 2),
            Some(_) => (self.first, column / 2),
            None => (self.first, column),
        };
        (row < self.rows).then(|| from.get((expert * self.rows + row) * self.inputs..)?.get(..self.inputs)).flatten()
    }
}

/// The router's rows, in order: experts, gated shared experts, groups, noise.
fn router_rows(weights: &MoeWeights) -> Vec<&[f32]> {
    let x = &weights.extras;
    let others = [&x.shared_gate, &x.group_router, &x.router_noise];
    std::iter::once(&weights.router[..]).chain(others.into_iter().filter_map(|rows| rows.as_deref())).collect()
}

/// Everything that is not a packed matrix, as words.
pub(super) fn vectors_of(c: &MoeConfig, weights: &MoeWeights) -> Vec<(&'static str, Vec<u32>)> {
    let [h, e] = [c.hidden_size(), c.num_experts()].map(|n| n as usize);
    let x = &weights.extras;
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
    // Padded with zeros to whole vec4.
    let padded = |values: &[f32], width: usize| {
        let mut words = Vec::new();
        for row in values.chunks_exact(width) {
            words.extend(bits(row));
            words.resize(words.len().next_multiple_of(4), 0);
        }
        words
    };
    let router: Vec<u32> = router_rows(weights).into_iter().flat_map(|rows| padded(rows, h)).collect();
    let or = |values: &Option<Vec<f32>>, other: f32| bits(&values.clone().unwrap_or_else(|| vec![other; e]));
    let router_vectors =
        [or(&weights.router_bias, 0.0), or(&x.selection_bias, 0.0), or(&x.per_expert_scale, 1.0)].concat();
    let mut vectors = vec![("router_weights", router), ("router_vectors", router_vectors)];
    let expert_size = c.expert_size() as usize;
    if let Some(up) = &x.up_bias {
        vectors.push(("gate_up_bias", gate_up_bias(c, x.gate_bias.as_deref(), up)));
    }
    vectors.extend(x.down_bias.as_ref().map(|bias| ("down_bias", padded(bias, expert_size))));
    vectors.extend(x.output_bias.as_ref().map(|bias| ("output_bias", padded(bias, h))));
    vectors.extend(x.token_table.as_ref().map(|table| ("table", table.clone())));
    for (name, norm) in [
        ("router_norm", &x.router_norm),
        ("expert_norm", &x.expert_norm),
        ("expert_out_norm", &x.expert_out_norm),
        ("routed_norm", &x.routed_norm),
        ("output_norm", &x.output_norm),
    ] {
        vectors.extend(norm.as_ref().map(|norm| (name, bits(norm))));
    }
    vectors
}

/// Biases in the order of the packed columns: `[experts, packed columns]`.
pub(super) fn gate_up_bias(c: &MoeConfig, gate: Option<&[f32]>, up: &[f32]) -> Vec<u32> {
    let i = c.intermediate_size() as usize;
    let mut words = Vec::new();
    for (expert, up) in up.chunks_exact(i).enumerate() {
        let gate = gate.and_then(|gate| gate.get(expert * i..)).filter(|_| c.activation().is_gated());
        for column in 0..i.next_multiple_of(4) {
            if c.activation().is_gated() {
                let gate = gate.filter(|_| column < i).and_then(|gate| gate.get(column));
                words.push(gate.copied().unwrap_or(0.0).to_bits());
            }
            words.push(up.get(column).copied().unwrap_or(0.0).to_bits());
        }
    }
    words
}

/// Fills one page: `row(expert, column)` is the f32 row to pack, `None` for padding.
pub(super) async fn upload_page<'w>(
    gpu: &Gpu,
    label: &str,
    format: WeightFormat,
    page: &WeightPage,
    row: impl Fn(usize, usize) -> Option<&'w [f32]> + Sync,
) -> Result<wgpu::Buffer> {
    let buffer = gpu.mapped_buffer(label, page.bytes, USAGE).await?;
    let columns = page.num_columns as usize;
    let quads = (page.end_expert - page.first_expert) as usize * columns / QUAD;
    let quad_bytes = page.bytes as usize / quads;
    {
        let mut view = buffer
            .get_mapped_range_mut(..)
            .map_err(|e| Error::Device { during: format!("uploading {label}"), message: e.to_string() })?;
        // Mapped memory is write-only: pack a few quads at a time on the host, in parallel, and copy them over.
        let batch = (UPLOAD_BYTES / quad_bytes).clamp(1, quads);
        let mut packed = vec![0u8; batch * quad_bytes];
        for first in (0..quads).step_by(batch) {
            let packed = &mut packed[..batch.min(quads - first) * quad_bytes];
            packed.par_chunks_exact_mut(quad_bytes).enumerate().for_each(|(n, packed)| {
                let column = (first + n) * QUAD;
                let (expert, column) =
                    (page.first_expert as usize + column / columns, page.first_column as usize + column % columns);
                pack_quad(format, std::array::from_fn(|i| row(expert, column + i)), packed);
            });
            view.slice(first * quad_bytes..first * quad_bytes + packed.len()).copy_from_slice(packed);
        }
    }
    buffer.unmap();
    Ok(buffer)
}

/// Columns that are packed together, and inputs of a block.
const QUAD: usize = LANE_COLUMNS as usize;
/// Bytes packed at a time.
const UPLOAD_BYTES: usize = 4 << 20;

/// Four columns as blocks of 4 inputs x 4 columns, padded with zeros: `[k4, 4 inputs, 4 columns]`.
fn pack_quad(format: WeightFormat, columns: [Option<&[f32]>; QUAD], packed: &mut [u8]) {
    let width = format.bits() as usize / 8;
    for (k, inputs) in packed.chunks_exact_mut(QUAD * width).enumerate() {
        for (value, column) in inputs.chunks_exact_mut(width).zip(columns) {
            let weight = column.and_then(|column| column.get(k)).copied().unwrap_or(0.0);
            match format {
                WeightFormat::F32 => value.copy_from_slice(&weight.to_le_bytes()),
                WeightFormat::F16 => value.copy_from_slice(&half::f16::from_f32(weight).to_le_bytes()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quad_is_transposed_in_blocks_and_padded() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0], [10.0, 20.0, 30.0, 40.0, 50.0]);
        let mut packed = [0xffu8; 2 * 16 * 4];
        pack_quad(WeightFormat::F32, [Some(&a), None, Some(&b), None], &mut packed);
        let values: Vec<f32> = bytemuck::pod_collect_to_vec(&packed);
        assert_eq!(values[..8], [1.0, 0.0, 10.0, 0.0, 2.0, 0.0, 20.0, 0.0]);
        assert_eq!(values[16..], [5.0, 0.0, 50.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
    }
}
