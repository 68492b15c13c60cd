//! Expert weights on the device: quads of columns, in pages, filled one expert after the other.

use super::context::{Gpu, Signal, write_mapped};
use crate::error::{Error, Result};
use crate::kernels::matmul::LANE_COLUMNS;
use crate::model::config::MoeConfig;
use crate::model::formats;
use crate::model::source::{ExpertKind, ExpertMatrix, ExpertSource, PackedRows, Projection, read_ahead};
use crate::model::weights::MoeWeights;
use crate::plan::pages::WeightPage;
use crate::plan::{LayerPlan, Matrix, ROUTED};
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
    /// Everything but routed and shared experts from `weights`, those from `source`. Of a plan with places, routed
    /// experts stay on the host. `progress(bytes)` is called with what has been read so far.
    pub(super) async fn upload(
        gpu: &Gpu,
        plan: &LayerPlan,
        weights: &MoeWeights,
        source: &mut dyn ExpertSource,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(Self, HostExperts)> {
        let mut uploader = Uploader::new(gpu);
        let mut pages = HashMap::new();
        let mut host = HostExperts::default();
        for matrix in plan.matrices() {
            pages.insert(matrix.name, empty_pages(gpu, matrix).await?);
        }
        let mut done = 0;
        for matrix in plan.matrices().iter().filter(|matrix| expert_matrix(matrix.name).is_none()) {
            let rows = plain_rows(matrix.name, weights);
            uploader.expert(matrix, &pages[matrix.name], 0, &rows).await?;
            done += matrix.bytes();
        }
        let loads: Vec<(&Matrix, ExpertMatrix)> = plan
            .matrices()
            .iter()
            .filter_map(|matrix| Some((matrix, expert_matrix(matrix.name)?)))
            .flat_map(|(matrix, (kind, projection))| {
                let routed = ROUTED.contains(&matrix.name).then_some(plan.config().num_weighted_experts());
                let experts = routed.unwrap_or(matrix.num_experts()) as usize;
                (0..experts).map(move |expert| (matrix, ExpertMatrix { kind, projection, expert }))
            })
            .collect();
        let matrices: Vec<ExpertMatrix> = loads.iter().map(|&(_, matrix)| matrix).collect();
        let mut loads = loads.into_iter();
        read_ahead(source, &matrices, async |rows| {
            let Some((matrix, ExpertMatrix { expert, .. })) = loads.next() else { return Ok(()) };
            if plan.places().is_some() && ROUTED.contains(&matrix.name) {
                host.add(matrix, &rows)?;
            } else {
                uploader.expert(matrix, &pages[matrix.name], expert, &rows).await?;
            }
            done += matrix.bytes() / u64::from(matrix.num_experts());
            progress(done);
            Ok(())
        })
        .await?;
        uploader.finish().await?;
        let mut vectors = HashMap::new();
        for (name, words) in vectors_of(plan.config(), weights) {
            vectors.insert(name, gpu.filled_buffer(name, bytemuck::cast_slice(&words), USAGE).await?);
        }
        if plan.places().is_some() {
            let bytes = u64::from(plan.config().num_experts()) * 4;
            vectors.insert("place_of_expert", gpu.buffer("place_of_expert", bytes, USAGE).await?);
        }
        Ok((Self { pages, vectors }, host))
    }

    /// All of them.
    pub(super) fn buffers(&self) -> impl Iterator<Item = &wgpu::Buffer> {
        self.pages.values().flatten().chain(self.vectors.values())
    }

    /// The buffer of this name, or a page of it.
    pub(super) fn find(&self, name: &str, page: usize) -> Option<&wgpu::Buffer> {
        match self.pages.get(name) {
            Some(pages) => pages.get(page),
            None => self.vectors.get(name),
        }
    }
}

/// Routed experts on the host, packed as a device has them: by matrix of [`ROUTED`], then by expert.
#[derive(Default)]
pub(super) struct HostExperts(pub(super) [Vec<Vec<u8>>; 2]);

impl HostExperts {
    fn add(&mut self, matrix: &Matrix, rows: &PackedRows) -> Result<()> {
        let bytes = (matrix.bytes() / u64::from(matrix.num_experts().max(1))) as usize;
        let mut packed = Vec::new();
        let short = || Error::OutOfMemory { during: format!("keeping {} on the host", matrix.name) };
        packed.try_reserve_exact(bytes).map_err(|_| short())?;
        packed.resize(bytes, 0);
        rows.pack(matrix, 0, &mut packed);
        self.0[usize::from(matrix.name != ROUTED[0])].push(packed);
        Ok(())
    }
}

impl Gpu {
    /// Bytes of routed experts that this device has memory for, less an eighth for what a pass needs beside them;
    /// `None`: for all of them. wgpu does not say how much memory there is, so their pages are allocated and given back.
    pub(crate) async fn room_for_experts(&self, plan: &LayerPlan) -> Result<Option<u64>> {
        let routed = plan.matrices().iter().filter(|matrix| ROUTED.contains(&matrix.name));
        let sizes: Vec<u64> = routed.flat_map(|matrix| matrix.pages.iter().map(|page| page.bytes)).collect();
        let mut buffers = Vec::new();
        let room = allocate_each(&sizes, async |bytes| {
            buffers.push(self.buffer("experts, to see whether they fit", bytes, USAGE).await?);
            Ok(())
        })
        .await;
        buffers.iter().for_each(wgpu::Buffer::destroy);
        room
    }
}

/// The bytes that could be allocated before memory ran out, less an eighth; `None`: it did not.
async fn allocate_each(sizes: &[u64], mut allocate: impl AsyncFnMut(u64) -> Result<()>) -> Result<Option<u64>> {
    let mut done = 0;
    for &bytes in sizes {
        match allocate(bytes).await {
            Ok(()) => done += bytes,
            Err(Error::OutOfMemory { .. }) => return Ok(Some(done - done / 8)),
            Err(other) => return Err(other),
        }
    }
    Ok(None)
}

/// Buffers for the pages of a matrix. Their content is zero.
pub(super) async fn empty_pages(gpu: &Gpu, matrix: &Matrix) -> Result<Vec<wgpu::Buffer>> {
    let mut buffers = Vec::new();
    for page in &matrix.pages {
        buffers.push(gpu.buffer(matrix.name, page.bytes, USAGE).await?);
    }
    Ok(buffers)
}

/// Which projection of which experts it is; `None`: none of experts.
pub(super) fn expert_matrix(name: &str) -> Option<(ExpertKind, Projection)> {
    match name {
        "gate_up_weights" => Some((ExpertKind::Routed, Projection::First)),
        "down_weights" => Some((ExpertKind::Routed, Projection::Down)),
        "shared_gate_up_weights" => Some((ExpertKind::Shared, Projection::First)),
        "shared_down_weights" => Some((ExpertKind::Shared, Projection::Down)),
        _ => None,
    }
}

impl PackedRows {
    /// The row that is packed column `column`; `None`: padding. Columns of the second matrix, if there is one,
    /// alternate with those of the first.
    fn row(&self, column: usize, row_bytes: usize) -> Option<&[u8]> {
        let (from, row) = match &self.1 {
            Some(second) if !column.is_multiple_of(2) => (second, column / 2),
            Some(_) => (&self.0, column / 2),
            None => (&self.0, column),
        };
        from.get(row * row_bytes..(row + 1) * row_bytes)
    }

    /// Columns `first_column..` of the matrix as a device has them, in parallel: `packed` is whole quads.
    pub(super) fn pack(&self, matrix: &Matrix, first_column: usize, packed: &mut [u8]) {
        let inputs = matrix.inputs as usize;
        let row_bytes = matrix.format.layout(inputs).bytes;
        packed.par_chunks_exact_mut(matrix.quad_bytes()).enumerate().for_each(|(quad, packed)| {
            let column = first_column + quad * QUAD;
            let rows: [Option<&[u8]>; QUAD] = std::array::from_fn(|i| self.row(column + i, row_bytes));
            formats::interleave(matrix.format, inputs, rows, |_, place| place, packed);
        });
    }
}

/// Rows of a matrix that is not an expert's: the router's, or those into and out of a latent space.
pub(super) fn plain_rows(name: &str, weights: &MoeWeights) -> PackedRows {
    let x = &weights.extras;
    let rows = match name {
        "router_matrix" => router_rows(weights).concat(),
        "latent_in_weights" => x.latent_in.clone().unwrap_or_default(),
        _ => x.latent_out.clone().unwrap_or_default(),
    };
    PackedRows(bytemuck::cast_slice(&rows).to_vec(), None)
}

/// Bytes on their way to the device at a time.
const STAGING_BYTES: usize = 8 << 20;

/// Copies to the device through two buffers that stay mapped between copies: while one is on its way, the other is
/// filled.
pub(super) struct Uploader {
    gpu: Gpu,
    staging: Vec<(wgpu::Buffer, Option<Signal>)>,
    next: usize,
    packed: Vec<u8>,
}

impl Uploader {
    pub(super) fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), staging: Vec::new(), next: 0, packed: Vec::new() }
    }

    /// All columns of one expert to the pages that hold them.
    pub(super) async fn expert(
        &mut self,
        matrix: &Matrix,
        pages: &[wgpu::Buffer],
        expert: usize,
        rows: &PackedRows,
    ) -> Result<()> {
        let holds = |page: &WeightPage| (page.first_expert..page.end_expert).contains(&(expert as u32));
        for (page, buffer) in matrix.pages.iter().zip(pages).filter(|(page, _)| holds(page)) {
            let at = (expert as u64 - u64::from(page.first_expert)) * page.expert_bytes();
            self.columns(matrix, page, buffer, at, rows).await?;
        }
        Ok(())
    }

    /// The columns of one expert that `page` holds, to `buffer` from `at` on.
    pub(super) async fn columns(
        &mut self,
        matrix: &Matrix,
        page: &WeightPage,
        buffer: &wgpu::Buffer,
        at: u64,
        rows: &PackedRows,
    ) -> Result<()> {
        let quad_bytes = matrix.quad_bytes();
        let quads = page.num_columns as usize / QUAD;
        let batch = (STAGING_BYTES / quad_bytes).clamp(1, quads);
        let mut packed = std::mem::take(&mut self.packed);
        for first in (0..quads).step_by(batch) {
            packed.resize(batch.min(quads - first) * quad_bytes, 0);
            rows.pack(matrix, page.first_column as usize + first * QUAD, &mut packed);
            self.bytes(buffer, at + (first * quad_bytes) as u64, &packed).await?;
        }
        self.packed = packed;
        Ok(())
    }

    /// `bytes`, a multiple of 4, to `buffer` from `at` on.
    pub(super) async fn bytes(&mut self, buffer: &wgpu::Buffer, at: u64, bytes: &[u8]) -> Result<()> {
        let result = self.copy(buffer, at, bytes).await;
        if result.is_err() {
            // Mapped, on their way or neither: nobody knows.
            self.staging.clear();
            self.next = 0;
        }
        result
    }

    async fn copy(&mut self, buffer: &wgpu::Buffer, at: u64, bytes: &[u8]) -> Result<()> {
        for (n, bytes) in bytes.chunks(STAGING_BYTES).enumerate() {
            let (staging, signal) = self.free().await?;
            if let Some(signal) = signal {
                self.gpu.wait(&signal, "uploading weights").await?;
            }
            write_mapped(&staging, bytes)?;
            staging.unmap();
            let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            encoder.copy_buffer_to_buffer(&staging, 0, buffer, at + (n * STAGING_BYTES) as u64, bytes.len() as u64);
            let commands = self.gpu.scoped("uploading weights", |_| encoder.finish()).await?;
            self.gpu.submit(commands).await?;
            let signal = self.gpu.map(&staging, wgpu::MapMode::Write).await?;
            self.staging[self.next].1 = Some(signal);
            self.next = (self.next + 1) % 2;
        }
        Ok(())
    }

    /// The buffer that is to be filled next, and what to wait for before.
    async fn free(&mut self) -> Result<(wgpu::Buffer, Option<Signal>)> {
        if self.staging.len() <= self.next {
            let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
            let buffer = self.gpu.mapped_buffer("weights on their way", STAGING_BYTES as u64, usage).await?;
            self.staging.push((buffer, None));
        }
        let (buffer, signal) = &mut self.staging[self.next];
        Ok((buffer.clone(), signal.take()))
    }

    /// Waits until everything is on the device.
    pub(super) async fn finish(&mut self) -> Result<()> {
        for (_, signal) in &mut self.staging {
            if let Some(signal) = signal.take() {
                self.gpu.wait(&signal, "uploading weights").await?;
            }
        }
        self.staging.clear();
        self.next = 0;
        self.gpu.check("uploading weights")
    }
}

/// Columns that are packed together.
const QUAD: usize = LANE_COLUMNS as usize;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_could_be_allocated() {
        let room = |memory: u64| {
            let mut left = memory;
            pollster::block_on(allocate_each(&[80, 80, 40], async |bytes| {
                left = left.checked_sub(bytes).ok_or_else(|| Error::OutOfMemory { during: "a test".to_owned() })?;
                Ok(())
            }))
            .expect("running out of memory is an answer")
        };
        assert_eq!([0, 79, 80, 199, 200].map(room), [Some(0), Some(0), Some(70), Some(140), None]);
        let lost = |_| async { Err(Error::DeviceLost { message: String::new() }) };
        assert!(matches!(pollster::block_on(allocate_each(&[1], lost)), Err(Error::DeviceLost { .. })));
    }
}
