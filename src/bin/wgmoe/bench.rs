//! `wgmoe bench`: how fast the layer is here, after checking that it is right.

use crate::output::{Output, Status};
use crate::{Matmul, Verdict, bench_table, must_be_writable, must_exist, open, unusable, widen};
use anyhow::Context as _;
use clap::builder::PossibleValuesParser;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use wgmoe::bench::measure::describe;
use wgmoe::bench::presets::{self, DEFAULT_TOKENS, Preset};
use wgmoe::bench::results::{DeviceResult, Failure, FirstResult, Results, RooflineResult, SCHEMA, write_text};
use wgmoe::bench::{Bench, Facts, Outcome, Progress, Row, Suite, SuitePlan, Workload, Yardstick, export, memory};
use wgmoe::plan::exceeds_webgpu_limits;
use wgmoe::{Context, DeviceChoice, LayerFormats, MoeConfig, Roofline, Trace, TraceLayer, WeightFormat};

/// Time for the runs of one row.
const SLICE: Duration = Duration::from_secs(2);
/// Standard output, where a file is expected.
const STDOUT: &str = "-";

const EXAMPLES: &str = "\
Without options it times layers that suit the device, in less than a minute. Every row is checked against the f64 \
reference before it is timed; a wrong one is not reported, and the exit code is 1.

Ctrl-C ends it early: what was measured by then is printed and written, and the exit code is 130. Once more, and \
nothing is.

Examples:
  wgmoe bench
  wgmoe bench --suite quick --json before.json --csv before.csv
  wgmoe bench --preset qwen3-30b-a3b --tokens 1,16,512
  wgmoe bench --hidden 2048 --intermediate 1024 --experts 64 --top-k 8 --weights f32
  wgmoe bench --preset qwen3-30b-a3b --tokens 1 --weights int4 --skew 1 --gpu-memory 100MiB
  wgmoe bench --trace trace.json:3 --tokens 1,64
  wgmoe bench --skew 1.2 --device cpu --json results.json
  wgmoe bench --router";

/// Time a layer and each of its stages, after checking the result
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Layer of a real model; other options change single sizes of it
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(presets::ALL.iter().map(|p| p.name)))]
    preset: Option<String>,
    #[command(flatten)]
    sizes: crate::Sizes,
    /// Several layers: quick takes about a minute, standard several, full has every preset
    #[arg(long, value_name = "NAME", value_parser = suite, conflicts_with_all = SUITE_DECIDES)]
    suite: Option<Suite>,
    /// Route tokens as recorded ones, from a file of `wgmoe inspect`; :LAYER chooses one of several layers
    #[arg(long, value_name = "FILE[:LAYER]", conflicts_with_all = ["suite", "skew", "router"])]
    trace: Option<String>,
    /// Batch sizes
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// Storage of the expert weights [default: as the preset was published, or f16]: f32, f16, bf16, int8, int4 (groups of 32; :g16, :g64, :g128 for others, :zp for
    /// zero points), mxfp4, nvfp4, fp8, q4_0, q8_0, q4_k, q6_k
    #[arg(long, value_name = "FORMAT", value_parser = crate::weight_format)]
    weights: Option<WeightFormat>,
    #[command(flatten)]
    memory: crate::Memory,
    /// Give each timed pass tokens of its own: experts come from memory then, as in a model of many layers, and not from
    /// caches that the pass before filled
    #[arg(long)]
    fresh_tokens: bool,
    /// Grouped matmul: auto, tiled, subgroup or vec
    #[arg(long, value_name = "VARIANT", default_value = "auto", value_parser = crate::matmul_variant)]
    matmul: Matmul,
    #[command(flatten)]
    tuning: crate::tuning::Args,
    /// Rounds of each row, of one pass each [default: as many as fit two seconds, at least 11]
    #[arg(long, value_name = "N")]
    runs: Option<usize>,
    /// Exponent of the Zipf distribution of tokens over experts; 0 is even
    #[arg(long, value_name = "S", default_value_t = 0.0)]
    skew: f64,
    /// Time the router alone instead, at 128 to 896 experts and 512 tokens
    #[arg(long, conflicts_with_all = ["preset", "hidden", "intermediate", "experts", "top_k", "tokens", "skew"])]
    router: bool,
    /// Also print what each stage moves, beside the least that it has to, and how near its ceiling it comes
    #[arg(long)]
    stages: bool,
    /// Also write the rows as CSV to this file; with - to standard output
    #[arg(long, value_name = "FILE|-")]
    csv: Option<PathBuf>,
    /// Also write the rows as a Markdown table to this file; with - to standard output
    #[arg(long, value_name = "FILE|-")]
    markdown: Option<PathBuf>,
    /// Seed of weights and inputs
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// Options that a suite leaves nothing to.
const SUITE_DECIDES: [&str; 9] =
    ["preset", "hidden", "intermediate", "experts", "top_k", "tokens", "weights", "skew", "router"];

/// Somebody pressed Ctrl-C.
static STOP: AtomicBool = AtomicBool::new(false);

/// One layer to time.
struct Job {
    /// Name for tables and files; `None` for sizes of the user's own.
    name: Option<String>,
    preset: Preset,
    weights: WeightFormat,
    skew: f64,
    tokens: Vec<u32>,
}

/// Recorded choices.
struct Recorded {
    /// Where they are from.
    name: String,
    num_experts: u32,
    top_k: u32,
    /// `[tokens, top_k]`
    choices: Vec<i32>,
}

/// What was found about one layer.
#[derive(Default)]
struct Measured {
    rows: Vec<Row>,
    failures: Vec<Failure>,
    first_result: Option<FirstResult>,
}

pub fn execute(args: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    let recorded = args.recorded()?;
    check(args, recorded.as_ref(), output)?;
    let facts = Facts::now();
    let start = Instant::now();
    let context = open(&device, output)?;
    let mut device_time = start.elapsed();
    let status = Status::new();
    status.set("measuring what this device can reach at best");
    let roofline = roofline(&context, &status, output);
    let began = Instant::now();
    let plan = match args.suite {
        Some(suite) => Some(suite_plan(suite, &context, roofline.as_ref(), &status, output)?),
        None => None,
    };
    let jobs = match &plan {
        Some(plan) => suite_jobs(plan),
        None => jobs(args, recorded.as_ref(), &context)?,
    };
    let needs_more = |job: &Job| {
        let tokens = job.tokens.iter().copied().max().unwrap_or(1);
        job.preset.config().is_ok_and(|config| exceeds_webgpu_limits(&config, job.weights, tokens))
    };
    let start = Instant::now();
    let context = widen(context, &device, jobs.iter().any(needs_more), output)?;
    device_time += start.elapsed();
    // A variant that was asked for is not looked up, and the router alone has no grouped matmul.
    let is_open = args.matmul.0.is_none() && !args.router;
    let tuning = if is_open { args.tuning.find(&context, output) } else { None };

    let mut results = Results {
        schema: SCHEMA,
        wgmoe_version: env!("CARGO_PKG_VERSION").to_owned(),
        device: DeviceResult::from(context.device()),
        facts: Some(facts),
        yardstick: None,
        interrupted: false,
        roofline: roofline.clone().map(RooflineResult::from),
        rows: Vec::new(),
        failures: Vec::new(),
        first_results: Vec::new(),
        routers: Vec::new(),
        tuning: tuning.as_ref().map(|found| found.path.display().to_string()),
    };
    if args.router {
        status.set("timing routers");
        let rate = results.roofline.as_ref().and_then(|r| r.bandwidths.first()).map_or(f64::NAN, |&(_, rate)| rate);
        results.routers = wgmoe::bench::router::router_times(&context, rate)?;
        drop(status);
        output.line(&bench_table::routers(&results.routers));
        output.json(&results)?;
        return Ok(Verdict::Right);
    }
    stop_on_ctrl_c()?;
    let mut yardstick = Yardstick::new(&context)?;
    for (index, job) in jobs.iter().enumerate().take_while(|_| !is_stopped()) {
        let left = args.suite.map(|suite| suite.budget().saturating_sub(began.elapsed()));
        let slice = plan.as_ref().zip(left).map_or(SLICE, |(plan, left)| plan.slice(index, left));
        if let Some((plan, left)) = plan.as_ref().zip(left) {
            status.expect(plan.expected(index, left));
        }
        let bench = Bench {
            device_time,
            roofline: roofline.clone(),
            weights: job.weights,
            matmul: args.matmul.0,
            tuning: tuning.as_ref().map(|found| found.tuning.clone()),
            gpu_memory: args.memory.gpu_memory,
            pinned_experts: args.memory.pin_experts.clone(),
            fresh_tokens: args.fresh_tokens,
            runs: args.runs,
            slice,
            trace: recorded.as_ref().map(|recorded| recorded.name.clone()),
            brief: args.suite.is_some(),
            stop: Some(&STOP),
            ..Bench::new(&context)
        };
        let config = job.preset.config().map_err(|error| unusable(error.to_string()))?;
        let title = job.title(&config);
        let Measured { rows, failures, first_result } =
            run_job(job, config, &bench, recorded.as_ref(), args.seed, &mut yardstick, &status)
                .with_context(|| format!("cannot make the layer: {title}"))?;
        let more = if args.stages { bench_table::stage_bytes(&rows) } else { String::new() };
        let table = bench_table::layer(&title, &rows, &failures, first_result.as_ref(), &more);
        status.suspend(|| output.line(&table));
        results.rows.extend(rows);
        results.failures.extend(failures);
        results.first_results.extend(first_result);
    }
    drop(status);
    let kept = yardstick.result();
    output.line(&bench_table::yardstick(&kept));
    results.yardstick = Some(kept);
    results.interrupted = is_stopped();
    write(args, &results, output)?;
    if results.interrupted {
        output.line("interrupted: this is what was measured by then");
        return Ok(Verdict::Interrupted);
    }
    Ok(if results.failures.is_empty() { Verdict::Right } else { Verdict::Wrong })
}

/// Every file that was asked for.
fn write(args: &Args, results: &Results, output: &mut Output) -> anyhow::Result<()> {
    for (path, text) in [(&args.csv, export::csv(results)), (&args.markdown, export::markdown(results))] {
        match path.as_deref() {
            Some(path) if path == Path::new(STDOUT) => output.bytes(text.as_bytes()),
            Some(path) => {
                write_text(path, &text)?;
                output.line(&format!("rows saved in {}", path.display()));
            }
            None => {}
        }
    }
    output.json(results)
}

fn roofline(context: &Context, status: &Status, output: &mut Output) -> Option<Roofline> {
    match wgmoe::roofline(context) {
        Ok(roofline) => {
            status.suspend(|| output.line(&bench_table::roofline(&roofline)));
            Some(roofline)
        }
        Err(error) => {
            status.suspend(|| output.line(&format!("roofline: not measured: {error}")));
            None
        }
    }
}

fn is_stopped() -> bool {
    STOP.load(Ordering::Relaxed)
}

/// The first time, the round that runs is the last. The second time, whatever was measured is gone.
fn stop_on_ctrl_c() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        if STOP.swap(true, Ordering::Relaxed) {
            std::process::exit(i32::from(crate::INTERRUPTED));
        }
        crate::output::warn("stopping, with what was measured; Ctrl-C again stops at once, without");
    })
    .context("cannot catch Ctrl-C")
}

/// clap value parser for `--suite`.
fn suite(text: &str) -> Result<Suite, String> {
    let names = || Suite::ALL.map(Suite::name).join(", ");
    Suite::ALL.into_iter().find(|suite| suite.name() == text).ok_or_else(|| format!("expected one of {}", names()))
}

/// What a suite has for this device. Says how long that takes.
fn suite_plan(
    suite: Suite,
    context: &Context,
    roofline: Option<&Roofline>,
    status: &Status,
    output: &mut Output,
) -> anyhow::Result<SuitePlan> {
    let available = memory::available().unwrap_or(u64::MAX);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let plan = SuitePlan::new(suite, context.device(), roofline, available, threads)?;
    let rows: usize = plan.jobs.iter().map(|job| job.tokens.len()).sum();
    let expected = plan.expected(0, suite.budget());
    let text = format!(
        "suite {}: {} layers, {rows} rows, about {} by this device's roofline",
        suite.name(),
        plan.jobs.len(),
        bench_table::duration(expected)
    );
    status.suspend(|| {
        output.line(&text);
        for name in &plan.left_out {
            output.line(&format!("left out: {name}, of which not even the fewest experts fit the memory"));
        }
    });
    if plan.jobs.is_empty() {
        anyhow::bail!("{available} bytes of free memory are too few for any layer of the suite");
    }
    Ok(plan)
}

fn suite_jobs(plan: &SuitePlan) -> Vec<Job> {
    let job = |job: &wgmoe::bench::SuiteJob| Job {
        name: Some(job.name()),
        preset: job.preset,
        weights: job.preset.weights,
        skew: job.skew,
        tokens: job.tokens.clone(),
    };
    plan.jobs.iter().map(job).collect()
}

/// Everything about the arguments that can be wrong, before a device is opened.
fn check(args: &Args, recorded: Option<&Recorded>, output: &mut Output) -> anyhow::Result<()> {
    args.tuning.check()?;
    if args.tokens.contains(&0) {
        return Err(unusable("--tokens 0: expected numbers from 1 up"));
    }
    if args.runs == Some(0) {
        return Err(unusable("--runs 0: expected a number from 1 up"));
    }
    if !(args.skew.is_finite() && args.skew >= 0.0) {
        return Err(unusable(format!("--skew {}: expected a number from 0 (even) up", args.skew)));
    }
    for (option, path) in [("--csv", &args.csv), ("--markdown", &args.markdown)] {
        match path.as_deref() {
            Some(path) if path == Path::new(STDOUT) => output.take_stdout(option)?,
            Some(path) => must_be_writable(option, path)?,
            None => {}
        }
    }
    let preset = args.chosen_preset(recorded);
    if let Some(Recorded { name, num_experts, top_k, .. }) = recorded
        && (preset.num_experts, preset.top_k) != (*num_experts, *top_k)
    {
        let layer = format!("{} experts, top-{}", preset.num_experts, preset.top_k);
        return Err(unusable(format!(
            "--trace {name}: {num_experts} experts, top-{top_k}, expected those of the layer: {layer}"
        )));
    }
    let rows_fit = |config: MoeConfig| LayerFormats::from(args.weights_of(&preset)).check(&config);
    preset.config().and_then(rows_fit).map_err(|error| unusable(error.to_string()))
}

impl Args {
    /// The layer of the trace that was asked for.
    fn recorded(&self) -> anyhow::Result<Option<Recorded>> {
        let Some(argument) = &self.trace else { return Ok(None) };
        let numbered = argument.rsplit_once(':').and_then(|(path, layer)| Some((path, layer.parse::<u32>().ok()?)));
        let (path, number) = match numbered {
            Some((path, layer)) if !Path::new(argument).exists() => (path, Some(layer)),
            _ => (argument.as_str(), None),
        };
        must_exist("--trace", Path::new(path))?;
        let trace = Trace::read(Path::new(path))?;
        let found = match (number, &trace.layers[..]) {
            (None, [only]) => Some(only),
            (None, _) => None,
            (Some(number), layers) => layers.iter().find(|layer| layer.layer == number),
        };
        let Some(TraceLayer { layer, num_experts, top_k, experts, .. }) = found.cloned() else {
            let layers = trace.layers.iter().map(|layer| layer.layer.to_string()).collect::<Vec<_>>().join(", ");
            return Err(unusable(format!("--trace {argument}: expected one of its layers, as {path}:LAYER: {layers}")));
        };
        let file = Path::new(path).file_name().unwrap_or_default().to_string_lossy();
        Ok(Some(Recorded { name: format!("{file}:{layer}"), num_experts, top_k, choices: experts }))
    }

    /// The preset, or the small one, with the sizes that were given; without a preset, with the experts of the trace.
    fn chosen_preset(&self, recorded: Option<&Recorded>) -> Preset {
        let mut preset = self.sizes.of(self.preset.as_deref());
        if let (Some(recorded), None) = (recorded, &self.preset) {
            preset.num_experts = self.sizes.experts.unwrap_or(recorded.num_experts);
            preset.top_k = self.sizes.top_k.unwrap_or(recorded.top_k);
        }
        preset
    }

    /// The format that was given, or the published one.
    fn weights_of(&self, preset: &Preset) -> WeightFormat {
        self.weights.unwrap_or(preset.weights)
    }
}

impl Job {
    /// Name and sizes in one line.
    fn title(&self, config: &MoeConfig) -> String {
        let name = self.name.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
        format!("{name}{}", describe(config, self.weights, self.skew))
    }
}

/// What to time: what was asked for, or what suits the device and fits the memory.
fn jobs(args: &Args, recorded: Option<&Recorded>, context: &Context) -> anyhow::Result<Vec<Job>> {
    let tokens = |default: &[u32]| if args.tokens.is_empty() { default.to_vec() } else { args.tokens.clone() };
    if args.preset.is_some() || args.sizes.any() || recorded.is_some() {
        let preset = args.chosen_preset(recorded);
        let changed = if args.sizes.any() { " (changed)" } else { "" };
        let name = args.preset.as_ref().map(|name| format!("{name}{changed}"));
        let weights = args.weights_of(&preset);
        return Ok(vec![Job { name, preset, weights, skew: args.skew, tokens: tokens(DEFAULT_TOKENS) }]);
    }
    let available = memory::available().unwrap_or(u64::MAX);
    let jobs: Vec<Job> = presets::defaults_for(context.device())
        .into_iter()
        .filter_map(|choice| {
            let weights = args.weights_of(&choice.preset);
            // The f32 weights, what is packed from them, and, where device memory is host memory, the device's copy.
            let bytes_per_weight = (4.0 + 2.0 * weights.bits_per_weight(2048) / 8.0).ceil() as u64;
            let preset = choice.preset.scaled_to(available, bytes_per_weight)?;
            let full = choice.preset.num_experts;
            let name = if preset.num_experts == full {
                preset.name.to_owned()
            } else {
                format!("{} ({} of {full} experts: memory)", preset.name, preset.num_experts)
            };
            Some(Job { name: Some(name), preset, weights, skew: args.skew, tokens: tokens(&choice.tokens) })
        })
        .collect();
    if jobs.is_empty() {
        anyhow::bail!("{available} bytes of free memory are too few for the default layers; give smaller sizes");
    }
    Ok(jobs)
}

/// Makes the layer and measures it at every batch size.
fn run_job(
    job: &Job,
    config: MoeConfig,
    bench: &Bench<'_>,
    recorded: Option<&Recorded>,
    seed: u64,
    yardstick: &mut Yardstick<'_>,
    status: &Status,
) -> wgmoe::Result<Measured> {
    status.lively();
    status.set(format!("{}: making weights", job.preset.name));
    let mut workload = Workload::new(config, job.skew, seed)?.with_biases(job.preset.biases);
    if let Some(recorded) = recorded {
        workload = workload.with_choices(&recorded.choices)?;
    }
    let mut show = |progress| match progress {
        Progress::Loading => status.set("loading weights"),
        Progress::Verifying(tokens) => {
            status.lively();
            status.set(format!("{tokens} tokens: checking the result against the reference"));
        }
        Progress::Timing(round, rounds) => {
            status.quiet();
            status.set(format!("round {} of {rounds}", round + 1));
        }
        Progress::Profiling(tokens) => status.set(format!("{tokens} tokens: timing stages")),
    };
    let mut measured = Measured::default();
    for outcome in bench.run(job.name.as_deref(), workload, &job.tokens, yardstick, &mut show) {
        match outcome {
            Outcome::Started(first_result) => measured.first_result = Some(first_result),
            Outcome::Measured(row) => measured.rows.push(*row),
            Outcome::Failed(failure) => measured.failures.push(failure),
        }
    }
    Ok(measured)
}
