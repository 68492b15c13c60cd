//! Division by the root mean square, where a layer has it: on what the router or the experts read, on each expert's
//! output, on the sum, on the layer's output. Twin of `shaders/norm.wgsl`.

use crate::model::config::Norm;

/// `out[r, :] = v[r, :] / sqrt(mean(v[r, :]^2) + epsilon) * weight`; with `scale_first`, v is multiplied by the weight
/// before anything else. `v [rows, weight.len()]`.
pub fn norm(norm: Norm, weight: &[f32], v: &[f64]) -> Vec<f64> {
    let mut out = Vec::new();
    for row in v.chunks_exact(weight.len()) {
        let scaled = || row.iter().zip(weight).map(|(v, &w)| v * f64::from(w));
        let squares: f64 =
            if norm.scale_first { scaled().map(|v| v * v).sum() } else { row.iter().map(|v| v * v).sum() };
        let root = (squares / row.len() as f64 + f64::from(norm.epsilon)).sqrt();
        out.extend(scaled().map(|v| v / root));
    }
    out
}
