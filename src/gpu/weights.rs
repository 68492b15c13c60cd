//! Expert weights on the device: blocks of 4 columns x 4 inputs, padded with zeros, in pages.

use super::context::Gpu;
use crate::error::{Error, Result};
use crate::kernels::matmul::LANE_COLUMNS;
use crate::model::weights::{MoeWeights, WeightFormat};
use crate::plan::LayerPlan;
use crate::plan::pages::WeightPage;
use rayon::prelude::*;

/// A layer's weights in device buffers.
pub(super) struct DeviceWeights {
    /// `[num_experts, hidden_size padded to 4]`, f32
    pub(super) router: wgpu::Buffer,
    /// `[num_experts]`, f32; zeros where the layer has no bias
    pub(super) router_bias: wgpu::Buffer,
    /// Rows 2i and 2i+1 of an expert are row i of its gate_proj and of its up_proj.
    pub(super) gate_up: Vec<wgpu::Buffer>,
    pub(super) down: Vec<wgpu::Buffer>,
}

impl DeviceWeights {
    pub(super) async fn upload(gpu: &Gpu, plan: &LayerPlan, weights: &MoeWeights) -> Result<Self> {
        let c = plan.config();
        let [h, i, e] = [c.hidden_size(), c.intermediate_size(), c.num_experts()].map(|n| n as usize);
        let storage = wgpu::BufferUsages::STORAGE;

        let stride = h.next_multiple_of(4);
        let mut router = vec![0.0f32; e * stride];
        for (padded, row) in router.chunks_exact_mut(stride).zip(weights.router.chunks_exact(h)) {
            padded[..h].copy_from_slice(row);
        }
        let bias = weights.router_bias.clone().unwrap_or_else(|| vec![0.0; e]);
        let router = gpu.filled_buffer("router_weights", bytemuck::cast_slice(&router), storage).await?;
        let router_bias = gpu.filled_buffer("router_bias", bytemuck::cast_slice(&bias), storage).await?;

        // gate and up rows alternate; rows past intermediate_size are padding
        let gate_up_row = |expert: usize, column: usize| {
            let from = if column.is_multiple_of(2) { &weights.gate_proj } else { &weights.up_proj };
            (column / 2 < i).then(|| &from[(expert * i + column / 2) * h..][..h])
        };
        let down_row =
            |expert: usize, column: usize| (column < h).then(|| &weights.down_proj[(expert * h + column) * i..][..i]);
        let mut gate_up = Vec::new();
        for page in plan.gate_up_pages() {
            gate_up.push(upload_page(gpu, "gate_up weights", plan.format(), page, gate_up_row).await?);
        }
        let mut down = Vec::new();
        for page in plan.down_pages() {
            down.push(upload_page(gpu, "down weights", plan.format(), page, down_row).await?);
        }
        Ok(Self { router, router_bias, gate_up, down })
    }
}

/// Fills one page: `row(expert, column)` is the f32 row to pack, `None` for padding.
async fn upload_page<'w>(
    gpu: &Gpu,
    label: &str,
    format: WeightFormat,
    page: &WeightPage,
    row: impl Fn(usize, usize) -> Option<&'w [f32]> + Sync,
) -> Result<wgpu::Buffer> {
    let buffer = gpu.mapped_buffer(label, page.bytes, wgpu::BufferUsages::STORAGE).await?;
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
