//! Readings of a model's definition that look right and are not. Each has bitten a real implementation.
//!
//! Every test works out the right reading and the wrong ones with numbers that fit on a napkin, and holds the reference
//! and every engine to the right one. A wrong one that came near would make the test say nothing, so that fails too.
//!
//! Most layers here have hidden size 1 and the token 1. Expert e then answers 2^e, unless a test says otherwise, so
//! that the sum tells who was in it.

mod support;

use std::sync::LazyLock;
use support::{assert_close, gpu_context};
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, Context, DROPPED, Error, ExtraWeights, Form, Front, Function,
    GroupScore, Groups, LayerExtras, Masked, MoeConfig, MoeLayer, MoeWeights, Norm, Priority, RankBy, Renormalize,
    Routing, Scores, Selection, SharedExperts, SharedGate, SpecialKind, reference,
};

const RELU: Activation = Activation::plain(Function::Relu);

/// The engines that there are: the CPU always, a GPU where there is one.
static ENGINES: LazyLock<Vec<Context>> =
    LazyLock::new(|| std::iter::once(Context::cpu()).chain(gpu_context()).collect());

fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

fn silu(v: f64) -> f64 {
    v * sigmoid(v)
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let exps: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
    exps.iter().map(|e| e / exps.iter().sum::<f64>()).collect()
}

/// Hidden size 1, expert e answers 2^e times a positive token.
fn layer(num_experts: u32, top_k: u32, routing: Routing) -> (MoeConfig, MoeWeights) {
    let config = MoeConfig::new(1, 1, num_experts, top_k, routing, RELU).expect("valid sizes");
    let weights = MoeWeights {
        router: vec![0.0; num_experts as usize],
        up_proj: vec![1.0; num_experts as usize],
        down_proj: (0..num_experts).map(|e| 2f32.powi(e as i32)).collect(),
        ..MoeWeights::default()
    };
    (config, weights)
}

/// One expert of this activation whose gate and up projections are these numbers; it answers what is between them.
fn one_expert(activation: Activation, [gate, up]: [f32; 2]) -> (MoeConfig, MoeWeights) {
    let config = MoeConfig::new(1, 1, 1, 1, Routing::softmax(false), activation).expect("valid sizes");
    let weights = MoeWeights {
        router: vec![0.0],
        gate_proj: if activation.is_gated() { vec![gate] } else { Vec::new() },
        up_proj: vec![up],
        down_proj: vec![1.0],
        ..MoeWeights::default()
    };
    (config, weights)
}

/// Reference and engines give `right`, and nothing `wrong` is near it.
fn check((config, weights): &(MoeConfig, MoeWeights), batch: &Batch<'_>, right: &[f64], wrong: &[&[f64]]) {
    let largest = right.iter().fold(1e-3f64, |most, v| most.max(v.abs()));
    for wrong in wrong {
        assert_eq!(wrong.len(), right.len());
        let apart = right.iter().zip(*wrong).fold(0.0f64, |most, (a, b)| most.max((a - b).abs()));
        assert!(apart > 1e-3 * largest, "the readings do not differ: {right:?}, {wrong:?}");
    }
    let defined: Vec<f32> = reference::moe_forward(config, weights, *batch).y.iter().map(|&v| v as f32).collect();
    assert_close("reference", &defined, right, |_| 3e-6 * largest);
    for context in ENGINES.iter() {
        let layer = MoeLayer::new(context, config.clone(), weights).expect("a valid layer");
        let y = layer.forward_batch(batch).expect("a valid batch");
        assert_close(&context.device().name, &y, right, |_| 1e-5 * largest);
    }
}

/// Experts and their weights.
type Choices<'a> = &'a [(u32, f64)];

/// One token with these logits makes the right choices, in this order, with these weights.
fn check_choices(layer: &(MoeConfig, MoeWeights), logits: &[f32], right: Choices<'_>, wrong: &[Choices<'_>]) {
    let sum = |choices: Choices<'_>| vec![choices.iter().map(|&(e, w)| w * 2f64.powi(e as i32)).sum::<f64>()];
    let batch = Batch { front: Front::Logits(logits), ..Batch::from(&[1.0]) };
    let sums: Vec<Vec<f64>> = wrong.iter().map(|wrong| sum(wrong)).collect();
    check(layer, &batch, &sum(right), &sums.iter().map(|sum| &sum[..]).collect::<Vec<_>>());
    for context in ENGINES.iter() {
        let layer = MoeLayer::new(context, layer.0.clone(), &layer.1).expect("a valid layer");
        layer.forward_batch(&batch).expect("a valid batch");
        let routing = layer.routing().expect("a pass ran");
        assert_eq!(routing.topk_experts, right.iter().map(|choice| choice.0).collect::<Vec<_>>());
        let weights: Vec<f64> = right.iter().map(|choice| choice.1).collect();
        assert_close("weights", &routing.topk_weights, &weights, |_| 1e-5);
    }
}

/// The comparison can fail: the wrong reading is not the engines'.
#[test]
#[should_panic(expected = "reference: 1 of 1 elements are out of bounds")]
fn a_wrong_reading_fails() {
    check(&layer(2, 1, Routing::softmax(false)), &Batch::from(&[1.0]), &[1.0], &[&[0.5]]);
}

#[test]
#[should_panic(expected = "the readings do not differ")]
fn a_wrong_reading_that_is_nearly_right_fails() {
    check(&layer(2, 1, Routing::softmax(false)), &Batch::from(&[1.0]), &[0.5], &[&[0.500_01]]);
}

// Weights

/// Qwen2 does not, Qwen3 does; DeepSeek-V2 does not, V3 does.
#[test]
fn chosen_weights_sum_to_one_only_if_renormalised() {
    let logits = [2.0, 1.0, 0.0, -1.0];
    let p = softmax(&logits.map(f64::from));
    let plain = [(0, p[0]), (1, p[1])];
    let renormalised = plain.map(|(e, w)| (e, w / (p[0] + p[1])));
    check_choices(&layer(4, 2, Routing::softmax(false)), &logits, &plain, &[&renormalised]);
    check_choices(&layer(4, 2, Routing::softmax(true)), &logits, &renormalised, &[&plain]);
}

#[test]
fn a_softmax_over_the_chosen_is_not_one_over_all() {
    let logits = [0.5, 2.0, 1.5, 0.0];
    let all = softmax(&logits.map(f64::from));
    let selected = softmax(&[2.0, 1.5]);
    let (over_selected, over_all) = ([(1, selected[0]), (2, selected[1])], [(1, all[1]), (2, all[2])]);
    let routing = Routing::new(Scores::SoftmaxSelected, false);
    check_choices(&layer(4, 2, routing), &logits, &over_selected, &[&over_all]);
    check_choices(&layer(4, 2, Routing::softmax(false)), &logits, &over_all, &[&over_selected]);
}

/// The bias of DeepSeek-V3 (on sigmoids) and ERNIE (on a softmax) only chooses.
#[test]
fn weights_come_from_unbiased_scores() {
    let logits = [1.0, 0.5, 0.0];
    let bias = [-0.75, 0.0, 0.5];
    for function in [Scores::Sigmoid, Scores::Softmax] {
        let s = match function {
            Scores::Sigmoid => logits.map(|l| sigmoid(f64::from(l))).to_vec(),
            _ => softmax(&logits.map(f64::from)),
        };
        let biased = |e: usize| s[e] + f64::from(bias[e]);
        let mut layer = layer(3, 2, Routing::new(function, false));
        layer.1.extras.selection_bias = Some(bias.to_vec());
        let right = [(2, s[2]), (1, s[1])];
        let weighted_by_biased = [(2, biased(2)), (1, biased(1))];
        let chosen_by_unbiased = [(0, s[0]), (1, s[1])];
        check_choices(&layer, &logits, &right, &[&weighted_by_biased, &chosen_by_unbiased]);
    }
}

/// Kolibri adds the bias to logits, DeepSeek to scores. The weights are scores either way.
#[test]
fn a_bias_is_added_to_what_ranks() {
    let logits = [3.0, 0.0];
    let by_score = [(1, sigmoid(0.0))]; // 0.95 and 0.5 + 1
    let by_logit = [(0, sigmoid(3.0))]; // 3 and 0 + 1
    for (rank_by, right, wrong) in [(RankBy::Scores, by_score, by_logit), (RankBy::Logits, by_logit, by_score)] {
        let mut layer = layer(2, 1, Routing { rank_by, ..Routing::new(Scores::Sigmoid, false) });
        layer.1.extras.selection_bias = Some(vec![0.0, 1.0]);
        check_choices(&layer, &logits, &right, &[&wrong]);
    }
}

/// DeepSeek adds it to the sum; LFM2, Hunyuan and ERNIE say what the sum must not be less than.
#[test]
fn an_epsilon_is_added_and_a_floor_clamps() {
    let logits = [0.5, 0.25, 0.0];
    let by = |divisor: f64| [(0, 0.5 / divisor), (1, 0.25 / divisor)];
    let raw = |epsilon, floor| {
        let renormalize = Some(Renormalize { epsilon, floor, ..Renormalize::default() });
        layer(3, 2, Routing { renormalize, ..Routing::new(Scores::Raw, false) })
    };
    check_choices(&raw(0.5, 0.0), &logits, &by(1.25), &[&by(0.75)]);
    check_choices(&raw(0.0, 0.5), &logits, &by(0.75), &[&by(1.25)]); // the sum is above
    check_choices(&raw(0.0, 1.0), &logits, &by(1.0), &[&by(0.75), &by(1.75)]); // the sum is below
    check_choices(&raw(0.5, 1.5), &logits, &by(1.5), &[&by(1.25), &by(0.75), &by(2.0)]); // adds, then clamps
}

/// A sum of zero leaves the weights zero, and NaN out of the model.
#[test]
fn weights_that_are_all_zero_stay_zero() {
    let layer = layer(2, 1, Routing::new(Scores::Raw, true));
    let batch = Batch { front: Front::Logits(&[0.0, -1.0]), ..Batch::from(&[1.0]) };
    check(&layer, &batch, &[0.0], &[&[1.0]]);
}

#[test]
fn weights_may_be_divided_by_another_norm_than_the_sum() {
    let (sum, root) = ([(0, 3.0 / 7.0), (1, 4.0 / 7.0)], [(0, 3.0 / 5.0), (1, 4.0 / 5.0)]);
    let order = |weights: [(u32, f64); 2]| [weights[1], weights[0]];
    for (p, right, wrong) in [(1.0, sum, root), (2.0, root, sum)] {
        let renormalize = Some(Renormalize { p, ..Renormalize::default() });
        let layer = layer(2, 2, Routing { renormalize, ..Routing::new(Scores::Raw, false) });
        check_choices(&layer, &[3.0, 4.0], &order(right), &[&order(wrong)]);
    }
}

/// The scaling factor of the routed experts must not be divided away again.
#[test]
fn the_scale_comes_after_renormalising() {
    let logits = [1.0, 0.0];
    let s = [sigmoid(1.0), sigmoid(0.0)];
    let times = |scale: f64| [0, 1].map(|e| (e as u32, scale * s[e] / (s[0] + s[1])));
    let routing = Routing { scale: 2.5, ..Routing::new(Scores::Sigmoid, true) };
    check_choices(&layer(2, 2, routing), &logits, &times(2.5), &[&times(1.0)]);
}

/// Gemma-4. It also has no say in who is chosen.
#[test]
fn a_scale_of_each_expert_comes_after_renormalising() {
    let logits = [1.0, 0.5, 0.0];
    let p = softmax(&logits.map(f64::from));
    let scale = [0.5, 1.0, 4.0];
    let mut layer = layer(3, 2, Routing::softmax(true));
    layer.1.extras.per_expert_scale = Some(scale.map(|s| s as f32).to_vec());
    let sum = p[0] + p[1];
    let scaled_sum = p[0] * scale[0] + p[1] * scale[1];
    let right = [(0, p[0] / sum * scale[0]), (1, p[1] / sum * scale[1])];
    let before = [(0, p[0] * scale[0] / scaled_sum), (1, p[1] * scale[1] / scaled_sum)];
    let other = p[2] * scale[2] + p[1];
    let chosen_by_scaled = [(2, p[2] * scale[2] / other), (1, p[1] / other)];
    check_choices(&layer, &logits, &right, &[&before, &chosen_by_scaled]);
}

/// Phi-3.5-MoE: the weight of each choice is a softmax over what is left and close to it.
#[test]
fn sparsemixer_weights_do_not_sum_to_one() {
    let jitter = 0.25; // close is half of the larger magnitude
    let layer = layer(4, 2, Routing { selection: Selection::Sparsemixer { jitter }, ..Routing::softmax(false) });
    // 2.0 and 1.5 are close to 2.0. Of the rest, 0.5 is not close to 1.5.
    let first = 1.0 / (1.0 + (-0.5f64).exp());
    let right = [(0, first), (1, 1.0)];
    let one_softmax = [(0, first), (1, 1.0 - first)];
    check_choices(&layer, &[2.0, 1.5, 0.5, -3.0], &right, &[&one_softmax]);
    // The second pass divides by the second maximum: (1 - 0.45) / 1 is not close, (1 - 0.45) / 2 would be.
    let by_first_max = [(0, 1.0 / (1.0 + (-1f64).exp())), (1, 1.0 / (1.0 + (-0.55f64).exp()))];
    let right = [by_first_max[0], (1, 1.0)];
    check_choices(&layer, &[2.0, 1.0, 0.45, -3.0], &right, &[&by_first_max]);
}

/// DeepSeek-V4's hash layers look up who, and still score how much.
#[test]
fn a_token_table_gives_experts_and_not_weights() {
    let mut layer = layer(
        3,
        2,
        Routing { selection: Selection::TokenTable { vocab_size: 2 }, ..Routing::new(Scores::Sigmoid, true) },
    );
    layer.1.extras.token_table = Some(vec![0, 1, 2, 0]);
    let s = [2.0, 1.0, -1.0].map(sigmoid);
    let sum = s[2] + s[0];
    let batch = Batch { token_ids: Some(&[1]), front: Front::Logits(&[2.0, 1.0, -1.0]), ..Batch::from(&[1.0]) };
    let right = 4.0 * s[2] / sum + s[0] / sum;
    let even = (4.0 + 1.0) / 2.0;
    let best = (s[0] + 2.0 * s[1]) / (s[0] + s[1]);
    check(&layer, &batch, &[right], &[&[even], &[best]]);
}

// Logits

#[test]
fn the_cap_is_on_logits_and_comes_after_bias_and_factor() {
    let (cap, factor, bias) = (1.5, 0.5, 1.0);
    let routing =
        Routing { logit_scale: factor as f32, logit_softcap: Some(cap as f32), ..Routing::new(Scores::Sigmoid, false) };
    let mut layer = layer(1, 1, routing);
    layer.1.router = vec![3.0];
    layer.1.router_bias = Some(vec![bias as f32]);
    let soft = |v: f64| cap * (v / cap).tanh();
    check(
        &layer,
        &Batch::from(&[1.0]),
        &[sigmoid(soft((3.0 + bias) * factor))],
        &[
            &[sigmoid((3.0 + bias) * factor)],
            &[soft(sigmoid((3.0 + bias) * factor))],
            &[sigmoid(factor * soft(3.0 + bias))],
            &[sigmoid(soft(3.0 * factor + bias))],
            &[sigmoid(soft(3.0 * factor) + bias)],
        ],
    );
}

/// Logits of the caller's are after scale, bias and cap.
#[test]
fn given_logits_are_final() {
    let routing = Routing { logit_scale: 0.5, logit_softcap: Some(1.0), ..Routing::new(Scores::Sigmoid, false) };
    let mut layer = layer(1, 1, routing);
    layer.1.router_bias = Some(vec![1.0]);
    let again = sigmoid((3.0f64 * 0.5).tanh());
    check_choices(&layer, &[3.0], &[(0, sigmoid(3.0))], &[&[(0, again)], &[(0, sigmoid(4.0))]]);
}

// Selection

/// Older code fills with 0, newer text with -inf. With negative biased scores another set is chosen.
#[test]
fn masked_groups_are_minus_infinity_or_zero() {
    let logits = [2.0, 0.0, -1.0, -2.0];
    // Biased scores: 0.68, -0.4 | -0.63, -0.78. The first group wins; its second expert is below zero.
    let bias = [-0.2, -0.9, -0.9, -0.9];
    let s = logits.map(|l| sigmoid(f64::from(l)));
    let (minus_infinity, zero) = ([(0, s[0]), (1, s[1])], [(0, s[0]), (2, s[2])]);
    for (masked, right, wrong) in [(Masked::NegInfinity, minus_infinity, zero), (Masked::Zero, zero, minus_infinity)] {
        let groups = Some(Groups { num_groups: 2, keep: 1, score: GroupScore::Max, masked });
        let mut layer = layer(4, 2, Routing { groups, ..Routing::new(Scores::Sigmoid, false) });
        layer.1.extras.selection_bias = Some(bias.to_vec());
        check_choices(&layer, &logits, &right, &[&wrong]);
    }
}

/// DeepSeek-V2 goes by a group's best expert, V3 by the sum of its two best.
#[test]
fn a_groups_score_is_its_best_or_the_sum_of_two() {
    let logits = [2.0, -3.0, 1.0, 0.5];
    let s = logits.map(|l| sigmoid(f64::from(l))); // 0.88, 0.05 | 0.73, 0.62
    let (by_best, by_two) = ([(0, s[0])], [(2, s[2])]);
    for (score, right, wrong) in [(GroupScore::Max, by_best, by_two), (GroupScore::SumTop2, by_two, by_best)] {
        let groups = Some(Groups { num_groups: 2, keep: 1, score, masked: Masked::NegInfinity });
        let layer = layer(4, 1, Routing { groups, ..Routing::new(Scores::Sigmoid, false) });
        check_choices(&layer, &logits, &right, &[&wrong]);
    }
}

#[test]
fn groups_are_scored_with_the_bias() {
    let logits = [2.0, 1.0, 0.0, 0.0];
    let s = logits.map(|l| sigmoid(f64::from(l)));
    let groups = Some(Groups { num_groups: 2, keep: 1, score: GroupScore::SumTop2, masked: Masked::NegInfinity });
    let mut layer = layer(4, 1, Routing { groups, ..Routing::new(Scores::Sigmoid, false) });
    layer.1.extras.selection_bias = Some(vec![0.0, 0.0, 0.3, 0.9]); // 1.61 against 1.0, or 2.2 with it
    check_choices(&layer, &logits, &[(3, s[3])], &[&[(0, s[0])]]);
}

/// torch.topk promises no order.
#[test]
fn ties_go_to_the_lowest_index() {
    let even = softmax(&[0.0; 5])[0];
    let first = |n: u32| (0..n).map(|e| (e, even)).collect::<Vec<_>>();
    let last: Vec<_> = (2..5).map(|e| (e, even)).collect();
    check_choices(&layer(5, 3, Routing::softmax(false)), &[1.0; 5], &first(3), &[&last]);
    // -0 is not below +0.
    let zeros = [-0.0, 0.0, -0.0, 0.0, 0.0];
    let signs = [(1, even), (3, even), (4, even)];
    check_choices(&layer(5, 3, Routing::softmax(false)), &zeros, &first(3), &[&signs]);
    // Groups tie in the same way.
    let groups = Some(Groups { num_groups: 5, keep: 2, score: GroupScore::Max, masked: Masked::NegInfinity });
    let layer = layer(5, 2, Routing { groups, ..Routing::softmax(false) });
    check_choices(&layer, &[1.0; 5], &first(2), &[&last[1..]]);
}

/// No order is right for NaN, so nobody is chosen at all; where one has to be, it is the last.
#[test]
fn nan_is_an_error_and_not_an_expert() {
    assert_eq!(reference::router::top_k_indices(&[f64::NAN, f64::NEG_INFINITY, 0.0], 3), [2, 1, 0]);
    let (config, mut weights) = layer(3, 2, Routing::softmax(false));
    weights.router = vec![1e30, 0.0, 0.0];
    for context in ENGINES.iter() {
        let layer = MoeLayer::new(context, config.clone(), &weights).expect("finite weights");
        let own = layer.forward(&[1e30]);
        assert!(matches!(own, Err(Error::NonFiniteLogits { num_tokens: 1 })), "{own:?}");
        let given = layer.forward_with_logits(&[1.0], &[0.0, f32::NAN, 1.0]);
        assert!(matches!(given, Err(Error::NonFinite { index: 1, .. })), "{given:?}");
    }
}

/// A sigmoid is 1 long before logits are equal.
#[test]
fn saturated_scores_do_not_make_a_tie() {
    let layer = layer(3, 1, Routing::new(Scores::Sigmoid, false));
    check_choices(&layer, &[40.0, 60.0, 50.0], &[(1, 1.0)], &[&[(0, 1.0)]]);
}

/// The usual guard against overflow, exp(min(-v, 80)), makes all scores below sigmoid(-80) the same.
#[test]
fn tiny_scores_are_not_all_the_same() {
    let (equal, apart) = ([(0, 0.5), (1, 0.5)], [(0, sigmoid(1.0)), (1, sigmoid(-1.0))]);
    let sigmoids = layer(2, 2, Routing::new(Scores::Sigmoid, true));
    check_choices(&sigmoids, &[-84.0, -85.0], &apart, &[&equal]);
    // Roots of exponentials, where those are no numbers of f32 any more.
    let roots = layer(2, 2, Routing::new(Scores::SqrtSoftplus, true));
    check_choices(&roots, &[-110.0, -112.0], &apart, &[&equal]);
}

// Capacity

fn capacity(limit: u32, priority: Priority) -> Capacity {
    let limit = CapacityLimit::Number(limit);
    Capacity { limit, per_sequence: false, priority, renormalize_after: false, pass_through: false }
}

/// Hunyuan drops when it infers, too: what a token gets depends on who came before it.
#[test]
fn a_capacity_makes_a_token_depend_on_its_batch() {
    let routing = Routing { capacity: Some(capacity(1, Priority::Position)), ..Routing::softmax(true) };
    let layer = layer(2, 1, routing);
    let alone = Batch { front: Front::Logits(&[0.0, 1.0]), ..Batch::from(&[3.0]) };
    check(&layer, &alone, &[6.0], &[&[0.0]]);
    let second = Batch { front: Front::Logits(&[0.0, 1.0, 0.0, 1.0]), ..Batch::from(&[1.0, 3.0]) };
    check(&layer, &second, &[2.0, 0.0], &[&[2.0, 6.0]]);
}

#[test]
fn a_capacity_per_sequence_starts_again_with_each() {
    for per_sequence in [false, true] {
        let capacity = Capacity { per_sequence, ..capacity(1, Priority::Position) };
        let layer = layer(2, 1, Routing { capacity: Some(capacity), ..Routing::softmax(true) });
        let logits = [0.0, 1.0, 0.0, 1.0];
        let batch = Batch { front: Front::Logits(&logits), tokens_per_sequence: Some(1), ..Batch::from(&[1.0, 3.0]) };
        let (of_batch, of_sequence): (&[f64], &[f64]) = (&[2.0, 0.0], &[2.0, 6.0]);
        let (right, wrong) = if per_sequence { (of_sequence, of_batch) } else { (of_batch, of_sequence) };
        check(&layer, &batch, right, &[wrong]);
    }
}

/// Switch goes by position, GShard lets every first choice go before any second one, and V-MoE lets the surest token
/// go first.
#[test]
fn who_goes_first_decides_who_is_dropped() {
    // Token 0 wants expert 0, then 1. Token 1 wants 1, then 0, and more so. Token 2 wants 1 most of all, then 0.
    let logits = [0.2, 0.0, 0.0, 1.0, 0.0, 2.0];
    let p: Vec<Vec<f64>> = logits.chunks(2).map(|row| softmax(&[f64::from(row[0]), f64::from(row[1])])).collect();
    let by_position = [p[0][0] + 2.0 * p[0][1], 0.0, 0.0];
    let by_choice = [p[0][0], 2.0 * p[1][1], 0.0];
    let by_score = [p[0][0], 0.0, 2.0 * p[2][1]];
    let all = [&by_position[..], &by_choice[..], &by_score[..]];
    for (n, priority) in [Priority::Position, Priority::Choice, Priority::Score].into_iter().enumerate() {
        let layer = layer(2, 2, Routing { capacity: Some(capacity(1, priority)), ..Routing::softmax(false) });
        let batch = Batch { front: Front::Logits(&logits), ..Batch::from(&[1.0; 3]) };
        let wrong: Vec<&[f64]> = (0..3).filter(|other| *other != n).map(|other| all[other]).collect();
        check(&layer, &batch, all[n], &wrong);
    }
}

#[test]
fn what_is_left_may_be_renormalised_after_dropping() {
    // Token 0 takes experts 0 and 1. Token 1 comes too late for expert 0, its first choice, and has only expert 2.
    let logits = [1.0, 0.0, -9.0, 1.0, -9.0, 0.0];
    let p = softmax(&[1.0, 0.0]);
    for renormalize_after in [false, true] {
        let capacity = Capacity { renormalize_after, ..capacity(1, Priority::Position) };
        let layer = layer(3, 2, Routing { capacity: Some(capacity), ..Routing::softmax(true) });
        let batch = Batch { front: Front::Logits(&logits), ..Batch::from(&[1.0, 1.0]) };
        let (before, after) = ([p[0] + 2.0 * p[1], 4.0 * p[1]], [p[0] + 2.0 * p[1], 4.0]);
        let (right, wrong) = if renormalize_after { (after, before) } else { (before, after) };
        check(&layer, &batch, &right, &[&wrong]);
    }
}

#[test]
fn a_dropped_token_is_zero_or_passes_through_with_its_weight() {
    let logits = [0.0, 1.0, 0.0, 1.0];
    let p = softmax(&[0.0, 1.0])[1];
    for (pass_through, right, wrong) in [(false, 0.0, [3.0 * p, 3.0]), (true, 3.0 * p, [0.0, 3.0])] {
        let capacity = Capacity { pass_through, ..capacity(1, Priority::Position) };
        let layer = layer(2, 1, Routing { capacity: Some(capacity), ..Routing::softmax(false) });
        let batch = Batch { front: Front::Logits(&logits), ..Batch::from(&[1.0, 3.0]) };
        check(&layer, &batch, &[2.0 * p, right], &[&[2.0 * p, wrong[0]], &[2.0 * p, wrong[1]]]);
    }
}

/// The factor is of a fair share: `factor * tokens * top_k / experts`, and tokens without top_k are half of it.
#[test]
fn a_capacity_factor_counts_every_choice() {
    let round_up = Capacity {
        limit: CapacityLimit::Fraction { fraction: 1.0 * 2.0 / 4.0, round_up: true, minimum: 1 },
        ..capacity(1, Priority::Position)
    };
    assert_eq!(round_up.of_tokens(6), 3);
    let limit = |fraction, round_up, minimum| Capacity {
        limit: CapacityLimit::Fraction { fraction, round_up, minimum },
        ..capacity(1, Priority::Position)
    };
    assert_eq!([limit(0.3, true, 0), limit(0.3, false, 0)].map(|c| c.of_tokens(6)), [2, 1]);
    assert_eq!(limit(0.3, false, 4).of_tokens(6), 4);
    // 0.1 * 30 is 3.0000000000000004 or so, and still 3.
    assert_eq!(limit(0.1, true, 0).of_tokens(30), 3);
}

/// Zhou et al.: experts choose tokens. A token may have several, or nobody.
#[test]
fn expert_choice_is_the_experts_choice() {
    let capacity = Some(capacity(1, Priority::Position));
    let routing = Routing { selection: Selection::ExpertChoice, capacity, ..Routing::softmax(false) };
    let layer = layer(2, 2, routing);
    // Token 0 prefers expert 0, token 1 expert 0 even more; expert 1 prefers token 0.
    let logits = [1.0, 0.0, 3.0, 0.0];
    let p = [softmax(&[1.0, 0.0]), softmax(&[3.0, 0.0])];
    let batch = Batch { front: Front::Logits(&logits), ..Batch::from(&[1.0, 1.0]) };
    check(&layer, &batch, &[2.0 * p[0][1], p[1][0]], &[&[p[0][0] + 2.0 * p[0][1], 0.0], &[p[0][0], p[1][0]]]);
}

/// -1 from the caller is nobody: no index, no share of anything, and no row of somebody else's.
#[test]
fn nobody_contributes_nothing() {
    let layer = layer(2, 2, Routing::softmax(true));
    let experts = [-1, 1, -1, -1];
    let front = Front::Assignments { experts: &experts, weights: &[0.5, 0.25, 1.0, 1.0] };
    check(&layer, &Batch { front, ..Batch::from(&[1.0, 1.0]) }, &[0.5, 0.0], &[&[1.0, 0.0], &[0.5, 3.0]]);
    for context in ENGINES.iter() {
        let layer = MoeLayer::new(context, layer.0.clone(), &layer.1).expect("valid");
        let y = layer.forward_with_assignments(&[1.0, 1.0], &experts, &[0.5, 0.25, 1.0, 1.0]).expect("valid");
        assert_eq!(y[1], 0.0);
        let routing = layer.routing().expect("a pass ran");
        assert_eq!(routing.topk_experts, [DROPPED, 1, DROPPED, DROPPED]);
        assert_eq!((routing.num_dropped, &routing.tokens_per_expert[..]), (3, &[0, 1][..]));
    }
}

// Between an expert's projections

/// gpt-oss clamps the gate from above only and the other half on both sides, adds 1 to that, and has a sharper sigmoid.
#[test]
fn gpt_oss_clamps_the_gate_above_only_and_adds_one() {
    let (limit, alpha) = (1.0, 1.5);
    let activation = Activation { form: Form::GptOss { limit: 1.0, alpha: 1.5 }, function: Function::Silu };
    let f = |g: f64, alpha: f64| g * sigmoid(alpha * g);
    let clamp = |v: f64| v.clamp(-limit, limit);
    for (g, u) in [(-2.0f64, 0.5f64), (2.0, 0.5), (0.5, 2.0), (0.5, -3.0)] {
        let right = f(g.min(limit), alpha) * (clamp(u) + 1.0);
        let mut wrong = vec![f(g.min(limit), alpha) * clamp(u), f(g.min(limit), 1.0) * (clamp(u) + 1.0)];
        match (g, u) {
            (-2.0, _) => wrong.push(f(clamp(g), alpha) * (clamp(u) + 1.0)),
            (2.0, _) => wrong.push(f(g, alpha) * (clamp(u) + 1.0)),
            (_, -3.0) => {
                // Clamped to -1, plus 1: nothing is left of the expert.
                assert_eq!(right, 0.0);
                wrong = vec![f(g, alpha) * clamp(u), f(g, alpha) * (u.min(limit) + 1.0)];
            }
            _ => wrong.push(f(g, alpha) * (u + 1.0)),
        }
        let wrong: Vec<[f64; 1]> = wrong.into_iter().map(|v| [v]).collect();
        let wrong: Vec<&[f64]> = wrong.iter().map(|v| &v[..]).collect();
        check(&one_expert(activation, [g as f32, u as f32]), &Batch::from(&[1.0]), &[right], &wrong);
    }
}

/// DeepSeek-V4 clamps as gpt-oss does, but with a plain SiLU and no 1. Step-3 clamps what the SiLU made.
#[test]
fn a_clamp_comes_before_the_function_or_after_it() {
    let silu_of = |form| Activation { form, function: Function::Silu };
    let (before, after) = (silu_of(Form::Clamped { limit: 1.0 }), silu_of(Form::ClampedAfter { limit: 1.0 }));
    let gpt_oss = |g: f64, u: f64| g.min(1.0) * sigmoid(1.702 * g.min(1.0)) * (u.clamp(-1.0, 1.0) + 1.0);
    for (g, u) in [(3.0f64, 0.5f64), (3.0, 2.0), (3.0, -2.0)] {
        let up = u.clamp(-1.0, 1.0);
        let [first, last] = [silu(g.min(1.0)) * up, silu(g).min(1.0) * up];
        let wrong: [&[f64]; 3] = [&[last], &[gpt_oss(g, u)], &[silu(g) * u]];
        check(&one_expert(before, [g as f32, u as f32]), &Batch::from(&[1.0]), &[first], &wrong);
        check(&one_expert(after, [g as f32, u as f32]), &Batch::from(&[1.0]), &[last], &[&[first], &[silu(g) * u]]);
    }
    // Neither bounds the gate from below.
    let right = silu(-2.0) * 0.5;
    check(&one_expert(before, [-2.0, 0.5]), &Batch::from(&[1.0]), &[right], &[&[silu(-1.0) * 0.5]]);
    let wide = silu_of(Form::ClampedAfter { limit: 0.1 });
    check(&one_expert(wide, [-2.0, 0.05]), &Batch::from(&[1.0]), &[silu(-2.0) * 0.05], &[&[-0.1 * 0.05]]);
}

/// Kimi-K3's SiTU: the sigmoid sees the gate before the cap.
#[test]
fn situ_caps_both_halves_and_its_sigmoid_sees_the_gate() {
    let activation = Activation { form: Form::SoftCapped { gate: 1.5, up: 0.5 }, function: Function::Silu };
    let cap = |v: f64, cap: f64| cap * (v / cap).tanh();
    let (g, u) = (1.0, 2.0);
    check(
        &one_expert(activation, [g as f32, u as f32]),
        &Batch::from(&[1.0]),
        &[cap(g, 1.5) * sigmoid(g) * cap(u, 0.5)],
        &[
            &[cap(g, 1.5) * sigmoid(cap(g, 1.5)) * cap(u, 0.5)],
            &[cap(silu(g), 1.5) * cap(u, 0.5)],
            &[cap(g, 1.5) * sigmoid(g) * u],
            &[cap(g, 0.5) * sigmoid(g) * cap(u, 1.5)],
        ],
    );
}

/// w1 is the gate, w3 is not: exchanged, nothing fails and everything is wrong.
#[test]
fn the_function_is_on_the_gate() {
    let layer = one_expert(Activation::SWIGLU, [2.0, -1.0]);
    check(&layer, &Batch::from(&[1.0]), &[-silu(2.0)], &[&[2.0 * silu(-1.0)], &[silu(-2.0)]]);
}

/// Nemotron, Switch and NLLB.
#[test]
fn experts_without_a_gate_have_two_matrices() {
    let squared = Activation::plain(Function::Relu2);
    let (config, weights) = one_expert(squared, [0.0, 3.0]);
    check(&(config.clone(), weights.clone()), &Batch::from(&[1.0]), &[9.0], &[&[27.0], &[3.0], &[0.0]]);
    // A third matrix is not left out in silence.
    let third = MoeWeights { gate_proj: vec![1.0], ..weights };
    let result = MoeLayer::new(&Context::cpu(), config, &third).map(|_| ());
    assert!(matches!(result, Err(Error::InvalidConfig { field: "gate_proj", .. })), "{result:?}");
}

/// "gelu" has three meanings, which differ in the third digit.
#[test]
fn three_functions_are_called_gelu() {
    let v = -1.5f64;
    let exact = v * 0.066_807_201_268_858_07; // the normal distribution at -1.5
    let tanh = v * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044_715 * v * v * v));
    let quick = v * sigmoid(1.702 * v);
    for (function, right, wrong) in [
        (Function::Gelu, exact, [tanh, quick]),
        (Function::GeluTanh, tanh, [exact, quick]),
        (Function::GeluQuick, quick, [exact, tanh]),
    ] {
        let layer = one_expert(Activation::plain(function), [0.0, v as f32]);
        check(&layer, &Batch::from(&[1.0]), &[right], &[&[wrong[0]], &[wrong[1]]]);
    }
}

/// The usual guard against overflow, exp(min(-v, 80)), leaves 1e-33 of a gate whose sigmoid is nothing.
#[test]
fn a_closed_gate_lets_nothing_through() {
    let scale = 1e35f64;
    let cases = [
        (Activation::plain(Function::Silu), -86.0, 1.0),
        (Activation::plain(Function::GeluQuick), -50.5, 1.702),
        (Activation { form: Form::GptOss { limit: 7.0, alpha: 1.702 }, function: Function::Silu }, -50.5, 1.702),
    ];
    let through = |v: f64, t: f64| v * scale * sigmoid(t);
    for (activation, v, slope) in cases {
        // gpt-oss multiplies by up + 1.
        let up = if activation.is_gated() { 0.0 } else { v as f32 };
        let (config, mut weights) = one_expert(activation, [v as f32, up]);
        weights.down_proj = vec![scale as f32];
        check(&(config, weights), &Batch::from(&[1.0]), &[through(v, slope * v)], &[&[through(v, -80.0)]]);
    }
    let v = -9.95;
    let slope = 2.0 * (2.0 / std::f64::consts::PI).sqrt() * (1.0 + 0.044_715 * v * v);
    let (config, mut weights) = one_expert(Activation::plain(Function::GeluTanh), [0.0, v as f32]);
    weights.down_proj = vec![scale as f32];
    let v = f64::from(v as f32);
    check(&(config, weights), &Batch::from(&[1.0]), &[through(v, slope * v)], &[&[through(v, -80.0)]]);
}

// Around the experts

/// Llama-4. An expert is not linear, so it matters where the weight goes.
#[test]
fn weighing_the_input_is_not_weighing_the_output() {
    let (g, u, w) = (2.0, 3.0, sigmoid(0.5));
    let (of_input, of_output) = (silu(w * g) * w * u, w * silu(g) * u);
    for (weigh_input, right, wrong) in [(true, of_input, of_output), (false, of_output, of_input)] {
        let routing = Routing { weigh_input, ..Routing::new(Scores::Sigmoid, false) };
        let (_, weights) = one_expert(Activation::SWIGLU, [g as f32, u as f32]);
        let config = MoeConfig::new(1, 1, 1, 1, routing, Activation::SWIGLU).expect("valid");
        let batch = Batch { front: Front::Logits(&[0.5]), ..Batch::from(&[1.0]) };
        // Both ends would be weighed twice.
        check(&(config, weights), &batch, &[right], &[&[wrong], &[w * of_input]]);
    }
}

/// The weight is on all of an expert's output, bias and norm included. The layer's own bias is nobody's.
#[test]
fn an_experts_bias_is_weighed_and_the_layers_is_not() {
    let mut layer = layer(2, 1, Routing::new(Scores::Sigmoid, false));
    layer.1.extras.down_bias = Some(vec![10.0, 20.0]);
    layer.1.extras.output_bias = Some(vec![100.0]);
    let w = sigmoid(1.0);
    let batch = Batch { front: Front::Logits(&[0.0, 1.0]), ..Batch::from(&[1.0]) };
    let right = w * (2.0 + 20.0) + 100.0;
    check(&layer, &batch, &[right], &[&[w * 2.0 + 20.0 + 100.0], &[w * (2.0 + 20.0 + 100.0)], &[w * 22.0]]);
}

fn with_extras((config, weights): (MoeConfig, MoeWeights), extras: LayerExtras) -> (MoeConfig, MoeWeights) {
    (config.with_extras(extras).expect("valid extras"), weights)
}

/// Shared experts that answer 10, 20, ... times a positive token.
fn with_shared(layer: (MoeConfig, MoeWeights), num: u32, gate: SharedGate, average: bool) -> (MoeConfig, MoeWeights) {
    let shared = SharedExperts { num, intermediate_size: 1, activation: RELU, gate, average };
    let mut layer = with_extras(layer, LayerExtras { shared: Some(shared), ..LayerExtras::default() });
    layer.1.extras.shared_up_proj = vec![1.0; num as usize];
    layer.1.extras.shared_down_proj = (1..=num).map(|s| 10.0 * s as f32).collect();
    layer
}

#[test]
fn shared_experts_are_added_or_averaged() {
    for (average, right, wrong) in [(false, 11.0, 5.5), (true, 5.5, 11.0)] {
        let mut layer = with_shared(layer(1, 1, Routing::softmax(true)), 1, SharedGate::None, average);
        layer.1.extras.output_bias = Some(vec![100.0]);
        let halved = if average { 55.5 } else { 0.0 };
        check(&layer, &Batch::from(&[1.0]), &[right + 100.0], &[&[wrong + 100.0], &[right], &[halved]]);
    }
    // Two of them are not averaged among themselves.
    let layer = with_shared(layer(1, 1, Routing::softmax(true)), 2, SharedGate::None, false);
    check(&layer, &Batch::from(&[1.0]), &[31.0], &[&[16.0]]);
}

/// Qwen2-MoE gates the shared expert alone; a residual layer with a coefficient also takes from the routed ones.
#[test]
fn a_shared_gate_is_a_sigmoid_and_may_mix() {
    let g = sigmoid(0.5);
    let [alone, mixed, reversed] = [1.0 + g * 10.0, (1.0 - g) + g * 10.0, g + (1.0 - g) * 10.0];
    for (gate, right, wrong) in [(SharedGate::Sigmoid, alone, mixed), (SharedGate::Mix, mixed, alone)] {
        let mut layer = with_shared(layer(1, 1, Routing::softmax(true)), 1, gate, false);
        layer.1.extras.shared_gate = Some(vec![0.5]);
        check(&layer, &Batch::from(&[1.0]), &[right], &[&[wrong], &[reversed], &[11.0]]);
    }
}

/// As if the token had chosen the shared experts, too: one norm and one scale for all.
#[test]
fn joint_shared_gates_are_renormalised_with_the_choices() {
    let routing = Routing { scale: 2.5, ..Routing::new(Scores::Sigmoid, true) };
    let mut layer = with_shared(layer(3, 2, routing), 2, SharedGate::Joint, false);
    layer.1.extras.shared_gate = Some(vec![0.5, -1.0]);
    let s = [2.0, 1.0].map(sigmoid);
    let gates = [0.5, -1.0].map(sigmoid);
    let (routed, shared) = (s[0] + 2.0 * s[1], 10.0 * gates[0] + 20.0 * gates[1]);
    let alone = s[0] + s[1];
    let all = alone + gates[0] + gates[1];
    let batch = Batch { front: Front::Logits(&[2.0, 1.0, 0.0]), ..Batch::from(&[1.0]) };
    check(
        &layer,
        &batch,
        &[2.5 * (routed + shared) / all],
        &[
            &[2.5 * routed / alone + shared],
            &[2.5 * (routed / alone + shared)],
            &[2.5 * routed / all + shared / all],
            &[2.5 * routed / alone + 2.5 * shared / (gates[0] + gates[1])],
        ],
    );
}

#[test]
fn neither_scale_is_on_shared_experts() {
    let routing = Routing { scale: 2.0, ..Routing::softmax(true) };
    let mut layer = with_shared(layer(1, 1, routing), 1, SharedGate::None, false);
    let extras = LayerExtras { routed_scale: 3.0, ..layer.0.extras().clone() };
    layer.0 = layer.0.with_extras(extras).expect("valid");
    check(&layer, &Batch::from(&[1.0]), &[16.0], &[&[66.0], &[11.0], &[36.0], &[26.0]]);
}

/// A norm forgets the scale of what it reads, so a factor before it is not one after it.
#[test]
fn the_routed_scale_is_after_the_routed_norm() {
    let routing = Routing { scale: 5.0, ..Routing::softmax(true) };
    let norm = Some(Norm { epsilon: 0.0, scale_first: false });
    let extras = LayerExtras { routed_norm: norm, routed_scale: 3.0, ..LayerExtras::default() };
    let mut layer = with_extras(layer(2, 1, routing), extras);
    layer.1.extras.routed_norm = Some(vec![2.0]);
    // Of one number the norm leaves the sign.
    check(&layer, &Batch::from(&[1.0]), &[2.0 * 3.0], &[&[2.0], &[30.0], &[10.0]]);
}

/// On each expert's output, before it is weighed: the other order would forget the weight.
#[test]
fn an_experts_output_is_normed_before_it_is_weighed() {
    let norm = Some(Norm { epsilon: 0.0, scale_first: false });
    let extras = LayerExtras { expert_out_norm: norm, ..LayerExtras::default() };
    let mut layer = with_extras(layer(2, 2, Routing::new(Scores::Sigmoid, false)), extras);
    layer.1.extras.expert_out_norm = Some(vec![1.0]);
    let s = [1.0, 0.0].map(sigmoid);
    let batch = Batch { front: Front::Logits(&[1.0, 0.0]), ..Batch::from(&[1.0]) };
    // Of one positive number the norm leaves 1.
    let (of_each_weighed, of_sum, none) = (2.0, 1.0, s[0] + 2.0 * s[1]);
    check(&layer, &batch, &[s[0] + s[1]], &[&[of_each_weighed], &[of_sum], &[none]]);
}

/// Multiplied by its weight first, a vector has another root mean square.
#[test]
fn a_norms_weight_is_inside_or_outside_the_root() {
    let (x, weight) = ([1.0, 2.0], [3.0, 1.0]);
    let root = |v: [f64; 2]| ((v[0] * v[0] + v[1] * v[1]) / 2.0).sqrt();
    let product = [x[0] * weight[0], x[1] * weight[1]];
    let (outside, inside) = (product.map(|v| v / root(x)), product.map(|v| v / root(product)));
    for (scale_first, right, wrong) in [(false, outside, inside), (true, inside, outside)] {
        // One linear expert that is the identity, for positive tokens.
        let config = MoeConfig::new(2, 2, 1, 1, Routing::softmax(true), RELU).expect("valid");
        let norm = Some(Norm { epsilon: 0.0, scale_first });
        let extras = LayerExtras { expert_norm: norm, ..LayerExtras::default() };
        let identity = vec![1.0, 0.0, 0.0, 1.0];
        let weights = MoeWeights {
            router: vec![0.0; 2],
            up_proj: identity.clone(),
            down_proj: identity,
            extras: ExtraWeights { expert_norm: Some(vec![3.0, 1.0]), ..ExtraWeights::default() },
            ..MoeWeights::default()
        };
        check(&with_extras((config, weights), extras), &Batch::from(&[1.0, 2.0]), &right, &[&wrong, &product, &x]);
    }
}

/// The norm of the router is nobody else's.
#[test]
fn a_router_norm_is_not_on_what_the_experts_read() {
    let norm = Some(Norm { epsilon: 0.0, scale_first: false });
    let extras = LayerExtras { router_norm: norm, ..LayerExtras::default() };
    let mut layer = with_extras(layer(1, 1, Routing::new(Scores::Sigmoid, false)), extras);
    layer.1.extras.router_norm = Some(vec![0.5]);
    layer.1.router = vec![1.0];
    check(&layer, &Batch::from(&[4.0]), &[sigmoid(0.5) * 4.0], &[&[sigmoid(0.5) * 0.5], &[sigmoid(4.0) * 4.0]]);
}

/// Kimi-K3, Nemotron: one projection into the experts' space and one out of it, around the sum. Router and shared
/// experts stay outside.
#[test]
fn only_routed_experts_live_in_the_latent_space() {
    let squared = Activation::plain(Function::Relu2);
    let config = MoeConfig::new(1, 1, 2, 2, Routing::new(Scores::Sigmoid, false), squared).expect("valid");
    let (_, mut weights) = layer(2, 2, Routing::new(Scores::Sigmoid, false));
    weights.router = vec![1.0, -1.0];
    let (config, mut weights) = with_shared((config, weights), 1, SharedGate::None, false);
    let extras = LayerExtras { latent_size: Some(1), ..config.extras().clone() };
    let config = config.with_extras(extras).expect("valid");
    weights.extras.latent_in = Some(vec![2.0]);
    weights.extras.latent_out = Some(vec![3.0]);
    let routed = |router_reads: f64, reads: f64| {
        sigmoid(router_reads) * reads * reads + sigmoid(-router_reads) * 2.0 * reads * reads
    };
    check(
        &(config, weights),
        &Batch::from(&[1.0]),
        &[3.0 * routed(1.0, 2.0) + 10.0],
        &[
            &[3.0 * routed(2.0, 2.0) + 10.0],
            &[3.0 * routed(1.0, 2.0) + 20.0],
            &[3.0 * (routed(1.0, 2.0) + 10.0)],
            &[routed(1.0, 6.0) + 10.0],
        ],
    );
}

/// A zero-computation expert still counts: it takes its share of the weights.
#[test]
fn an_identity_expert_returns_its_input_and_a_zero_expert_nothing() {
    let s = [0.0, 1.0].map(sigmoid);
    let sum = s[0] + s[1];
    for kind in [SpecialKind::Identity, SpecialKind::Zero] {
        let extras = LayerExtras { special_experts: 1, special_kind: kind, ..LayerExtras::default() };
        let mut layer = with_extras(layer(2, 2, Routing::new(Scores::Sigmoid, true)), extras);
        // Only the first expert has weights.
        layer.1.up_proj.truncate(1);
        layer.1.down_proj = vec![5.0];
        let expert = s[0] / sum * 5.0 * 3.0;
        let (identity, zero) = (expert + s[1] / sum * 3.0, expert);
        let (right, wrong) = if kind == SpecialKind::Identity { (identity, zero) } else { (zero, identity) };
        let batch = Batch { front: Front::Logits(&[0.0, 1.0]), ..Batch::from(&[3.0]) };
        check(&layer, &batch, &[right], &[&[wrong], &[15.0], &[expert + 3.0]]);
    }
}
