//! Experts that come and go. The others are copied on the device, block by block, or stay where they are.

use super::super::weights::{self, DeviceWeights, Uploader};
use super::{GpuLayer, State};
use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::routing::Noise;
use crate::model::source::{ExpertMatrix, HostSource, PackedRows, read_expert};
use crate::model::weights::{ExpertWeights, MoeWeights, check_expert_id, splice_row};
use crate::plan::pages::WeightPage;
use crate::plan::{Matrix, pad4};
use async_lock::Mutex;
use std::collections::HashMap;

/// A change of a layer's experts.
#[derive(Clone, Copy)]
pub(crate) enum Edit<'a> {
    Add(&'a ExpertWeights),
    Remove(u32),
    Replace(u32, &'a ExpertWeights),
}

impl<'a> Edit<'a> {
    /// Of a layer that is as `config` says: the place, the experts that leave it, and the one that comes.
    pub(crate) fn parts(self, config: &MoeConfig) -> (u32, u32, Option<&'a ExpertWeights>) {
        match self {
            Edit::Add(expert) => (config.num_weighted_experts(), 0, Some(expert)),
            Edit::Remove(id) => (id, 1, None),
            Edit::Replace(id, expert) => (id, 1, Some(expert)),
        }
    }
}

/// Where experts from `at` on come from: `removed` old ones are left out there, and a new one stands there or not.
struct Splice<'a> {
    at: u32,
    removed: u32,
    inserted: Option<&'a MoeWeights>,
}

impl Splice<'_> {
    /// The old id of expert `new`, `None` for the inserted one.
    fn old_id(&self, new: u32) -> Option<u32> {
        let inserted = u32::from(self.inserted.is_some());
        if new < self.at {
            Some(new)
        } else if new < self.at + inserted {
            None
        } else {
            Some(new - inserted + self.removed)
        }
    }
}

impl GpuLayer {
    /// Nothing changes on an error: the new buffers take the place of the old ones at the very end.
    pub(crate) async fn edit(&mut self, edit: Edit<'_>) -> Result<()> {
        if self.residency.is_some() {
            return Err(Error::Unsupported {
                what: "changing experts".to_owned(),
                by: "by a layer that brings its experts in as they are chosen (gpu_memory)".to_owned(),
                hint: "make a new layer, or give it the memory of all experts".to_owned(),
            });
        }
        let old = self.plan.config().clone();
        let (at, removed, expert) = edit.parts(&old);
        if removed > 0 {
            check_expert_id(&old, at)?;
        }
        let config = match edit {
            Edit::Add(_) => old.with_num_experts(old.num_experts() + 1)?,
            Edit::Remove(_) => old.with_num_experts(old.num_experts() - 1)?,
            Edit::Replace(..) => old.clone(),
        };
        let inserted = expert.map(|expert| self.checked(expert)).transpose()?;
        let plan = self.plan.with_config(&config)?;
        let splice = Splice { at, removed, inserted: inserted.as_ref() };

        let mut encoder = self.encoder();
        let mut pages = self.weights.pages.clone();
        for matrix in plan.matrices().iter().filter(|m| ["gate_up_weights", "down_weights"].contains(&m.name)) {
            let buffers = self.spliced_pages(matrix, &config, &splice, &mut encoder).await?;
            pages.insert(matrix.name, buffers);
        }
        let (vectors, router) = self.spliced_vectors(&old, &splice, expert).await?;
        for matrix in plan.matrices().iter().filter(|m| m.name == "router_matrix") {
            let rows = PackedRows(bytemuck::cast_slice(&router).to_vec(), None);
            let buffers = weights::empty_pages(&self.gpu, matrix).await?;
            let mut uploader = Uploader::new(&self.gpu);
            uploader.expert(matrix, &buffers, 0, &rows).await?;
            uploader.finish().await?;
            pages.insert(matrix.name, buffers);
        }
        self.submit(encoder).await?;
        self.gpu.check("moving experts")?;
        self.weights = DeviceWeights { pages, vectors };
        self.plan = plan;
        self.state = Mutex::new(State::default());
        Ok(())
    }

    /// The expert as the only one of a layer.
    fn checked(&self, expert: &ExpertWeights) -> Result<MoeWeights> {
        expert.validate(self.plan.config())?;
        expert.check_optional(&self.tensors)?;
        Ok(expert.matrices())
    }

    /// The pages of a matrix after the change: those that stay are the old buffers, others are filled by copies.
    async fn spliced_pages(
        &self,
        matrix: &Matrix,
        config: &MoeConfig,
        splice: &Splice<'_>,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<Vec<wgpu::Buffer>> {
        let old_pages = self.plan.pages(matrix.name);
        let mut buffers = Vec::new();
        for page in &matrix.pages {
            let stays = (page.first_expert..page.end_expert).all(|e| splice.old_id(e) == Some(e));
            let same = old_pages.iter().position(|old| stays && old == page);
            if let Some(old) = same.and_then(|index| self.weights.find(matrix.name, index)) {
                buffers.push(old.clone());
                continue;
            }
            let buffer = self.gpu.buffer(matrix.name, page.bytes, weights::USAGE).await?;
            let block = page.expert_bytes();
            for expert in page.first_expert..page.end_expert {
                let to = u64::from(expert - page.first_expert) * block;
                match (splice.old_id(expert), splice.inserted) {
                    (Some(id), _) => {
                        // Columns of an expert are cut the same way, whichever experts there are.
                        let holds = |old: &WeightPage| {
                            (old.first_expert..old.end_expert).contains(&id) && old.first_column == page.first_column
                        };
                        let index = old_pages.iter().position(holds);
                        let old = index.and_then(|index| Some((index, self.weights.find(matrix.name, index)?)));
                        let Some((index, old)) = old else { return Err(lost(matrix.name, id)) };
                        let from = u64::from(id - old_pages[index].first_expert) * block;
                        encoder.copy_buffer_to_buffer(old, from, &buffer, to, block);
                    }
                    (None, Some(inserted)) => {
                        let formats = self.plan.formats();
                        let mut source = HostSource { config, weights: inserted, formats };
                        let Some((kind, projection)) = weights::expert_matrix(matrix.name) else {
                            return Err(lost(matrix.name, expert));
                        };
                        let rows = read_expert(&mut source, ExpertMatrix { kind, projection, expert: 0 })?;
                        let mut uploader = Uploader::new(&self.gpu);
                        uploader.columns(matrix, page, &buffer, to, &rows).await?;
                        uploader.finish().await?;
                    }
                    (None, None) => return Err(lost(matrix.name, expert)),
                }
            }
            buffers.push(buffer);
        }
        Ok(buffers)
    }

    /// The other tensors after the change, and the router's rows. They are small: edited on the host.
    async fn spliced_vectors(
        &self,
        old: &MoeConfig,
        splice: &Splice<'_>,
        expert: Option<&ExpertWeights>,
    ) -> Result<(HashMap<&'static str, wgpu::Buffer>, Vec<f32>)> {
        let mut vectors = self.weights.vectors.clone();
        let mut router = Vec::new();
        let (at, removed) = (splice.at as usize, splice.removed as usize);
        let num_experts = old.num_experts() as usize;
        for name in ["router_weights", "router_vectors", "gate_up_bias", "down_bias"] {
            let Some(buffer) = self.weights.vectors.get(name) else { continue };
            let mut words = self.read_buffer(buffer, self.encoder(), (buffer.size() / 4) as usize).await?;
            match name {
                "router_weights" => {
                    let width = pad4(old.hidden_size()) as usize;
                    let mut row = expert.map_or(Vec::new(), |expert| bits(&expert.router_row));
                    row.resize(if expert.is_some() { width } else { 0 }, 0);
                    let noise_at = words.len() / width - num_experts;
                    // Rows of noise, where there are any, are the last. A new expert's is zeros; one that takes
                    // another's place takes its row, too.
                    let has_noise = old.routing().noise == Noise::NoisyTopK;
                    if has_noise && (removed == 0 || expert.is_none()) {
                        let zeros = vec![0; row.len()];
                        splice_row(&mut words, width, noise_at + at, removed, &zeros);
                    }
                    splice_row(&mut words, width, at, removed, &row);
                    let unpadded = words.chunks_exact(width).flat_map(|row| &row[..old.hidden_size() as usize]);
                    router = unpadded.map(|&word| f32::from_bits(word)).collect();
                }
                "router_vectors" => {
                    let values = expert.map(|e| [e.router_bias, e.selection_bias, e.per_expert_scale]);
                    for vector in (0..3).rev() {
                        let value = values.map(|values| values[vector].to_bits());
                        splice_row(&mut words, 1, vector * num_experts + at, removed, value.as_slice());
                    }
                }
                _ => {
                    let width = words.len() / old.num_weighted_experts() as usize;
                    let mut row = match (name, expert) {
                        ("gate_up_bias", Some(expert)) => weights::gate_up_bias(
                            old,
                            expert.gate_bias.as_deref(),
                            expert.up_bias.as_deref().unwrap_or_default(),
                        ),
                        (_, Some(expert)) => bits(expert.down_bias.as_deref().unwrap_or_default()),
                        (_, None) => Vec::new(),
                    };
                    row.resize(if expert.is_some() { width } else { 0 }, 0);
                    splice_row(&mut words, width, at, removed, &row);
                }
            }
            let buffer = self.gpu.filled_buffer(name, bytemuck::cast_slice(&words), weights::USAGE).await?;
            vectors.insert(name, buffer);
        }
        Ok((vectors, router))
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn lost(matrix: &str, expert: u32) -> Error {
    Error::Device { during: "moving experts".to_owned(), message: format!("expert {expert} of {matrix} is nowhere") }
}
