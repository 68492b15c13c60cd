//! The classic mixtures of `examples/`, the core of each against its paper's equation, on every engine.

mod support;

use support::{Values, assert_close, bits, gpu_context};
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, Context, DROPPED, ExtraWeights, Function, GroupScore, Groups,
    LayerExtras, Masked, MoeConfig, MoeLayer, MoeWeights, Noise, Priority, Routing, Scores, Selection, SharedExperts,
    SharedGate, reference,
};

const H: usize = 12;
const I: usize = 8;
const RELU: Activation = Activation::plain(Function::Relu);

/// The engines that there are: the CPU always, a GPU where there is one.
fn engines() -> Vec<Context> {
    std::iter::once(Context::cpu()).chain(gpu_context()).collect()
}

/// Experts with two matrices, and their random weights.
fn layer(num_experts: u32, top_k: u32, routing: Routing) -> (MoeConfig, MoeWeights) {
    let config = MoeConfig::new(H as u32, I as u32, num_experts, top_k, routing, RELU).expect("valid sizes");
    let weights = MoeWeights { gate_proj: Vec::new(), ..Values(5).weights(&config) };
    (config, weights)
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// `rows [_, H]` times a token.
fn logits(rows: &[f32], token: &[f32]) -> Vec<f64> {
    rows.chunks_exact(H).map(|row| dot(row, token)).collect()
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let exps: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
    exps.iter().map(|e| e / exps.iter().sum::<f64>()).collect()
}

fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}

/// `down relu(up token)` of one expert.
fn mlp(up: &[f32], down: &[f32], expert: usize, token: &[f32]) -> Vec<f64> {
    let size = H * I;
    let inner: Vec<f64> = logits(&up[expert * size..][..size], token).iter().map(|v| v.max(0.0)).collect();
    let row = |row: &[f32]| row.iter().zip(&inner).map(|(&w, v)| f64::from(w) * v).sum();
    down[expert * size..][..size].chunks_exact(I).map(row).collect()
}

/// `sum over e of weights[e] * expert e`
fn ensemble(w: &MoeWeights, weights: &[f64], token: &[f32]) -> Vec<f64> {
    let mut y = vec![0.0; H];
    for (e, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight != 0.0) {
        y.iter_mut().zip(mlp(&w.up_proj, &w.down_proj, e, token)).for_each(|(y, out)| *y += weight * out);
    }
    y
}

fn close(name: &str, got: &[f32], want: &[f64]) {
    let largest = want.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    assert_close(name, got, want, |_| 1e-5 * largest);
}

/// Jacobs, Jordan, Nowlan and Hinton 1991.
#[test]
fn an_adaptive_mixture_is_the_ensemble_weighted_by_a_softmax() {
    let routing = Routing { selection: Selection::Dense, ..Routing::new(Scores::Softmax, false) };
    let (config, weights) = layer(5, 5, routing);
    let x = Values(6).floats(9 * H);
    let gates: Vec<Vec<f64>> = x.chunks_exact(H).map(|token| softmax(&logits(&weights.router, token))).collect();
    let y: Vec<f64> = x.chunks_exact(H).zip(&gates).flat_map(|(token, g)| ensemble(&weights, g, token)).collect();
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        close("y", &layer.forward(&x).expect("it runs"), &y);
        let routing = layer.routing().expect("a pass ran");
        close("gates", &routing.topk_weights, &gates.concat());
        for (experts, weights) in routing.topk_experts.chunks_exact(5).zip(routing.topk_weights.chunks_exact(5)) {
            assert_eq!(experts, [0, 1, 2, 3, 4], "choice j is expert j");
            assert!((weights.iter().sum::<f32>() - 1.0).abs() < 1e-5, "{weights:?}");
        }
    }
}

/// Jordan and Jacobs 1994.
#[test]
fn a_hierarchical_mixtures_weights_are_products_of_two_softmaxes() {
    let groups = Groups { num_groups: 3, keep: 3, score: GroupScore::Max, masked: Masked::NegInfinity };
    let routing =
        Routing { selection: Selection::Dense, groups: Some(groups), ..Routing::new(Scores::Hierarchical, false) };
    let (config, mut weights) = layer(6, 6, routing);
    weights.extras.group_router = Some(Values(7).even(3 * H));
    let x = Values(8).floats(9 * H);
    let product = |token: &[f32]| -> Vec<f64> {
        let top = softmax(&logits(weights.extras.group_router.as_deref().expect("just made"), token));
        let all = logits(&weights.router, token);
        (0..6).map(|e| top[e / 2] * softmax(&all[e / 2 * 2..][..2])[e % 2]).collect()
    };
    let flat: Vec<f64> = x.chunks_exact(H).flat_map(product).collect();
    // One softmax over everything would be something else.
    let one = |token: &[f32]| softmax(&logits(&weights.router, token));
    let differ = x.chunks_exact(H).flat_map(one).zip(&flat).any(|(one, two)| (one - two).abs() > 0.05);
    assert!(differ, "the group router matters");
    let y: Vec<f64> = x.chunks_exact(H).flat_map(|token| ensemble(&weights, &product(token), token)).collect();
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        close("y", &layer.forward(&x).expect("it runs"), &y);
        close("weights", &layer.routing().expect("a pass ran").topk_weights, &flat);
    }
}

/// Fedus, Zoph and Shazeer 2021.
#[test]
fn a_switch_layer_drops_exactly_what_is_beyond_the_capacity() {
    let (sequence, num_tokens) = (16, 48);
    let x = Values(9).even(num_tokens * H);
    let mut fewest = usize::MAX;
    for factor in [0.5, 1.0, 2.0, 4.0] {
        let capacity = Capacity {
            limit: CapacityLimit::Fraction { fraction: factor / 4.0, round_up: true, minimum: 1 },
            per_sequence: true,
            priority: Priority::Position,
            renormalize_after: false,
            pass_through: false,
        };
        let routing = Routing { capacity: Some(capacity), ..Routing::new(Scores::Softmax, false) };
        let (config, mut weights) = layer(4, 1, routing);
        // One favourite, so that something is dropped.
        weights.router_bias = Some(vec![0.0, 0.0, 1.0, 0.0]);
        let (mut expected, mut y, mut taken) = (Vec::new(), Vec::new(), [0; 4]);
        for (t, token) in x.chunks_exact(H).enumerate() {
            if t % sequence == 0 {
                taken = [0; 4];
            }
            let mut all = logits(&weights.router, token);
            all[2] += 1.0;
            let best = (0..4).fold(0, |best, e| if all[e] > all[best] { e } else { best });
            taken[best] += 1;
            let takes = taken[best] <= (factor * sequence as f64 / 4.0) as usize;
            expected.push(if takes { best as u32 } else { DROPPED });
            let mut weight = vec![0.0; 4];
            weight[best] = if takes { softmax(&all)[best] } else { 0.0 };
            y.extend(ensemble(&weights, &weight, token));
        }
        let dropped = expected.iter().filter(|&&e| e == DROPPED).count();
        assert!(dropped <= fewest && (dropped > 0) == (factor < 4.0), "{dropped} at factor {factor}");
        fewest = dropped;
        for context in engines() {
            let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
            let batch = Batch { tokens_per_sequence: Some(sequence as u32), ..Batch::from(&x) };
            let got = layer.forward_batch(&batch).expect("it runs");
            close("y", &got, &y);
            let routing = layer.routing().expect("a pass ran");
            assert_eq!(routing.topk_experts, expected, "{}", context.device().name);
            assert_eq!(routing.num_dropped, dropped);
            assert_eq!(layer.statistics().expect("a pass ran").num_dropped as usize, dropped);
            for (got, &expert) in got.chunks_exact(H).zip(&expected) {
                assert_eq!(got.iter().all(|v| *v == 0.0), expert == DROPPED);
            }
        }
    }
}

/// Lepikhin et al. 2020.
#[test]
fn a_second_expert_is_dropped_by_lot() {
    let num_tokens = 2000;
    let (config, weights) = layer(6, 2, Routing { noise: Noise::RandomSecond, ..Routing::softmax(true) });
    let x = Values(10).even(num_tokens * H);
    let mut by_engine = Vec::new();
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        let run = |seed| {
            let y = layer.forward_batch(&Batch { seed, ..Batch::from(&x) }).expect("it runs");
            (y, layer.routing().expect("a pass ran"))
        };
        let (y, calm) = run(None);
        assert_eq!(calm.num_dropped, 0, "no seed, no randomness");
        let ((with_7, seven), (again, _), (with_8, eight)) = (run(Some(7)), run(Some(7)), run(Some(8)));
        assert_eq!(bits(&with_7), bits(&again));
        assert_ne!(bits(&with_7), bits(&with_8));
        assert_ne!(bits(&with_7), bits(&y));
        for routing in [&seven, &eight] {
            assert!(routing.topk_experts.iter().step_by(2).all(|&e| e != DROPPED), "the first choice always stays");
            // Dropped with probability 1 - 2 w: the count is within 5 deviations of its mean.
            let chances = routing.topk_weights.chunks_exact(2).map(|w| 1.0 - f64::from(2.0 * w[1]).min(1.0));
            let (mean, variance) = chances.fold((0.0, 0.0), |(m, v), p| (m + p, v + p * (1.0 - p)));
            let off = (routing.num_dropped as f64 - mean).abs();
            assert!(
                mean > 200.0 && off < 5.0 * f64::sqrt(variance),
                "{} dropped, {mean} expected",
                routing.num_dropped
            );
            assert_eq!(routing.topk_weights, calm.topk_weights, "the weight of the first choice is not made up for");
        }
        // What is left of y is the first choice with its weight.
        let t = seven.topk_experts.iter().skip(1).step_by(2).position(|&e| e == DROPPED).expect("many are dropped");
        let mut weight = vec![0.0; 6];
        weight[seven.topk_experts[2 * t] as usize] = f64::from(seven.topk_weights[2 * t]);
        close("y", &with_7[t * H..][..H], &ensemble(&weights, &weight, &x[t * H..][..H]));
        by_engine.push(seven.topk_experts);
    }
    assert!(by_engine.windows(2).all(|pair| pair[0] == pair[1]), "the lot is the same everywhere");
}

/// Rajbhandari et al. 2022.
#[test]
fn a_residual_layer_adds_or_mixes_a_dense_part() {
    for gate in [SharedGate::None, SharedGate::Mix] {
        // A pyramid: later layers have more experts, and each reads what the one before it left.
        let mut stream = Values(11).floats(9 * H);
        for num_experts in [2, 4, 8] {
            let shared = SharedExperts { num: 1, intermediate_size: I as u32, activation: RELU, gate, average: false };
            let (config, mut weights) = layer(num_experts, 1, Routing::softmax(false));
            let config = config.with_extras(LayerExtras { shared: Some(shared), ..LayerExtras::default() });
            let config = config.expect("valid extras");
            let mut values = Values(12);
            weights.extras = ExtraWeights {
                shared_up_proj: values.even(H * I),
                shared_down_proj: values.even(H * I),
                shared_gate: (gate == SharedGate::Mix).then(|| values.even(H)),
                ..ExtraWeights::default()
            };
            let mut expected = Vec::new();
            for token in stream.chunks_exact(H) {
                let p = softmax(&logits(&weights.router, token));
                let best = (0..p.len()).fold(0, |best, e| if p[e] > p[best] { e } else { best });
                let routed = mlp(&weights.up_proj, &weights.down_proj, best, token);
                let dense = mlp(&weights.extras.shared_up_proj, &weights.extras.shared_down_proj, 0, token);
                let g = weights.extras.shared_gate.as_ref().map(|row| sigmoid(dot(row, token)));
                let [a, b] = g.map_or([1.0, 1.0], |g| [g, 1.0 - g]);
                expected.extend(dense.iter().zip(&routed).map(|(dense, routed)| a * dense + b * p[best] * routed));
            }
            for context in engines() {
                let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
                close(&format!("{gate:?}"), &layer.forward(&stream).expect("it runs"), &expected);
            }
            stream.iter_mut().zip(&expected).for_each(|(stream, y)| *stream += *y as f32);
        }
    }
}

/// Balaji et al. 2022: an expert owns an interval of the noise level.
#[test]
fn a_denoiser_is_chosen_by_the_noise_level() {
    let levels: Vec<f64> = (0..20).map(|t| f64::from(t) / 20.0).collect();
    let x = Values(13).floats(20 * H);
    let owner: Vec<i32> = levels.iter().map(|u| (u * 4.0) as i32).collect();
    // What the layer's own router thinks does not matter: the only choice weighs 1 once renormalised.
    let (given, weights) = layer(4, 1, Routing { selection: Selection::Given, ..Routing::softmax(true) });
    let hard = |(token, &e): (&[f32], &i32)| mlp(&weights.up_proj, &weights.down_proj, e as usize, token);
    let y_hard: Vec<f64> = x.chunks_exact(H).zip(&owner).flat_map(hard).collect();

    // A linear gate on an embedding of the level, (sin, cos).
    let gate: Vec<[f64; 2]> = (0..4).map(|e| (f64::from(e) / 4.0 + 0.125).sin_cos().into()).collect();
    let embed = |u: f64| gate.iter().map(move |g| (20.0 * (g[0] * u.sin() + g[1] * u.cos())) as f32);
    let gate_logits: Vec<f32> = levels.iter().flat_map(|&u| embed(u)).collect();
    let soft = |(token, logits): (&[f32], &[f32])| {
        let wide: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        let mut kept = vec![f64::NEG_INFINITY; 4];
        for e in reference::router::top_k_indices(&wide, 2) {
            kept[e] = wide[e];
        }
        ensemble(&weights, &softmax(&kept), token)
    };
    let y_soft: Vec<f64> = x.chunks_exact(H).zip(gate_logits.chunks_exact(4)).flat_map(soft).collect();
    let (choosing, _) = layer(4, 2, Routing::softmax(true));
    for context in engines() {
        let layer = MoeLayer::new(&context, given.clone(), &weights).expect("valid");
        let batch = Batch { experts: Some(&owner), ..Batch::from(&x) };
        close("given", &layer.forward_batch(&batch).expect("it runs"), &y_hard);
        let assigned = layer.forward_with_assignments(&x, &owner, &[1.0; 20]).expect("it runs");
        close("assigned", &assigned, &y_hard);
        let layer = MoeLayer::new(&context, choosing.clone(), &weights).expect("valid");
        close("soft", &layer.forward_with_logits(&x, &gate_logits).expect("it runs"), &y_soft);
    }
}
