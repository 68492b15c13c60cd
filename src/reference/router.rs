//! Stage 1: which experts each token gets, and with which weight. Twin of `shaders/router.wgsl`.

use super::dot;
use crate::model::config::MoeConfig;
use crate::model::routing::Scores;

/// What the router decides.
#[derive(Clone, Debug)]
pub struct Router {
    /// `[num_tokens, num_experts]`
    pub router_logits: Vec<f64>,
    /// Softmax of the logits: `[num_tokens, num_experts]`
    pub router_probs: Vec<f64>,
    /// Best first: `[num_tokens, top_k]`
    pub topk_experts: Vec<u32>,
    /// `[num_tokens, top_k]`
    pub topk_weights: Vec<f64>,
}

/// Logits, scores, selection, weights.
/// `router [num_experts, hidden_size]`, `router_bias [num_experts]`, `x [num_tokens, hidden_size]`.
pub fn router(config: &MoeConfig, router: &[f32], router_bias: Option<&[f32]>, x: &[f32]) -> Router {
    route(config, router_logits(config, router, router_bias, x))
}

/// `logits[t, e] = sum over h of x[t, h] * router[e, h] + router_bias[e]`
pub fn router_logits(config: &MoeConfig, router: &[f32], router_bias: Option<&[f32]>, x: &[f32]) -> Vec<f64> {
    let hidden_size = config.hidden_size() as usize;
    let mut logits = Vec::new();
    for token in x.chunks_exact(hidden_size) {
        for (e, weights) in router.chunks_exact(hidden_size).enumerate() {
            let bias = router_bias.map_or(0.0, |bias| f64::from(bias[e]));
            logits.push(dot(token.iter().map(|&v| f64::from(v)), weights) + bias);
        }
    }
    logits
}

/// Scores, selection and weights of given logits `[num_tokens, num_experts]`.
pub fn route(config: &MoeConfig, router_logits: Vec<f64>) -> Router {
    let (num_experts, top_k) = (config.num_experts() as usize, config.top_k() as usize);
    let mut router_probs = Vec::new();
    let mut topk_experts = Vec::new();
    let mut topk_weights = Vec::new();
    for logits in router_logits.chunks_exact(num_experts) {
        let probs = match config.routing().scores {
            Scores::Softmax => softmax(logits),
        };
        let chosen = top_k_indices(logits, top_k);
        let sum: f64 = if config.routing().renormalize { chosen.iter().map(|&e| probs[e]).sum() } else { 1.0 };
        topk_weights.extend(chosen.iter().map(|&e| probs[e] / sum));
        topk_experts.extend(chosen.iter().map(|&e| e as u32));
        router_probs.extend(probs);
    }
    Router { router_logits, router_probs, topk_experts, topk_weights }
}

/// `exp(l - max) / sum exp(l - max)`; the largest logit is subtracted so that nothing overflows.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

/// Indices of the `k` largest values, largest first. Equal values: lowest index first. NaN ranks below everything,
/// and -0 equals +0.
pub fn top_k_indices(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let rank = |v: f64| if v.is_nan() { (0, 0.0) } else { (1, v + 0.0) };
    order.sort_by(|&a, &b| rank(values[b]).partial_cmp(&rank(values[a])).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate(k);
    order
}
