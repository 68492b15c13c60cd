//! Every engine against golden files: blocks computed by somebody else's implementation (tests/golden/README.md).
//! tests/families.rs does the same with the reference.

mod support;

use std::path::{Path, PathBuf};
use support::{gpu_context, variants};
use wgmoe::golden::{self, GoldenCase, compare};
use wgmoe::reference::moe_forward;
use wgmoe::{Context, Error, LayerOptions, MatmulVariant, MoeLayer, Result, RoutingDecision};

/// Runs the layer of a case on its input: `y [num_tokens, hidden_size]` and the routing.
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

fn reference(case: &GoldenCase) -> Result<(Vec<f32>, RoutingDecision)> {
    let forward = moe_forward(&case.config, &case.weights, case.batch());
    let to_f32 = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let offsets = &forward.permutation.expert_offsets;
    let routing = RoutingDecision {
        num_tokens: case.num_tokens,
        topk_experts: forward.router.topk_experts.clone(),
        topk_weights: to_f32(&forward.router.topk_weights),
        shared_weights: to_f32(&forward.router.shared_weights),
        router_logits: to_f32(&forward.router.router_logits),
        tokens_per_expert: offsets.windows(2).map(|range| range[1] - range[0]).collect(),
        ..RoutingDecision::default()
    };
    Ok((to_f32(&forward.y), routing))
}

/// A layer on `context`, with the variant that the plan chooses or another.
fn check_context(context: &Context, matmul: Option<MatmulVariant>, cases: &[GoldenCase]) {
    let engine = |case: &GoldenCase| {
        let options = LayerOptions { matmul, ..LayerOptions::default() };
        let layer = MoeLayer::with_options(context, case.config.clone(), &case.weights, &options)?;
        Ok((layer.forward(&case.x)?, layer.routing()?))
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
    let cases: Vec<GoldenCase> = own_cases().into_iter().chain(neighbouring_cases()).collect();
    for matmul in std::iter::once(None).chain(variants(&context).into_iter().map(Some)) {
        check_context(&context, matmul, &cases);
    }
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

/// The first choice is dropped, or its weight is too small for a part of it to count.
fn hides_weights(case: &GoldenCase) -> bool {
    let first = |values: &Option<Vec<f32>>| values.as_ref().and_then(|values| values.first().copied());
    let dropped = case.topk_experts.as_ref().and_then(|experts| experts.first()) == Some(&wgmoe::DROPPED);
    dropped || first(&case.topk_weights).is_none_or(|weight| weight.abs() < 0.02)
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
            let (mut y, mut routing) = reference(&case).expect("the reference runs");
            if name == "duplicate expert" && case.config.top_k() < 2 || name == "wrong weight" && hides_weights(&case) {
                continue;
            }
            mistake(&mut y, &mut routing);
            let verdict = compare(&case, &y, &routing, golden::TOLERANCE);
            assert!(!verdict.passed(), "{name} passed on {}", case.file.display());
        }
    }
}
