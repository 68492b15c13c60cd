//! `wgmoe check`: are the numbers right, here and now? Made for CI.

use crate::bench_table::plain_table;
use crate::families::chosen;
use crate::output::{Output, Status};
use crate::{Matmul, Verdict, must_exist, open, unusable};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use wgmoe::check::Progress;
use wgmoe::golden::{self, GoldenCase};
use wgmoe::{
    CaseId, CheckKind, Checkpoint, Context, DeviceChoice, Error, Family, KernelCheck, LayerOptions, MoeLayer,
    WeightFormat, reference,
};

const EXAMPLES: &str = "\
Without a path, every kernel variant that this device can run is compared with its reference over a table of shapes, \
layers of every kind are compared whole, and 10,000 rows of logits of every kind go through router and permute.

--cases, --exact, --rows and --determinism each run that part and no other; together, those that are named. A generated \
case that fails is run again, alone, by the same --seed and --case with its number.

With paths, each golden case (a safetensors file with a layer, its input and the output that another implementation \
computed) is run and compared: output within 1e-5, selected experts and their weights.

Exit code 0 only if at least one case ran, nothing failed and nothing was unsupported; 1 otherwise; 2 if a path does \
not exist or an argument cannot be used.

Examples:
  wgmoe check
  wgmoe check cases/ --device cpu
  wgmoe check a.safetensors b.safetensors --json results.json
  wgmoe check --cases 12000 --seed 7
  wgmoe check --determinism
  wgmoe check a.safetensors --family mine.toml";

/// Compare every kernel with its reference, or golden cases with what another implementation computed
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Golden cases: safetensors files, or folders of them (not their subfolders)
    #[arg(value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// Storage of the expert weights, as for `bench`; the f64 reference then computes the expected output again from
    /// the rounded weights. Golden cases only [default: as the file stores them]
    #[arg(long, value_name = "FORMAT", value_parser = crate::weight_format)]
    weights: Option<WeightFormat>,
    /// Model family of the golden cases: a description of your own, or the name of a built-in one; without it, their
    /// configurations decide
    #[arg(long, value_name = "TOML|NAME")]
    family: Option<String>,
    /// Grouped matmul: auto, tiled, subgroup or vec. Golden cases only: without a path, all are checked
    #[arg(long, value_name = "VARIANT", default_value = "auto", value_parser = crate::matmul_variant)]
    matmul: Matmul,
    /// This many generated cases: kernels of every format and variant on random layers
    #[arg(long, value_name = "N", conflicts_with = "paths", value_parser = clap::value_parser!(u64).range(1..))]
    cases: Option<u64>,
    /// Generated cases are others with another seed
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Only the generated case of this number
    #[arg(long, value_name = "I", conflicts_with_all = ["paths", "cases"])]
    case: Option<u64>,
    /// Layers of small integers, bit by bit
    #[arg(long, conflicts_with = "paths")]
    exact: bool,
    /// Rows of logits through router and permute, exactly: this many [100000 if no number is given]
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "100000", conflicts_with = "paths",
        value_parser = clap::value_parser!(u64).range(1..))]
    rows: Option<u64>,
    /// The same bits in every run, batch and order of tokens
    #[arg(long, conflicts_with = "paths")]
    determinism: bool,
    /// Runs of every variant for --determinism
    #[arg(long, value_name = "N", default_value_t = 1000, requires = "determinism",
        value_parser = clap::value_parser!(u32).range(2..))]
    runs: u32,
}

/// Rows of logits where nobody asked for them.
const ROWS: u64 = 10_000;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Pass,
    Fail,
    Unsupported,
}

/// One line of the report. Field names are a promise: other programs read them.
#[derive(Debug, Serialize)]
struct Case {
    /// The file; for a kernel its label.
    file: String,
    /// The model family; `kernel` for a kernel; absent if the file could not be read that far.
    family: Option<String>,
    /// Sizes; kernels only.
    #[serde(skip_serializing_if = "Option::is_none")]
    shape: Option<String>,
    /// What kind of check it was; kernels only.
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<CheckKind>,
    /// Cases, rows or comparisons that it stands for; kernels only.
    #[serde(skip_serializing_if = "Option::is_none")]
    count: Option<u64>,
    /// Which generated case it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    case: Option<CaseId>,
    status: Outcome,
    max_rel_error: Option<f64>,
    reason: Option<String>,
    /// How experts were stored on the device; golden cases only.
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<String>,
    /// Bytes of weight matrices on the device; golden cases only.
    #[serde(skip_serializing_if = "Option::is_none")]
    weight_bytes: Option<u64>,
}

/// All checks of one kind.
#[derive(Debug, Default, Serialize)]
struct KindTotal {
    checks: usize,
    failed: usize,
    /// Cases, rows or comparisons.
    count: u64,
    seconds: f64,
}

#[derive(Debug, Serialize)]
struct Report {
    cases: Vec<Case>,
    passed: usize,
    failed: usize,
    unsupported: usize,
    /// By kind; kernels only.
    kinds: BTreeMap<&'static str, KindTotal>,
}

pub fn execute(args: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    let files = files(&args.paths)?;
    let family = args.family.as_deref().map(|family| chosen("--family", family)).transpose()?;
    let context = open(&device, output)?;
    let (cases, kinds) = if args.paths.is_empty() {
        check_device(args, &context, output)?
    } else {
        let check = |file: &PathBuf| check_file(file, args, family.as_ref(), &context, output);
        (files.iter().map(check).collect(), BTreeMap::new())
    };
    let count = |status| cases.iter().filter(|case| case.status == status).count();
    let (passed, failed, unsupported) = (count(Outcome::Pass), count(Outcome::Fail), count(Outcome::Unsupported));
    let report = Report { passed, failed, unsupported, cases, kinds };
    output.json(&report)?;
    if report.cases.is_empty() {
        output.line("nothing to check: no *.safetensors files there");
    }
    let unsupported_part = if unsupported > 0 { format!(", {unsupported} unsupported") } else { String::new() };
    output.line(&format!("{passed} passed, {failed} failed{unsupported_part}"));
    Ok(if passed > 0 && failed + unsupported == 0 { Verdict::Right } else { Verdict::Wrong })
}

/// The files that `paths` stand for, folders replaced by what is in them, in a fixed order.
fn files(paths: &[PathBuf]) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        must_exist("PATH", path)?;
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|error| unusable(format!("{}: {error}", path.display())))?;
        let mut inside: Vec<PathBuf> = entries
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .filter(|file| file.extension().is_some_and(|extension| extension == "safetensors") && !file.is_dir())
            .collect();
        inside.sort();
        files.extend(inside);
    }
    Ok(files)
}

/// The parts that were asked for, or those that a device has to pass before it is used.
fn check_device(
    args: &Args,
    context: &Context,
    output: &mut Output,
) -> anyhow::Result<(Vec<Case>, BTreeMap<&'static str, KindTotal>)> {
    let named = args.cases.is_some() || args.case.is_some() || args.exact || args.rows.is_some() || args.determinism;
    let generated = args.case.map(|case| case..case.saturating_add(1)).or(args.cases.map(|cases| 0..cases));
    let rows = args.rows.or((!named).then_some(ROWS));
    let mut checks = Vec::new();
    let mut kinds = BTreeMap::new();
    let mut run = |check: &mut dyn FnMut(Progress<'_>) -> wgmoe::Result<Vec<KernelCheck>>| {
        let status = Status::new();
        let begun = Instant::now();
        let done = check(&mut |done, all, what: &str| status.set(format!("{done} of {all}: {what}")))?;
        total(&mut kinds, &done, begun.elapsed());
        checks.extend(done);
        Ok::<(), Error>(())
    };
    if !named {
        run(&mut |progress| wgmoe::check_kernels(context, progress))?;
    }
    if let Some(cases) = generated {
        run(&mut |progress| wgmoe::check_cases(context, args.seed, cases.clone(), progress))?;
    }
    if args.exact {
        run(&mut |progress| wgmoe::check_exact(context, progress))?;
    }
    if let Some(rows) = rows {
        run(&mut |progress| wgmoe::check_rows(context, rows, progress))?;
    }
    if args.determinism {
        run(&mut |progress| wgmoe::check_determinism(context, args.runs, progress))?;
    }
    print_checks(&checks, output);
    print_totals(&kinds, output);
    Ok((checks.into_iter().map(case_of).collect(), kinds))
}

/// Adds checks that took this time together.
fn total(kinds: &mut BTreeMap<&'static str, KindTotal>, checks: &[KernelCheck], took: Duration) {
    for check in checks {
        let kind = kinds.entry(check.kind.name()).or_default();
        kind.checks += 1;
        kind.failed += usize::from(!check.passed);
        kind.count += check.count;
        kind.seconds += took.as_secs_f64() / checks.len() as f64;
    }
}

/// Every kernel of the table with its error; of the many others, those that failed.
fn print_checks(checks: &[KernelCheck], output: &mut Output) {
    let mut table = plain_table(&["kernel", "shape", "error", ""]);
    let listed = |check: &&KernelCheck| matches!(check.kind, CheckKind::Kernel | CheckKind::Layer);
    for check in checks.iter().filter(listed) {
        let verdict = if check.passed { "ok" } else { "FAILED" };
        table.add_row([
            check.kernel.clone(),
            check.shape.clone(),
            format!("{:.0e}", check.max_rel_error),
            verdict.into(),
        ]);
    }
    if checks.iter().any(|check| listed(&check)) {
        output.line(&format!("{table}"));
    }
    for check in checks.iter().filter(|check| !check.passed) {
        let reason = check.reason.as_deref().unwrap_or("no reason given");
        output.line(&format!("FAILED  {} {}: {reason}", check.kernel, check.shape));
        if let Some(CaseId { seed, index }) = check.case {
            output.line(&format!("        again: wgmoe check --seed {seed} --case {index}"));
        }
    }
}

fn print_totals(kinds: &BTreeMap<&'static str, KindTotal>, output: &mut Output) {
    let mut table = plain_table(&["kind", "checks", "cases, rows or runs", "failed", "seconds"]);
    for (kind, total) in kinds {
        let seconds = format!("{:.1}", total.seconds);
        let counts = [total.checks.to_string(), total.count.to_string(), total.failed.to_string()];
        table.add_row([&[(*kind).to_owned()][..], &counts, &[seconds]].concat());
    }
    output.line(&format!("{table}"));
}

fn case_of(check: KernelCheck) -> Case {
    Case {
        file: check.kernel,
        family: Some("kernel".to_owned()),
        shape: Some(check.shape),
        kind: Some(check.kind),
        count: Some(check.count),
        case: check.case,
        status: if check.passed { Outcome::Pass } else { Outcome::Fail },
        max_rel_error: finite(check.max_rel_error),
        reason: check.reason,
        weights: None,
        weight_bytes: None,
    }
}

/// JSON has no infinities.
fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

/// Runs one golden case. Whatever is wrong with it becomes its result and does not stop the others.
fn check_file(file: &Path, args: &Args, family: Option<&Family>, context: &Context, output: &mut Output) -> Case {
    let name = file.display().to_string();
    let mut case = Case {
        file: name,
        family: None,
        shape: None,
        kind: None,
        count: None,
        case: None,
        status: Outcome::Pass,
        max_rel_error: None,
        reason: None,
        weights: None,
        weight_bytes: None,
    };
    if let Err(error) = run_case(file, args, family, context, &mut case) {
        let unsupported = matches!(error, Error::Unsupported { .. });
        case.status = if unsupported { Outcome::Unsupported } else { Outcome::Fail };
        case.reason = Some(error.to_string());
    }
    output.line(&case_line(&case, file));
    case
}

fn run_case(
    file: &Path,
    args: &Args,
    family: Option<&Family>,
    context: &Context,
    case: &mut Case,
) -> wgmoe::Result<()> {
    let mut golden = GoldenCase::read(file, family)?;
    case.family = Some(golden.family.clone());
    let checkpoint = Checkpoint::open(file)?;
    let mut source = checkpoint.layer(family, golden.layer)?;
    if let Some(format) = args.weights {
        source.convert_to(format)?;
    }
    let options = LayerOptions { matmul: args.matmul.0, ..Default::default() };
    let layer = MoeLayer::load(context, &mut source, &options, |_, _| {})?;
    case.weights = Some(layer.formats().name());
    case.weight_bytes = Some(layer.weight_bytes());
    let y = layer.forward_batch(&golden.batch())?;
    let routing = layer.routing()?;
    if let Some(format) = args.weights.filter(|&format| format != WeightFormat::F32) {
        // The file's output belongs to unrounded weights, which this layer does not have.
        let rounded = golden.weights.rounded(&golden.config, format)?;
        let expected = reference::moe_forward(&golden.config, &rounded, golden.batch()).y;
        golden.y = expected.iter().map(|&v| v as f32).collect();
    }
    let verdict = golden::compare(&golden, &y, &routing, golden::TOLERANCE);
    let has_losses = golden.load_balancing_loss.is_some() || golden.router_z_loss.is_some();
    let statistics = has_losses.then(|| layer.statistics()).transpose()?;
    let losses = statistics.and_then(|found| golden::compare_losses(&golden, &found, golden::TOLERANCE));
    case.max_rel_error = finite(verdict.max_rel_error);
    case.reason = verdict.reason.or(losses);
    case.status = if case.reason.is_none() { Outcome::Pass } else { Outcome::Fail };
    Ok(())
}

fn case_line(case: &Case, file: &Path) -> String {
    let status = match case.status {
        Outcome::Pass => "ok         ",
        Outcome::Fail => "FAILED     ",
        Outcome::Unsupported => "unsupported",
    };
    let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy();
    let error = case.max_rel_error.map(|error| format!("  error {error:.0e}")).unwrap_or_default();
    let reason = case.reason.as_ref().map(|reason| format!("  {reason}")).unwrap_or_default();
    format!("{status}  {name}{error}{reason}")
}
