//! Stage 5: each token's expert outputs, weighted and summed in the order of its choices.

use super::permute::Rows;
use crate::model::routing::RoutingDecision;
use pulp::Arch;
use rayon::prelude::*;

/// `y[t, :] = sum over j < top_k of topk_weights[t, j] * expert_out[row_of_assignment[t, j], :]`
/// `expert_out [num_rows, hidden_size]`, `y [num_tokens, hidden_size]`.
pub(super) fn combine(simd: Arch, decision: &RoutingDecision, rows: &Rows, expert_out: &[f32], y: &mut [f32]) {
    let Some(h) = y.len().checked_div(decision.num_tokens) else { return };
    let top_k = decision.topk_weights.len() / decision.num_tokens;
    y.par_chunks_exact_mut(h).enumerate().for_each(|(t, y)| {
        simd.dispatch(|| {
            y.fill(0.0);
            for a in t * top_k..(t + 1) * top_k {
                let weight = decision.topk_weights[a];
                let row = &expert_out[rows.row_of_assignment[a] * h..][..h];
                for (sum, value) in y.iter_mut().zip(row) {
                    *sum += weight * value;
                }
            }
        });
    });
}
