//! The definition: what an MoE layer computes, in plain loops and f64.
//!
//! One file per stage, in the order of the pass. Nothing here is fast, parallel or clever, and nothing knows of
//! devices: if the mathematics is unclear here, this is the place to fix. Every kernel and the CPU engine are held
//! to these functions.
//!
//! Shapes are row-major, outer to inner. An assignment `a = t * top_k + j` is choice `j` of token `t`;
//! a row is an assignment's place after sorting by expert.

pub mod combine;
pub mod down;
pub mod gate_up;
pub mod permute;
pub mod router;

use crate::model::config::MoeConfig;
use crate::model::weights::MoeWeights;

/// Everything the pass computes, stage by stage.
#[derive(Clone, Debug)]
pub struct Forward {
    /// Router's result.
    pub router: router::Router,
    /// Rows by expert.
    pub permutation: permute::Permutation,
    /// `[num_rows, intermediate_size]`
    pub intermediate: Vec<f64>,
    /// `[num_rows, hidden_size]`
    pub expert_out: Vec<f64>,
    /// `[num_tokens, hidden_size]`
    pub y: Vec<f64>,
}

/// The whole layer: `x [num_tokens, hidden_size]` to `y [num_tokens, hidden_size]`.
pub fn moe_forward(config: &MoeConfig, weights: &MoeWeights, x: &[f32]) -> Forward {
    let router = router::router(config, &weights.router, weights.router_bias.as_deref(), x);
    forward_with_routing(config, weights, x, router)
}

/// The layer after its router: for comparing with a device that chose differently in a near-tie.
pub fn forward_with_routing(config: &MoeConfig, weights: &MoeWeights, x: &[f32], router: router::Router) -> Forward {
    let permutation = permute::permute(&router.topk_experts, config.num_experts());
    let intermediate = gate_up::gate_up(config, &weights.gate_proj, &weights.up_proj, x, &permutation);
    let expert_out = down::down(config, &weights.down_proj, &intermediate, &permutation);
    let y = combine::combine(config, &expert_out, &router.topk_weights, &permutation);
    Forward { router, permutation, intermediate, expert_out, y }
}

/// `sum over k of a[k] * b[k]`, in order.
fn dot(a: impl Iterator<Item = f64>, b: &[f32]) -> f64 {
    a.zip(b).map(|(a, &b)| a * f64::from(b)).sum()
}
