//! How evenly a pass used its experts.

use super::router::log_sum_exp;
use crate::model::config::MoeConfig;
use crate::model::routing::{DROPPED, RoutingDecision};
use crate::model::statistics::{SequenceSums, Statistics};

/// Sums over the tokens of each sequence, in f64, and what follows from them. `tokens_per_sequence` divides the tokens.
/// A decision without logits, as the caller's own assignments leave it, has only the counts.
pub fn statistics(config: &MoeConfig, decision: &RoutingDecision, tokens_per_sequence: usize) -> Statistics {
    let [e, top_k] = [config.num_experts(), config.top_k()].map(|n| n as usize);
    let mut logits = decision.router_logits.chunks_exact(e);
    let sums = |experts: &[u32]| {
        let num_tokens = experts.len() / top_k;
        let mut sums = SequenceSums::new(num_tokens, e);
        for row in logits.by_ref().take(num_tokens) {
            add_token(&mut sums, row);
        }
        for &expert in experts {
            match sums.assigned.get_mut(expert as usize) {
                Some(count) => *count += 1,
                None => sums.dropped += u32::from(expert == DROPPED),
            }
        }
        sums
    };
    let sequences = decision.topk_experts.chunks(tokens_per_sequence.max(1) * top_k).map(sums).collect();
    Statistics::new(sequences)
}

fn add_token(sums: &mut SequenceSums, logits: &[f32]) {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !largest.is_finite() || logits.iter().any(|l| l.is_nan()) {
        return; // no numbers, as only some policies let through
    }
    // The first of the largest.
    let mut best = 0;
    for (e, &logit) in logits.iter().enumerate() {
        best = if logit > logits[best] { e } else { best };
    }
    sums.best[best] += 1;
    let total = log_sum_exp(logits);
    sums.squared_log_sum_exp += total * total;
    for (sum, &logit) in sums.probability.iter_mut().zip(logits) {
        let p = (f64::from(logit) - total).exp();
        *sum += p;
        sums.entropy -= if p > 0.0 { p * p.ln() } else { 0.0 };
    }
}
