//! `wgmoe run`: one layer of a checkpoint on real activations.

use crate::bench_table::{number, seconds};
use crate::families::chosen;
use crate::output::{Bytes, Output};
use crate::{Verdict, must_be_writable, must_exist, open, unusable, widen};
use anyhow::Context as _;
use indicatif::HumanBytes;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Instant;
use wgmoe::model::checkpoint::{read_activations, read_integers, read_tensor, write_tensor};
use wgmoe::plan::exceeds_webgpu_limits;
use wgmoe::{Batch, Checkpoint, DeviceChoice, Error, LayerOptions, MoeLayer, NonFinite, ResidencyStats, WeightFormat};

/// Name of the tensor in the file that is written.
const OUTPUT_TENSOR: &str = "output";

const EXAMPLES: &str = "\
FILE is a safetensors or GGUF file, a model.safetensors.index.json or the folder of a checkpoint. The output has the \
shape of the input and is written as tensor \"output\", f32.

Examples:
  wgmoe run model.safetensors --layer 3 --input x.safetensors --output y.safetensors
  wgmoe run Qwen3-30B-A3B/ --layer 0 --input acts.safetensors:hidden_states --output y.safetensors --weights int4
  wgmoe run gpt-oss-120b/ --layer 7 --input x.safetensors --output y.safetensors --gpu-memory 512MiB
  wgmoe run DeepSeek-V4/ --input acts.safetensors:x --ids acts.safetensors:input_ids --output y.safetensors
  wgmoe run mine.safetensors --family mine.toml --input x.safetensors --output y.safetensors --json -";

/// Run one layer of a checkpoint on activations from a file
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The checkpoint
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Layer of the model
    #[arg(long, value_name = "N", default_value_t = 0)]
    layer: u32,
    /// Activations [..., hidden_size]; the tensor's name may be left out where the file holds only one
    #[arg(long, value_name = "FILE[:TENSOR]")]
    input: String,
    /// For layers whose choices go by id: token ids [tokens], or experts [tokens, top_k] with -1 for nobody
    #[arg(long, value_name = "FILE[:TENSOR]")]
    ids: Option<String>,
    /// Where to write the output
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Model family: a description of your own, or the name of a built-in one; without it, config.json decides
    #[arg(long, value_name = "TOML|NAME")]
    family: Option<String>,
    /// Storage of the expert weights on the device, as for `bench` [default: as the file stores them]
    #[arg(long, value_name = "FORMAT", value_parser = crate::weight_format)]
    weights: Option<WeightFormat>,
    /// What becomes of tokens with NaN or infinite router logits: an error, no expert and zeros, or experts and NaN
    #[arg(long, value_name = "POLICY", value_enum, default_value_t = Policy::Error)]
    non_finite: Policy,
    #[command(flatten)]
    memory: crate::Memory,
    #[command(flatten)]
    tuning: crate::tuning::Args,
}

/// [`NonFinite`] as a word.
#[derive(clap::ValueEnum, Clone, Copy, Debug)]
enum Policy {
    Error,
    Drop,
    Propagate,
}

impl From<Policy> for NonFinite {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Error => NonFinite::Error,
            Policy::Drop => NonFinite::Drop,
            Policy::Propagate => NonFinite::Propagate,
        }
    }
}

#[derive(Serialize)]
struct Report {
    file: String,
    family: String,
    layout: String,
    layer: u32,
    device: wgmoe::DeviceInfo,
    weights: String,
    /// Bytes of weight matrices on the device.
    weight_bytes: u64,
    tokens: usize,
    hidden_size: u32,
    intermediate_size: u32,
    num_experts: u32,
    top_k: u32,
    tokens_per_expert: Vec<u32>,
    /// Tokens whose router logits were NaN or infinite.
    non_finite_tokens: u32,
    /// Reading the description and the small tensors.
    read_s: f64,
    /// Reading, packing and uploading the experts.
    load_s: f64,
    /// The forward pass, with its input going in and its output coming back.
    forward_s: f64,
    /// The file of the tuning that was used, if one was.
    #[serde(skip_serializing_if = "Option::is_none")]
    tuning: Option<String>,
    /// Where not all experts are on the device.
    #[serde(skip_serializing_if = "Option::is_none")]
    residency: Option<ResidencyStats>,
    output: String,
}

pub fn execute(args: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    must_exist("FILE", &args.file)?;
    let (input, tensor) = split_input("--input", &args.input)?;
    let ids = args.ids.as_deref().map(|ids| split_input("--ids", ids)).transpose()?;
    must_be_writable("--output", &args.output)?;
    args.tuning.check()?;
    let family = args.family.as_deref().map(|family| chosen("--family", family)).transpose()?;
    let context = open(&device, output)?;

    let started = Instant::now();
    let cannot = || format!("cannot read layer {} of {}", args.layer, args.file.display());
    let checkpoint = Checkpoint::open(&args.file)?;
    let mut source = checkpoint.layer(family.as_ref(), args.layer).with_context(cannot)?;
    if let Some(format) = args.weights {
        source.convert_to(format)?;
    }
    let formats = source.formats().with_context(cannot)?;
    let config = source.config().clone();
    let read = match args.non_finite {
        Policy::Error => read_tensor,
        Policy::Drop | Policy::Propagate => read_activations,
    };
    let (x, shape) = read(&input, tensor.as_deref())?;
    check_shape(&input, tensor.as_deref(), &shape, config.hidden_size())?;
    let ids = ids.map(|(file, tensor)| read_integers(&file, tensor.as_deref())).transpose()?;
    let read_s = started.elapsed().as_secs_f64();
    let num_tokens = u32::try_from(x.len() / config.hidden_size() as usize).unwrap_or(u32::MAX);
    let needed = exceeds_webgpu_limits(&config, formats, num_tokens);
    let context = widen(context, &device, needed, output)?;
    let tuning = args.tuning.find(&context, output);
    let options = LayerOptions {
        tuning: tuning.as_ref().map(|found| found.tuning.clone()),
        non_finite: args.non_finite.into(),
        ..args.memory.options()
    };

    let started = Instant::now();
    let bar = Bytes::new("loading experts");
    let layer =
        MoeLayer::load(&context, &mut source, &options, |done, total| bar.set(done, total)).with_context(cannot)?;
    drop(bar);
    let load_s = started.elapsed().as_secs_f64();
    let started = Instant::now();
    let given = Ids::of(ids.unwrap_or_default())?;
    let batch = Batch {
        // Sequences are the axis before the last, where there is one before that.
        tokens_per_sequence: (shape.len() > 2).then(|| shape[shape.len() - 2] as u32).filter(|&tokens| tokens > 0),
        token_ids: Some(&given.tokens),
        experts: Some(&given.experts),
        ..Batch::from(&x)
    };
    let y = layer.forward_batch(&batch)?;
    let forward_s = started.elapsed().as_secs_f64();
    let tokens_per_expert =
        if y.is_empty() { vec![0; config.num_experts() as usize] } else { layer.routing()?.tokens_per_expert };
    write_tensor(&args.output, OUTPUT_TENSOR, &y, &shape)
        .with_context(|| format!("cannot write {}", args.output.display()))?;

    let report = Report {
        file: args.file.display().to_string(),
        family: source.family().to_owned(),
        layout: source.layout().to_owned(),
        layer: args.layer,
        device: context.device().clone(),
        weights: formats.name(),
        weight_bytes: layer.weight_bytes(),
        tokens: x.len() / config.hidden_size() as usize,
        hidden_size: config.hidden_size(),
        intermediate_size: config.intermediate_size(),
        num_experts: config.num_experts(),
        top_k: config.top_k(),
        tokens_per_expert,
        non_finite_tokens: layer.status()?.non_finite_tokens,
        read_s,
        load_s,
        forward_s,
        tuning: tuning.map(|found| found.path.display().to_string()),
        residency: layer.residency(),
        output: args.output.display().to_string(),
    };
    output.line(&describe(&report));
    output.json(&report)?;
    Ok(Verdict::Right)
}

/// The same numbers as token ids and as experts: the layer takes what it routes by.
pub struct Ids {
    pub tokens: Vec<u32>,
    pub experts: Vec<i32>,
}

impl Ids {
    pub fn of(ids: Vec<i64>) -> anyhow::Result<Self> {
        let range = i64::from(i32::MIN)..=i64::from(i32::MAX);
        if let Some(id) = ids.iter().find(|id| !range.contains(id)) {
            return Err(unusable(format!("--ids: {id} is no id")));
        }
        // -1 is no token: as a u32 it is beyond every table, which then says so.
        Ok(Self {
            tokens: ids.iter().map(|&id| id as u32).collect(),
            experts: ids.iter().map(|&id| id as i32).collect(),
        })
    }
}

/// `file` or `file:tensor`. A file whose name has a colon in it wins.
pub fn split_input(option: &str, argument: &str) -> anyhow::Result<(PathBuf, Option<String>)> {
    if Path::new(argument).is_file() {
        return Ok((argument.into(), None));
    }
    if let Some((file, tensor)) = argument.rsplit_once(':')
        && Path::new(file).is_file()
    {
        if tensor.is_empty() {
            return Err(unusable(format!("{option} {argument}: the tensor's name after the colon is missing")));
        }
        return Ok((file.into(), Some(tensor.to_owned())));
    }
    Err(unusable(format!("{option} {argument}: no such file")))
}

/// The last axis of the input must be the layer's width.
pub fn check_shape(path: &Path, tensor: Option<&str>, shape: &[usize], hidden_size: u32) -> wgmoe::Result<()> {
    if shape.last() == Some(&(hidden_size as usize)) {
        return Ok(());
    }
    Err(Error::BadTensor {
        path: path.to_owned(),
        tensor: tensor.unwrap_or("input").to_owned(),
        found: format!("{shape:?}"),
        expected: format!("[..., {hidden_size}], the layer's hidden_size last"),
    })
}

fn describe(report: &Report) -> String {
    let Report { family, layout, layer, hidden_size, intermediate_size, num_experts, top_k, tokens, .. } = report;
    format!(
        "layer:  {layer} of {} ({family}, {layout} layout)\n        \
         hidden {hidden_size}, intermediate {intermediate_size}, {num_experts} experts, top-{top_k}, {} weights, {} on the device\n\
         tokens: {tokens}{}\n\
         {}\n\
         {}time:   read {}, load {}, forward {}\n\
         output: {}",
        report.file,
        report.weights,
        HumanBytes(report.weight_bytes),
        match report.non_finite_tokens {
            0 => String::new(),
            number => format!(", {number} of them with NaN or infinite router logits"),
        },
        load_line(&report.tokens_per_expert),
        report.residency.as_ref().map(|stats| format!("{}\n", residency_line(stats))).unwrap_or_default(),
        seconds(report.read_s),
        seconds(report.load_s),
        seconds(report.forward_s),
        report.output,
    )
}

/// What bringing experts in took.
fn residency_line(stats: &ResidencyStats) -> String {
    format!(
        "memory: {} of {} experts on the device at a time, {} for each; needed {}, there {} ({:.0} %), copied {}; \
         each pass read its router's choices back",
        stats.places,
        stats.num_experts,
        HumanBytes(stats.expert_bytes),
        stats.hits + stats.misses,
        stats.hits,
        100.0 * stats.hit_rate(),
        HumanBytes(stats.uploaded_bytes),
    )
}

/// How evenly the tokens are spread, and who has most.
fn load_line(tokens_per_expert: &[u32]) -> String {
    let mut busiest: Vec<(usize, u32)> = tokens_per_expert.iter().copied().enumerate().collect();
    busiest.sort_by_key(|&(e, n)| (std::cmp::Reverse(n), e));
    let sum: u64 = tokens_per_expert.iter().copied().map(u64::from).sum();
    let mean = sum as f64 / tokens_per_expert.len().max(1) as f64;
    let idle = tokens_per_expert.iter().filter(|&&n| n == 0).count();
    let most: Vec<String> =
        busiest.iter().take(5).filter(|(_, n)| *n > 0).map(|(e, n)| format!("expert {e}: {n}")).collect();
    let most = if most.is_empty() { String::new() } else { format!("; most: {}", most.join(", ")) };
    format!("load:   {} tokens for each expert on average, idle experts: {idle}{most}", number(mean))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_load_names_the_busiest_and_counts_the_idle() {
        let line = load_line(&[0, 5, 2, 5]);
        assert!(line.contains("idle experts: 1") && line.contains("expert 1: 5, expert 3: 5, expert 2: 2"), "{line}");
        assert!(!load_line(&[0, 0]).contains("most"));
    }

    #[test]
    fn shapes_must_end_in_the_hidden_size() {
        assert!(check_shape(Path::new("x"), None, &[2, 3, 8], 8).is_ok());
        assert!(check_shape(Path::new("x"), None, &[8, 2], 8).is_err());
        assert!(check_shape(Path::new("x"), None, &[], 8).is_err());
    }
}
