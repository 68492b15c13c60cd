//! The embedded CPU engine against the reference, and its promises about bits.

mod support;

use support::assert_close;
use wgmoe::cpu::CpuLayer;
use wgmoe::{Activation, Batch, Error, ExpertWeights, MoeConfig, MoeWeights, Routing, WeightFormat, reference};

/// A small generator: the same values on every machine.
struct Values(u64);

impl Values {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    /// Between -1 and 1, one in sixteen ten times as large, so that no softmax is flat.
    fn floats(&mut self, len: usize) -> Vec<f32> {
        let mut float =
            || (self.next() as f32 / (1u64 << 30) as f32 - 1.0) * if self.below(16) == 0 { 10.0 } else { 1.0 };
        (0..len).map(|_| float()).collect()
    }
}

fn config([hidden, intermediate, experts, top_k]: [u32; 4], renormalize: bool) -> MoeConfig {
    let routing = Routing::softmax(renormalize);
    MoeConfig::new(hidden, intermediate, experts, top_k, routing, Activation::SWIGLU).expect("the sizes are valid")
}

fn weights(config: &MoeConfig, values: &mut Values) -> MoeWeights {
    let [h, i, e] = [config.hidden_size(), config.intermediate_size(), config.num_experts()].map(|n| n as usize);
    let mut scaled = |len, fan_in: usize| -> Vec<f32> {
        values.floats(len).into_iter().map(|v| v / (fan_in as f32).sqrt()).collect()
    };
    MoeWeights {
        router: scaled(e * h, h),
        router_bias: (e % 2 == 0).then(|| scaled(e, 1)),
        gate_proj: scaled(e * i * h, h),
        up_proj: scaled(e * i * h, h),
        down_proj: scaled(e * h * i, i),
        ..MoeWeights::default()
    }
}

fn layer(config: &MoeConfig, weights: &MoeWeights, format: WeightFormat) -> CpuLayer {
    CpuLayer::new(config.clone(), weights, format).expect("the weights are valid")
}

fn forward(layer: &CpuLayer, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    layer.forward_into(x, &mut y).expect("the input is valid");
    y
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// One pass against the reference, stage by stage as far as the engine shows them.
fn check(config: &MoeConfig, weights: &MoeWeights, format: WeightFormat, x: &[f32], name: &str) {
    let [h, e] = [config.hidden_size(), config.num_experts()].map(|n| n as usize);
    let mut y = vec![f32::NAN; x.len()];
    let decision = layer(config, weights, format).forward_into(x, &mut y).expect("the input is valid");
    let stored = weights.rounded(config, format).expect("the format holds the weights");
    let mut router = reference::router::router(config, &stored, &Batch::from(x));

    assert_close(&format!("{name}: logits"), &decision.router_logits, &router.router_logits, |at| {
        let (t, expert) = (at / e, at % e);
        let products = x[t * h..][..h].iter().zip(&stored.router[expert * h..][..h]);
        let bias = stored.router_bias.as_ref().map_or(0.0, |bias| f64::from(bias[expert].abs()));
        let sum: f64 = products.map(|(&x, &w)| (f64::from(x) * f64::from(w)).abs()).sum();
        4.0 * (h as f64 + 1.0).sqrt() / 16_777_216.0 * (sum + bias)
    });
    // A near-tie may fall either way; then the reference follows the engine's choice.
    for (at, (&got, &expected)) in decision.topk_experts.iter().zip(&router.topk_experts).enumerate() {
        let logits = &router.router_logits[at / config.top_k() as usize * e..][..e];
        let gap = (logits[got as usize] - logits[expected as usize]).abs();
        assert!(gap <= 1e-4, "{name}: assignment {at} went to expert {got}, not {expected}");
    }
    if decision.topk_experts != router.topk_experts {
        router.topk_experts = decision.topk_experts.clone();
        router.topk_weights = decision.topk_weights.iter().map(|&w| f64::from(w)).collect();
    }
    assert_close(&format!("{name}: weights"), &decision.topk_weights, &router.topk_weights, |_| 6e-6);
    let mut counts = vec![0; e];
    decision.topk_experts.iter().for_each(|&expert| counts[expert as usize] += 1);
    assert_eq!(decision.tokens_per_expert, counts, "{name}");
    assert_eq!(decision.num_tokens, x.len() / h, "{name}");

    let expected = reference::forward_with_routing(config, &stored, x, router);
    let largest = expected.y.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    assert_close(&format!("{name}: y"), &y, &expected.y, |_| 1e-5 * largest);
}

/// `[hidden_size, intermediate_size, num_experts, top_k]` and the number of tokens.
const CASES: [([u32; 4], usize); 16] = [
    ([1, 1, 1, 1], 1),
    ([1, 1, 1, 1], 40),
    ([1, 1, 3, 3], 5),
    ([7, 1, 2, 1], 9),
    ([1, 19, 2, 2], 9),
    ([7, 5, 4, 2], 13),
    ([32, 16, 8, 2], 1),
    ([33, 17, 5, 3], 37),
    ([64, 48, 8, 8], 16),
    ([130, 31, 16, 4], 129),
    ([129, 300, 6, 2], 24),
    ([257, 40, 257, 8], 3),
    ([24, 24, 1024, 32], 6),
    ([40, 129, 1, 1], 250),
    ([40, 33, 2, 1], 251),
    ([256, 128, 32, 4], 100),
];

#[test]
fn every_shape_matches_the_reference() {
    for (case, (sizes, num_tokens)) in CASES.into_iter().enumerate() {
        for (format, renormalize) in [(WeightFormat::F32, true), (WeightFormat::F16, false)] {
            let mut values = Values(case as u64);
            let config = config(sizes, renormalize);
            let weights = weights(&config, &mut values);
            let x = values.floats(num_tokens * sizes[0] as usize);
            check(&config, &weights, format, &x, &format!("{sizes:?} {num_tokens} tokens {}", format.name()));
        }
    }
}

/// Sizes that hold whole blocks of every format, and no whole panels.
const BLOCKS: [([u32; 4], usize); 4] =
    [([256, 256, 3, 2], 1), ([256, 512, 5, 2], 3), ([512, 256, 4, 2], 37), ([256, 256, 2, 2], 130)];

#[test]
fn every_format_matches_the_reference() {
    for (case, (sizes, num_tokens)) in BLOCKS.into_iter().enumerate() {
        for format in WeightFormat::every() {
            let mut values = Values(40 + case as u64);
            let config = config(sizes, true);
            let weights = weights(&config, &mut values);
            let x = values.floats(num_tokens * sizes[0] as usize);
            check(&config, &weights, format, &x, &format!("{sizes:?} {num_tokens} tokens {}", format.name()));
        }
    }
}

/// Formats with blocks of one input hold rows of any length, those with larger ones refuse them.
#[test]
fn rows_of_other_lengths_are_refused() {
    for (sizes, field) in [([250, 256, 3, 2], "gate_proj"), ([256, 250, 3, 2], "down_proj")] {
        let config = config(sizes, true);
        let weights = weights(&config, &mut Values(50));
        for format in WeightFormat::every() {
            match CpuLayer::new(config.clone(), &weights, format) {
                Ok(_) => assert_eq!(format.block(), 1, "{format}"),
                Err(Error::InvalidConfig { field: f, .. }) => assert!(f == field && format.block() > 1, "{format}"),
                Err(error) => panic!("{format}: {error}"),
            }
        }
    }
}

#[test]
fn bytes_in_memory_are_those_of_the_format() {
    let config = config([256, 512, 3, 2], true);
    let weights = weights(&config, &mut Values(51));
    for (format, bits) in [
        (WeightFormat::F32, 32.0),
        (WeightFormat::F16, 16.0),
        (WeightFormat::INT8, 9.0),
        (WeightFormat::INT4, 5.0),
        (WeightFormat::Mxfp4, 4.25),
        (WeightFormat::Q4K, 4.625),
        (WeightFormat::Q6K, 6.5625),
    ] {
        let layer = layer(&config, &weights, format);
        assert_eq!(layer.formats(), format.into());
        assert_eq!(layer.weight_bytes() as f64 * 8.0, bits * (3 * 3 * 256 * 512) as f64, "{format}");
    }
}

#[test]
fn all_tokens_on_one_expert_match_the_reference() {
    let mut values = Values(1);
    let config = config([70, 50, 6, 2], true);
    let mut weights = weights(&config, &mut values);
    weights.router_bias = Some(vec![0.0, 0.0, 1000.0, 0.0, 500.0, 0.0]);
    let x = values.floats(300 * 70);
    check(&config, &weights, WeightFormat::F32, &x, "skewed");
    let decision = layer(&config, &weights, WeightFormat::F32).forward_into(&x, &mut vec![0.0; x.len()]);
    assert_eq!(decision.expect("the input is valid").tokens_per_expert, [0, 0, 300, 0, 300, 0]);
}

#[test]
fn equal_logits_choose_the_lowest_experts() {
    let mut values = Values(2);
    let config = config([8, 8, 5, 3], false);
    let mut weights = weights(&config, &mut values);
    weights.router.fill(0.0);
    weights.router_bias = None;
    let x = values.floats(4 * 8);
    let decision = layer(&config, &weights, WeightFormat::F32).forward_into(&x, &mut vec![0.0; x.len()]);
    let decision = decision.expect("the input is valid");
    assert_eq!(decision.topk_experts, [0, 1, 2].repeat(4));
    assert_eq!(decision.topk_weights, [0.2; 12]);
}

/// The comparison above is worth nothing if it accepts a wrong layer.
#[test]
#[should_panic(expected = "wrong weight: y")]
fn one_wrong_weight_is_noticed() {
    let mut values = Values(3);
    let config = config([64, 32, 4, 4], true);
    let weights = weights(&config, &mut values);
    let x = values.floats(20 * 64);
    let mut wrong = weights.clone();
    wrong.down_proj[777] += 0.01;
    let expected = reference::moe_forward(&config, &wrong, &x).y;
    let largest = expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
    let y = forward(&layer(&config, &weights, WeightFormat::F32), &x);
    assert_close("wrong weight: y", &y, &expected, |_| 1e-5 * largest);
}

#[test]
fn a_token_alone_has_the_bits_it_has_in_any_batch() {
    let floats = [
        ([300, 72, 8, 2], WeightFormat::F32),
        ([300, 72, 8, 2], WeightFormat::F16),
        ([33, 150, 3, 3], WeightFormat::F32),
    ];
    for (sizes, format) in floats {
        let mut values = Values(4);
        let (config, h) = (config(sizes, true), sizes[0] as usize);
        let weights = weights(&config, &mut values);
        let layer = layer(&config, &weights, format);
        let x = values.floats(128 * h);
        let alone: Vec<Vec<u32>> = x.chunks_exact(h).map(|token| bits(&forward(&layer, token))).collect();
        for num_tokens in 2..=128 {
            let tokens: Vec<usize> = (0..num_tokens).map(|_| values.below(128)).collect();
            let batch: Vec<f32> = tokens.iter().flat_map(|&t| &x[t * h..][..h]).copied().collect();
            for (&token, y) in tokens.iter().zip(forward(&layer, &batch).chunks_exact(h)) {
                assert!(bits(y) == alone[token], "{sizes:?} {}: token {token} of {num_tokens}", format.name());
            }
        }
    }
}

/// As above, for every format: one token, tiles of every height, a batch of 128 that takes several tiles.
#[test]
fn a_token_alone_has_the_bits_it_has_in_a_batch_in_every_format() {
    let config = config([256, 256, 2, 1], true);
    for format in WeightFormat::every() {
        let mut values = Values(14);
        let layer = layer(&config, &weights(&config, &mut values), format);
        let x = values.floats(128 * 256);
        let alone: Vec<Vec<u32>> = x.chunks_exact(256).map(|token| bits(&forward(&layer, token))).collect();
        for num_tokens in [2, 3, 4, 5, 6, 7, 8, 11, 128] {
            for (token, y) in forward(&layer, &x[..num_tokens * 256]).chunks_exact(256).enumerate() {
                assert!(bits(y) == alone[token], "{format}: token {token} of {num_tokens}");
            }
        }
    }
}

/// Each edited layer is the one that is made of the edited weights.
#[test]
fn experts_come_and_go_in_every_format() {
    for format in WeightFormat::every() {
        let mut values = Values(15);
        let mut config = config([256, 256, 3, 2], true);
        let mut weights = weights(&config, &mut values);
        weights.router_bias = None;
        let mut layer = layer(&config, &weights, format);
        let x = values.floats(9 * 256);
        let before = bits(&forward(&layer, &x));
        let mut expert = || ExpertWeights {
            gate_proj: values.floats(256 * 256),
            up_proj: values.floats(256 * 256),
            down_proj: values.floats(256 * 256),
            router_row: values.floats(256),
            ..ExpertWeights::default()
        };
        let (new, other) = (expert(), expert());
        config = weights.insert_expert(&config, 3, &new).expect("it fits");
        assert_eq!(layer.add_expert(&new).expect("it fits"), 3);
        config = weights.remove_expert(&config, 1).expect("it is there");
        layer.remove_expert(1).expect("it is there");
        config = weights.remove_expert(&config, 0).expect("it is there");
        config = weights.insert_expert(&config, 0, &other).expect("it fits");
        layer.replace_expert(0, &other).expect("it fits");
        let anew = self::layer(&config, &weights, format);
        assert_eq!((layer.config(), layer.weight_bytes()), (&config, anew.weight_bytes()), "{format}");
        let (edited, anew) = (bits(&forward(&layer, &x)), bits(&forward(&anew, &x)));
        assert!(edited == anew, "{format}");
        assert!(edited != before, "{format}: these are other experts");
    }
}

#[test]
fn bits_do_not_depend_on_the_run_or_the_threads() {
    let mut values = Values(5);
    let config = config([200, 90, 16, 4], true);
    let weights = weights(&config, &mut values);
    let layer = layer(&config, &weights, WeightFormat::F16);
    let x = values.floats(90 * 200);
    let expected = bits(&forward(&layer, &x));
    for run in 0..100 {
        assert!(bits(&forward(&layer, &x)) == expected, "run {run}");
    }
    for threads in [1, 3, 8] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
        assert!(bits(&pool.install(|| forward(&layer, &x))) == expected, "{threads} threads");
    }
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(bits(&forward(&layer, &x)) == expected));
        }
    });
}

#[test]
fn no_tokens_are_no_work() {
    let config = config([4, 3, 2, 1], true);
    let layer = layer(&config, &weights(&config, &mut Values(6)), WeightFormat::F32);
    let decision = layer.forward_into(&[], &mut []).expect("nothing is valid");
    assert_eq!((decision.num_tokens, decision.topk_experts.len()), (0, 0));
    assert_eq!(decision.tokens_per_expert, [0, 0]);
}

#[test]
fn bad_input_is_refused_with_its_place() {
    let config = config([4, 3, 2, 1], true);
    let layer = layer(&config, &weights(&config, &mut Values(7)), WeightFormat::F32);
    let mut y = [7.0; 8];
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = [1.0; 8];
        x[5] = bad;
        match layer.forward_into(&x, &mut y) {
            Err(Error::NonFinite { tensor, index, .. }) => assert_eq!((tensor.as_str(), index), ("x", 5)),
            other => panic!("{bad}: {other:?}"),
        }
    }
    for (x, y, tensor, expected) in [(7, 7, "x", 8), (8, 4, "y", 8), (4, 8, "y", 4), (0, 4, "y", 0)] {
        match layer.forward_into(&vec![1.0; x], &mut vec![0.0; y]) {
            Err(Error::LengthMismatch { tensor: t, expected: e, .. }) => assert_eq!((t, e), (tensor, expected)),
            other => panic!("{x} {y}: {other:?}"),
        }
    }
    assert_eq!(y, [7.0; 8], "an error leaves y alone");
    forward(&layer, &[1.0; 8]);
}

#[test]
fn logits_past_f32_are_refused() {
    let config = config([4, 3, 2, 1], true);
    let mut weights = weights(&config, &mut Values(8));
    weights.router = [[1e30; 4], [-1e30; 4]].concat();
    let layer = layer(&config, &weights, WeightFormat::F32);
    let x = [[1e30; 4], [1.0; 4], [1e30; 4]].concat();
    match layer.forward_into(&x, &mut [0.0; 12]) {
        Err(Error::NonFiniteLogits { num_tokens }) => assert_eq!(num_tokens, 2),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bad_weights_are_refused() {
    let config = config([4, 3, 2, 1], true);
    let good = weights(&config, &mut Values(9));
    let refused = |change: fn(&mut MoeWeights), format| {
        let mut weights = good.clone();
        change(&mut weights);
        CpuLayer::new(config.clone(), &weights, format).err()
    };
    let short = |w: &mut MoeWeights| w.up_proj.truncate(5);
    assert!(matches!(refused(short, WeightFormat::F32), Some(Error::LengthMismatch { tensor: "up_proj", .. })));
    let nan = |w: &mut MoeWeights| w.gate_proj[3] = f32::NAN;
    assert!(matches!(refused(nan, WeightFormat::F32), Some(Error::NonFinite { index: 3, .. })));
    let large = |w: &mut MoeWeights| w.down_proj[2] = 1e6;
    assert!(matches!(refused(large, WeightFormat::F16), Some(Error::NotRepresentable { index: 2, .. })));
    assert!(refused(large, WeightFormat::F32).is_none());
}
