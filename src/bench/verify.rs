//! Is the result that is about to be timed right? The f64 reference decides.
//!
//! The reference is slow on purpose, so for large layers it computes a sample of the tokens: a token's output does
//! not depend on the others. The sample is spread over the whole batch, because a wrong grid shows at its ends.

use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::routing::RoutingDecision;
use crate::model::weights::MoeWeights;
use crate::reference::router::{self, Router};
use crate::reference::{self, capacity};
use rayon::prelude::*;

/// Largest `max|y - y_ref| / max|y_ref|` that counts as right: 84 units in the last place of an f32, where sums of
/// thousands of products in f32 usually end below 10.
pub const TOLERANCE: f64 = crate::golden::TOLERANCE;

/// Logits closer than this in relation to the largest are a near-tie that a device may break in its own way.
const NEAR_TIE: f64 = 1e-5;

/// Multiplications that the reference may spend on one verification: around a second on one core.
const BUDGET: u64 = 600_000_000;

/// Tokens that are verified however expensive they are.
const LEAST_TOKENS: u64 = 2;

/// What verification found.
#[derive(Clone, Debug, PartialEq)]
pub struct Verification {
    /// Tokens that the reference computed too.
    pub tokens_checked: usize,
    /// `max|y - y_ref| / max|y_ref|` over those; infinite where there is nothing to compare.
    pub max_rel_error: f64,
    /// What is wrong, if something is.
    pub reason: Option<String>,
}

impl Verification {
    /// Whether the result may be reported.
    pub fn passed(&self) -> bool {
        self.reason.is_none()
    }

    fn failed(reason: String) -> Self {
        Verification { tokens_checked: 0, max_rel_error: f64::INFINITY, reason: Some(reason) }
    }
}

/// Which tokens of a batch to verify: all, or as many as the budget allows, evenly spread with both ends included.
pub fn sample(config: &MoeConfig, num_tokens: usize) -> Vec<usize> {
    let [h, i, k, e] =
        [config.hidden_size(), config.intermediate_size(), config.top_k(), config.num_experts()].map(u64::from);
    let affordable = (BUDGET / (3 * h * i * k + h * e)).max(LEAST_TOKENS) as usize;
    if num_tokens <= affordable {
        return (0..num_tokens).collect();
    }
    (0..affordable).map(|n| n * (num_tokens - 1) / (affordable - 1)).collect()
}

/// Compares `y [num_tokens, hidden_size]` and the routing of the pass that made it with the reference.
/// `weights` are those that the device holds, rounding included.
pub fn verify(
    config: &MoeConfig,
    weights: &MoeWeights,
    x: &[f32],
    y: &[f32],
    routing: &RoutingDecision,
) -> Verification {
    let (hidden_size, top_k) = (config.hidden_size() as usize, config.top_k() as usize);
    let num_tokens = x.len() / hidden_size;
    if y.len() != x.len() {
        return Verification::failed(format!("the output has {} elements, expected {}", y.len(), x.len()));
    }
    if routing.topk_experts.len() != num_tokens * top_k {
        let found = routing.topk_experts.len();
        return Verification::failed(format!("the routing has {found} assignments, expected {}", num_tokens * top_k));
    }
    // Every token can be checked for this, and a hole in the grid often shows as NaN.
    if let Some(at) = y.iter().position(|v| !v.is_finite()) {
        let (token, column) = (at / hidden_size, at % hidden_size);
        return Verification::failed(format!("the output of token {token} is {} in column {column}", y[at]));
    }
    let tokens = sample(config, num_tokens);
    // Whom a capacity drops depends on the whole batch.
    let whole = config.routing().capacity.map(|_| {
        let batch = Batch::from(x);
        capacity::capacity(config, router::router(config, weights, &batch), &batch)
    });
    let checked: Result<Vec<Deviation>, String> = tokens
        .par_iter()
        .map(|&t| {
            let (x, y) = (&x[t * hidden_size..][..hidden_size], &y[t * hidden_size..][..hidden_size]);
            let chosen = &routing.topk_experts[t * top_k..][..top_k];
            match &whole {
                Some(whole) => check_token_of_batch(config, weights, x, y, chosen, of_token(whole, t, num_tokens)),
                None => check_token(config, weights, x, y, chosen),
            }
            .map_err(|reason| format!("token {t}: {reason}"))
        })
        .collect();
    match checked {
        Err(reason) => {
            Verification { tokens_checked: tokens.len(), max_rel_error: f64::INFINITY, reason: Some(reason) }
        }
        Ok(deviations) => judge(&tokens, &deviations),
    }
}

/// How far one token is off, and how large its output is.
struct Deviation {
    error: f64,
    magnitude: f64,
}

fn check_token(
    config: &MoeConfig,
    weights: &MoeWeights,
    x: &[f32],
    y: &[f32],
    chosen: &[u32],
) -> Result<Deviation, String> {
    let batch = Batch::from(x);
    let logits = router::router_logits(config, weights, &batch);
    let mut routed = router::route(config, weights, logits.clone(), &batch);
    if sorted(chosen) != sorted(&routed.topk_experts) {
        accept_near_tie(&routed.router_logits, &routed.topk_experts, chosen)?;
        routed = router::route_with(config, weights, logits, Some(chosen), &batch);
    }
    deviation(config, weights, x, y, routed)
}

/// As [`check_token`] with the routing that the reference found for the token among the others.
fn check_token_of_batch(
    config: &MoeConfig,
    weights: &MoeWeights,
    x: &[f32],
    y: &[f32],
    chosen: &[u32],
    routed: Router,
) -> Result<Deviation, String> {
    if sorted(chosen) != sorted(&routed.topk_experts) {
        return Err(format!("experts {chosen:?} were chosen, expected {:?}", routed.topk_experts));
    }
    deviation(config, weights, x, y, routed)
}

/// Token `t` of `num_tokens`.
fn of_token(whole: &Router, t: usize, num_tokens: usize) -> Router {
    fn row<T: Clone>(values: &[T], t: usize, num_tokens: usize) -> Vec<T> {
        let width = values.len() / num_tokens;
        values[t * width..][..width].to_vec()
    }
    Router {
        router_logits: row(&whole.router_logits, t, num_tokens),
        router_probs: row(&whole.router_probs, t, num_tokens),
        topk_experts: row(&whole.topk_experts, t, num_tokens),
        topk_weights: row(&whole.topk_weights, t, num_tokens),
        shared_weights: row(&whole.shared_weights, t, num_tokens),
        first_scores: row(&whole.first_scores, t, num_tokens),
    }
}

fn sorted(experts: &[u32]) -> Vec<u32> {
    let mut sorted = experts.to_vec();
    sorted.sort_unstable();
    sorted
}

fn deviation(
    config: &MoeConfig,
    weights: &MoeWeights,
    x: &[f32],
    y: &[f32],
    routed: Router,
) -> Result<Deviation, String> {
    let expected = reference::forward_with_routing(config, weights, x, routed).y;
    // Maxima pass over NaN, so it has to be looked for.
    if expected.iter().any(|v| !v.is_finite()) {
        return Err("the reference's output is not finite".to_owned());
    }
    let error = y.iter().zip(&expected).map(|(&y, expected)| (f64::from(y) - expected).abs()).fold(0.0, f64::max);
    Ok(Deviation { error, magnitude: expected.iter().copied().map(f64::abs).fold(0.0, f64::max) })
}

/// A different choice is right only if it is as good as the reference's up to rounding.
fn accept_near_tie(logits: &[f64], expected: &[u32], chosen: &[u32]) -> Result<(), String> {
    let wrong = || format!("experts {chosen:?} were chosen, expected {expected:?}");
    let mut distinct = chosen.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    if distinct.len() != chosen.len() || chosen.iter().any(|&e| e as usize >= logits.len()) {
        return Err(wrong());
    }
    let scale = logits.iter().copied().map(f64::abs).fold(1.0, f64::max);
    let least = |experts: &[u32]| experts.iter().map(|&e| logits[e as usize]).fold(f64::INFINITY, f64::min);
    if least(expected) - least(chosen) <= NEAR_TIE * scale { Ok(()) } else { Err(wrong()) }
}

fn judge(tokens: &[usize], deviations: &[Deviation]) -> Verification {
    let magnitude = deviations.iter().map(|d| d.magnitude).fold(0.0, f64::max);
    let worst = (0..deviations.len()).max_by(|&a, &b| deviations[a].error.total_cmp(&deviations[b].error));
    let (Some(worst), true) = (worst, magnitude > 0.0) else {
        return Verification::failed("the reference's output is zero everywhere: nothing to compare with".to_owned());
    };
    let max_rel_error = deviations[worst].error / magnitude;
    // "Not right" rather than "wrong", so that a NaN fails.
    let right = max_rel_error <= TOLERANCE;
    let reason =
        (!right).then(|| format!("token {} is off by {max_rel_error:.1e}, allowed is {TOLERANCE:.0e}", tokens[worst]));
    Verification { tokens_checked: tokens.len(), max_rel_error, reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Workload;
    use crate::{Activation, Capacity, CapacityLimit, DROPPED, Priority, Routing};

    fn case() -> (Workload, Vec<f32>, Vec<f32>, RoutingDecision) {
        let routing = Routing::softmax(true);
        let config = MoeConfig::new(48, 20, 6, 2, routing, Activation::SWIGLU).expect("valid sizes");
        let workload = Workload::new(config, 0.0, 9).expect("small");
        let x = workload.input(11).expect("small");
        let forward = reference::moe_forward(&workload.config, &workload.weights, &x);
        let decision = RoutingDecision {
            num_tokens: 11,
            topk_experts: forward.router.topk_experts,
            topk_weights: forward.router.topk_weights.iter().map(|&w| w as f32).collect(),
            router_logits: forward.router.router_logits.iter().map(|&l| l as f32).collect(),
            tokens_per_expert: forward.permutation.expert_offsets.windows(2).map(|o| o[1] - o[0]).collect(),
            ..RoutingDecision::default()
        };
        (workload, x, forward.y.iter().map(|&v| v as f32).collect(), decision)
    }

    fn reason(y: &[f32], routing: &RoutingDecision, workload: &Workload, x: &[f32]) -> String {
        let found = verify(&workload.config, &workload.weights, x, y, routing);
        assert!(!found.passed());
        found.reason.expect("it failed")
    }

    #[test]
    fn the_right_result_passes() {
        let (workload, x, y, routing) = case();
        let found = verify(&workload.config, &workload.weights, &x, &y, &routing);
        assert!(found.passed() && found.tokens_checked == 11 && found.max_rel_error < 1e-7, "{found:?}");
    }

    #[test]
    fn one_wrong_element_fails() {
        let (workload, x, mut y, routing) = case();
        y[5 * 48 + 3] += 1e-3;
        assert!(reason(&y, &routing, &workload, &x).contains("token 5"));
        y[5 * 48 + 3] = f32::NAN;
        assert!(reason(&y, &routing, &workload, &x).contains("token 5 is NaN in column 3"));
    }

    #[test]
    fn short_outputs_and_wrong_experts_fail() {
        let (workload, x, y, mut routing) = case();
        assert!(reason(&y[1..], &routing, &workload, &x).contains("elements"));
        // An expert that does not exist, and the same one twice.
        for wrong in [99, routing.topk_experts[1]] {
            let mut routing = routing.clone();
            routing.topk_experts[0] = wrong;
            assert!(reason(&y, &routing, &workload, &x).contains("were chosen, expected"), "{wrong}");
        }
        routing.topk_experts.pop();
        assert!(reason(&y, &routing, &workload, &x).contains("assignments"));
    }

    #[test]
    fn what_a_capacity_drops_depends_on_the_whole_batch() {
        let capacity = Capacity {
            limit: CapacityLimit::Number(2),
            per_sequence: false,
            priority: Priority::Position,
            renormalize_after: false,
            pass_through: false,
        };
        let routing = Routing { capacity: Some(capacity), ..Routing::softmax(false) };
        let config = MoeConfig::new(48, 20, 4, 1, routing, Activation::SWIGLU).expect("valid sizes");
        let workload = Workload::new(config, 0.0, 9).expect("small");
        let x = workload.input(11).expect("small");
        let forward = reference::moe_forward(&workload.config, &workload.weights, &x);
        let y: Vec<f32> = forward.y.iter().map(|&v| v as f32).collect();
        let topk_experts = forward.router.topk_experts;
        let dropped = topk_experts.iter().position(|&e| e == DROPPED).expect("11 tokens, 8 places");
        let mut routing = RoutingDecision { num_tokens: 11, topk_experts, ..RoutingDecision::default() };
        let found = verify(&workload.config, &workload.weights, &x, &y, &routing);
        assert!(found.passed() && found.tokens_checked == 11, "{found:?}");
        // One that should have been dropped was not.
        routing.topk_experts[dropped] = 0;
        assert!(reason(&y, &routing, &workload, &x).contains("were chosen, expected"));
    }

    #[test]
    fn a_near_tie_may_be_broken_either_way() {
        let logits = [3.0, 2.0, 2.0 - 1e-7, 1.0];
        assert!(accept_near_tie(&logits, &[0, 1], &[0, 2]).is_ok());
        assert!(accept_near_tie(&logits, &[0, 1], &[0, 3]).is_err());
        assert!(accept_near_tie(&logits, &[0, 1], &[0, 0]).is_err(), "an expert counts once");
    }

    #[test]
    fn samples_reach_both_ends() {
        let routing = Routing::softmax(true);
        let big = MoeConfig::new(4096, 14336, 8, 2, routing, Activation::SWIGLU).expect("valid sizes");
        assert_eq!(sample(&big, 512), [0, 511]);
        assert_eq!(sample(&big, 1), [0]);
        let small = MoeConfig::new(1024, 512, 32, 4, routing, Activation::SWIGLU).expect("valid sizes");
        let tokens = sample(&small, 100_000);
        assert!(tokens.len() > 50 && tokens[0] == 0 && tokens.last() == Some(&99_999));
    }
}
