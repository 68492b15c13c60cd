//! Stage 4: each expert's second projection. Twin of `shaders/down.wgsl`.

use super::dot;
use super::permute::Permutation;
use crate::model::config::MoeConfig;

/// `expert_out[r, h] = intermediate[r, :] . down_proj[expert, h, :]` with the expert of row `r`.
/// `down_proj [num_experts, hidden_size, intermediate_size]`, `intermediate [num_rows, intermediate_size]`;
/// result `[num_rows, hidden_size]`.
pub fn down(config: &MoeConfig, down_proj: &[f32], intermediate: &[f64], rows: &Permutation) -> Vec<f64> {
    let [h, i] = [config.hidden_size(), config.intermediate_size()].map(|n| n as usize);
    let mut expert_out = Vec::new();
    for (row, values) in intermediate.chunks_exact(i).enumerate() {
        let expert = rows.expert_of_row(row);
        for column in expert * h..(expert + 1) * h {
            expert_out.push(dot(values.iter().copied(), &down_proj[column * i..][..i]));
        }
    }
    expert_out
}
