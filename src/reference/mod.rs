//! The definition: what an MoE layer computes, in plain loops and f64.
//!
//! One file per stage, in the order of the pass. Nothing here is fast, parallel or clever, and nothing knows of
//! devices: if the mathematics is unclear here, this is the place to fix. Every kernel and the CPU engine are held
//! to these functions.
//!
//! Shapes are row-major, outer to inner. An assignment `a = t * top_k + j` is choice `j` of token `t`;
//! a row is an assignment's place after sorting by expert.

pub mod capacity;
pub mod combine;
pub mod down;
pub mod drop_rows;
pub mod gate_up;
pub mod norm;
pub mod permute;
pub mod router;
pub mod statistics;

use crate::model::batch::{Batch, Front};
use crate::model::config::{MoeConfig, Norm};
use crate::model::routing::DROPPED;
use crate::model::weights::MoeWeights;
use gate_up::FirstProjections;

/// Everything the pass computes, stage by stage.
#[derive(Clone, Debug)]
pub struct Forward {
    /// Router's result, after capacity.
    pub router: router::Router,
    /// Rows by expert.
    pub permutation: permute::Permutation,
    /// What the experts read: `[num_tokens, expert_size]`
    pub expert_in: Vec<f64>,
    /// `[num_rows, intermediate_size]`
    pub intermediate: Vec<f64>,
    /// `[num_rows, expert_size]`
    pub expert_out: Vec<f64>,
    /// `[num_tokens, expert_size]`
    pub combined: Vec<f64>,
    /// What the shared experts add, weighted: `[num_tokens, hidden_size]`, zeros where there are none.
    pub shared: Vec<f64>,
    /// `[num_tokens, hidden_size]`
    pub y: Vec<f64>,
}

/// The whole layer: `x [num_tokens, hidden_size]` to `y [num_tokens, hidden_size]`.
pub fn moe_forward<'a>(config: &MoeConfig, weights: &MoeWeights, batch: impl Into<Batch<'a>>) -> Forward {
    let batch = batch.into();
    let seen = router_input(config, weights, batch.x);
    let seen = Batch { x: &seen, ..batch };
    let mut logits = router::router_logits(config, weights, &seen);
    let router = match batch.front {
        Front::Router => router::route(config, weights, logits, &seen),
        Front::Logits(given) => {
            logits.experts = exact(given);
            router::route(config, weights, logits, &seen)
        }
        Front::Assignments { experts, weights: given } => {
            let ids: Vec<u32> = experts.iter().map(|&e| u32::try_from(e).unwrap_or(DROPPED)).collect();
            let mut router = router::route_with(config, weights, logits, Some(&ids), &seen);
            // Final: no weight of ours, and no second choice left to chance.
            (router.topk_experts, router.topk_weights) = (ids, exact(given));
            return forward_with_routing(config, weights, batch.x, router);
        }
    };
    forward_with_routing(config, weights, batch.x, capacity::capacity(config, router, &batch))
}

/// What the router reads: x, or its norm. `[num_tokens, hidden_size]`
pub fn router_input(config: &MoeConfig, weights: &MoeWeights, x: &[f32]) -> Vec<f32> {
    let wide = exact(x);
    let seen = optional_norm(config.extras().router_norm, &weights.extras.router_norm, wide);
    seen.into_iter().map(|v| v as f32).collect()
}

/// The layer after router and capacity: for comparing with a device that chose differently in a near-tie.
pub fn forward_with_routing(config: &MoeConfig, weights: &MoeWeights, x: &[f32], router: router::Router) -> Forward {
    let [h, i, d, top_k] =
        [config.hidden_size(), config.intermediate_size(), config.expert_size(), config.top_k()].map(|n| n as usize);
    let extras = &weights.extras;
    let x = exact(x);
    let num_tokens = x.len() / h;

    let projected = match &extras.latent_in {
        Some(projection) => down::down([d, h], projection, None, &x, vec![0; num_tokens]),
        None => x.clone(),
    };
    let expert_in = optional_norm(config.extras().expert_norm, &extras.expert_norm, projected);

    let permutation = permute::permute(&router.topk_experts, config.num_weighted_experts());
    let expert_of_row: Vec<usize> =
        (0..permutation.assignment_of_row.len()).map(|row| permutation.expert_of_row(row)).collect();
    let factor = |a: usize| if config.routing().weigh_input { router.topk_weights[a] } else { 1.0 };
    let rows: Vec<(usize, usize, f64)> = expert_of_row
        .iter()
        .zip(&permutation.assignment_of_row)
        .map(|(&expert, &a)| (expert, a as usize / top_k, factor(a as usize)))
        .collect();
    let first = FirstProjections {
        activation: config.activation(),
        input_size: d,
        gate_proj: &weights.gate_proj,
        up_proj: &weights.up_proj,
        gate_bias: extras.gate_bias.as_deref(),
        up_bias: extras.up_bias.as_deref(),
        intermediate_size: i,
    };
    let intermediate = gate_up::gate_up(&first, &expert_in, &rows);
    let down_bias = extras.down_bias.as_deref();
    let expert_out = down::down([d, i], &weights.down_proj, down_bias, &intermediate, expert_of_row);
    let expert_out = optional_norm(config.extras().expert_out_norm, &extras.expert_out_norm, expert_out);
    let combined = combine::combine(config, &expert_out, &expert_in, &router, &permutation);

    let routed = match &extras.latent_out {
        Some(projection) => down::down([h, d], projection, None, &combined, vec![0; num_tokens]),
        None => combined.clone(),
    };
    let routed = optional_norm(config.extras().routed_norm, &extras.routed_norm, routed);
    let shared = shared(config, weights, &x, &router.shared_weights);
    let half = if config.extras().shared.is_some_and(|shared| shared.average) { 0.5 } else { 1.0 };
    let y = routed.iter().zip(&shared).enumerate().map(|(at, (routed, shared))| {
        let bias = extras.output_bias.as_ref().map_or(0.0, |bias| f64::from(bias[at % h]));
        half * (f64::from(config.extras().routed_scale) * routed + shared) + bias
    });
    let y = optional_norm(config.extras().output_norm, &extras.output_norm, y.collect());
    Forward { router, permutation, expert_in, intermediate, expert_out, combined, shared, y }
}

/// `sum over s of weight[t, s] * shared expert s of x[t, :]`; the weight is 1 where the router does not gate them.
/// `x [num_tokens, hidden_size]`, `shared_weights [num_tokens, num_shared]` or empty.
pub fn shared(config: &MoeConfig, weights: &MoeWeights, x: &[f64], shared_weights: &[f64]) -> Vec<f64> {
    let h = config.hidden_size() as usize;
    let Some(shared) = config.extras().shared else { return vec![0.0; x.len()] };
    let [num, size] = [shared.num, shared.intermediate_size].map(|n| n as usize);
    let extras = &weights.extras;
    let first = FirstProjections {
        activation: shared.activation,
        input_size: h,
        gate_proj: &extras.shared_gate_proj,
        up_proj: &extras.shared_up_proj,
        gate_bias: None,
        up_bias: None,
        intermediate_size: size,
    };
    let mut sum = vec![0.0; x.len()];
    for s in 0..num {
        let rows: Vec<_> = (0..x.len() / h).map(|t| (s, t, 1.0)).collect();
        let intermediate = gate_up::gate_up(&first, x, &rows);
        let out = down::down([h, size], &extras.shared_down_proj, None, &intermediate, vec![s; rows.len()]);
        for (at, (sum, out)) in sum.iter_mut().zip(out).enumerate() {
            *sum += shared_weights.get(at / h * num + s).copied().unwrap_or(1.0) * out;
        }
    }
    sum
}

fn optional_norm(norm: Option<Norm>, weight: &Option<Vec<f32>>, v: Vec<f64>) -> Vec<f64> {
    match (norm, weight) {
        (Some(norm), Some(weight)) => norm::norm(norm, weight, &v),
        _ => v,
    }
}

fn exact(values: &[f32]) -> Vec<f64> {
    values.iter().map(|&v| f64::from(v)).collect()
}

/// `sum over k of a[k] * b[k]`, in order.
fn dot(a: impl Iterator<Item = f64>, b: &[f32]) -> f64 {
    a.zip(b).map(|(a, &b)| a * f64::from(b)).sum()
}
