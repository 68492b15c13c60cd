//! The built-in families against blocks that somebody else's implementation computed, with the f64 reference: what is
//! tested is the descriptions, not an engine.

use std::path::{Path, PathBuf};
use wgmoe::golden::{self, GoldenCase, compare, compare_losses};
use wgmoe::reference::{moe_forward, statistics::statistics};
use wgmoe::{Error, RoutingDecision};

fn golden_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the folder of golden files should be readable");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a folder entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files
}

fn own_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Runs the reference: the first thing that is wrong, and the relative error of the output.
fn run(case: &GoldenCase) -> (f64, Option<String>) {
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
    let verdict = compare(case, &to_f32(&forward.y), &routing, golden::TOLERANCE);
    let sequence = case.tokens_per_sequence.map_or(case.num_tokens, |tokens| tokens as usize);
    let losses = compare_losses(case, &statistics(&case.config, &forward.router, sequence), golden::TOLERANCE);
    (verdict.max_rel_error, verdict.reason.or(losses))
}

/// Every case of a folder: right, or of a family that says why it is not supported.
fn check_folder(folder: &Path) {
    let (mut failures, mut passed, mut unsupported, mut worst) = (Vec::new(), 0, Vec::new(), 0.0f64);
    for path in golden_files(folder) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match GoldenCase::read(&path, None) {
            Ok(case) => match run(&case) {
                (error, None) => {
                    worst = worst.max(error);
                    passed += 1;
                }
                (_, Some(reason)) => failures.push(format!("{name}: {reason}")),
            },
            Err(Error::Unsupported { what, .. }) if what.starts_with("family ") => unsupported.push(name),
            Err(error) => failures.push(format!("{name}: {error}")),
        }
    }
    println!("{}: {passed} cases, worst relative error {worst:.1e}; unsupported: {unsupported:?}", folder.display());
    assert!(failures.is_empty(), "{} of {} failed:\n{}", failures.len(), failures.len() + passed, failures.join("\n"));
}

#[test]
fn the_reference_agrees_with_golden_files() {
    check_folder(&own_folder());
}

/// A larger collection beside the checkout, or where WGMOE_GOLDEN says.
#[test]
fn the_reference_agrees_with_neighbouring_golden_files() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden");
    let folder = std::env::var_os("WGMOE_GOLDEN").map_or(beside, PathBuf::from);
    if folder.is_dir() {
        check_folder(&folder);
    } else {
        println!("no {}: only the cases in tests/golden run", folder.display());
    }
}
