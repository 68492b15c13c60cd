//! How evenly a pass used its experts: the auxiliary values of the literature. Twin of `shaders/expert_statistics.wgsl`
//! and `shaders/token_statistics.wgsl`.

use super::router::{Router, log_sum_exp, softmax, top_k_indices};
use crate::model::config::MoeConfig;
use crate::model::routing::DROPPED;
use crate::model::statistics::{SequenceSums, Statistics};

/// Sums over the tokens of each sequence, and what follows from them. `tokens_per_sequence` divides the tokens. Of a token
/// with NaN or infinite logits only the assignments count.
pub fn statistics(config: &MoeConfig, router: &Router, tokens_per_sequence: usize) -> Statistics {
    let [e, top_k] = [config.num_experts(), config.top_k()].map(|n| n as usize);
    let mut sequences = Vec::new();
    for (logits, experts) in router
        .router_logits
        .chunks(tokens_per_sequence * e)
        .zip(router.topk_experts.chunks(tokens_per_sequence * top_k))
    {
        let mut sums = SequenceSums::new(logits.len() / e, e);
        let is_number = |row: &&[f64]| {
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            largest.is_finite() && !row.iter().any(|l| l.is_nan())
        };
        for row in logits.chunks_exact(e).filter(is_number) {
            sums.best[top_k_indices(row, 1)[0]] += 1;
            let total = log_sum_exp(row);
            sums.squared_log_sum_exp += total * total;
            for (sum, p) in sums.probability.iter_mut().zip(softmax(row)) {
                *sum += p;
                sums.entropy -= if p > 0.0 { p * p.ln() } else { 0.0 };
            }
        }
        for &expert in experts {
            match sums.assigned.get_mut(expert as usize) {
                Some(count) => *count += 1,
                None if expert == DROPPED => sums.dropped += 1,
                None => {}
            }
        }
        sequences.push(sums);
    }
    Statistics::new(sequences)
}
