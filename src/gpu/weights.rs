//! Expert weights on the device: packed rows, padded to whole vec4, in pages.

use super::context::Gpu;
use crate::error::{Error, Result};
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

        let mut router = vec![0u8; e * h.next_multiple_of(4) * 4];
        for (packed, row) in router.chunks_exact_mut(h.next_multiple_of(4) * 4).zip(weights.router.chunks_exact(h)) {
            pack_row(WeightFormat::F32, row, packed);
        }
        let bias = weights.router_bias.clone().unwrap_or_else(|| vec![0.0; e]);
        let router = gpu.filled_buffer("router_weights", &router, storage).await?;
        let router_bias = gpu.filled_buffer("router_bias", bytemuck::cast_slice(&bias), storage).await?;

        // gate and up rows alternate; rows past intermediate_size are padding
        let gate_up_row = |expert: usize, column: usize| {
            let from = if column % 2 == 0 { &weights.gate_proj } else { &weights.up_proj };
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
    let rows = (page.end_expert - page.first_expert) as usize * columns;
    let row_bytes = page.bytes as usize / rows;
    {
        let mut view = buffer
            .get_mapped_range_mut(..)
            .map_err(|e| Error::Device { during: format!("uploading {label}"), message: e.to_string() })?;
        // Mapped memory is write-only: pack a few rows at a time on the host, in parallel, and copy them over.
        let batch = (UPLOAD_BYTES / row_bytes).clamp(1, rows);
        let mut packed = vec![0u8; batch * row_bytes];
        for first in (0..rows).step_by(batch) {
            let packed = &mut packed[..batch.min(rows - first) * row_bytes];
            packed.par_chunks_exact_mut(row_bytes).enumerate().for_each(|(n, packed)| {
                let index = first + n;
                let expert = page.first_expert as usize + index / columns;
                match row(expert, page.first_column as usize + index % columns) {
                    Some(values) => pack_row(format, values, packed),
                    None => packed.fill(0),
                }
            });
            view.slice(first * row_bytes..first * row_bytes + packed.len()).copy_from_slice(packed);
        }
    }
    buffer.unmap();
    Ok(buffer)
}

/// Bytes packed at a time.
const UPLOAD_BYTES: usize = 4 << 20;

/// Stores `values` in `format` and zeros after them.
fn pack_row(format: WeightFormat, values: &[f32], packed: &mut [u8]) {
    let width = format.bits() as usize / 8;
    let (front, padding) = packed.split_at_mut(values.len() * width);
    match format {
        WeightFormat::F32 => front.copy_from_slice(bytemuck::cast_slice(values)),
        WeightFormat::F16 => {
            for (to, &value) in front.chunks_exact_mut(2).zip(values) {
                to.copy_from_slice(&half::f16::from_f32(value).to_le_bytes());
            }
        }
    }
    padding.fill(0);
}
