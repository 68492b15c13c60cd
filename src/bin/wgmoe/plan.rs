//! `wgmoe plan`: what a layer will take on a device, before anything is downloaded or allocated.

use crate::bench_table::{number, percent, plain_table, seconds};
use crate::output::{Output, Status};
use crate::{Verdict, device_choice, must_be_writable, open, unusable};
use clap::builder::PossibleValuesParser;
use indicatif::HumanBytes;
use serde::Serialize;
use std::path::{Path, PathBuf};
use wgmoe::bench::presets::{self, DEFAULT_TOKENS, Preset};
use wgmoe::forecast::{self, DeviceFacts, Fit, Forecast, Limit, Way};
use wgmoe::{Context, MoeConfig, WeightFormat};

/// What `--save-device` measures beside `--weights`.
const SAVED_FORMATS: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT4];

const EXAMPLES: &str = "\
--device is `this` (or any device of this machine, as elsewhere), a file of facts that --save-device wrote on another \
machine, or one of webgpu-defaults, xe-lp, apple-m2, rtx-4070. On a device of this machine two small layers run for a few \
seconds, so that times are those of its kernels; of the layer itself nothing is allocated. The exit code is 1 if the layer does \
not fit.

Examples:
  wgmoe plan --preset qwen3-30b-a3b --tokens 1,512
  wgmoe plan --preset mixtral-8x7b --weights int4 --device rtx-4070
  wgmoe plan --preset deepseek-v3 --device webgpu-defaults --tokens 16
  wgmoe plan --save-device here.json
  wgmoe plan --preset gpt-oss-120b --device here.json --gpu-memory 2GiB --json -";

/// Say what a layer will take on a device: bytes, pages, dispatches, time, and what would make it fit
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Layer of a real model; other options change single sizes of it
    #[arg(long, value_name = "NAME", value_parser = PossibleValuesParser::new(presets::ALL.iter().map(|p| p.name)))]
    preset: Option<String>,
    #[command(flatten)]
    sizes: crate::Sizes,
    /// Storage of the expert weights, as for `bench`
    #[arg(long, value_name = "FORMAT", default_value = "f16", value_parser = crate::weight_format)]
    weights: WeightFormat,
    /// Batch sizes
    #[arg(long, value_name = "A,B,C", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    tokens: Vec<u32>,
    /// GPU memory for the weights of routed experts, such as 4GiB [default: for all of them]
    #[arg(long, value_name = "SIZE", value_parser = crate::size)]
    gpu_memory: Option<u64>,
    /// Write the device's facts, for --device on another machine
    #[arg(long, value_name = "FILE")]
    save_device: Option<PathBuf>,
}

#[derive(Serialize)]
struct Report {
    preset: &'static str,
    hidden_size: u32,
    intermediate_size: u32,
    num_experts: u32,
    top_k: u32,
    device: DeviceFacts,
    batches: Vec<Batch>,
}

#[derive(Serialize)]
struct Batch {
    tokens: u32,
    /// `None`: not even the limits suffice.
    #[serde(skip_serializing_if = "Option::is_none")]
    forecast: Option<Forecast>,
    fit: Fit,
}

pub fn execute(args: &Args, device: Option<&str>, output: &mut Output) -> anyhow::Result<Verdict> {
    if let Some(path) = &args.save_device {
        must_be_writable("--save-device", path)?;
    }
    let preset = args.sizes.of(args.preset.as_deref());
    let config = preset.config().map_err(|error| unusable(error.to_string()))?;
    wgmoe::LayerFormats::from(args.weights).check(&config).map_err(|error| unusable(error.to_string()))?;
    let facts = facts(args, device, output)?;
    if let Some(path) = &args.save_device {
        facts.write(path)?;
        output.line(&format!("facts of the device saved in {}", path.display()));
    }
    output.line(&format!("\n{}\non {}", title(&preset, args.weights), facts.name));
    let tokens = if args.tokens.is_empty() { DEFAULT_TOKENS } else { &args.tokens };
    let mut batches = Vec::new();
    for &tokens in tokens {
        let batch = batch(args, &facts, &config, tokens);
        output.line(&describe(&batch, &facts));
        batches.push(batch);
    }
    let verdict = match batches.iter().any(|batch| batch.fit.fits == Some(false)) {
        true => Verdict::Wrong,
        false => Verdict::Right,
    };
    let Preset { name, hidden_size, intermediate_size, num_experts, top_k, .. } = preset;
    output.json(&Report {
        preset: name,
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        device: facts,
        batches,
    })?;
    Ok(verdict)
}

/// Of a file, of a built-in name, or of a device here, measured.
fn facts(args: &Args, device: Option<&str>, output: &mut Output) -> anyhow::Result<DeviceFacts> {
    let named = device.filter(|device| *device != "this");
    if let Some(name) = named {
        if let Some(facts) = DeviceFacts::built_in(name) {
            return Ok(facts);
        }
        let path = Path::new(name);
        if path.is_file() {
            return Ok(DeviceFacts::read(path)?);
        }
        if path.extension().is_some_and(|extension| extension == "json" || extension == "toml") {
            return Err(unusable(format!("--device {name}: no such file")));
        }
    }
    let choice = device_choice(named)?;
    drop(open(&choice, output)?);
    let context = Context::with_all_limits(&choice)?;
    let mut formats = vec![args.weights];
    if args.save_device.is_some() {
        formats.extend(SAVED_FORMATS.into_iter().filter(|&format| format != args.weights));
    }
    let status = Status::new();
    Ok(forecast::measure(&context, &formats, &mut |what| status.set(what))?)
}

fn batch(args: &Args, facts: &DeviceFacts, config: &MoeConfig, tokens: u32) -> Batch {
    Batch {
        tokens,
        // Why not, the fit says.
        forecast: forecast::forecast(facts, config, args.weights, tokens, args.gpu_memory).ok(),
        fit: forecast::fit(facts, config, args.weights, tokens, args.gpu_memory),
    }
}

fn title(preset: &Preset, weights: WeightFormat) -> String {
    let Preset { name, hidden_size, intermediate_size, num_experts, top_k, .. } = preset;
    format!(
        "{name}: hidden {hidden_size}, intermediate {intermediate_size}, {num_experts} experts, top-{top_k}, {} weights",
        weights.name()
    )
}

fn count(n: u32, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

fn describe(batch: &Batch, facts: &DeviceFacts) -> String {
    let mut text = format!("\n{}", count(batch.tokens, "token", "tokens"));
    if let Some(forecast) = &batch.forecast {
        text.push_str(&format!(
            ": {}{}\n",
            forecast.seconds.map_or("no time predicted".to_owned(), |s| format!("{} predicted", seconds(s))),
            shape(forecast, facts)
        ));
        text.push_str(&bytes(forecast, facts));
    } else {
        text.push('\n');
    }
    text.push_str(&fit(&batch.fit));
    if let Some(forecast) = &batch.forecast {
        text.push_str(&format!("{}\n", stages(forecast)));
    }
    text.trim_end().to_owned()
}

fn shape(forecast: &Forecast, facts: &DeviceFacts) -> String {
    if facts.cpu_engine {
        return String::new();
    }
    let widened = forecast.all_limits && facts.profile(true) != facts.profile(false);
    format!(
        "; {}, {}, matmul {}, experts in {}{}",
        count(forecast.passes, "pass", "passes"),
        count(forecast.dispatches, "dispatch", "dispatches"),
        forecast.matmul,
        count(forecast.pages, "page", "pages"),
        if widened { ", opened with all limits" } else { "" },
    )
}

fn bytes(forecast: &Forecast, facts: &DeviceFacts) -> String {
    let bytes = &forecast.bytes;
    let mut text = format!(
        "  memory  {} = weights {} + scratch {} + input and output {}",
        HumanBytes(bytes.total()),
        HumanBytes(bytes.weights),
        HumanBytes(bytes.scratch),
        HumanBytes(bytes.input_output),
    );
    if let Some(places) = forecast.places {
        text.push_str(&format!("; {places} experts at a time, the others are brought in"));
    }
    match facts.memory_bytes {
        Some(available) => text.push_str(&format!("; there are {}\n", HumanBytes(available))),
        None => text.push_str("; how much the device has is not known\n"),
    }
    text
}

fn fit(fit: &Fit) -> String {
    let mut text = match &fit.reason {
        Some(reason) => format!("  DOES NOT FIT  {reason}\n"),
        None => return String::new(),
    };
    for way in &fit.ways {
        let way = match *way {
            Way::Weights(format, bytes) => format!("--weights {}: {}", format.name(), HumanBytes(bytes)),
            Way::Tokens(tokens) => format!("--tokens {tokens}"),
            Way::GpuMemory(bytes, places) => format!(
                "--gpu-memory {bytes}: {} on the device at a time, the others are brought in",
                count(places, "expert", "experts")
            ),
        };
        text.push_str(&format!("    would fit with {way}\n"));
    }
    if fit.ways.is_empty() {
        text.push_str("    no format, no batch size and no part of the experts would fit\n");
    }
    text
}

fn stages(forecast: &Forecast) -> String {
    let mut table = plain_table(&["stage", "dispatches", "MFLOP", "least MB", "time", "share", "by"]);
    let all: f64 = forecast.stages.iter().filter_map(|stage| stage.seconds).sum();
    for stage in &forecast.stages {
        let limit = match stage.limit {
            Some(Limit::Compute) => "arithmetic",
            Some(Limit::Memory) => "memory",
            Some(Limit::Measured) => "measurement",
            None => "-",
        };
        table.add_row([
            stage.stage.to_owned(),
            stage.dispatches.to_string(),
            number(stage.flops as f64 / 1e6),
            number(stage.bytes as f64 / 1e6),
            stage.seconds.map_or("-".to_owned(), seconds),
            stage.seconds.map_or("-".to_owned(), |s| percent(s / all)),
            limit.to_owned(),
        ]);
    }
    table.to_string()
}
