//! Every engine against golden files: blocks computed by somebody else's implementation (tests/golden/README.md).

mod support;

use std::path::{Path, PathBuf};
use support::{gpu_context, variants};
use wgmoe::golden::{self, GoldenCase, compare, compare_losses};
use wgmoe::model::checkpoint::read_tensor;
use wgmoe::reference::moe_forward;
use wgmoe::{
    Activation, Checkpoint, Context, Error, Function, LayerExtras, LayerOptions, MatmulVariant, MoeConfig, MoeLayer,
    MoeWeights, Result, Routing, RoutingDecision, SpecialKind,
};

/// Runs one case: its output and routing.
type Engine<'a> = &'a dyn Fn(&GoldenCase) -> Result<(Vec<f32>, RoutingDecision)>;

fn golden_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the folder of golden files should be readable");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a folder entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files
}

/// Cases that ship with the crate; each must be supported.
fn own_cases() -> Vec<GoldenCase> {
    let files = golden_files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"));
    files.iter().map(|path| GoldenCase::read(path, None).unwrap_or_else(|error| panic!("{error}"))).collect()
}

/// Cases of a larger collection beside the checkout, if there is one; families that are not supported yet are counted,
/// everything else must be readable.
fn neighbouring_cases() -> Vec<GoldenCase> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden");
    if !folder.is_dir() {
        println!("no {}: only the cases in tests/golden run", folder.display());
        return Vec::new();
    }
    let (mut cases, mut unsupported) = (Vec::new(), 0);
    for path in golden_files(&folder) {
        match GoldenCase::read(&path, None) {
            Ok(case) => cases.push(case),
            Err(Error::Unsupported { .. }) => unsupported += 1,
            Err(error) => panic!("{error}"),
        }
    }
    println!("{}: {} cases, {unsupported} of families that are not supported", folder.display(), cases.len());
    cases
}

/// Runs `engine` on each case and lists every one that fails.
fn check_all(name: &str, engine: Engine, cases: &[GoldenCase]) {
    let mut failures = Vec::new();
    let mut worst: f64 = 0.0;
    for case in cases {
        let verdict = match engine(case) {
            Ok((y, routing)) => compare(case, &y, &routing, golden::TOLERANCE),
            Err(error) => panic!("{name}: {}: {error}", case.file.display()),
        };
        worst = worst.max(verdict.max_rel_error);
        failures.extend(verdict.reason.map(|reason| format!("{}: {reason}", case.file.display())));
    }
    println!("{name}: {} cases, worst relative error {worst:.1e}", cases.len());
    assert!(failures.is_empty(), "{name}: {} of {} failed:\n{}", failures.len(), cases.len(), failures.join("\n"));
}

/// The definition, in f32; `tests/families.rs` holds it to the files.
fn reference(case: &GoldenCase) -> (Vec<f32>, RoutingDecision) {
    let forward = moe_forward(&case.config, &case.weights, case.batch());
    let to_f32 = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let routing = RoutingDecision {
        num_tokens: case.num_tokens,
        topk_experts: forward.router.topk_experts.clone(),
        topk_weights: to_f32(&forward.router.topk_weights),
        shared_weights: to_f32(&forward.router.shared_weights),
        router_logits: to_f32(&forward.router.router_logits),
        ..RoutingDecision::default()
    };
    (to_f32(&forward.y), routing)
}

/// A layer on `context`, with the variant that the plan chooses or another.
fn check_context(context: &Context, matmul: Option<MatmulVariant>, cases: &[GoldenCase]) {
    let engine = |case: &GoldenCase| {
        let options = LayerOptions { matmul, ..LayerOptions::default() };
        let layer = MoeLayer::with_options(context, case.config.clone(), &case.weights, &options)?;
        let y = layer.forward_batch(&case.batch())?;
        if case.load_balancing_loss.is_some() || case.router_z_loss.is_some() {
            let wrong = compare_losses(case, &layer.statistics()?, golden::TOLERANCE);
            assert_eq!(wrong, None, "{}", case.file.display());
        }
        Ok((y, layer.routing()?))
    };
    let variant = matmul.map_or("", MatmulVariant::name);
    check_all(&format!("{} {variant}", context.device().name), &engine, cases);
}

#[test]
fn the_cpu_engine_agrees_with_golden_files() {
    check_context(&Context::cpu(), None, &own_cases());
    check_context(&Context::cpu(), None, &neighbouring_cases());
}

#[test]
fn the_gpu_agrees_with_golden_files() {
    let Some(context) = gpu_context() else { return };
    check_context(&context, None, &own_cases());
    check_context(&context, None, &neighbouring_cases());
    // The variants differ in the matmul only: a case of each family is enough.
    let mut cases = own_cases();
    cases.dedup_by(|a, b| a.family == b.family);
    for variant in variants(&context) {
        check_context(&context, Some(variant), &cases);
    }
}

/// Files with packed weights: they stay packed on the device, in every variant, and their sizes there are those of the
/// format. The expected outputs were computed from the unpacked weights.
#[test]
fn packed_files_stay_packed() {
    let gpu = gpu_context();
    let mut formats = std::collections::BTreeSet::new();
    for case in own_cases().iter().chain(&neighbouring_cases()) {
        let checkpoint = Checkpoint::open(&case.file).expect("it was read before");
        let storage = checkpoint.metadata("weight_storage").unwrap_or("f32").to_owned();
        if storage == "f32" {
            continue;
        }
        let engines = gpu.iter().flat_map(|gpu| {
            std::iter::once(None).chain(variants(gpu).into_iter().map(Some)).map(move |matmul| (gpu.clone(), matmul))
        });
        for (context, matmul) in engines.chain([(Context::cpu(), None)]) {
            let name = format!("{} on {} {matmul:?}", case.file.display(), context.device().name);
            let mut source = checkpoint.layer(None, case.layer).expect("it was read before");
            let options = LayerOptions { matmul, ..LayerOptions::default() };
            let layer = MoeLayer::load(&context, &mut source, &options, |_, _| {})
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(layer.formats().name(), storage, "{name}");
            let y = layer.forward_batch(&case.batch()).unwrap_or_else(|error| panic!("{name}: {error}"));
            let routing = layer.routing().expect("there was a pass");
            let verdict = compare(case, &y, &routing, golden::TOLERANCE);
            assert!(verdict.reason.is_none(), "{name}: {:?}", verdict.reason);
            // Routed and shared experts. The CPU engine pads the columns of each matrix to 64, halves of which are gates;
            // GPUs have quads, and software drivers the router as a matrix too.
            let c = &case.config;
            let on_gpu = context.gpu().is_some();
            let [h, i, e] = [c.hidden_size(), c.intermediate_size(), c.num_experts()];
            let matrices = |i: u32, wide: bool| {
                let pad = |n: u32, to: u32| if wide { n.next_multiple_of(if on_gpu { 4 } else { to }) } else { n };
                f64::from(2 * pad(i, 32) * h + pad(h, 64) * i)
            };
            let shared = c.extras().shared.map_or((0, 0), |shared| (shared.num, shared.intermediate_size));
            let weights = |wide| f64::from(e) * matrices(i, wide) + f64::from(shared.0) * matrices(shared.1, wide);
            let bits = match storage.as_str() {
                "bf16" => 16.0,
                "fp8" => 8.25,
                "mxfp4" => 4.25,
                other => panic!("{name}: {other} is no storage that this test knows"),
            };
            let stored = layer.weight_bytes() as f64 - if on_gpu { f64::from(e * h * 4) } else { 0.0 };
            let [least, most] = [false, true].map(|wide| weights(wide) * bits / 8.0);
            // Quads are whole 32 bytes, which shows in rows as short as these.
            let columns = |i: u32| f64::from(2 * i.next_multiple_of(4) + h.next_multiple_of(4));
            let quads = (f64::from(e) * columns(i) + f64::from(shared.0) * columns(shared.1)) / 4.0;
            let most = 1.1 * most + if on_gpu { 31.0 * quads } else { 0.0 };
            assert!(stored >= least && stored <= most, "{name}: {stored} bytes, of {least} to {most}");
        }
        formats.insert(storage);
    }
    assert_eq!(formats.into_iter().collect::<Vec<_>>(), ["bf16", "fp8", "mxfp4"]);
}

/// The families of the collection, and a layer of each layout that it has for them.
#[test]
fn many_families_are_covered() {
    let cases = own_cases();
    let mut covered: Vec<(&str, &str)> =
        cases.iter().map(|case| (case.family.as_str(), case.layout.as_str())).collect();
    covered.sort_unstable();
    covered.dedup();
    let mut families: Vec<&str> = covered.iter().map(|&(family, _)| family).collect();
    families.dedup();
    assert!(families.len() >= 42 && covered.len() >= 50, "{} {}: {covered:?}", families.len(), covered.len());
}

/// A token on the edge between two experts would make a case a matter of luck.
#[test]
fn no_case_is_a_near_tie() {
    let cases: Vec<GoldenCase> = own_cases().into_iter().chain(neighbouring_cases()).collect();
    let smallest = cases.iter().filter_map(|case| Some((case.smallest_gap()?, &case.file)));
    let (gap, file) = smallest.min_by(|a, b| a.0.total_cmp(&b.0)).expect("some case has logits");
    println!("smallest gap between the last chosen and the first rejected logit: {gap:.1e} in {}", file.display());
    assert!(gap > 1e-4, "{}: {gap:.1e}", file.display());
}

/// The comparison has teeth: an engine with any one of these mistakes fails on every case that can show it.
#[test]
fn wrong_engines_fail() {
    type Mistake = fn(&mut Vec<f32>, &mut RoutingDecision);
    let mistakes: [(&str, Mistake); 5] = [
        ("flipped element", |y, _| {
            let largest = (0..y.len()).max_by(|&a, &b| y[a].abs().total_cmp(&y[b].abs())).expect("not empty");
            y[largest] = -y[largest];
        }),
        ("NaN", |y, _| y[0] = f32::NAN),
        ("short", |y, _| y.truncate(y.len() - 1)),
        ("duplicate expert", |_, routing| routing.topk_experts[0] = routing.topk_experts[1]),
        ("wrong weight", |_, routing| routing.topk_weights[0] *= 0.999),
    ];
    for case in own_cases() {
        for (name, mistake) in mistakes {
            let (mut y, mut routing) = reference(&case);
            mistake(&mut y, &mut routing);
            let verdict = compare(&case, &y, &routing, golden::TOLERANCE);
            assert!(!verdict.passed(), "{name} passed on {}", case.file.display());
        }
    }
}

/// A router that is a network of its own is the caller's: here Zaya's, with the state that it carries from layer to
/// layer, in plain loops. The layer behind it takes the logits; the last expert has no weights and gives nothing.
#[test]
fn a_router_network_of_the_caller_stands_in_front() {
    let file =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/router_network/zaya__t7_h72_i40_e8k1_eda_module.safetensors");
    let io = |name: &str| read_tensor(&file, Some(name)).unwrap_or_else(|error| panic!("{error}")).0;
    let tensor = |name: &str| io(&format!("model.layers.1.mlp.{name}"));
    let linear = |x: &[f64], weight: &str, bias: Option<&str>| -> Vec<f64> {
        let (weights, biases) = (tensor(weight), bias.map(tensor));
        let row = |(n, row): (usize, &[f32])| {
            let sum: f64 = row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum();
            sum + biases.as_ref().map_or(0.0, |bias| f64::from(bias[n]))
        };
        weights.chunks_exact(x.len()).enumerate().map(row).collect()
    };
    let gelu = |v: Vec<f64>| v.into_iter().map(|v| Function::Gelu.apply(v)).collect::<Vec<f64>>();

    let (x, state, scale) =
        (io("io.hidden_states"), io("io.prev_router_hidden_states"), tensor("gate.router_states_scale"));
    let norm = tensor("gate.router_mlp.norm.weight");
    let mut logits = Vec::new();
    for (token, state) in x.chunks_exact(72).zip(state.chunks_exact(32)) {
        let token: Vec<f64> = token.iter().map(|&v| f64::from(v)).collect();
        let mut r = linear(&token, "gate.down_proj.weight", Some("gate.down_proj.bias"));
        r.iter_mut().zip(state).zip(&scale).for_each(|((r, &s), &scale)| *r += f64::from(s) * f64::from(scale));
        let root = (r.iter().map(|v| v * v).sum::<f64>() / 32.0 + 1e-5).sqrt();
        let normed: Vec<f64> = r.iter().zip(&norm).map(|(v, &w)| v / root * f64::from(w)).collect();
        let h = gelu(linear(&normed, "gate.router_mlp.fc1.weight", Some("gate.router_mlp.fc1.bias")));
        let h = gelu(linear(&h, "gate.router_mlp.fc2.weight", Some("gate.router_mlp.fc2.bias")));
        logits.extend(linear(&h, "gate.router_mlp.out_proj.weight", None).into_iter().map(|l| l as f32));
    }
    for (found, expected) in logits.iter().zip(io("io.router_logits")) {
        assert!((found - expected).abs() < 1e-5, "{found} {expected}");
    }

    let config = MoeConfig::new(72, 40, 9, 1, Routing::softmax(false), Activation::SWIGLU)
        .and_then(|config| {
            let extras = LayerExtras { special_experts: 1, special_kind: SpecialKind::Zero, ..LayerExtras::default() };
            config.with_extras(extras)
        })
        .expect("a layer that can exist");
    let both = tensor("experts.gate_up_proj"); // gate rows, then up rows, of each expert
    let half = |first: usize| both.chunks_exact(40 * 72).skip(first).step_by(2).flatten().copied().collect();
    let mut weights = MoeWeights {
        router: vec![0.0; 9 * 72], // never asked
        gate_proj: half(0),
        up_proj: half(1),
        down_proj: tensor("experts.down_proj"),
        ..MoeWeights::default()
    };
    weights.extras.selection_bias = Some(tensor("gate.balancing_biases"));
    let expected = io("io.output");
    let most = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    for context in [Some(Context::cpu()), gpu_context()].into_iter().flatten() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        let y = layer.forward_with_logits(&x, &logits).expect("it runs");
        let error = y.iter().zip(&expected).fold(0.0f32, |most, (y, e)| most.max((y - e).abs())) / most;
        assert!(error < 1e-5, "{}: {error:e}", context.device().name);
    }
}
