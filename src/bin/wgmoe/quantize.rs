//! `wgmoe quantize`: a checkpoint's MoE layers with their experts in another format.

use crate::bench_table::{percent, plain_table};
use crate::families::chosen;
use crate::output::{Bytes, Output};
use crate::{Verdict, must_be_writable, must_exist, unusable};
use anyhow::Context as _;
use indicatif::HumanBytes;
use serde::Serialize;
use std::path::PathBuf;
use wgmoe::model::quantize::{QuantizedTensor, quantize};
use wgmoe::{Checkpoint, WeightFormat};

const EXAMPLES: &str = "\
Rounds to the nearest code, with scales by the largest weight of each group. The output is a safetensors file with the \
MoE layers and their configuration: `run`, `check` and `bench`'s library read it as they read the original. Routers, \
biases and norms keep their types; what has no place in an MoE layer (attention, embeddings) is left out.

The error is that of the weights: the root of the mean square of the differences by that of the weights, and the largest \
difference by the largest weight. docs/formats.md has what to expect of each format.

Examples:
  wgmoe quantize Qwen3-30B-A3B/ --to int4:g32 --output qwen3-int4.safetensors
  wgmoe quantize Mixtral-8x7B/ --layer 0 --layer 1 --to mxfp4 --output two-layers.safetensors
  wgmoe quantize model.safetensors --to q4_k --output model-q4_k.safetensors --json -";

/// Write a checkpoint's MoE layers with their experts in another format, and say what that does to them
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The checkpoint: a safetensors or GGUF file, an index, or a folder
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The format: f32, f16, bf16, int8, int4 (groups of 32; :g16, :g64, :g128 for others, :zp for zero points), mxfp4,
    /// nvfp4, fp8, q4_0, q8_0, q4_k, q6_k
    #[arg(long, value_name = "FORMAT", value_parser = crate::weight_format)]
    to: WeightFormat,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Only this layer of the model; may be given several times [default: all that have experts]
    #[arg(long, value_name = "N")]
    layer: Vec<u32>,
    /// Model family: a description of your own, or the name of a built-in one; without it, config.json decides
    #[arg(long, value_name = "TOML|NAME")]
    family: Option<String>,
}

#[derive(Serialize)]
struct Report {
    file: String,
    output: String,
    layers: Vec<u32>,
    to: WeightFormat,
    tensors: Vec<QuantizedTensor>,
}

pub fn execute(args: &Args, output: &mut Output) -> anyhow::Result<Verdict> {
    must_exist("FILE", &args.file)?;
    must_be_writable("--output", &args.output)?;
    let family = args.family.as_deref().map(|family| chosen("--family", family)).transpose()?;
    let checkpoint = Checkpoint::open(&args.file)?;
    checkpoint.check_not_a_source(&args.output).map_err(|error| unusable(format!("--output: {error}")))?;
    let layers = match args.layer.is_empty() {
        true => checkpoint.layers(family.as_ref())?,
        false => sorted(args.layer.clone()),
    };
    let bar = Bytes::new("writing");
    let tensors =
        quantize(&checkpoint, family.as_ref(), &layers, args.to, &args.output, &mut |done, all| bar.set(done, all))
            .with_context(|| format!("cannot convert {}", args.file.display()))?;
    drop(bar);

    let mut table = plain_table(&["experts", "from", "to", "before", "after", "rms error", "largest"]);
    for tensor in &tensors {
        table.add_row([
            tensor.name.clone(),
            tensor.from.to_string(),
            tensor.to.to_string(),
            HumanBytes(tensor.bytes_before).to_string(),
            HumanBytes(tensor.bytes_after).to_string(),
            error(tensor.rms_error),
            error(tensor.max_error),
        ]);
    }
    output.line(&format!("{table}"));
    let bytes = |of: fn(&QuantizedTensor) -> u64| HumanBytes(tensors.iter().map(of).sum());
    output.line(&format!(
        "{} layer(s), experts {} before, {} after: {}",
        layers.len(),
        bytes(|tensor| tensor.bytes_before),
        bytes(|tensor| tensor.bytes_after),
        args.output.display()
    ));
    output.json(&Report {
        file: args.file.display().to_string(),
        output: args.output.display().to_string(),
        layers,
        to: args.to,
        tensors,
    })?;
    Ok(Verdict::Right)
}

/// In per cent, as long as that is readable.
fn error(error: f64) -> String {
    if error == 0.0 || error >= 1e-3 { percent(error) } else { format!("{error:.0e}") }
}

/// Ascending, each once.
fn sorted(mut layers: Vec<u32>) -> Vec<u32> {
    layers.sort_unstable();
    layers.dedup();
    layers
}
