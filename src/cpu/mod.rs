//! The embedded CPU engine: the same layer on the host's cores, for machines without a GPU.
//!
//! One function per stage, in the order of the pass; rayon spreads each stage over the threads of the current pool.
//! Shapes are row-major unless a type says otherwise (`panels`, `chunks`).
//!
//! **Bits.** Every element of every product is one chain of multiply-adds over ascending `k`, in one accumulator (where
//! weights are codes times a factor: a chain of such chains, each times its factor), whatever the number of rows beside
//! it (`kernel`). So the same input gives the same bits, on any number of
//! threads, and a token alone gives the bits it gives inside a batch. Processors with and without fused
//! multiply-add may differ from each other. Where a layer makes tokens compete (capacity, expert choice) or noise goes
//! by a token's place, only the first of these holds.
//!
//! This folder is the only one that may hold `unsafe`, each use with its reason.

mod activate;
mod capacity;
mod chunks;
mod combine;
mod decode;
#[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for instructions that others do not have"))]
mod digits;
mod edit;
mod experts;
mod kernel;
mod load;
mod norm;
mod panel;
mod panels;
mod permute;
mod roofline;
mod router;
mod shared;
mod statistics;
mod widen;
mod words;

pub(crate) use load::weight_bytes;
pub use roofline::{Roofline, roofline};
pub(crate) use roofline::{dense_matmul, fold, rows_times_rows};
pub use statistics::statistics;

use crate::error::{Error, Result};
use crate::model::batch::{Batch, Front};
use crate::model::config::MoeConfig;
use crate::model::formats::LayerFormats;
use crate::model::noise;
use crate::model::routing::{DROPPED, Noise, NonFinite, RoutingDecision};
use bytemuck::Zeroable;
use chunks::{Chunk, chunks};
use combine::Finish;
use digits::Digits;
use experts::Experts;
use kernel::Input;
use norm::RmsNorm;
use panels::Panels;
use permute::pack;
use rayon::prelude::*;
use router::{Logits, Router};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A layer whose weights are packed for this processor. Threads may share it; each forward pass borrows its own
/// scratch memory from a pool inside.
#[derive(Debug)]
pub struct CpuLayer {
    config: MoeConfig,
    formats: LayerFormats,
    simd: pulp::Arch,
    router: Router,
    experts: Experts,
    shared: Option<Experts>,
    /// `[expert_size, hidden_size]`, f32
    latent_in: Option<Panels>,
    /// `[hidden_size, expert_size]`, f32
    latent_out: Option<Panels>,
    router_norm: Option<RmsNorm>,
    expert_norm: Option<RmsNorm>,
    expert_out_norm: Option<RmsNorm>,
    routed_norm: Option<RmsNorm>,
    output_norm: Option<RmsNorm>,
    output_bias: Option<Vec<f32>>,
    non_finite: NonFinite,
    scratch: Mutex<Vec<Scratch>>,
}

/// Memory of one forward pass, kept for the next. A plain layer leaves the second half empty.
#[derive(Debug, Default)]
struct Scratch {
    /// Tokens or gathered rows, packed: `[num_rows, hidden_size or expert_size]`
    packed: Vec<f32>,
    /// Either of both rows as whole numbers, where their matrices are multiplied with these.
    digits: Vec<Digits>,
    /// Packed: `[num_rows, intermediate_size]`
    intermediate: Vec<f32>,
    /// `[num_rows, expert_size]`
    expert_out: Vec<f32>,

    /// What the router sees, where that is not x: `[num_tokens, hidden_size]`
    seen: Vec<f32>,
    /// What the shared experts add: `[num_tokens, hidden_size]`
    shared: Vec<f32>,
    /// What the experts read, where that is not x: `[num_tokens, expert_size]`
    expert_in: Vec<f32>,
    /// Before the projection out of the latent space: `[num_tokens, expert_size]`
    combined: Vec<f32>,
}

/// The time of each stage, in order. Stages that a layer does not have are not there.
pub type StageTimes = Vec<(&'static str, Duration)>;

/// Measures stages that follow each other.
struct Clock {
    last: Instant,
    times: StageTimes,
}

impl Clock {
    fn start() -> Self {
        Self { last: Instant::now(), times: Vec::with_capacity(5) }
    }

    fn lap(&mut self, stage: &'static str) {
        let now = Instant::now();
        self.times.push((stage, now - self.last));
        self.last = now;
    }
}

impl CpuLayer {
    /// Sizes and semantics.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// How the expert weights are stored.
    pub fn formats(&self) -> LayerFormats {
        self.formats
    }

    /// Bytes of the experts' matrices, shared ones included, as they are stored.
    pub fn weight_bytes(&self) -> u64 {
        self.experts.bytes() + self.shared.as_ref().map_or(0, Experts::bytes)
    }

    /// What becomes of tokens that the router cannot make anything of.
    pub fn set_non_finite(&mut self, non_finite: NonFinite) {
        self.non_finite = non_finite;
    }

    /// The layer: `x [num_tokens, hidden_size]` to `y [num_tokens, hidden_size]`; `num_tokens` follows from the
    /// length and may be 0. Every element of `y` is written, or none on an error.
    ///
    /// It runs on rayon's threads. Called from one of them (inside [`rayon::scope`], say) it saves the way there and back,
    /// some microseconds, which few tokens feel.
    ///
    /// Errors: lengths that do not fit; unless [`CpuLayer::set_non_finite`] says otherwise, NaN or infinity in `x` and
    /// router logits that are not numbers.
    pub fn forward_into(&self, x: &[f32], y: &mut [f32]) -> Result<RoutingDecision> {
        self.forward_batch(&Batch::from(x), y)
    }

    /// The same for any input. The caller's own assignments leave no logits in the decision.
    ///
    /// Errors: also what [`Batch::check`] finds.
    pub fn forward_batch(&self, batch: &Batch<'_>, y: &mut [f32]) -> Result<RoutingDecision> {
        Ok(self.forward_profiled(batch, y)?.0)
    }

    /// The same, with the time of each stage: router, permute, gate_up, down, combine, and in between what else the
    /// layer has.
    pub fn forward_profiled(&self, batch: &Batch<'_>, y: &mut [f32]) -> Result<(RoutingDecision, StageTimes)> {
        let num_tokens = self.check_input(batch, y)?;
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        // Entering the pool once keeps its threads awake between the stages.
        let result = rayon::scope(|_| self.forward(num_tokens, batch, y, &mut scratch));
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
        result
    }

    fn forward(
        &self,
        num_tokens: usize,
        batch: &Batch<'_>,
        y: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(RoutingDecision, StageTimes)> {
        let config = &self.config;
        let [h, i, d, top_k] = [config.hidden_size(), config.intermediate_size(), config.expert_size(), config.top_k()]
            .map(|n| n as usize);
        let tokens = chunks(&[0, num_tokens]);
        let mut clock = Clock::start();

        let (decision, mut packed_is_x) = self.route(num_tokens, &tokens, batch, scratch)?;
        clock.lap("router");

        let needs_x = self.shared.is_some() || self.latent_in.is_some();
        let num_weighted = config.num_weighted_experts() as usize;
        let num_rows: usize = decision.tokens_per_expert[..num_weighted].iter().map(|&n| n as usize).sum();
        // All the memory before anything is written to y.
        let packed = reserve(&mut scratch.packed, (num_rows * d).max(if needs_x { num_tokens * h } else { 0 }))?;
        let inner = self.shared.as_ref().map_or(0, |shared| shared.intermediate_size);
        let intermediate = reserve(&mut scratch.intermediate, (num_rows * i).max(num_tokens * inner))?;
        let of_shared = self.shared.as_ref().map_or(0, |shared| shared.digits_for(self.simd, num_tokens));
        let digits = reserve(&mut scratch.digits, self.experts.digits_for(self.simd, num_rows).max(of_shared))?;
        let shared_out = if self.shared.is_some() { num_tokens * h } else { 0 };
        let expert_out = reserve(&mut scratch.expert_out, (num_rows * d).max(shared_out))?;
        let shared = reserve(&mut scratch.shared, shared_out)?;
        let reads_x = self.latent_in.is_none() && self.expert_norm.is_none();
        let expert_in = reserve(&mut scratch.expert_in, if reads_x { 0 } else { num_tokens * d })?;
        let combined = reserve(&mut scratch.combined, if self.latent_out.is_some() { num_tokens * d } else { 0 })?;

        if needs_x && !packed_is_x {
            pack(&tokens, &mut packed[..num_tokens * h], |t| &batch.x[t * h..][..h]);
            packed_is_x = true;
        }
        if let Some(experts) = &self.shared {
            debug_assert!(packed_is_x);
            let x = &packed[..num_tokens * h];
            self.add_shared(experts, &tokens, x, &decision, digits, intermediate, expert_out, shared);
            clock.lap("shared");
        }
        if let Some(projection) = &self.latent_in {
            self.project(projection, &tokens, Input::floats(&packed[..num_tokens * h]), expert_in);
            clock.lap("latent_in");
        }
        if let Some(norm) = &self.expert_norm {
            if self.latent_in.is_none() {
                expert_in.copy_from_slice(batch.x);
            }
            norm.apply_rows(self.simd, expert_in);
            clock.lap("expert_norm");
        }
        let expert_in = if reads_x { batch.x } else { &*expert_in };

        let rows = permute::permute(&decision, num_weighted);
        let experts = chunks(&rows.expert_offsets);
        let packed_rows = &mut packed[..num_rows * d];
        pack(&experts, packed_rows, |row| &expert_in[rows.assignment_of_row[row] / top_k * d..][..d]);
        clock.lap("permute");

        let factors = config
            .routing()
            .weigh_input
            .then(|| rows.assignment_of_row.iter().map(|&a| decision.topk_weights[a]).collect::<Vec<f32>>());
        let intermediate = &mut intermediate[..num_rows * i];
        let input = Input::new(self.simd, &self.experts.first, &experts, packed_rows, digits);
        experts::gate_up(self.simd, &self.experts, &experts, input, factors.as_deref(), intermediate);
        clock.lap("gate_up");

        let expert_out = &mut expert_out[..num_rows * d];
        let input = Input::new(self.simd, &self.experts.down, &experts, intermediate, digits);
        self.project(&self.experts.down, &experts, input, expert_out);
        clock.lap("down");

        if let Some(norm) = &self.expert_out_norm {
            norm.apply_rows(self.simd, expert_out);
            clock.lap("expert_out_norm");
        }
        let finish = Finish {
            simd: self.simd,
            routed_norm: self.routed_norm.as_ref(),
            routed_scale: config.extras().routed_scale,
            shared: self.shared.is_some().then_some(&*shared),
            average: config.extras().shared.is_some_and(|shared| shared.average),
            bias: self.output_bias.as_deref(),
            output_norm: self.output_norm.as_ref(),
        };
        let between = [&*expert_out, expert_in];
        match &self.latent_out {
            None => {
                combine::combine(self.simd, config, &decision, &rows, between, y, |t, y| finish.apply(t, y));
                clock.lap("combine");
            }
            Some(projection) => {
                combine::combine(self.simd, config, &decision, &rows, between, combined, |_, _| {});
                clock.lap("combine");
                let packed = reserve(&mut scratch.packed, num_tokens * d)?;
                pack(&tokens, packed, |t| &combined[t * d..][..d]);
                self.project(projection, &tokens, Input::floats(packed), y);
                y.par_chunks_exact_mut(h).enumerate().for_each(|(t, y)| finish.apply(t, y));
                clock.lap("latent_out");
            }
        }
        if let Some(value) = self.non_finite.row_value() {
            decision.non_finite_tokens.iter().for_each(|&t| y[t as usize * h..][..h].fill(value));
        }
        Ok((decision, clock.times))
    }

    /// Stage 1, with capacity. Also whether `scratch.packed` now holds x.
    fn route(
        &self,
        num_tokens: usize,
        tokens: &[Chunk],
        batch: &Batch<'_>,
        scratch: &mut Scratch,
    ) -> Result<(RoutingDecision, bool)> {
        let h = self.config.hidden_size() as usize;
        let own = matches!(batch.front, Front::Router);
        let mut logits = Logits { are_final: !own, ..Logits::default() };
        let mut packed_is_x = false;
        if own || self.config.num_gated_shared() > 0 {
            let seen = self.router_input(batch, &mut scratch.seen)?;
            packed_is_x = seen.is_none();
            let seen = seen.unwrap_or(batch.x);
            let packed = reserve(&mut scratch.packed, num_tokens * h)?;
            pack(tokens, packed, |t| &seen[t * h..][..h]);
            let times = |matrix: &Panels| {
                let mut out = vec![0.0; num_tokens * matrix.columns];
                self.project(matrix, tokens, Input::floats(packed), &mut out);
                out
            };
            if own {
                logits.experts = times(&self.router.logits);
                logits.noise = self.router.noise.as_ref().filter(|_| batch.seed.is_some()).map_or(Vec::new(), times);
            }
            logits.gates = self.router.gates.as_ref().map_or(Vec::new(), times);
        }
        let mut decision = match batch.front {
            Front::Assignments { experts, weights } => {
                router::assigned(&self.config, &logits.gates, num_tokens, experts, weights, self.non_finite)?
            }
            Front::Router | Front::Logits(_) => {
                if let Front::Logits(given) = batch.front {
                    logits.experts = given.to_vec();
                }
                let (mut decision, ranks) = router::route(&self.config, &self.router, logits, batch, self.non_finite)?;
                let nobodys =
                    |decision: &RoutingDecision| decision.topk_experts.iter().filter(|&&e| e == DROPPED).count();
                let before = nobodys(&decision);
                capacity::capacity(&self.config, batch, &ranks, &mut decision);
                decision.over_capacity = (nobodys(&decision) - before) as u32;
                decision
            }
        };
        router::count(&self.config, &mut decision);
        Ok((decision, packed_is_x))
    }

    /// What the router sees, if that is not x itself: its norm, jittered.
    fn router_input<'a>(&self, batch: &Batch<'_>, seen: &'a mut Vec<f32>) -> Result<Option<&'a [f32]>> {
        let jitter = match (self.config.routing().noise, batch.seed) {
            (Noise::Jitter { epsilon }, Some(seed)) => Some((f64::from(epsilon), noise::key(seed))),
            _ => None,
        };
        if self.router_norm.is_none() && jitter.is_none() {
            return Ok(None);
        }
        let seen = reserve(seen, batch.x.len())?;
        seen.copy_from_slice(batch.x);
        seen.par_chunks_exact_mut(self.config.hidden_size() as usize).enumerate().for_each(|(t, row)| {
            if let Some(norm) = &self.router_norm {
                norm.apply(self.simd, row);
            }
            if let Some((epsilon, key)) = jitter {
                for (at, v) in (0..).zip(row) {
                    let uniform = f64::from(noise::uniform(key, t as u32, at));
                    *v = (f64::from(*v) * (1.0 + epsilon * (2.0 * uniform - 1.0))) as f32;
                }
            }
        });
        Ok(Some(seen))
    }

    /// `shared[t, :] = sum over s of weight[t, s] * shared expert s of x[t, :]`; `x` is packed.
    #[expect(clippy::too_many_arguments, reason = "scratch memory")]
    fn add_shared(
        &self,
        experts: &Experts,
        tokens: &[Chunk],
        x: &[f32],
        decision: &RoutingDecision,
        digits: &mut [Digits],
        intermediate: &mut [f32],
        out: &mut [f32],
        shared: &mut [f32],
    ) {
        let num = self.config.extras().shared.map_or(0, |shared| shared.num as usize);
        let intermediate = &mut intermediate[..decision.num_tokens * experts.intermediate_size];
        let out = &mut out[..shared.len()];
        let gated = !decision.shared_weights.is_empty();
        for s in 0..num {
            let chunks: Vec<Chunk> = tokens.iter().map(|chunk| Chunk { expert: s, ..chunk.clone() }).collect();
            let input = Input::new(self.simd, &experts.first, &chunks, x, digits);
            experts::gate_up(self.simd, experts, &chunks, input, None, intermediate);
            let input = Input::new(self.simd, &experts.down, &chunks, intermediate, digits);
            if num == 1 && !gated {
                return self.project(&experts.down, &chunks, input, shared);
            }
            self.project(&experts.down, &chunks, input, out);
            let weight = |t| if gated { decision.shared_weights[t * num + s] } else { 1.0 };
            let width = self.config.hidden_size() as usize;
            combine::add_weighted(self.simd, width, shared, out, s == 0, weight);
        }
    }

    fn project(&self, weights: &Panels, chunks: &[Chunk], input: Input<'_>, out: &mut [f32]) {
        experts::project(self.simd, weights, chunks, input, out);
    }

    /// `num_tokens` of a pass.
    fn check_input(&self, batch: &Batch<'_>, y: &[f32]) -> Result<usize> {
        let num_tokens = batch.check_for(&self.config, self.non_finite)?;
        if y.len() != batch.x.len() {
            let shape = format!("[{num_tokens}, {}]", self.config.hidden_size());
            return Err(Error::LengthMismatch { tensor: "y", shape, expected: batch.x.len(), found: y.len() });
        }
        let assignments = u64::from(num_tokens) * u64::from(self.config.top_k());
        if assignments > u64::from(u32::MAX) {
            return Err(Error::LimitExceeded {
                what: "one pass, in assignments of tokens to experts,".to_owned(),
                required: assignments,
                available: u64::from(u32::MAX),
                hint: "split the tokens over several passes",
            });
        }
        Ok(num_tokens as usize)
    }
}

/// The first `len` elements of `buffer`, which grows if it must. What they hold is left over from earlier.
fn reserve<T: Copy + Zeroable>(buffer: &mut Vec<T>, len: usize) -> Result<&mut [T]> {
    if buffer.len() < len {
        let bytes = len.saturating_mul(size_of::<T>());
        let out_of_memory = |_| Error::OutOfMemory { during: format!("reserving {bytes} bytes of scratch memory") };
        buffer.try_reserve_exact(len - buffer.len()).map_err(out_of_memory)?;
        buffer.resize(len, T::zeroed());
    }
    Ok(&mut buffer[..len])
}

#[cfg(test)]
mod tests;
