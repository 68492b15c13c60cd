//! Tokens that the router can make nothing of: NaN and infinities in activations and logits, under each policy, on every
//! engine. Whatever becomes of them, other tokens keep their bits and ids stay different and below the number of experts.

mod support;

use support::{Values, assert_same_bits, config, gpu_context, read_buffer};
use wgmoe::reference;
use wgmoe::wgpu;
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, Context, DROPPED, Error, ExtraWeights, GpuMemory, LayerExtras,
    LayerOptions, MatmulVariant, MoeConfig, MoeLayer, MoeWeights, NonFinite, PassStatus, Priority, Routing, Scores,
    Selection, SharedExperts, SharedGate,
};

const INF: f32 = f32::INFINITY;
const H: usize = 12;

fn engines() -> Vec<Context> {
    std::iter::once(Context::cpu()).chain(gpu_context()).collect()
}

/// One variant, so that a token's bits do not depend on how many others there are.
fn options(non_finite: NonFinite) -> LayerOptions {
    LayerOptions { non_finite, matmul: Some(MatmulVariant::Tiled), ..LayerOptions::default() }
}

fn layer(context: &Context, config: &MoeConfig, weights: &MoeWeights, non_finite: NonFinite) -> MoeLayer {
    MoeLayer::with_options(context, config.clone(), weights, &options(non_finite)).expect("the layer is valid")
}

/// With shared experts, gated or not: they see a broken token, too.
fn with_shared(config: &MoeConfig, mut weights: MoeWeights, gate: SharedGate) -> (MoeConfig, MoeWeights) {
    let shared = SharedExperts { num: 1, intermediate_size: 8, activation: Activation::SWIGLU, gate, average: false };
    let config = config.clone().with_extras(LayerExtras { shared: Some(shared), ..LayerExtras::default() });
    let mut values = Values(9);
    weights.extras = ExtraWeights {
        shared_gate_proj: values.even(8 * H),
        shared_up_proj: values.even(8 * H),
        shared_down_proj: values.even(8 * H),
        shared_gate: (gate != SharedGate::None).then(|| values.even(H)),
        ..ExtraWeights::default()
    };
    (config.expect("the sizes fit"), weights)
}

/// Rows of `y`, and whether the token was broken. Others have to have the bits of `clean`.
#[track_caller]
fn assert_rows(name: &str, policy: NonFinite, y: &[f32], clean: &[f32], broken: &[usize]) {
    for (t, (y, clean)) in y.chunks_exact(H).zip(clean.chunks_exact(H)).enumerate() {
        match policy {
            _ if !broken.contains(&t) => assert_same_bits(&format!("{name}: token {t}"), y, clean),
            NonFinite::Drop => assert_same_bits(&format!("{name}: dropped token {t}"), y, &[0.0; H]),
            _ => assert!(y.iter().all(|v| v.is_nan()), "{name}: token {t}: {y:?}"),
        }
    }
}

#[track_caller]
fn assert_ids(name: &str, experts: &[u32], top_k: usize, num_experts: u32, dropped: &[usize]) {
    for (t, experts) in experts.chunks_exact(top_k).enumerate() {
        let distinct: std::collections::BTreeSet<_> = experts.iter().collect();
        if dropped.contains(&t) {
            assert!(experts.iter().all(|&e| e == DROPPED), "{name}: token {t}: {experts:?}");
        } else {
            assert!(distinct.len() == top_k && experts.iter().all(|&e| e < num_experts), "{name}: {t}: {experts:?}");
        }
    }
}

#[test]
fn broken_activations_under_each_policy() {
    let plain = config([H as u32, 8, 6, 3], true);
    let weights = Values(3).weights(&plain);
    let kinds = [
        (plain.clone(), weights.clone()),
        with_shared(&plain, weights.clone(), SharedGate::None),
        with_shared(&plain, weights, SharedGate::Sigmoid),
    ];
    for context in engines() {
        for (kind, (config, weights)) in kinds.iter().enumerate() {
            let clean = Values(5).floats(40 * H);
            let expected = layer(&context, config, weights, NonFinite::Error).forward(&clean).expect("it is clean");
            for policy in [NonFinite::Drop, NonFinite::Propagate] {
                let layer = layer(&context, config, weights, policy);
                for (bad, num_tokens) in [(f32::NAN, 40), (INF, 40), (-INF, 5), (f32::NAN, 1)] {
                    let name = format!("{}: layer {kind}, {policy:?}, {bad} in {num_tokens}", context.device().name);
                    let mut x = clean[..num_tokens * H].to_vec();
                    let broken: Vec<usize> = [0, 3, 39].into_iter().filter(|t| *t < num_tokens).collect();
                    // One element, a whole row, one element.
                    x[1] = bad;
                    if num_tokens > 3 {
                        x[3 * H..4 * H].fill(bad);
                    }
                    if num_tokens > 39 {
                        x[39 * H + 11] = bad;
                    }
                    let y = layer.forward(&x).expect("it is no error");
                    assert_rows(&name, policy, &y, &expected[..num_tokens * H], &broken);
                    let routing = layer.routing().expect("there was a pass");
                    let gone = if policy == NonFinite::Drop { &broken[..] } else { &[] };
                    assert_ids(&name, &routing.topk_experts, 3, 6, gone);
                    assert_eq!(
                        routing.non_finite_tokens,
                        broken.iter().map(|&t| t as u32).collect::<Vec<_>>(),
                        "{name}"
                    );
                    let status = layer.status().expect("there was a pass");
                    assert_eq!(status.non_finite_tokens, broken.len() as u32, "{name}");
                    let statistics = layer.statistics().expect("there was a pass");
                    assert!(statistics.entropy.is_finite() && statistics.router_z_loss.is_finite(), "{name}");
                }
                // Nothing is left of it.
                let y = layer.forward(&clean).expect("it is clean");
                assert_rows("afterwards", policy, &y, &expected, &[]);
                assert_eq!(layer.status().expect("there was a pass"), PassStatus::default());
            }
        }
    }
}

/// Finite activations, but not the logits: the router has to notice by itself. Also the default policy's count.
#[test]
fn logits_that_overflow_under_each_policy() {
    let config = config([H as u32, 8, 6, 3], true);
    let mut weights = Values(3).weights(&config);
    weights.router[..H].fill(1e30);
    let mut x = Values(5).floats(20 * H);
    x[7 * H..8 * H].fill(1e30); // infinite
    x[9 * H..10 * H].iter_mut().enumerate().for_each(|(i, v)| *v = if i % 2 == 0 { 3e38 } else { -3e38 }); // NaN
    let clean: Vec<f32> = x.iter().map(|&v| if v.abs() > 1e20 { 0.0 } else { v }).collect();
    for context in engines() {
        let expected = layer(&context, &config, &weights, NonFinite::Error).forward(&clean).expect("it is clean");
        for policy in [NonFinite::Error, NonFinite::Drop, NonFinite::Propagate] {
            let layer = layer(&context, &config, &weights, policy);
            let result = layer.forward(&x);
            if policy == NonFinite::Error {
                assert!(matches!(result, Err(Error::NonFiniteLogits { num_tokens: 2 })), "{result:?}");
            } else {
                assert_rows(&format!("{policy:?}"), policy, &result.expect("no error"), &expected, &[7, 9]);
                assert_eq!(layer.status().expect("there was a pass").non_finite_tokens, 2);
            }
        }
        // As the reference drops them: what is left is not zero, what is dropped is.
        let mut exact = reference::moe_forward(&config, &weights, &clean).y;
        reference::drop_rows::drop_rows(&mut exact, H, &[7, 9]);
        let y = layer(&context, &config, &weights, NonFinite::Drop).forward(&x).expect("no error");
        let most = exact.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        support::assert_close("dropped", &y, &exact, |_| 1e-5 * most);
        for (t, row) in exact.chunks_exact(H).enumerate() {
            assert_eq!(row.iter().all(|v| *v == 0.0), t == 7 || t == 9, "token {t}");
        }
    }
}

/// Values that routers have met, and worse.
const SPECIAL: [f32; 12] =
    [f32::NAN, -f32::NAN, INF, -INF, 0.0, -0.0, 3e38, -3e38, 1e4, -1e4, f32::MIN_POSITIVE, 1e-45];

/// Around each size at which a kernel may count differently; ids of both engines are the same.
#[test]
fn ids_stay_ids_whatever_the_logits_are() {
    let contexts = engines();
    for e in [1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024_usize] {
        for k in [1, 8, 32].into_iter().filter(|&k| k <= e) {
            let config = config([1, 1, e as u32, k as u32], true);
            let weights = Values(e as u64).weights(&config);
            let mut values = Values((e * 64 + k) as u64);
            let tokens = 48;
            let mut logits: Vec<f32> = (0..tokens * e)
                .map(|i| if i / e % 3 == 0 { values.even(1)[0] } else { SPECIAL[values.below(SPECIAL.len())] })
                .collect();
            logits[..e].fill(-INF); // all masked
            logits[e..2 * e].fill(f32::NAN);
            logits[2 * e..3 * e].fill(2.5); // all the same
            if e > 40 {
                // Fewer left than are chosen.
                logits[3 * e..4 * e].fill(-INF);
                logits[4 * e - 1] = 1.0;
            }
            let exact: Vec<f64> = logits.iter().map(|&l| l.into()).collect();
            let broken = reference::drop_rows::broken_tokens(&exact, e);
            assert!(broken.len() > 2 && broken.len() < tokens, "{e}: {broken:?}");
            for policy in [NonFinite::Drop, NonFinite::Propagate] {
                let mut all_ids = Vec::new();
                for context in &contexts {
                    let name = format!("{}: {e} experts, top {k}, {policy:?}", context.device().name);
                    let layer = layer(context, &config, &weights, policy);
                    let y = layer.forward_with_logits(&vec![1.0; tokens], &logits).expect("no error");
                    let routing = layer.routing().expect("there was a pass");
                    let gone = if policy == NonFinite::Drop { &broken[..] } else { &[] };
                    assert_ids(&name, &routing.topk_experts, k, e as u32, gone);
                    assert_eq!(routing.non_finite_tokens.len(), broken.len(), "{name}");
                    for (t, (weights, y)) in routing.topk_weights.chunks_exact(k).zip(&y).enumerate() {
                        let sum: f32 = weights.iter().sum();
                        match (broken.contains(&t), policy) {
                            (false, _) => {
                                assert!((sum - 1.0).abs() < 1e-5, "{name}: token {t}: {weights:?}");
                                assert!(y.is_finite(), "{name}: token {t}: {y}");
                            }
                            (true, NonFinite::Drop) => assert_eq!((sum, y.to_bits()), (0.0, 0), "{name}: token {t}"),
                            (true, _) => assert!(sum.is_nan() && y.is_nan(), "{name}: token {t}: {weights:?}"),
                        }
                    }
                    // Ties: the lowest ids, in order.
                    let first: Vec<u32> = (0..k as u32).collect();
                    assert_eq!(routing.topk_experts[2 * k..3 * k], first, "{name}");
                    all_ids.push(routing.topk_experts);
                }
                assert!(all_ids.windows(2).all(|pair| pair[0] == pair[1]), "{e} experts, top {k}: engines differ");
            }
        }
    }
}

/// A dropped token takes nothing from the capacity of an expert; one that is propagated does.
#[test]
fn a_dropped_token_takes_no_capacity() {
    for priority in [Priority::Position, Priority::Choice, Priority::Score] {
        let capacity = Capacity {
            limit: CapacityLimit::Number(2),
            per_sequence: false,
            priority,
            renormalize_after: priority == Priority::Position,
            pass_through: priority == Priority::Choice,
        };
        let routing = Routing { capacity: Some(capacity), ..Routing::softmax(true) };
        let config = MoeConfig::new(H as u32, 8, 4, 1, routing, Activation::SWIGLU).expect("the sizes are valid");
        let weights = Values(3).weights(&config);
        let x = Values(4).floats(4 * H);
        // Everybody wants expert 0; the first cannot be.
        let logits = [[f32::NAN, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]];
        for context in engines() {
            let layer = layer(&context, &config, &weights, NonFinite::Drop);
            let y = layer.forward_with_logits(&x, logits.as_flattened()).expect("no error");
            let name = format!("{}: {priority:?}", context.device().name);
            assert_same_bits(&name, &y[..H], &[0.0; H]);
            let routing = layer.routing().expect("there was a pass");
            assert_eq!(routing.topk_experts, [DROPPED, 0, 0, DROPPED], "{name}");
            let expected = PassStatus { non_finite_tokens: 1, over_capacity: 1 };
            assert_eq!(layer.status().expect("there was a pass"), expected, "{name}");
            assert_eq!(routing.over_capacity, 1, "{name}");
        }
    }
}

/// What is recorded cannot fail; the device counts, and tells when it is asked.
#[test]
fn recorded_passes_count_on_the_device() {
    let Some(context) = gpu_context() else { return };
    let (device, queue) = context.gpu().map(|gpu| (gpu.device(), gpu.queue())).expect("it is a GPU");
    let plain = config([H as u32, 8, 6, 3], true);
    let (config, weights) = with_shared(&plain, Values(3).weights(&plain), SharedGate::None);
    let clean = Values(5).floats(20 * H);
    let mut x = clean.clone();
    x[4 * H] = f32::NAN;
    x[19 * H] = INF;
    for policy in [NonFinite::Error, NonFinite::Drop, NonFinite::Propagate] {
        let layer = layer(&context, &config, &weights, policy);
        let expected = layer.forward(&clean).expect("it is clean");
        let buffer = |usage| {
            let size = (x.len() * 4) as u64;
            device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        let from = buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST);
        let to = buffer(wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC);
        for (x, broken) in [(&x, &[4, 19][..]), (&clean, &[])] {
            queue.write_buffer(&from, 0, bytemuck::cast_slice(x));
            let mut encoder = device.create_command_encoder(&Default::default());
            layer.record(&mut encoder, &from, &to, 20).expect("the buffers fit");
            assert_eq!(layer.pass_stats().readbacks, 0);
            queue.submit([encoder.finish()]);
            let y = read_buffer(device, queue, &to);
            assert_rows(&format!("recorded, {policy:?}"), policy, &y, &expected, broken);
            assert_eq!(layer.status().expect("it was submitted").non_finite_tokens, broken.len() as u32);
            let routing = layer.routing().expect("it was submitted");
            assert_eq!(routing.non_finite_tokens.len(), broken.len());
        }
    }
}

/// Weights overflow behind finite logits: the token is as broken as one with NaN for logits, on every engine.
#[test]
fn weights_that_overflow_are_no_weights() {
    let routing = Routing { scale: 1e10, ..Routing::new(Scores::Raw, false) };
    let config = MoeConfig::new(H as u32, 8, 4, 2, routing, Activation::SWIGLU).expect("the sizes are valid");
    let weights = Values(3).weights(&config);
    let x = Values(4).floats(2 * H);
    let logits = [[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4e30]];
    for context in engines() {
        let result =
            layer(&context, &config, &weights, NonFinite::Error).forward_with_logits(&x, logits.as_flattened());
        assert!(matches!(result, Err(Error::NonFiniteLogits { num_tokens: 1 })), "{result:?}");
        let layer = layer(&context, &config, &weights, NonFinite::Drop);
        let y = layer.forward_with_logits(&x, logits.as_flattened()).expect("no error");
        assert_same_bits(&context.device().name, &y[H..], &[0.0; H]);
        assert!(y[..H].iter().all(|v| *v != 0.0), "{y:?}");
    }
}

/// Sparsemixer's softmax over what is left is a sum of nothing where everything left is masked.
#[test]
fn a_masked_choice_of_sparsemixer_weighs_nothing() {
    let routing =
        Routing { selection: Selection::Sparsemixer { jitter: 0.01 }, ..Routing::new(Scores::Softmax, false) };
    let config = MoeConfig::new(H as u32, 8, 3, 2, routing, Activation::SWIGLU).expect("the sizes are valid");
    let weights = Values(3).weights(&config);
    for context in engines() {
        let layer = layer(&context, &config, &weights, NonFinite::Error);
        let y = layer.forward_with_logits(&Values(4).floats(H), &[-INF, 1.0, -INF]).expect("one is left");
        assert!(y.iter().all(|v| v.is_finite()), "{y:?}");
        assert_eq!(layer.routing().expect("there was a pass").topk_weights, [1.0, 0.0], "{}", context.device().name);
    }
}

/// Experts that are brought in: nobody is brought in for a dropped token.
#[test]
fn dropped_tokens_bring_no_expert_in() {
    let Some(context) = gpu_context() else { return };
    let config = config([H as u32, 8, 6, 2], true);
    let weights = Values(3).weights(&config);
    let clean = Values(5).floats(10 * H);
    let expected = layer(&context, &config, &weights, NonFinite::Error).forward(&clean).expect("it is clean");
    let all = options(NonFinite::Drop);
    let options = LayerOptions { gpu_memory: GpuMemory::Bytes(3 * 3 * 8 * 12 * 4), ..all };
    let layer = MoeLayer::with_options(&context, config, &weights, &options).expect("three experts fit");
    assert!(layer.residency().is_some_and(|stats| stats.places < 6), "{:?}", layer.residency());
    let mut x = clean;
    x[2 * H + 5] = f32::NAN;
    let y = layer.forward_batch(&Batch::from(&x)).expect("no error");
    assert_rows("brought in", NonFinite::Drop, &y, &expected, &[2]);
    assert_eq!(layer.forward(&[f32::NAN; H]).expect("no error"), [0.0; H]);
}
