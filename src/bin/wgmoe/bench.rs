//! `wgmoe bench`: how fast the layer is here, after checking that it is right.

use crate::output::{Output, Status};
use crate::{Matmul, Verdict, bench_table, open, unusable, widen};
use anyhow::Context as _;
use clap::builder::PossibleValuesParser;
use std::time::{Duration, Instant};
use wgmoe::bench::measure::describe;
use wgmoe::bench::presets::{self, DEFAULT_TOKENS, Preset};
use wgmoe::bench::results::{DeviceResult, Failure, FirstResult, Results, RooflineResult, SCHEMA};
use wgmoe::bench::{Bench, Outcome, Progress, Row, Workload, memory};
use wgmoe::plan::exceeds_webgpu_limits;
use wgmoe::{DeviceChoice, LayerFormats, MoeConfig, WeightFormat};

/// Time for the runs of one row.
const SLICE: Duration = Duration::from_secs(2);

const EXAMPLES: &str = "\
Without options it times layers that suit the device, in less than a minute. Every row is checked against the f64 \
reference before it is timed; a wrong one is not reported, and the exit code is 1.

Examples:
  wgmoe bench
  wgmoe bench --preset qwen3-30b-a3b --tokens 1,16,512
  wgmoe bench --hidden 2048 --intermediate 1024 --experts 64 --top-k 8 --weights f32
  wgmoe bench --preset qwen3-30b-a3b --tokens 1 --weights int4 --skew 1 --gpu-memory 100MiB
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
    /// Batch sizes
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// Storage of the expert weights: f32, f16, bf16, int8, int4 (groups of 32; :g16, :g64, :g128 for others, :zp for
    /// zero points), mxfp4, nvfp4, fp8, q4_0, q8_0, q4_k, q6_k
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = crate::weight_format)]
    weights: WeightFormat,
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
    /// Timed runs of each row [default: as many as fit two seconds, at least 5]
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
    /// Seed of weights and inputs
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

/// One layer to time.
struct Job {
    /// Name for tables and files; `None` for sizes of the user's own.
    name: Option<String>,
    preset: Preset,
    tokens: Vec<u32>,
}

/// What was found about one layer.
#[derive(Default)]
struct Measured {
    rows: Vec<Row>,
    failures: Vec<Failure>,
    first_result: Option<FirstResult>,
}

pub fn execute(args: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    check(args)?;
    let start = Instant::now();
    let context = open(&device, output)?;
    let mut device_time = start.elapsed();
    let jobs = jobs(args, &context)?;
    let needs_more = |job: &Job| {
        let tokens = job.tokens.iter().copied().max().unwrap_or(1);
        job.preset.config().is_ok_and(|config| exceeds_webgpu_limits(&config, args.weights, tokens))
    };
    let start = Instant::now();
    let context = widen(context, &device, jobs.iter().any(needs_more), output)?;
    device_time += start.elapsed();
    // A variant that was asked for is not looked up, and the router alone has no grouped matmul.
    let is_open = args.matmul.0.is_none() && !args.router;
    let tuning = if is_open { args.tuning.find(&context, output) } else { None };

    let status = Status::new();
    status.set("measuring what this device can reach at best");
    let roofline = match wgmoe::roofline(&context) {
        Ok(roofline) => Some(roofline),
        Err(error) => {
            status.suspend(|| output.line(&format!("roofline: not measured: {error}")));
            None
        }
    };
    if let Some(roofline) = &roofline {
        status.suspend(|| output.line(&bench_table::roofline(roofline)));
    }

    let (weights, matmul, runs) = (args.weights, args.matmul.0, args.runs);
    let bench = Bench {
        context: &context,
        device_time,
        roofline: roofline.clone(),
        weights,
        matmul,
        tuning: tuning.as_ref().map(|found| found.tuning.clone()),
        gpu_memory: args.memory.gpu_memory,
        pinned_experts: args.memory.pin_experts.clone(),
        fresh_tokens: args.fresh_tokens,
        runs,
        slice: SLICE,
    };
    let mut results = Results {
        schema: SCHEMA,
        wgmoe_version: env!("CARGO_PKG_VERSION").to_owned(),
        device: DeviceResult::from(context.device()),
        roofline: roofline.map(|r| RooflineResult {
            gflops: r.gflops,
            gbytes_per_s: r.gbytes_per_s,
            bandwidths: r.bandwidths,
            how: r.how,
        }),
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
    for job in &jobs {
        let config = job.preset.config().map_err(|error| unusable(error.to_string()))?;
        let title = job.title(&config, args);
        let Measured { rows, failures, first_result } =
            run_job(job, config, &bench, args, &status).with_context(|| format!("cannot make the layer: {title}"))?;
        let more = if args.stages { bench_table::stage_bytes(&rows) } else { String::new() };
        let table = bench_table::layer(&title, &rows, &failures, first_result.as_ref(), &more);
        status.suspend(|| output.line(&table));
        results.rows.extend(rows);
        results.failures.extend(failures);
        results.first_results.extend(first_result);
    }
    drop(status);
    output.json(&results)?;
    Ok(if results.failures.is_empty() { Verdict::Right } else { Verdict::Wrong })
}

/// Everything about the arguments that can be wrong, before a device is opened.
fn check(args: &Args) -> anyhow::Result<()> {
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
    let rows_fit = |config: MoeConfig| LayerFormats::from(args.weights).check(&config);
    args.chosen_preset().config().and_then(rows_fit).map_err(|error| unusable(error.to_string()))
}

impl Args {
    /// The preset, or the small one, with the sizes that were given.
    fn chosen_preset(&self) -> Preset {
        self.sizes.of(self.preset.as_deref())
    }
}

impl Job {
    /// Name and sizes in one line.
    fn title(&self, config: &MoeConfig, args: &Args) -> String {
        let name = self.name.as_ref().map(|name| format!("{name}: ")).unwrap_or_default();
        format!("{name}{}", describe(config, args.weights, args.skew))
    }
}

/// What to time: what was asked for, or what suits the device and fits the memory.
fn jobs(args: &Args, context: &wgmoe::Context) -> anyhow::Result<Vec<Job>> {
    let tokens = |default: &[u32]| if args.tokens.is_empty() { default.to_vec() } else { args.tokens.clone() };
    if args.preset.is_some() || args.sizes.any() {
        let preset = args.chosen_preset();
        let changed = if args.sizes.any() { " (changed)" } else { "" };
        let name = args.preset.as_ref().map(|name| format!("{name}{changed}"));
        return Ok(vec![Job { name, preset, tokens: tokens(DEFAULT_TOKENS) }]);
    }
    // The f32 weights, what is packed from them, and, where device memory is host memory, the device's copy.
    let bytes_per_weight = (4.0 + 2.0 * args.weights.bits_per_weight(2048) / 8.0).ceil() as u64;
    let available = memory::available().unwrap_or(u64::MAX);
    let jobs: Vec<Job> = presets::defaults_for(context.device())
        .into_iter()
        .filter_map(|choice| {
            let preset = choice.preset.scaled_to(available, bytes_per_weight)?;
            let full = choice.preset.num_experts;
            let name = if preset.num_experts == full {
                preset.name.to_owned()
            } else {
                format!("{} ({} of {full} experts: memory)", preset.name, preset.num_experts)
            };
            Some(Job { name: Some(name), preset, tokens: tokens(&choice.tokens) })
        })
        .collect();
    if jobs.is_empty() {
        anyhow::bail!("{available} bytes of free memory are too few for the default layers; give smaller sizes");
    }
    Ok(jobs)
}

/// Makes the layer and measures it at every batch size.
fn run_job(job: &Job, config: MoeConfig, bench: &Bench<'_>, args: &Args, status: &Status) -> wgmoe::Result<Measured> {
    status.lively();
    status.set(format!("{}: making weights", job.preset.name));
    let workload = Workload::new(config, args.skew, args.seed)?;
    let mut show = |progress| match progress {
        Progress::Loading => status.set("loading weights"),
        Progress::Verifying(tokens) => {
            status.lively();
            status.set(format!("{tokens} tokens: checking the result against the reference"));
        }
        Progress::Timing(tokens, run, runs) => {
            status.quiet();
            status.set(format!("{tokens} tokens: run {run} of {runs}"));
        }
    };
    let mut measured = Measured::default();
    for outcome in bench.run(job.name.as_deref(), workload, &job.tokens, &mut show) {
        match outcome {
            Outcome::Started(first_result) => measured.first_result = Some(first_result),
            Outcome::Measured(row) => measured.rows.push(*row),
            Outcome::Failed(failure) => measured.failures.push(failure),
        }
    }
    Ok(measured)
}
