//! Stage 3: each expert's first projections and its activation. Twin of `shaders/gate_up.wgsl`.

use super::dot;
use super::permute::Permutation;
use crate::model::config::MoeConfig;

/// `intermediate[r, i] = act(x[token] . gate_proj[expert, i], x[token] . up_proj[expert, i])`
/// with the token and the expert of row `r`.
/// `gate_proj`, `up_proj [num_experts, intermediate_size, hidden_size]`, `x [num_tokens, hidden_size]`;
/// result `[num_rows, intermediate_size]`.
pub fn gate_up(config: &MoeConfig, gate_proj: &[f32], up_proj: &[f32], x: &[f32], rows: &Permutation) -> Vec<f64> {
    let [h, i] = [config.hidden_size(), config.intermediate_size()].map(|n| n as usize);
    let mut intermediate = Vec::new();
    for (row, &assignment) in rows.assignment_of_row.iter().enumerate() {
        let token = assignment as usize / config.top_k() as usize;
        let token = || x[token * h..][..h].iter().map(|&v| f64::from(v));
        let expert = rows.expert_of_row(row);
        for column in expert * i..(expert + 1) * i {
            let gate = dot(token(), &gate_proj[column * h..][..h]);
            let up = dot(token(), &up_proj[column * h..][..h]);
            intermediate.push(config.activation().apply(gate, up));
        }
    }
    intermediate
}
