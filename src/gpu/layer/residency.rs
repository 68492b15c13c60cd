//! Layers larger than the device: all routed experts stay on the host, and those that tokens were routed to are brought
//! into places on the device, the least recently used making room.
//!
//! A pass is then cut in three: the router; rounds of the experts' products, each over as many experts as have a place;
//! everything after them. Between the router and the first round its choices are read back: this is the only mode in
//! which a dispatch waits for the host. Experts that are there already make the first round, so that the others are
//! copied while it runs. A row's result depends on its expert's weights alone, not on the round, so bits are those of
//! a layer that has all experts on the device.

use super::super::context::read_mapped;
use super::super::weights::{DeviceWeights, HostExperts, Uploader};
use super::host::final_experts;
use super::{GpuLayer, PassKey, State, unprepared};
use crate::error::{Error, Result};
use crate::gpu::context::Gpu;
use crate::model::routing::DROPPED;
use crate::plan::{LayerPlan, ROUTED};
use serde::Serialize;

/// What bringing experts in has cost so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ResidencyStats {
    /// Routed experts that have weights.
    pub num_experts: u32,
    /// Of those, how many are on the device at a time.
    pub places: u32,
    /// Of the places, how many hold an expert that never leaves.
    pub pinned: u32,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Passes.
    pub passes: u64,
    /// Times that a pass needed an expert that was on the device.
    pub hits: u64,
    /// Times that a pass needed an expert that was not.
    pub misses: u64,
    /// Bytes of experts copied to the device by passes.
    pub uploaded_bytes: u64,
    /// Rounds of the experts' products.
    pub rounds: u64,
}

impl ResidencyStats {
    /// Hits per needed expert; 1 if none was needed.
    pub fn hit_rate(&self) -> f64 {
        let needed = self.hits + self.misses;
        if needed == 0 { 1.0 } else { self.hits as f64 / needed as f64 }
    }
}

/// Room for one expert on the device.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    /// Who is there, complete.
    expert: Option<u32>,
    /// When it was last needed, counted in rounds.
    used: u64,
    pinned: bool,
}

/// Experts on the host, and who of them is on the device.
pub(super) struct Residency {
    host: HostExperts,
    places: Vec<Place>,
    uploader: Uploader,
    now: u64,
    stats: ResidencyStats,
}

impl Residency {
    /// Brings `pinned` experts in, then the first ones.
    pub(super) async fn new(
        gpu: &Gpu,
        plan: &LayerPlan,
        weights: &DeviceWeights,
        host: HostExperts,
        places: u32,
        pinned: &[u32],
    ) -> Result<Self> {
        let num_experts = plan.config().num_weighted_experts();
        let mut first: Vec<u32> = Vec::new();
        for &expert in pinned {
            if expert >= num_experts {
                return Err(Error::config("pinned_experts", expert, format!("ids below {num_experts}")));
            }
            if !first.contains(&expert) {
                first.push(expert);
            }
        }
        let num_pinned = first.len();
        if num_pinned as u32 >= places {
            return Err(Error::config(
                "pinned_experts",
                format!("{num_pinned} experts"),
                format!("fewer than the {places} places that gpu_memory has room for: one has to stay free"),
            ));
        }
        first.extend((0..num_experts).filter(|expert| !pinned.contains(expert)));
        first.truncate(places as usize);
        let stats = ResidencyStats {
            num_experts,
            places,
            pinned: num_pinned as u32,
            expert_bytes: plan.expert_bytes(),
            ..ResidencyStats::default()
        };
        let places = vec![Place::default(); places as usize];
        let mut this = Self { host, places, uploader: Uploader::new(gpu), now: 0, stats };
        for (place, expert) in first.into_iter().enumerate() {
            this.bring_in(plan, weights, place, expert).await?;
            this.places[place].pinned = place < num_pinned;
        }
        this.stats.uploaded_bytes = 0;
        Ok(this)
    }

    fn place_of(&self, expert: u32) -> Option<usize> {
        self.places.iter().position(|place| place.expert == Some(expert))
    }

    /// Copies an expert to a place, whoever was there.
    async fn bring_in(&mut self, plan: &LayerPlan, weights: &DeviceWeights, place: usize, expert: u32) -> Result<()> {
        // Nobody is there until the copy is complete: an error on the way leaves no half of an expert behind.
        self.places[place].expert = None;
        for (name, experts) in ROUTED.iter().zip(&self.host.0) {
            let (Some(matrix), Some(bytes)) = (plan.matrix(name), experts.get(expert as usize)) else {
                return Err(Error::Device {
                    during: "bringing experts in".to_owned(),
                    message: format!("{name} of expert {expert} is not on the host"),
                });
            };
            let holds = |first: u32, end: u32| (first..end).contains(&(place as u32));
            for (index, page) in matrix.pages.iter().enumerate() {
                let Some(buffer) = weights.find(name, index).filter(|_| holds(page.first_expert, page.end_expert))
                else {
                    continue;
                };
                let from = page.first_column as usize / 4 * matrix.quad_bytes();
                let at = u64::from(place as u32 - page.first_expert) * page.expert_bytes();
                let part = bytes.get(from..from + page.expert_bytes() as usize).unwrap_or_default();
                self.uploader.bytes(buffer, at, part).await?;
                self.stats.uploaded_bytes += part.len() as u64;
            }
        }
        self.places[place].expert = Some(expert);
        self.places[place].used = self.now;
        Ok(())
    }

    /// Places whose experts may leave, the least recently used first.
    fn evictable(&self) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.places.len()).filter(|&place| !self.places[place].pinned).collect();
        places.sort_by_key(|&place| (self.places[place].expert.is_some(), self.places[place].used, place));
        places
    }
}

impl GpuLayer {
    /// What bringing experts in has cost; `None`: all are on the device.
    pub(crate) async fn residency(&self) -> Option<ResidencyStats> {
        match &self.residency {
            Some(residency) => Some(residency.lock().await.stats),
            None => None,
        }
    }

    /// Records a prepared and bound pass; where experts have to be brought in, submits all but its last part. The
    /// encoder that is returned completes it. `choices` can hold the choices of the pass on the host.
    pub(super) async fn run_pass(
        &self,
        state: &State,
        mut encoder: wgpu::CommandEncoder,
        key: PassKey,
        choices: Option<&wgpu::Buffer>,
    ) -> Result<(wgpu::CommandEncoder, u32)> {
        let (Some(residency), Some(choices)) = (&self.residency, choices) else {
            let dispatches = self.record_pass(state, &mut encoder, (key, 0), None)?;
            return Ok((encoder, dispatches));
        };
        let mut residency = residency.lock().await;
        let Some(pass) = state.passes.get(&key) else { return Err(unprepared(key.0)) };
        let index = |name| pass.plan.dispatches.iter().position(|dispatch| dispatch.name == name);
        let last = pass.plan.dispatches.iter().rposition(|dispatch| dispatch.name == "down");
        let (Some(first), Some(last)) = (index("gate_up"), last) else { return Err(unprepared(key.0)) };
        let experts = first..last + 1;

        let mut dispatches = self.record_part(state, &mut encoder, (key, 0), 0..experts.start, None)?;
        let needed = self.read_choices(state, encoder, key, choices).await?;
        residency.stats.passes += 1;
        let (here, missing): (Vec<u32>, Vec<u32>) =
            needed.into_iter().partition(|&expert| residency.place_of(expert).is_some());
        residency.stats.hits += here.len() as u64;
        residency.stats.misses += missing.len() as u64;
        let mut rounds = vec![here];
        // Half of the places at a time: while one half computes, the other is filled.
        let most = residency.evictable().len().div_ceil(2).max(1);
        rounds.extend(missing.chunks(most).map(<[u32]>::to_vec));
        for round in rounds.into_iter().filter(|round| !round.is_empty()) {
            dispatches += self.round(state, key, experts.clone(), &mut residency, &round).await?;
        }
        let mut encoder = self.encoder();
        dispatches += self.record_part(state, &mut encoder, (key, 0), experts.end..usize::MAX, None)?;
        Ok((encoder, dispatches))
    }

    /// Submits `encoder`; the experts that tokens of its pass chose, ascending.
    async fn read_choices(
        &self,
        state: &State,
        mut encoder: wgpu::CommandEncoder,
        key: PassKey,
        choices: &wgpu::Buffer,
    ) -> Result<Vec<u32>> {
        let c = self.plan.config();
        let bytes = u64::from(key.0) * u64::from(c.top_k()) * 4;
        let Some(experts) = state.scratch.get(final_experts(c, key.1)) else { return Err(unprepared(key.0)) };
        encoder.copy_buffer_to_buffer(experts, 0, choices, 0, bytes);
        self.submit(encoder).await?;
        let mapped = self.gpu.map(choices, wgpu::MapMode::Read).await?;
        self.gpu.wait(&mapped, "reading the router's choices").await?;
        let mut chosen = vec![false; c.num_weighted_experts() as usize];
        read_mapped(choices, |mapped| {
            for word in mapped[..bytes as usize].as_chunks::<4>().0 {
                // Dropped assignments and experts without weights need nothing.
                if let Some(chosen) = chosen.get_mut(u32::from_le_bytes(*word) as usize) {
                    *chosen = true;
                }
            }
        })?;
        Ok((0..).zip(chosen).filter(|&(_, chosen)| chosen).map(|(expert, _)| expert).collect())
    }

    /// Brings the experts of a round in, as far as they are not there, and submits their products.
    async fn round(
        &self,
        state: &State,
        key: PassKey,
        part: std::ops::Range<usize>,
        residency: &mut Residency,
        round: &[u32],
    ) -> Result<u32> {
        residency.now += 1;
        residency.stats.rounds += 1;
        let mut free = residency.evictable().into_iter();
        let mut table = vec![DROPPED; self.plan.config().num_experts() as usize];
        for &expert in round {
            let place = match residency.place_of(expert) {
                Some(place) => place,
                None => {
                    let Some(place) = free.next() else { return Err(unprepared(key.0)) };
                    residency.bring_in(&self.plan, &self.weights, place, expert).await?;
                    place
                }
            };
            residency.places[place].used = residency.now;
            table[expert as usize] = place as u32;
        }
        let Some(places) = self.weights.find("place_of_expert", 0) else { return Err(unprepared(key.0)) };
        self.gpu
            .scoped("uploading places", |_| {
                // In order with what is submitted before and after.
                self.gpu.queue().write_buffer(places, 0, bytemuck::cast_slice(&table));
            })
            .await?;
        let mut encoder = self.encoder();
        let dispatches = self.record_part(state, &mut encoder, (key, 0), part, None)?;
        self.submit(encoder).await?;
        Ok(dispatches)
    }
}
