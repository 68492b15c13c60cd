//! The embedded CPU engine: the same layer on the host's cores, for machines without a GPU.
//!
//! One function per stage, in the order of the pass; rayon spreads each stage over the threads of the current pool.
//! Shapes are row-major unless a type says otherwise (`panels`, `chunks`).
//!
//! **Bits.** Every element of every product is one chain of multiply-adds over ascending `k`, in one accumulator,
//! whatever the number of rows beside it (`kernel`). So the same input gives the same bits, on any number of
//! threads, and a token alone gives the bits it gives inside a batch. Processors with and without fused
//! multiply-add may differ from each other.
//!
//! This folder is the only one that may hold `unsafe`, each use with its reason.

mod chunks;
mod combine;
mod experts;
mod kernel;
mod panels;
mod permute;
mod roofline;
mod router;
mod shared;

pub(crate) use roofline::dense_matmul;
pub use roofline::{Roofline, roofline};

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::routing::RoutingDecision;
use crate::model::weights::{MoeWeights, WeightFormat, check_finite};
use chunks::Chunk;
use panels::Panels;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A layer whose weights are packed for this processor. Threads may share it; each forward pass borrows its own
/// scratch memory from a pool inside.
#[derive(Debug)]
pub struct CpuLayer {
    config: MoeConfig,
    format: WeightFormat,
    simd: pulp::Arch,
    /// `[num_experts, hidden_size]` as one matrix.
    router: Panels,
    router_bias: Option<Vec<f32>>,
    /// Gate and up columns side by side, see [`experts::pack_gate_up`].
    gate_up: Panels,
    /// `[num_experts]` matrices `[hidden_size, intermediate_size]`.
    down: Panels,
    scratch: Mutex<Vec<Scratch>>,
}

/// Memory of one forward pass, kept for the next.
#[derive(Debug, Default)]
struct Scratch {
    /// Tokens or gathered rows, packed: `[num_rows, hidden_size]`
    x: Vec<f32>,
    /// Packed: `[num_rows, intermediate_size]`
    intermediate: Vec<f32>,
    /// `[num_rows, hidden_size]`
    expert_out: Vec<f32>,
}

impl CpuLayer {
    /// Packs `weights` for this processor. `format` is how expert weights are stored; sums are f32 in any case.
    ///
    /// Errors: wrong lengths, NaN or infinite weights, weights that `format` cannot hold, memory that cannot be had.
    pub fn new(config: MoeConfig, weights: &MoeWeights, format: WeightFormat) -> Result<Self> {
        weights.validate(&config, format)?;
        let [h, i, e] = [config.hidden_size(), config.intermediate_size(), config.num_experts()].map(|n| n as usize);
        let router = Panels::pack(WeightFormat::F32, 1, [e, h], |_, n| Some(&weights.router[n * h..][..h]))?;
        let gate_up = experts::pack_gate_up(&config, &weights.gate_proj, &weights.up_proj, format)?;
        let down = Panels::pack(format, e, [h, i], |e, n| Some(&weights.down_proj[(e * h + n) * i..][..i]))?;
        let (router_bias, scratch) = (weights.router_bias.clone(), Mutex::default());
        Ok(Self { config, format, simd: pulp::Arch::new(), router, router_bias, gate_up, down, scratch })
    }

    /// Sizes and semantics.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// How the expert weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// SHIM
    pub fn forward_batch(&self, batch: &crate::Batch<'_>, y: &mut [f32]) -> Result<RoutingDecision> {
        self.forward_into(batch.x, y)
    }

    /// The layer: `x [num_tokens, hidden_size]` to `y [num_tokens, hidden_size]`; `num_tokens` follows from the
    /// length and may be 0. Every element of `y` is written, or none on an error.
    ///
    /// Errors: lengths that do not fit, NaN or infinity in `x`, router logits that are not numbers.
    pub fn forward_into(&self, x: &[f32], y: &mut [f32]) -> Result<RoutingDecision> {
        Ok(self.forward_profiled(x, y)?.0)
    }

    /// The same, with the time of each stage: router, permute, gate_up, down, combine.
    pub fn forward_profiled(&self, x: &[f32], y: &mut [f32]) -> Result<(RoutingDecision, [Duration; 5])> {
        let num_tokens = self.check_lengths(x, y)?;
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        // Entering the pool once keeps its threads awake between the stages.
        let result = rayon::scope(|_| self.forward(num_tokens, x, y, &mut scratch));
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner).push(scratch);
        result
    }

    fn forward(
        &self,
        num_tokens: usize,
        x: &[f32],
        y: &mut [f32],
        scratch: &mut Scratch,
    ) -> Result<(RoutingDecision, [Duration; 5])> {
        let Scratch { x: packed_x, intermediate, expert_out } = scratch;
        let [h, i, top_k] =
            [self.config.hidden_size(), self.config.intermediate_size(), self.config.top_k()].map(|n| n as usize);
        let num_rows = num_tokens * top_k;
        let packed_x = reserve(packed_x, num_rows * h)?;
        let intermediate = reserve(intermediate, num_rows * i)?;
        let expert_out = reserve(expert_out, num_rows * h)?;
        let start = Instant::now();

        check_finite("x", x)?;
        let tokens = chunks::chunks(&[0, num_tokens]);
        let packed_tokens = &mut packed_x[..num_tokens * h];
        permute::pack(&tokens, packed_tokens, |t| &x[t * h..][..h]);
        let mut router_logits = vec![0.0; num_tokens * self.config.num_experts() as usize];
        self.project(&self.router, &tokens, packed_tokens, &mut router_logits);
        let decision = router::route(&self.config, router_logits, self.router_bias.as_deref())?;
        let routed = Instant::now();

        let rows = permute::permute(&decision);
        let experts = chunks::chunks(&rows.expert_offsets);
        permute::pack(&experts, packed_x, |row| &x[rows.assignment_of_row[row] / top_k * h..][..h]);
        let permuted = Instant::now();

        experts::gate_up(self.simd, self.config.activation(), &self.gate_up, &experts, packed_x, intermediate, i);
        let activated = Instant::now();

        self.project(&self.down, &experts, intermediate, expert_out);
        let projected = Instant::now();

        combine::combine(self.simd, &decision, &rows, expert_out, y);
        let times =
            [routed - start, permuted - routed, activated - permuted, projected - activated, projected.elapsed()];
        Ok((decision, times))
    }

    fn project(&self, weights: &Panels, chunks: &[Chunk], x: &[f32], out: &mut [f32]) {
        experts::project(self.simd, weights, chunks, x, out);
    }

    /// `num_tokens` of a pass.
    fn check_lengths(&self, x: &[f32], y: &[f32]) -> Result<usize> {
        let h = self.config.hidden_size() as usize;
        let num_tokens = x.len() / h;
        let check = |tensor, found, expected| {
            let shape = format!("[{num_tokens}, {h}]");
            if found == expected { Ok(()) } else { Err(Error::LengthMismatch { tensor, shape, expected, found }) }
        };
        check("x", x.len(), num_tokens * h)?;
        check("y", y.len(), x.len())?;
        let assignments = num_tokens as u64 * u64::from(self.config.top_k());
        if assignments > u64::from(u32::MAX) {
            return Err(Error::LimitExceeded {
                what: "one pass, in assignments of tokens to experts,".to_owned(),
                required: assignments,
                available: u64::from(u32::MAX),
                hint: "split the tokens over several passes",
            });
        }
        Ok(num_tokens)
    }
}

/// The first `len` elements of `buffer`, which grows if it must. What they hold is left over from earlier.
fn reserve(buffer: &mut Vec<f32>, len: usize) -> Result<&mut [f32]> {
    if buffer.len() < len {
        let out_of_memory = |_| Error::OutOfMemory { during: format!("reserving {len} floats of scratch memory") };
        buffer.try_reserve_exact(len - buffer.len()).map_err(out_of_memory)?;
        buffer.resize(len, 0.0);
    }
    Ok(&mut buffer[..len])
}

/// SHIM
pub(crate) fn statistics(_: &MoeConfig, _: &RoutingDecision, _: usize) -> Result<crate::Statistics> {
    Ok(crate::Statistics::default())
}
