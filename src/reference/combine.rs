//! Stage 5: each token's expert outputs, weighted and summed. Twin of `shaders/combine.wgsl`.

use super::permute::Permutation;
use super::router::Router;
use crate::model::config::{MoeConfig, SpecialKind};
use crate::model::routing::DROPPED;

/// `routed[t, :] = sum over j < top_k of topk_weights[t, j] * expert_out[row_of_assignment[t, j], :]`
/// Assignments without a row: an identity expert gives `expert_in[t, :]`; so does a dropped one if the layer passes
/// tokens through; otherwise zero. Where weights were applied to the input, they are 1 here.
/// `expert_out [num_rows, expert_size]`, `expert_in [num_tokens, expert_size]`; result `[num_tokens, expert_size]`.
pub fn combine(
    config: &MoeConfig,
    expert_out: &[f64],
    expert_in: &[f64],
    router: &Router,
    rows: &Permutation,
) -> Vec<f64> {
    let [d, top_k] = [config.expert_size(), config.top_k()].map(|n| n as usize);
    let pass_through = config.routing().capacity.is_some_and(|capacity| capacity.pass_through);
    let mut routed = vec![0.0; router.topk_weights.len() / top_k * d];
    for (t, sums) in routed.chunks_exact_mut(d).enumerate() {
        for a in t * top_k..(t + 1) * top_k {
            let expert = router.topk_experts[a];
            let special = expert < config.num_experts() && expert >= config.num_weighted_experts();
            let contribution = match rows.row_of_assignment[a] {
                DROPPED if special && config.extras().special_kind == SpecialKind::Identity => &expert_in[t * d..][..d],
                DROPPED if !special && pass_through => &expert_in[t * d..][..d],
                DROPPED => continue,
                row => &expert_out[row as usize * d..][..d],
            };
            let weight = if config.routing().weigh_input { 1.0 } else { router.topk_weights[a] };
            for (sum, value) in sums.iter_mut().zip(contribution) {
                *sum += weight * value;
            }
        }
    }
    routed
}
