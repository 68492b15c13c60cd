//! The whole pass on a GPU: against the reference, and its promises about bits, counts and the caller's encoder.

mod support;

use std::time::Duration;
use support::{Values, assert_close, assert_same_bits, config, formats, gpu_context, read_buffer, variants};
use wgmoe::bench::{Bench, Outcome, Workload, Yardstick};
use wgmoe::kernels::params::Uniform;
use wgmoe::plan::Dispatch;
use wgmoe::reference::router::{self, Logits, top_k_indices};
use wgmoe::reference::{self, Forward};
use wgmoe::wgpu;
use wgmoe::{
    Batch, Context, Error, IntGroups, LayerOptions, MatmulChoice, MatmulVariant, MoeConfig, MoeLayer, MoeWeights,
    RoutingDecision, WeightFormat,
};

/// Rounding unit of f32.
const U: f64 = 1.0 / 16_777_216.0;

/// What is special about a case's routing or input.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// Nothing.
    Plain,
    /// The router has a bias.
    Bias,
    /// Every token goes to the last `top_k` experts; the others get nothing.
    Crowded,
    /// Equal logits.
    Ties,
    /// Logits of +-1e4 and more: exact, so that their softmax is known.
    Huge,
    /// Logits of 1e-20.
    Tiny,
    /// One input in every token is 1000 times as large as the others.
    Outliers,
    /// Expert e gets `COUNTS[e]` tokens.
    Counted,
}

/// Tokens of each expert: none, one, and around the height of every tile.
const COUNTS: [usize; 12] = [0, 1, 3, 4, 5, 15, 16, 17, 31, 32, 33, 65];

/// `[hidden_size, intermediate_size, num_experts, top_k]`, number of tokens, whether weights are renormalised.
const CASES: [([u32; 4], usize, bool, Kind); 34] = [
    ([1, 1, 1, 1], 1, true, Kind::Plain),
    ([1, 1, 3, 3], 40, false, Kind::Plain),
    ([7, 1, 2, 1], 9, true, Kind::Plain),
    ([1, 19, 2, 2], 33, true, Kind::Plain),
    ([7, 5, 4, 2], 13, false, Kind::Bias),
    ([2, 3, 2, 1], 17, true, Kind::Bias),
    ([32, 16, 8, 2], 1, true, Kind::Plain),
    ([33, 17, 5, 3], 37, false, Kind::Plain),
    ([34, 18, 5, 3], 15, true, Kind::Plain),
    ([35, 19, 5, 3], 16, true, Kind::Bias),
    ([64, 48, 8, 8], 20, true, Kind::Plain),
    ([64, 48, 8, 1], 67, false, Kind::Plain),
    ([131, 31, 16, 4], 129, true, Kind::Plain),
    ([129, 300, 6, 2], 24, false, Kind::Bias),
    ([256, 128, 32, 4], 100, true, Kind::Plain),
    // Whole blocks of every weight format.
    ([512, 256, 8, 2], 48, true, Kind::Plain),
    ([256, 512, 5, 3], 13, false, Kind::Bias),
    ([256, 256, 6, 2], 1, true, Kind::Plain),
    ([40, 129, 1, 1], 250, true, Kind::Plain),
    ([24, 8, 63, 5], 66, true, Kind::Plain),
    ([24, 8, 65, 5], 3, false, Kind::Bias),
    ([24, 20, 256, 8], 70, true, Kind::Plain),
    ([20, 12, 257, 8], 19, true, Kind::Bias),
    ([12, 8, 1023, 2], 70, false, Kind::Plain),
    ([24, 8, 1024, 32], 6, true, Kind::Plain),
    ([16, 8, 1024, 32], 40, false, Kind::Bias),
    ([70, 50, 6, 2], 300, true, Kind::Crowded),
    ([48, 24, 257, 3], 90, false, Kind::Crowded),
    ([16, 12, 70, 4], 21, true, Kind::Ties),
    ([16, 12, 5, 3], 4, false, Kind::Ties),
    ([24, 16, 9, 4], 35, true, Kind::Huge),
    ([24, 16, 40, 4], 35, false, Kind::Tiny),
    ([64, 32, 8, 2], 50, true, Kind::Outliers),
    ([32, 24, 12, 1], 222, true, Kind::Counted),
];

/// Everything a case consists of.
struct Case {
    name: String,
    config: MoeConfig,
    weights: MoeWeights,
    x: Vec<f32>,
    kind: Kind,
}

fn case(index: usize) -> Case {
    let (sizes, num_tokens, renormalize, kind) = CASES[index];
    let [h, _, e, k] = sizes.map(|n| n as usize);
    let mut values = Values(index as u64 + 1);
    let config = config(sizes, renormalize);
    let mut weights = values.weights(&config);
    let mut x = values.floats(num_tokens * h);
    match kind {
        Kind::Plain => {}
        Kind::Bias => weights.router_bias = Some(values.even(e)),
        Kind::Crowded => {
            // Enough to decide, and not so much that the rounding of a logit is larger than everything else.
            weights.router_bias = Some((0..e).map(|expert| if expert + k >= e { 16.0 } else { 0.0 }).collect());
        }
        Kind::Ties => weights.router.fill(0.0),
        Kind::Huge => {
            weights.router.fill(0.0);
            let logits = [-3e38, 1e4, -1e4, 3e38, 0.0, 3e38, -1e30, 2e4, 1e38];
            weights.router_bias = Some(logits.into_iter().cycle().take(e).collect());
        }
        Kind::Tiny => weights.router.iter_mut().for_each(|w| *w *= 1e-20),
        Kind::Outliers => {
            for token in x.chunks_exact_mut(h) {
                token[h / 2] = 1000.0;
            }
            // The router must not see the outlier alone.
            weights.router.chunks_exact_mut(h).for_each(|expert| expert[h / 2] /= 1000.0);
        }
        Kind::Counted => {
            weights.router.fill(0.0);
            for expert in 0..e {
                weights.router[expert * h + expert] = 1.0;
            }
            let experts = COUNTS.iter().enumerate().flat_map(|(expert, &count)| std::iter::repeat_n(expert, count));
            let mut experts: Vec<usize> = experts.collect();
            assert_eq!((experts.len(), COUNTS.len()), (num_tokens, e), "the case has to fit COUNTS");
            for last in (1..experts.len()).rev() {
                experts.swap(last, values.below(last + 1));
            }
            for (token, expert) in x.chunks_exact_mut(h).zip(experts) {
                token[expert] = 20.0;
            }
        }
    }
    let name = format!("{sizes:?} {num_tokens} tokens {kind:?}");
    Case { name, config, weights, x, kind }
}

fn layer(context: &Context, case: &Case, options: &LayerOptions) -> MoeLayer {
    MoeLayer::with_options(context, case.config.clone(), &case.weights, options)
        .unwrap_or_else(|error| panic!("{}: {error}", case.name))
}

fn forced(variant: MatmulVariant, weights: WeightFormat) -> LayerOptions {
    LayerOptions { matmul: Some(variant), weights, ..LayerOptions::default() }
}

fn forward(layer: &MoeLayer, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; x.len()];
    layer.forward_into(x, &mut y).unwrap_or_else(|error| panic!("{error}"));
    y
}

/// The routing is a correct one of the device's own logits, and those are close enough to the reference's. So a near-tie
/// may fall either way, but nothing else may differ.
fn check_routing(name: &str, case: &Case, routing: &RoutingDecision) -> router::Router {
    let (config, weights, x) = (&case.config, &case.weights, &case.x);
    let [h, e, k] = [config.hidden_size(), config.num_experts(), config.top_k()].map(|n| n as usize);
    let mut expected = router::router(config, weights, &Batch::from(x));
    assert_eq!(routing.num_tokens, x.len() / h, "{name}");

    assert_close(&format!("{name}: logits"), &routing.router_logits, &expected.router_logits, |at| {
        let (t, expert) = (at / e, at % e);
        let products = x[t * h..][..h].iter().zip(&weights.router[expert * h..][..h]);
        let bias = weights.router_bias.as_ref().map_or(0.0, |bias| f64::from(bias[expert].abs()));
        let sum: f64 = products.map(|(&x, &w)| (f64::from(x) * f64::from(w)).abs()).sum();
        4.0 * (h as f64 + 1.0).sqrt() * U * (sum + bias)
    });

    let own_logits: Vec<f64> = routing.router_logits.iter().map(|&l| f64::from(l)).collect();
    let own =
        router::route(config, weights, Logits { experts: own_logits.clone(), shared: Vec::new() }, &Batch::from(x));
    for (t, (got, logits)) in routing.topk_experts.chunks_exact(k).zip(own_logits.chunks_exact(e)).enumerate() {
        let best: Vec<u32> = top_k_indices(logits, k).into_iter().map(|e| e as u32).collect();
        assert_eq!(got, best, "{name}: experts of token {t}");
    }
    assert_close(&format!("{name}: weights"), &routing.topk_weights, &own.topk_weights, |a| {
        1e-6 + 5e-6 * own.topk_weights[a]
    });
    let mut counts = vec![0; e];
    routing.topk_experts.iter().for_each(|&expert| counts[expert as usize] += 1);
    assert_eq!(routing.tokens_per_expert, counts, "{name}");
    assert_eq!(counts.iter().sum::<u32>() as usize, routing.num_tokens * k, "{name}");
    match case.kind {
        Kind::Ties => assert_eq!(routing.topk_experts, (0..k as u32).collect::<Vec<_>>().repeat(x.len() / h), "{name}"),
        Kind::Counted => assert_eq!(counts, COUNTS.map(|n| n as u32), "{name}"),
        Kind::Crowded => assert_eq!(counts[e - k..], vec![(x.len() / h) as u32; k], "{name}"),
        _ => {}
    }

    // From here on the reference follows the device's choice, with weights from its own logits.
    expected.topk_experts = routing.topk_experts.clone();
    for (t, weights) in expected.topk_weights.chunks_exact_mut(k).enumerate() {
        let probs = |j: usize| expected.router_probs[t * e + routing.topk_experts[t * k + j] as usize];
        let sum: f64 = if config.routing().renormalize.is_some() { (0..k).map(probs).sum() } else { 1.0 };
        for (j, weight) in weights.iter_mut().enumerate() {
            *weight = probs(j) / sum;
        }
    }
    expected
}

/// Root of the mean square of each token's outputs: what its errors are measured by. A row of a few elements can be near
/// zero by chance, with sums that are not; there it is that of the whole batch.
fn row_scales(config: &MoeConfig, y: &[f64]) -> Vec<f64> {
    let rms = |values: &[f64]| (values.iter().map(|v| v * v).sum::<f64>() / values.len() as f64).sqrt();
    let h = config.hidden_size() as usize;
    y.chunks_exact(h).map(|row| if h < 8 { rms(y) } else { rms(row) }).collect()
}

fn check_output(name: &str, config: &MoeConfig, y: &[f32], expected: &[f64]) {
    let scales = row_scales(config, expected);
    assert_close(&format!("{name}: y"), y, expected, |at| 1e-5 * scales[at / config.hidden_size() as usize]);
}

/// One case with each of `options`, which differ in nothing that the reference could see.
fn check(context: &Context, case: &Case, format: WeightFormat, options: &[LayerOptions]) {
    let stored = case.weights.rounded(&case.config, format).expect("the format holds them");
    let mut expected: Option<Forward> = None;
    for options in options {
        let layer = layer(context, case, options);
        let plan = layer.plan((case.x.len() / case.config.hidden_size() as usize) as u32);
        let variant = plan.unwrap_or_else(|error| panic!("{}: {error}", case.name)).matmul.label();
        let name = format!("{} {} {variant}", case.name, format.name());
        // A pass before it leaves dirt in every scratch buffer.
        let backwards: Vec<f32> = case.x.iter().rev().copied().collect();
        if case.kind != Kind::Outliers {
            forward(&layer, &backwards);
        }
        let y = forward(&layer, &case.x);
        let routing = layer.routing().unwrap_or_else(|error| panic!("{name}: {error}"));
        let router = check_routing(&name, case, &routing);
        let expected = match &mut expected {
            Some(forward) if forward.router.topk_experts == router.topk_experts => forward,
            other => other.insert(reference::forward_with_routing(&case.config, &stored, &case.x, router)),
        };
        check_output(&name, &case.config, &y, &expected.y);
    }
}

#[test]
fn every_case_matches_the_reference_in_every_variant() {
    let Some(context) = gpu_context() else { return };
    for index in 0..CASES.len() {
        let case = case(index);
        for format in formats(&case.config) {
            let options: Vec<_> = variants(&context).into_iter().map(|variant| forced(variant, format)).collect();
            check(&context, &case, format, &options);
        }
    }
}

/// Devices differ in the tile sizes that the plan chooses; here is what it chooses on others.
#[test]
fn tile_sizes_of_other_devices_match_the_reference() {
    let Some(context) = gpu_context() else { return };
    let mut choices = vec![MatmulChoice::Vec { workgroup_size: 32, k_lanes: 32, sorted: true }];
    choices.extend([16, 64].map(|workgroup_size| MatmulChoice::Vec { workgroup_size, k_lanes: 1, sorted: true }));
    choices.push(MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: true });
    choices.extend([16, 32, 64].map(|tile_m| MatmulChoice::Tiled { tile_m, tile_n: 64 }));
    choices.push(MatmulChoice::Tiled { tile_m: 64, tile_n: 32 });
    choices.extend([(32, 64), (64, 64), (128, 64)].map(|(tile_m, tile_n)| MatmulChoice::TiledTall { tile_m, tile_n }));
    // Software adapters with subgroups have Vec by another kernel; without, by this one.
    choices.push(MatmulChoice::Vec { workgroup_size: 8, k_lanes: 1, sorted: true });
    for kind in [Kind::Plain, Kind::Counted] {
        let index = CASES.iter().rposition(|&(sizes, tokens, _, k)| k == kind && sizes[2] > 4 && tokens > 60);
        let case = case(index.expect("there is such a case"));
        let options = |&choice: &MatmulChoice| LayerOptions { tile: Some(choice), ..LayerOptions::default() };
        check(&context, &case, WeightFormat::F32, &choices.iter().map(options).collect::<Vec<_>>());
    }
    let case = case(9); // 16 tokens: no sort
    let choice = MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: false };
    let options = LayerOptions { tile: Some(choice), weights: WeightFormat::F16, ..LayerOptions::default() };
    check(&context, &case, WeightFormat::F16, &[options]);
}

/// The plan's own choice, over batch sizes around those where it changes.
#[test]
fn the_plans_own_choices_match_the_reference() {
    let Some(context) = gpu_context() else { return };
    let config = config([48, 20, 16, 2], true);
    let weights = Values(77).weights(&config);
    let mut labels = std::collections::BTreeSet::new();
    let layer = MoeLayer::new(&context, config.clone(), &weights).expect("the weights are valid");
    for num_tokens in [1, 2, 3, 4, 5, 15, 16, 17, 18, 33, 64, 150] {
        let x = Values(num_tokens as u64).floats(num_tokens * 48);
        let name = format!("{num_tokens} tokens");
        let case = Case { name: name.clone(), config: config.clone(), weights: weights.clone(), x, kind: Kind::Plain };
        labels.insert(layer.plan(num_tokens as u32).expect("a pass fits").matmul.label());
        let y = forward(&layer, &case.x);
        let router = check_routing(&name, &case, &layer.routing().expect("there was a pass"));
        let expected = reference::forward_with_routing(&config, &weights, &case.x, router);
        check_output(&name, &config, &y, &expected.y);
    }
    println!("variants: {labels:?}");
    assert!(labels.len() >= 2, "the batch sizes were meant to cover several variants: {labels:?}");
}

/// The comparison above is worth nothing if it accepts a wrong layer.
#[test]
fn a_wrong_layer_is_noticed() {
    let Some(context) = gpu_context() else { return };
    let case = case(10);
    type Mistake = fn(&mut MoeWeights);
    let mistakes: [(&str, Mistake); 4] = [
        ("a weight", |w| w.down_proj[777] += 0.01),
        ("gate and up", |w| std::mem::swap(&mut w.gate_proj, &mut w.up_proj)),
        ("an expert", |w| w.gate_proj.rotate_right(64 * 48)),
        ("router", |w| w.router[3] += 0.001),
    ];
    for (name, mistake) in mistakes {
        let mut wrong =
            Case { weights: case.weights.clone(), x: case.x.clone(), name: name.to_owned(), ..case.clone() };
        mistake(&mut wrong.weights);
        let layer = layer(&context, &wrong, &LayerOptions::default());
        let y = forward(&layer, &case.x);
        let expected = reference::moe_forward(&case.config, &case.weights, &case.x).y;
        let noticed = std::panic::catch_unwind(|| check_output(name, &case.config, &y, &expected));
        assert!(noticed.is_err(), "{name} passed");
    }
}

impl Clone for Case {
    fn clone(&self) -> Self {
        Case {
            name: self.name.clone(),
            config: self.config.clone(),
            weights: self.weights.clone(),
            x: self.x.clone(),
            kind: self.kind,
        }
    }
}

/// Cutting weights into pages, batches into passes and expert_out into slices changes no bit.
#[test]
fn pages_and_passes_change_no_bits() {
    let Some(context) = gpu_context() else { return };
    let num_tokens = 150;
    let zero_points = WeightFormat::Int8(IntGroups::new(16, true).expect("a size of groups"));
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT4, zero_points, WeightFormat::Mxfp4] {
        let mut values = Values(5);
        let [h, i] = if format.block() == 1 { [72, 44] } else { [64, 32] };
        let config = config([h, i, 6, 2], true);
        let weights = values.weights(&config);
        let x = values.floats(num_tokens as usize * h as usize);
        for variant in variants(&context) {
            let whole = forced(variant, format);
            let build = |options: &LayerOptions| {
                MoeLayer::with_options(&context, config.clone(), &weights, options).expect("it fits the limit")
            };
            let layer = build(&whole);
            let (expected, routing) = (forward(&layer, &x), layer.routing().expect("there was a pass"));
            let (mut most_pages, mut most_passes, mut column_pages, mut sliced) = (0, 0, false, false);
            // The last leaves room for eight columns of the router.
            for limit in [60_000, 30_000, 9_000, 3_000, u64::from(h) * 32 + 96] {
                let name = format!("{} {} limit {limit}", variant.name(), format.name());
                let options = LayerOptions { max_binding_bytes: Some(limit), ..whole.clone() };
                let layer = build(&options);
                let plan = layer.plan(1).expect("one token fits");
                let matmul = |d: &Dispatch| if let Uniform::Matmul(params) = d.uniform { Some(params) } else { None };
                let params: Vec<_> = plan.dispatches.iter().filter_map(matmul).collect();
                most_pages = most_pages.max(params.len());
                column_pages |= params.iter().any(|p| p.first_column > 0);
                most_passes = most_passes.max(layer.num_passes(num_tokens));
                // Tokens of a full pass, or a few less.
                let plan = layer.plan(num_tokens / layer.num_passes(num_tokens) as u32).expect("a pass fits");
                sliced |= plan.dispatches.iter().any(|d| matches!(d.uniform, Uniform::Moe(p) if p.first_column > 0));
                assert_same_bits(&name, &forward(&layer, &x), &expected);
                assert_eq!(layer.routing().expect("there was a pass"), routing, "{name}");
            }
            assert!(most_pages > 12 && column_pages && most_passes > 10, "{most_pages} {column_pages} {most_passes}");
            assert!(sliced, "no pass had expert_out in slices");
        }
    }
}

#[test]
fn the_same_input_gives_the_same_bits() {
    let Some(context) = gpu_context() else { return };
    let case = case(12);
    for variant in variants(&context) {
        let layer = layer(&context, &case, &forced(variant, WeightFormat::F16));
        let expected = forward(&layer, &case.x);
        for run in 1..20 {
            assert_same_bits(&format!("{} run {run}", variant.name()), &forward(&layer, &case.x), &expected);
        }
        let again = self::layer(&context, &case, &forced(variant, WeightFormat::F16));
        assert_same_bits(&format!("{} another layer", variant.name()), &forward(&again, &case.x), &expected);
    }
}

/// With the variant forced: alone or in any batch, anywhere in it.
#[test]
fn a_tokens_bits_do_not_depend_on_its_batch() {
    let Some(context) = gpu_context() else { return };
    for (sizes, format) in [
        ([131, 37, 8, 2], WeightFormat::F32),
        ([64, 36, 24, 4], WeightFormat::F16),
        ([40, 30, 300, 3], WeightFormat::F32),
        ([96, 64, 24, 4], WeightFormat::INT4),
        ([96, 64, 8, 2], WeightFormat::Nvfp4),
        ([256, 256, 8, 2], WeightFormat::Q4K),
    ] {
        let mut values = Values(8);
        let h = sizes[0] as usize;
        let config = config(sizes, true);
        let weights = values.weights(&config);
        let x = values.floats(128 * h);
        let mut options: Vec<_> = variants(&context).into_iter().map(|variant| forced(variant, format)).collect();
        // What the plan chooses on GPUs, where lanes share sums.
        let choice = MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: true };
        options.push(LayerOptions { tile: Some(choice), weights: format, ..LayerOptions::default() });
        for options in options {
            let layer =
                MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("the layer is valid");
            let name = |what: &str| format!("{sizes:?} {options:?} {what}");
            let whole = forward(&layer, &x);
            for t in [0, 1, 2, 3, 5, 64, 100, 126, 127] {
                let alone = forward(&layer, &x[t * h..][..h]);
                assert_same_bits(&name(&format!("token {t}")), &alone, &whole[t * h..][..h]);
            }
            for num_tokens in [2, 5, 16, 17, 31, 70] {
                let first = values.below(128 - num_tokens);
                let range = first * h..(first + num_tokens) * h;
                let part = forward(&layer, &x[range.clone()]);
                assert_same_bits(&name(&format!("{num_tokens} tokens from {first}")), &part, &whole[range]);
            }
            let backwards = |values: &[f32]| values.chunks_exact(h).rev().flatten().copied().collect::<Vec<f32>>();
            let permuted = forward(&layer, &backwards(&x));
            assert_same_bits(&name("backwards"), &permuted, &backwards(&whole));
        }
    }
}

/// Folded grids and 2^22 assignments. The tokens repeat, and so must the results: a token's bits do not depend on where
/// it stands.
#[test]
fn large_batches_repeat_the_small_one() {
    let Some(context) = gpu_context() else { return };
    let all = variants(&context);
    for (sizes, num_tokens, variants) in
        [([8, 4, 5, 2], 70_001, all.as_slice()), ([4, 4, 16, 8], 1 << 19, &all[all.len() - 1..])]
    {
        let mut values = Values(16);
        let config = config(sizes, true);
        let weights = values.weights(&config);
        let [h, _, _, k] = sizes.map(|n| n as usize);
        let block = values.floats(61 * h);
        let x: Vec<f32> = block.iter().copied().cycle().take(num_tokens * h).collect();
        for &variant in variants {
            let layer = MoeLayer::with_options(&context, config.clone(), &weights, &forced(variant, WeightFormat::F32));
            let layer = layer.expect("the layer is valid");
            let name = format!("{num_tokens} tokens {}", variant.name());
            let expected = forward(&layer, &block);
            let experts = layer.routing().expect("there was a pass").topk_experts;
            let start = std::time::Instant::now();
            let y = forward(&layer, &x);
            println!("{name}: {:?}", start.elapsed());
            let repeated: Vec<f32> = expected.iter().copied().cycle().take(y.len()).collect();
            assert_same_bits(&name, &y, &repeated);
            let routing = layer.routing().expect("there was a pass");
            assert_eq!(routing.tokens_per_expert.iter().sum::<u32>() as usize, num_tokens * k, "{name}");
            let repeated: Vec<u32> = experts.into_iter().cycle().take(num_tokens * k).collect();
            assert!(routing.topk_experts == repeated, "{name}: other experts");
            assert!(layer.pass_stats().dispatches <= 7, "{name}: {:?}", layer.pass_stats());
        }
    }
}

#[test]
fn dispatches_readbacks_and_allocations_stay_low() {
    let Some(context) = gpu_context() else { return };
    let mut values = Values(9);
    let config = config([64, 32, 8, 2], true);
    let weights = values.weights(&config);
    for variant in std::iter::once(None).chain(variants(&context).into_iter().map(Some)) {
        let options = LayerOptions { matmul: variant, ..LayerOptions::default() };
        let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("the layer is valid");
        for (num_tokens, most) in [(1, 4), (2, 4), (16, 4), (17, 7), (600, 7), (2000, 7)] {
            // Only the plan's own choice promises 4.
            let most = if variant.is_none() { most } else { 7 };
            let x = values.floats(num_tokens * 64);
            layer.forward(&x).expect("the input is valid");
            layer.forward(&x).expect("the input is valid");
            let forward = layer.pass_stats();
            layer.upload(&x).expect("it fits one pass");
            layer.run_resident().expect("it was uploaded");
            layer.run_resident().expect("it was uploaded");
            let resident = layer.pass_stats();
            for stats in [forward, resident] {
                assert_eq!(stats.num_tokens as usize, num_tokens);
                assert!((1..=most).contains(&stats.dispatches), "{variant:?} {stats:?}");
                let created = (stats.readbacks, stats.allocations, stats.bind_groups);
                assert_eq!(created, (0, 0, 0), "{variant:?} {stats:?}");
            }
            let planned = layer.plan(num_tokens as u32).expect("it fits one pass").dispatches.len();
            assert_eq!(resident.dispatches as usize, planned);
        }
        // The first pass of a layer does allocate, so the counter counts.
        let fresh = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("the layer is valid");
        fresh.forward(&values.floats(64)).expect("the input is valid");
        let stats = fresh.pass_stats();
        assert!(stats.allocations > 0 && stats.bind_groups >= stats.dispatches, "{stats:?}");
    }
}

/// What a bench calls cold is cold, also for the second layer of a process; what it calls warm compiles nothing.
#[test]
fn every_layer_of_a_bench_starts_cold() {
    let Some(context) = gpu_context() else { return };
    let bench = Bench { runs: Some(1), slice: Duration::ZERO, ..Bench::new(&context) };
    let mut yardstick = Yardstick::new(&context).expect("the device runs");
    for _ in 0..2 {
        let workload = Workload::new(config([64, 32, 8, 2], true), 0.0, 1).expect("small");
        let outcomes = bench.run(None, workload, &[20], &mut yardstick, &mut |_| ());
        let [Outcome::Started(first), Outcome::Measured(row)] = &outcomes[..] else { panic!("{outcomes:?}") };
        let warm = first.warm.expect("loading takes an instant");
        assert_eq!((first.cold.kernels, warm.kernels), (row.dispatches, 0), "one kernel for each dispatch");
    }
}

/// A caller that records the same batch again, also one of several passes, pays for commands and nothing else.
#[test]
fn a_batch_that_is_recorded_again_creates_nothing() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("it is a GPU");
    let (device, queue) = (gpu.device(), gpu.queue());
    let config = config([16, 8, 4, 2], true);
    let weights = Values(16).weights(&config);
    let options = LayerOptions { max_binding_bytes: Some(64 * 16 * 4), ..LayerOptions::default() };
    let layer = MoeLayer::with_options(&context, config, &weights, &options).expect("the layer is valid");
    let x = Values(17).floats(150 * 16);
    let [x, y, other] = [(); 3].map(|()| buffer(device, queue, &x));
    assert!(layer.num_passes(150) > 2, "at least two passes of the same size");
    let record = |x: &wgpu::Buffer, y: &wgpu::Buffer| {
        let mut encoder = device.create_command_encoder(&Default::default());
        layer.record(&mut encoder, x, y, 150).expect("the buffers fit");
        queue.submit([encoder.finish()]);
        layer.pass_stats()
    };
    let first = record(&x, &y);
    assert_eq!(first.bind_groups, first.dispatches, "{first:?}");
    let again = record(&x, &y);
    assert_eq!((again.allocations, again.bind_groups, again.dispatches), (0, 0, first.dispatches));
    // Other buffers need bind groups of their own, and take the place of the first.
    assert_eq!(record(&x, &other).bind_groups, first.dispatches);
    assert_eq!(record(&x, &other).bind_groups, 0);
    assert_eq!(record(&x, &y).bind_groups, first.dispatches);
}

/// More batch sizes than prepared passes are kept for, among them batches of several passes.
#[test]
fn any_number_of_batch_sizes_works() {
    let Some(context) = gpu_context() else { return };
    let mut values = Values(10);
    let config = config([8, 4, 2, 1], true);
    let weights = values.weights(&config);
    let options = LayerOptions { max_binding_bytes: Some(128 * 32), ..forced(MatmulVariant::Vec, WeightFormat::F32) };
    let layer = MoeLayer::with_options(&context, config, &weights, &options).expect("the layer is valid");
    assert_eq!(layer.num_passes(128), 1);
    assert_eq!(layer.num_passes(129), 2);
    let x = values.floats(400 * 8);
    let expected = forward(&layer, &x);
    for num_tokens in (1..64).chain([128 + 70, 128 + 71, 300, 100, 128 + 72]) {
        let y = forward(&layer, &x[..num_tokens * 8]);
        assert_same_bits(&format!("{num_tokens} tokens"), &y, &expected[..num_tokens * 8]);
    }
}

#[test]
fn zero_tokens_are_no_work() {
    let Some(context) = gpu_context() else { return };
    let config = config([8, 4, 2, 1], true);
    let weights = Values(11).weights(&config);
    let layer = MoeLayer::new(&context, config, &weights).expect("the layer is valid");
    let gpu = context.gpu().expect("it is a GPU");
    let before = gpu.allocations();
    assert_eq!(layer.forward(&[]).expect("nothing is valid"), Vec::<f32>::new());
    assert_eq!(gpu.allocations(), before, "the device was touched");
    assert_eq!(layer.num_passes(0), 0);
    let routing = layer.routing().expect("there is always one");
    assert_eq!((routing.num_tokens, routing.topk_experts.len(), routing.tokens_per_expert), (0, 0, vec![0, 0]));
    // Also after another pass: the last forward was the empty one.
    layer.forward(&[1.0; 16]).expect("the input is valid");
    layer.forward(&[]).expect("nothing is valid");
    assert_eq!(layer.routing().expect("there is always one").num_tokens, 0);
    assert_eq!(layer.pass_stats().num_tokens, 0);
}

/// A device of the caller's own, on the adapter that the tests run on, and the errors that reached its handler.
fn own_device(context: &Context) -> (wgpu::Device, wgpu::Queue, std::sync::Arc<std::sync::Mutex<Vec<String>>>) {
    let mut desc = wgpu::InstanceDescriptor::new_without_display_handle();
    desc.backends = wgpu::Backends::PRIMARY;
    let adapters = pollster::block_on(wgpu::Instance::new(desc).enumerate_adapters(wgpu::Backends::all()));
    let wanted = context.device();
    let adapter = adapters.into_iter().find(|adapter| {
        let info = adapter.get_info();
        info.name == wanted.name && wanted.driver.contains(&info.driver_info)
    });
    let adapter = adapter.expect("the adapter is still there");
    let features = adapter.features() & wgpu::Features::SUBGROUP;
    let desc = wgpu::DeviceDescriptor { required_features: features, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&desc)).expect("the device opens");
    let errors = std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default();
    let sink = errors.clone();
    device.on_uncaptured_error(std::sync::Arc::new(move |error| {
        sink.lock().expect("nobody panics in here").push(error.to_string());
    }));
    (device, queue, errors)
}

/// A storage buffer with `content`.
fn buffer(device: &wgpu::Device, queue: &wgpu::Queue, content: &[f32]) -> wgpu::Buffer {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::COPY_SRC;
    let desc =
        wgpu::BufferDescriptor { label: None, size: (content.len() * 4) as u64, usage, mapped_at_creation: false };
    let buffer = device.create_buffer(&desc);
    queue.write_buffer(&buffer, 0, bytemuck::cast_slice(content));
    buffer
}

/// Several passes in one encoder of the caller's, one submit; more tokens than before on the way, so that buffers grow.
#[test]
fn recorded_passes_give_the_bits_of_forward() {
    let Some(context) = gpu_context() else { return };
    let (device, queue, errors) = own_device(&context);
    let context = Context::from_wgpu(device.clone(), queue.clone());
    let mut values = Values(12);
    // 150 * 2 * 24 * 4 bytes is 28,800: the last batch takes several passes within the small limit.
    for limit in [None, Some(12_800), Some(4_000)] {
        for variant in variants(&context) {
            let config = config([24, 20, 6, 2], true);
            let weights = values.weights(&config);
            let options = LayerOptions { max_binding_bytes: limit, ..forced(variant, WeightFormat::F16) };
            let layer = MoeLayer::with_options(&context, config, &weights, &options).expect("the layer is valid");
            let mut encoder = device.create_command_encoder(&Default::default());
            let mut passes = Vec::new();
            assert!(limit.is_none() || layer.num_passes(150) > 1);
            for num_tokens in [3, 17, 17, 40, 1, 150, 150, 3] {
                let x = values.floats(num_tokens * 24);
                // Poison, and elements that are not the pass's.
                let buffers = (buffer(&device, &queue, &x), buffer(&device, &queue, &vec![7.5; x.len() + 64]));
                layer.record(&mut encoder, &buffers.0, &buffers.1, num_tokens as u32).expect("the buffers fit");
                let stats = layer.pass_stats();
                assert_eq!((stats.num_tokens as usize, stats.readbacks), (num_tokens, 0));
                passes.push((x, buffers.1));
            }
            layer.record(&mut encoder, &passes[0].1, &passes[0].1, 0).expect("nothing is recorded");
            queue.submit([encoder.finish()]);
            let last_experts = layer.routing().expect("there was a pass").topk_experts;
            for (index, (x, y)) in passes.iter().enumerate() {
                let got = read_buffer(&device, &queue, y);
                let name = format!("{} limit {limit:?} pass {index}", variant.name());
                assert_same_bits(&name, &got[..x.len()], &forward(&layer, x));
                assert_same_bits(&format!("{name}: past the end"), &got[x.len()..], &[7.5; 64]);
            }
            assert_eq!(last_experts, layer.routing().expect("there was a pass").topk_experts);
        }
    }
    assert_eq!(*errors.lock().expect("nobody panicked"), Vec::<String>::new());
}

/// A recorded batch of several passes leaves only the last one's routing on the device: that is said, not guessed.
#[test]
fn routing_of_a_recorded_batch_of_several_passes_is_refused() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("it is a GPU");
    let (device, queue) = (gpu.device(), gpu.queue());
    let config = config([16, 8, 4, 2], true);
    let weights = Values(13).weights(&config);
    let options = LayerOptions { max_binding_bytes: Some(64 * 16 * 4), ..LayerOptions::default() };
    let layer = MoeLayer::with_options(&context, config, &weights, &options).expect("the layer is valid");
    let x = Values(14).floats(100 * 16);
    let (x, y) = (buffer(device, queue, &x), buffer(device, queue, &x));
    assert!(layer.num_passes(100) > 1);
    let mut encoder = device.create_command_encoder(&Default::default());
    layer.record(&mut encoder, &x, &y, 100).expect("the buffers fit");
    queue.submit([encoder.finish()]);
    let routing = layer.routing();
    assert!(matches!(routing, Err(Error::Unsupported { .. })), "{routing:?}");
}

#[test]
fn recording_refuses_unusable_buffers() {
    let Some(context) = gpu_context() else { return };
    let (device, queue, errors) = own_device(&context);
    let context = Context::from_wgpu(device.clone(), queue.clone());
    let config = config([16, 8, 4, 2], true);
    let weights = Values(15).weights(&config);
    let layer = MoeLayer::new(&context, config, &weights).expect("the layer is valid");
    let good = || buffer(&device, &queue, &[1.0; 64]);
    let small = buffer(&device, &queue, &[1.0; 60]);
    let desc = wgpu::BufferDescriptor {
        label: None,
        size: 256,
        usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    };
    let unusable = device.create_buffer(&desc);
    let record = |x: &wgpu::Buffer, y: &wgpu::Buffer| {
        let mut encoder = device.create_command_encoder(&Default::default());
        layer.record(&mut encoder, x, y, 4)
    };
    let same = good();
    assert!(matches!(record(&same, &same), Err(Error::Unsupported { .. })));
    for (x, y) in [(&small, &same), (&same, &small)] {
        let error = record(x, y);
        assert!(matches!(error, Err(Error::LimitExceeded { required: 256, available: 240, .. })), "{error:?}");
    }
    for (x, y) in [(&unusable, &same), (&same, &unusable)] {
        assert!(matches!(record(x, y), Err(Error::Unsupported { .. })));
    }
    assert!(record(&same, &good()).is_ok());
    assert_eq!(*errors.lock().expect("nobody panicked"), Vec::<String>::new());
}
