//! Stage 1, after its matmul: scores, selection, weights.

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::routing::RoutingDecision;
use rayon::prelude::*;

/// Chooses each token's experts. `logits [num_tokens, num_experts]`, `bias [num_experts]` is added to them.
///
/// Errors: a token whose logits hold NaN, or whose largest logit is infinite. A single logit of minus infinity is
/// fine: its weight is 0.
pub(super) fn route(config: &MoeConfig, mut logits: Vec<f32>, bias: Option<&[f32]>) -> Result<RoutingDecision> {
    let [e, top_k] = [config.num_experts(), config.top_k()].map(|n| n as usize);
    let num_tokens = logits.len() / e;
    let mut topk_experts = vec![0; num_tokens * top_k];
    let mut topk_weights = vec![0.0; num_tokens * top_k];
    let bad_tokens: u32 = logits
        .par_chunks_exact_mut(e)
        .zip(topk_experts.par_chunks_exact_mut(top_k))
        .zip(topk_weights.par_chunks_exact_mut(top_k))
        .map(|((logits, chosen), weights)| {
            for (logit, bias) in logits.iter_mut().zip(bias.unwrap_or_default()) {
                *logit += bias;
            }
            top_k_indices(logits, chosen);
            let best = logits[chosen[0] as usize];
            if !best.is_finite() || logits.iter().any(|l| l.is_nan()) {
                return 1;
            }
            match config.routing().scores {
                _ => softmax_weights(logits, chosen, config.routing().renormalize.is_some(), weights),
            }
            0
        })
        .sum();
    if bad_tokens > 0 {
        return Err(Error::NonFiniteLogits { num_tokens: bad_tokens });
    }
    let mut tokens_per_expert = vec![0; e];
    for &expert in &topk_experts {
        tokens_per_expert[expert as usize] += 1;
    }
    Ok(RoutingDecision { num_tokens, topk_experts, topk_weights, router_logits: logits, tokens_per_expert, ..RoutingDecision::default() })
}

/// Softmax of the chosen logits, over all experts or, renormalised, over the chosen ones. In f64: few values, and
/// the weights scale everything that follows. The largest logit is the first chosen one.
fn softmax_weights(logits: &[f32], chosen: &[u32], renormalize: bool, weights: &mut [f32]) {
    let max = f64::from(logits[chosen[0] as usize]);
    let exp = |logit: f32| (f64::from(logit) - max).exp();
    let exps = || chosen.iter().map(|&e| exp(logits[e as usize]));
    let sum: f64 = if renormalize { exps().sum() } else { logits.iter().copied().map(exp).sum() };
    for (weight, exp) in weights.iter_mut().zip(exps()) {
        *weight = (exp / sum) as f32;
    }
}

/// Fills `chosen` with the indices of the largest values, largest first. Equal values (and -0 equals +0): lowest
/// index first. NaN ranks below everything. `chosen` is at most as long as `values`.
fn top_k_indices(values: &[f32], chosen: &mut [u32]) {
    let better = |a: f32, b: f32| a > b || (b.is_nan() && !a.is_nan());
    let mut len = 0;
    for (index, &value) in values.iter().enumerate() {
        // The place after every chosen value that is at least as good; most values find none.
        let mut place = len;
        while place > 0 && better(value, values[chosen[place - 1] as usize]) {
            place -= 1;
        }
        if place < chosen.len() {
            len = (len + 1).min(chosen.len());
            chosen.copy_within(place..len - 1, place + 1);
            chosen[place] = index as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Routing, reference};

    fn config(num_experts: u32, top_k: u32, renormalize: bool) -> MoeConfig {
        let routing = Routing::softmax(renormalize);
        MoeConfig::new(1, 1, num_experts, top_k, routing, Activation::SWIGLU).expect("the sizes are valid")
    }

    /// A small generator, so that the test needs no crate.
    fn next(state: &mut u32) -> u32 {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *state >> 8
    }

    #[test]
    fn selection_is_that_of_the_reference_for_any_values() {
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0, f32::MAX, f32::MIN, 1e-45];
        let mut state = 1;
        for case in 0..20_000 {
            let e = 1 + next(&mut state) as usize % if case % 100 == 0 { 1024 } else { 40 };
            let k = 1 + next(&mut state) as usize % e.min(32);
            let values: Vec<f32> = (0..e).map(|_| special[next(&mut state) as usize % special.len()]).collect();
            let mut chosen = vec![0; k];
            top_k_indices(&values, &mut chosen);
            let values: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
            let expected = reference::router::top_k_indices(&values, k);
            assert!(chosen.iter().map(|&c| c as usize).eq(expected.iter().copied()), "{values:?}: {chosen:?}");
        }
    }

    #[test]
    fn weights_are_those_of_the_reference() {
        let mut state = 7;
        for scale in [0.0, 1.0, 1e4, 1e38] {
            for (e, k, renormalize) in [(1, 1, true), (8, 8, false), (257, 32, true), (257, 3, false)] {
                let config = config(e, k, renormalize);
                let logits: Vec<f32> =
                    (0..3 * e).map(|_| (next(&mut state) as f32 / (1 << 23) as f32 - 1.0) * scale).collect();
                let expected = reference::router::route(&config, logits.iter().map(|&l| f64::from(l)).collect());
                let got = route(&config, logits, None).expect("the logits are finite");
                assert_eq!(got.topk_experts, expected.topk_experts);
                for (got, expected) in got.topk_weights.iter().zip(expected.topk_weights) {
                    assert!((f64::from(*got) - expected).abs() <= 1e-7 * expected + 1e-45, "{got} {expected}");
                }
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_errors() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let cases = [([nan, 0.0], 1), ([0.0, nan], 1), ([inf, 0.0], 1), ([-inf, -inf], 1), ([-inf, 0.0], 0)];
        for (logits, bad) in cases {
            match route(&config(2, 1, true), logits.to_vec(), None) {
                Ok(_) => assert_eq!(bad, 0, "{logits:?}"),
                Err(Error::NonFiniteLogits { num_tokens }) => assert_eq!(num_tokens, bad, "{logits:?}"),
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn a_masked_expert_weighs_nothing() {
        let got = route(&config(2, 2, false), vec![f32::NEG_INFINITY, 0.0], None).expect("one logit is finite");
        assert_eq!((got.topk_experts, got.topk_weights), (vec![1, 0], vec![1.0, 0.0]));
    }

    #[test]
    fn bias_decides() {
        let got = route(&config(2, 1, true), vec![1.0, 0.0], Some(&[0.0, 2.0])).expect("the logits are finite");
        assert_eq!((got.topk_experts, got.router_logits), (vec![1], vec![1.0, 2.0]));
    }
}
