//! Between router and permute, in layers that have it: assignments beyond an expert's capacity are dropped.

use super::router::norm;
use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::routing::{DROPPED, Priority, RoutingDecision, Selection};
use rayon::prelude::*;
use std::ops::Range;

/// Drops what is beyond the capacity, then renormalises what is left if the layer does it in this order.
/// `ranks` is what the router left for it.
pub(super) fn capacity(config: &MoeConfig, batch: &Batch<'_>, ranks: &[f64], decision: &mut RoutingDecision) {
    let Some(capacity) = config.routing().capacity else { return };
    let [num_experts, top_k] = [config.num_experts(), config.top_k()].map(|n| n as usize);
    let num_tokens = decision.num_tokens;
    let sequence = match batch.tokens_per_sequence {
        Some(tokens) if capacity.per_sequence => tokens as usize,
        _ => num_tokens.max(1),
    };
    let experts = &mut decision.topk_experts;
    for first in (0..num_tokens).step_by(sequence) {
        let tokens = first..(first + sequence).min(num_tokens);
        let limit = capacity.of_tokens(tokens.len() as u32) as usize;
        if config.routing().selection == Selection::ExpertChoice {
            choose_tokens(experts, ranks, num_experts, tokens, limit);
            continue;
        }
        let mut taken = vec![0; num_experts];
        let mut take = |t: usize, j: usize| {
            let expert = &mut experts[t * top_k + j];
            let Some(taken) = taken.get_mut(*expert as usize) else { return };
            *taken += 1;
            if *taken > limit {
                *expert = DROPPED;
            }
        };
        match capacity.priority {
            Priority::Position => tokens.for_each(|t| (0..top_k).for_each(|j| take(t, j))),
            Priority::Choice => (0..top_k).for_each(|j| tokens.clone().for_each(|t| take(t, j))),
            Priority::Score => {
                let mut order: Vec<usize> = tokens.collect();
                order.sort_by(|&t, &u| ranks[u].total_cmp(&ranks[t]));
                (0..top_k).for_each(|j| order.iter().for_each(|&t| take(t, j)));
            }
        }
    }
    if let Some(renormalize) = config.routing().renormalize.filter(|_| capacity.renormalize_after) {
        let scale = f64::from(config.routing().scale);
        for (experts, weights) in decision.topk_experts.chunks(top_k).zip(decision.topk_weights.chunks_mut(top_k)) {
            for (weight, _) in weights.iter_mut().zip(experts).filter(|(_, expert)| **expert == DROPPED) {
                *weight = 0.0;
            }
            let norm = norm(renormalize, weights.iter().map(|&w| f64::from(w)));
            weights.iter_mut().for_each(|w| *w = (f64::from(*w) * scale / norm) as f32);
        }
    }
}

/// Each expert keeps the `limit` of these tokens that weigh most for it. Choice j is expert j.
fn choose_tokens(experts: &mut [u32], weights: &[f64], num_experts: usize, tokens: Range<usize>, limit: usize) {
    let left_out = |e: usize| {
        let at = |&t: &usize| t * num_experts + e;
        let mut order: Vec<usize> = tokens.clone().filter(|t| experts[at(t)] != DROPPED).collect();
        order.sort_by(|t, u| weights[at(u)].total_cmp(&weights[at(t)]));
        order.into_iter().skip(limit).map(|t| at(&t)).collect::<Vec<_>>()
    };
    let left_out: Vec<Vec<usize>> = (0..num_experts).into_par_iter().map(left_out).collect();
    for at in left_out.into_iter().flatten() {
        experts[at] = DROPPED;
    }
}
