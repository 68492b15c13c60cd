//! Stage 4: each expert's second projection. Twin of `shaders/down.wgsl`.

use super::dot;

/// `out[r, n] = v[r, :] . weights[expert, n, :] + bias[expert, n]` for each row r, given by its expert.
/// `v [rows, input_size]`, `weights [experts, output_size, input_size]`; result `[rows, output_size]`.
pub fn down(
    [output_size, input_size]: [usize; 2],
    weights: &[f32],
    bias: Option<&[f32]>,
    v: &[f64],
    expert_of_row: impl IntoIterator<Item = usize>,
) -> Vec<f64> {
    let mut out = Vec::new();
    for (row, expert) in v.chunks_exact(input_size).zip(expert_of_row) {
        for column in expert * output_size..(expert + 1) * output_size {
            let sum = dot(row.iter().copied(), &weights[column * input_size..][..input_size]);
            out.push(sum + bias.map_or(0.0, |bias| f64::from(bias[column])));
        }
    }
    out
}
