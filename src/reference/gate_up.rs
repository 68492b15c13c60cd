//! Stage 3: each expert's first projections and its activation. Twin of `shaders/gate_up.wgsl`.

use super::dot;
use crate::model::activation::Activation;

/// The first projections of some experts, all of one shape.
#[derive(Clone, Copy, Debug)]
pub struct FirstProjections<'a> {
    /// Between the projections.
    pub activation: Activation,
    /// Width of their input.
    pub input_size: usize,
    /// `[experts, intermediate_size, input_size]`; empty without a gate
    pub gate_proj: &'a [f32],
    /// `[experts, intermediate_size, input_size]`
    pub up_proj: &'a [f32],
    /// `[experts, intermediate_size]`
    pub gate_bias: Option<&'a [f32]>,
    /// `[experts, intermediate_size]`
    pub up_bias: Option<&'a [f32]>,
    /// Inner width.
    pub intermediate_size: usize,
}

/// `intermediate[r, i] = act(s * x . gate_proj[expert, i] + gate_bias, s * x . up_proj[expert, i] + up_bias)`
/// for each row r, given as (expert, input row, factor s of the input). `x [_, input_size]`; result
/// `[rows, intermediate_size]`.
pub fn gate_up(projections: &FirstProjections<'_>, x: &[f64], rows: &[(usize, usize, f64)]) -> Vec<f64> {
    let p = projections;
    let (width, size) = (p.input_size, p.intermediate_size);
    let mut intermediate = Vec::new();
    for &(expert, input, factor) in rows {
        let token = &x[input * width..][..width];
        for column in expert * size..(expert + 1) * size {
            let times = |weights: &[f32], bias: Option<&[f32]>| {
                let sum = factor * dot(token.iter().copied(), &weights[column * width..][..width]);
                sum + bias.map_or(0.0, |bias| f64::from(bias[column]))
            };
            let gate = if p.activation.is_gated() { times(p.gate_proj, p.gate_bias) } else { 0.0 };
            intermediate.push(p.activation.apply(gate, times(p.up_proj, p.up_bias)));
        }
    }
    intermediate
}
