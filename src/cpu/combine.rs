//! Stage 5: each token's expert outputs, weighted and summed in the order of its choices; and what comes after the sum.

use super::norm::RmsNorm;
use super::permute::{NO_ROW, Rows};
use crate::model::config::{MoeConfig, SpecialKind};
use crate::model::routing::RoutingDecision;
use pulp::Arch;
use rayon::prelude::*;

/// `routed[t, :] = sum over j < top_k of topk_weights[t, j] * expert_out[row_of_assignment[t, j], :]`, and `expert_in`
/// instead of `expert_out` where an assignment without a row passes its token on. Then `finish(t, row)`.
/// `expert_out [num_rows, expert_size]`, `expert_in` and `routed [num_tokens, expert_size]`.
pub(super) fn combine(
    simd: Arch,
    config: &MoeConfig,
    decision: &RoutingDecision,
    rows: &Rows,
    [expert_out, expert_in]: [&[f32]; 2],
    routed: &mut [f32],
    finish: impl Fn(usize, &mut [f32]) + Sync,
) {
    let [d, top_k] = [config.expert_size(), config.top_k()].map(|n| n as usize);
    let weigh_input = config.routing().weigh_input;
    let pass_through = config.routing().capacity.is_some_and(|capacity| capacity.pass_through);
    let special_passes = config.extras().special_kind == SpecialKind::Identity;
    let passes = |a: usize| {
        // Without a row it is either an expert without weights or dropped.
        let special = decision.topk_experts[a] < config.num_experts();
        if special { special_passes } else { pass_through }
    };
    routed.par_chunks_exact_mut(d).enumerate().for_each(|(t, sums)| {
        simd.dispatch(|| {
            sums.fill(0.0);
            for a in t * top_k..(t + 1) * top_k {
                let weight = if weigh_input { 1.0 } else { decision.topk_weights[a] };
                let values = match rows.row_of_assignment[a] {
                    NO_ROW if passes(a) => &expert_in[t * d..][..d],
                    NO_ROW => continue,
                    row => &expert_out[row * d..][..d],
                };
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum += weight * value;
                }
            }
        });
        finish(t, sums);
    });
}

/// `sum[t, :] = sum[t, :] + weight(t) * out[t, :]`, both `[num_tokens, width]`; the first one does not look at `sum`.
pub(super) fn add_weighted(
    simd: Arch,
    width: usize,
    sum: &mut [f32],
    out: &[f32],
    is_first: bool,
    weight: impl Fn(usize) -> f32 + Sync,
) {
    sum.par_chunks_exact_mut(width).zip(out.par_chunks_exact(width)).enumerate().for_each(|(t, (sum, out))| {
        let weight = weight(t);
        simd.dispatch(|| {
            for (sum, out) in sum.iter_mut().zip(out) {
                *sum = if is_first { weight * out } else { *sum + weight * out };
            }
        });
    });
}

/// From the routed experts' sum to the layer's output; what a layer does not have costs nothing.
pub(super) struct Finish<'a> {
    pub simd: Arch,
    pub routed_norm: Option<&'a RmsNorm>,
    pub routed_scale: f32,
    /// What the shared experts add: `[num_tokens, hidden_size]`
    pub shared: Option<&'a [f32]>,
    /// The mean of both instead of their sum.
    pub average: bool,
    /// `[hidden_size]`
    pub bias: Option<&'a [f32]>,
    pub output_norm: Option<&'a RmsNorm>,
}

impl Finish<'_> {
    /// `y` comes in as the routed experts' sum for token t.
    pub fn apply(&self, t: usize, y: &mut [f32]) {
        if let Some(norm) = self.routed_norm {
            norm.apply(self.simd, y);
        }
        let half = if self.average { 0.5 } else { 1.0 };
        self.simd.dispatch(|| {
            if self.routed_scale != 1.0 {
                y.iter_mut().for_each(|y| *y *= self.routed_scale);
            }
            if let Some(shared) = self.shared {
                let shared = &shared[t * y.len()..][..y.len()];
                y.iter_mut().zip(shared).for_each(|(y, shared)| *y = half * (*y + shared));
            }
            if let Some(bias) = self.bias {
                y.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        });
        if let Some(norm) = self.output_norm {
            norm.apply(self.simd, y);
        }
    }
}
