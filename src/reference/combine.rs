//! Stage 5: each token's expert outputs, weighted and summed. Twin of `shaders/combine.wgsl`.

use super::permute::Permutation;
use crate::model::config::MoeConfig;

/// `y[t, :] = sum over j < top_k of topk_weights[t, j] * expert_out[row_of_assignment[t, j], :]`
/// `expert_out [num_rows, hidden_size]`, `topk_weights [num_tokens, top_k]`; result `[num_tokens, hidden_size]`.
pub fn combine(config: &MoeConfig, expert_out: &[f64], topk_weights: &[f64], rows: &Permutation) -> Vec<f64> {
    let [h, top_k] = [config.hidden_size(), config.top_k()].map(|n| n as usize);
    let mut y = vec![0.0; topk_weights.len() / top_k * h];
    for (t, y) in y.chunks_exact_mut(h).enumerate() {
        for j in 0..top_k {
            let a = t * top_k + j;
            let row = rows.row_of_assignment[a] as usize;
            for (sum, value) in y.iter_mut().zip(&expert_out[row * h..][..h]) {
                *sum += topk_weights[a] * value;
            }
        }
    }
    y
}
