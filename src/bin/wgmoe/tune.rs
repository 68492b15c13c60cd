//! `wgmoe tune`: which kernels are the fastest here, measured once and stored.

use crate::bench_table::{plain_table, seconds};
use crate::output::{Output, Status};
use crate::{Verdict, must_be_writable, open, tuning, unusable};
use clap::builder::PossibleValuesParser;
use serde::Serialize;
use std::path::PathBuf;
use std::time::Duration;
use wgmoe::bench::presets::{self, Preset};
use wgmoe::plan::{ShapeClass, variant};
use wgmoe::tune::{self, DEFAULT_FORMATS, DEFAULT_TOKENS, Doing, Entry, Failure, Identity, Job, Outcome, Progress};
use wgmoe::{Context, DeviceChoice, MatmulChoice, Tuning, WeightFormat};

const EXAMPLES: &str = "\
Every choice is checked against the f64 reference before it is timed; a wrong one is reported and never chosen, and the \
exit code is 1. What is found is stored for this device, beside what was found before, and `wgmoe bench` and `wgmoe run` \
use it from then on (--tuning none: not). A new driver or version of wgmoe makes it void.

Examples:
  wgmoe tune
  wgmoe tune --dry-run
  wgmoe tune --preset mixtral-8x7b --tokens 1,256 --weights mxfp4 --budget 300
  wgmoe tune --hidden 2048 --intermediate 1024 --experts 64 --top-k 8
  wgmoe tune --device 0 --output tuning.json --json -";

/// Measure which kernels are the fastest on this device, and store the choices
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Layer of a real model [default: a few that differ]; other options change single sizes of it. One that is too large
    /// to load quickly is measured with fewer experts, of which each token chooses as many fewer
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(presets::ALL.iter().map(|p| p.name)))]
    preset: Option<String>,
    #[command(flatten)]
    sizes: crate::Sizes,
    /// Batch sizes [default: 1,4,16,64,128,512]
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    tokens: Vec<u32>,
    /// Storage of the expert weights, as for `bench` [default: f16,int4]
    #[arg(long, value_name = "FORMATS", value_delimiter = ',', value_parser = crate::weight_format)]
    weights: Vec<WeightFormat>,
    /// Time for all of it
    #[arg(long, value_name = "SECONDS", default_value_t = 100)]
    budget: u64,
    /// Where to store the choices [default: the user's cache folder, by device]
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Say what would be measured, and do nothing
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    device: &'a Identity,
    date: &'a str,
    /// What was found now.
    entries: &'a [Entry],
    failures: &'a [Failure],
    /// Layer and tokens for which there was no time.
    untried: &'a [(String, Vec<u32>)],
    /// Where it was stored; absent if there was nothing to store.
    stored: Option<String>,
}

/// One class of work of a dry run.
#[derive(Serialize)]
struct Planned {
    layer: String,
    weights: WeightFormat,
    tokens: Vec<u32>,
    shape: ShapeClass,
    candidates: Vec<MatmulChoice>,
}

pub fn execute(args: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    check(args)?;
    let context = open(&device, output)?;
    let jobs = jobs(args, &context)?;
    let target = args.output.clone().or_else(|| Tuning::stored_path(context.device()));
    let Some(target) = target else {
        return Err(unusable(
            "there is no cache folder for this user; say where to store the choices with --output FILE",
        ));
    };
    if args.dry_run {
        return dry_run(&jobs, &context, &target, output);
    }

    let status = Status::new();
    let mut show = |progress: Progress<'_>| show(&status, progress);
    let budget = Duration::from_secs(args.budget);
    let Outcome { tuning, failures, untried } = Tuning::measure(&context, &jobs, budget, &mut show)?;
    drop(status);
    output.line(&table(tuning.entries()));
    for Failure { layer, weights, tokens, choice, reason } in &failures {
        let choice = choice.map_or(String::new(), |choice| format!(", {}", name(choice)));
        output.line(&format!("FAILED  {layer}, {}{}{choice}: {reason}", weights.name(), batches(tokens)));
    }
    for (layer, tokens) in &untried {
        output.line(&format!("no time for {layer}{}; a larger --budget has it", batches(tokens)));
    }
    let found = tuning.entries().len();
    let stored = (found > 0).then(|| target.display().to_string());
    let whole = merged(tuning.clone(), &target, &context);
    if let Some(path) = &stored {
        whole.save(&target)?;
        output.line(&format!("{found} choices stored in {path}, which has {} now", whole.entries().len()));
    } else {
        output.line("nothing was found, and nothing is stored");
    }
    let (device, date, entries) = (tuning.device(), tuning.date(), tuning.entries());
    output.json(&Report { device, date, entries, failures: &failures, untried: &untried, stored })?;
    Ok(if failures.is_empty() { Verdict::Right } else { Verdict::Wrong })
}

/// Everything about the arguments that can be wrong, before a device is opened.
fn check(args: &Args) -> anyhow::Result<()> {
    if args.tokens.contains(&0) {
        return Err(unusable("--tokens 0: expected numbers from 1 up"));
    }
    if args.budget == 0 {
        return Err(unusable("--budget 0: expected a number of seconds from 1 up"));
    }
    if let Some(path) = &args.output {
        must_be_writable("--output", path)?;
    }
    for preset in args.chosen().into_iter().flatten() {
        let config = preset.config().map_err(|error| unusable(error.to_string()))?;
        for &format in &args.weights {
            wgmoe::LayerFormats::from(format).check(&config).map_err(|error| unusable(error.to_string()))?;
        }
    }
    Ok(())
}

impl Args {
    /// The layer that was asked for, if one was.
    fn chosen(&self) -> Option<[Preset; 1]> {
        if self.preset.is_none() && !self.sizes.any() {
            return None;
        }
        let mut preset = self.sizes.of(self.preset.as_deref());
        if self.sizes.any() {
            preset.name = "sizes of your own";
        }
        Some([preset])
    }
}

fn jobs(args: &Args, context: &Context) -> anyhow::Result<Vec<Job>> {
    let presets = args.chosen().map_or_else(|| tune::default_presets(context.device()), Vec::from);
    let formats = if args.weights.is_empty() { DEFAULT_FORMATS } else { &args.weights };
    let tokens = if args.tokens.is_empty() { DEFAULT_TOKENS } else { &args.tokens };
    Ok(tune::jobs(context.device(), &presets, formats, tokens)?)
}

/// What was found now, and what is stored of other classes already.
fn merged(tuning: Tuning, target: &std::path::Path, context: &Context) -> Tuning {
    if !target.exists() {
        return tuning;
    }
    match Tuning::load(target, context) {
        Ok(older) => tuning.or(older),
        Err(error) => {
            tuning::ignored(&error);
            tuning
        }
    }
}

fn dry_run(jobs: &[Job], context: &Context, target: &std::path::Path, output: &mut Output) -> anyhow::Result<Verdict> {
    let Some(gpu) = context.gpu() else {
        anyhow::bail!("the embedded CPU engine has one kernel: there is nothing to tune")
    };
    let mut planned = Vec::new();
    for job in jobs {
        for (shape, tokens) in job.classes() {
            let most = tokens.iter().copied().max().unwrap_or(1);
            let (config, device) = (&job.config, gpu.profile());
            let candidates = variant::candidates(config.top_k(), config.num_weighted_experts(), most, device);
            planned.push(Planned { layer: job.layer.clone(), weights: job.weights, tokens, shape, candidates });
        }
    }
    let mut table = plain_table(&["layer", "weights", "tokens", "class", "choices to try"]);
    for planned in &planned {
        table.add_row([
            planned.layer.clone(),
            planned.weights.name(),
            list(&planned.tokens),
            planned.shape.to_string(),
            planned.candidates.len().to_string(),
        ]);
    }
    output.line(&format!("{table}\nwould be stored in {}", target.display()));
    output.json(&planned)?;
    Ok(Verdict::Right)
}

fn show(status: &Status, progress: Progress<'_>) {
    let Progress { layer, weights, doing, done, total, left } = progress;
    let what = match doing {
        Doing::Loading => "loading weights".to_owned(),
        Doing::Checking(tokens, choice) => format!("{} tokens: checking {}", list(tokens), name(choice)),
        Doing::Racing(tokens, round, racing) => {
            format!("{} tokens: round {round}, {racing} choices left", list(tokens))
        }
    };
    // Nothing else wakes up while passes are timed.
    if matches!(doing, Doing::Loading | Doing::Checking(..)) {
        status.lively()
    } else {
        status.quiet()
    }
    let left = left.as_secs();
    status.set(format!("{} of {total}, at most {left} s left: {layer}, {}, {what}", done + 1, weights.name()));
}

/// What was found: one line for each class.
fn table(entries: &[Entry]) -> String {
    let header = [
        "layer",
        "weights",
        "tokens",
        "class",
        "chosen",
        "time",
        "table's choice",
        "its time",
        "gain",
        "runs",
        "tried",
    ];
    let mut table = plain_table(&header);
    for entry in entries {
        let default = entry.default;
        table.add_row([
            entry.layer.clone(),
            entry.weights.name(),
            list(&entry.tokens),
            entry.shape.to_string(),
            name(entry.chosen.choice),
            seconds(entry.chosen.median_s),
            default.map_or("wrong".to_owned(), |timed| name(timed.choice)),
            default.map_or("-".to_owned(), |timed| seconds(timed.median_s)),
            entry.gain().map_or("-".to_owned(), |gain| format!("{gain:.2}x")),
            entry.chosen.runs.to_string(),
            format!("{} of {}", entry.tried, entry.candidates),
        ]);
    }
    format!("\n{table}\n")
}

/// A choice in a few words: the kernel, and its tile.
fn name(choice: MatmulChoice) -> String {
    match choice {
        MatmulChoice::Vec { workgroup_size, .. } => {
            format!("{} {} by {workgroup_size}", choice.label(), choice.sizes())
        }
        _ => format!("{} {}", choice.label(), choice.sizes()),
    }
}

fn list(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn batches(tokens: &[u32]) -> String {
    if tokens.is_empty() { String::new() } else { format!(", {} tokens", list(tokens)) }
}
