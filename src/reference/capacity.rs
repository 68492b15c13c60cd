//! Between router and permute, in layers that have it: assignments beyond an expert's capacity are dropped.
//! Twin of `shaders/capacity.wgsl`.

use super::router::{Router, norm};
use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::routing::{DROPPED, Priority, Selection};

/// Drops what is beyond the capacity, then renormalises what is left if the layer does it in this order.
/// Without a capacity nothing changes.
pub fn capacity(config: &MoeConfig, mut router: Router, batch: &Batch<'_>) -> Router {
    let Some(capacity) = config.routing().capacity else { return router };
    let top_k = config.top_k() as usize;
    let num_tokens = router.topk_experts.len() / top_k;
    let sequence = match batch.tokens_per_sequence {
        Some(tokens) if capacity.per_sequence => tokens as usize,
        _ => num_tokens,
    };
    for first in (0..num_tokens).step_by(sequence.max(1)) {
        let tokens = first..(first + sequence).min(num_tokens);
        let limit = capacity.of_tokens(tokens.len() as u32) as usize;
        // Assignments (t, j) in the order in which experts take them.
        let mut order: Vec<(usize, usize)> = tokens.flat_map(|t| (0..top_k).map(move |j| (t, j))).collect();
        let descending = |a: f64, b: f64| b.total_cmp(&a);
        match (config.routing().selection, capacity.priority) {
            // choice j is expert j: the tokens that score highest for it
            (Selection::ExpertChoice, _) => order.sort_by(|&(t, j), &(u, k)| {
                descending(router.topk_weights[t * top_k + j], router.topk_weights[u * top_k + k])
            }),
            (_, Priority::Position) => {}
            (_, Priority::Choice) => order.sort_by_key(|&(_, j)| j),
            (_, Priority::Score) => order
                .sort_by(|&(t, j), &(u, k)| j.cmp(&k).then(descending(router.first_scores[t], router.first_scores[u]))),
        }
        let mut taken = vec![0; config.num_experts() as usize];
        for (t, j) in order {
            let expert = &mut router.topk_experts[t * top_k + j];
            let Some(taken) = taken.get_mut(*expert as usize) else { continue };
            *taken += 1;
            if *taken > limit {
                *expert = DROPPED;
            }
        }
    }
    if let Some(renormalize) = config.routing().renormalize.filter(|_| capacity.renormalize_after) {
        for (experts, weights) in router.topk_experts.chunks(top_k).zip(router.topk_weights.chunks_mut(top_k)) {
            let scale = f64::from(config.routing().scale);
            for (weight, _) in weights.iter_mut().zip(experts).filter(|(_, expert)| **expert == DROPPED) {
                *weight = 0.0;
            }
            let norm = norm(renormalize, weights.iter());
            weights.iter_mut().for_each(|weight| *weight *= scale / norm);
        }
    }
    router
}
