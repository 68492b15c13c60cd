//! `wgmoe inspect`: what the experts of a checkpoint's layers do with real activations.

use crate::families::chosen;
use crate::output::{Bytes, Output, Status};
use crate::run::{Ids, check_shape, split_input};
use crate::{Verdict, inspect_page, inspect_view, must_be_writable, must_exist, open, unusable, widen};
use anyhow::Context as _;
use std::path::{Path, PathBuf};
use wgmoe::inspect::{self, Inspection, LayerInspection};
use wgmoe::model::checkpoint::{read_integers, read_tensor};
use wgmoe::plan::exceeds_webgpu_limits;
use wgmoe::{Batch, Checkpoint, Context, DeviceChoice, Family, MoeLayer, WeightFormat};

/// What stands for the layer's number in `--input` and `--ids`.
const LAYER: &str = "{layer}";
/// The text of a model's input is a few MB at most.
const MAX_LABEL_BYTES: u64 = 64 << 20;

const EXAMPLES: &str = "\
FILE and --input are those of `wgmoe run`. Each layer gets the same activations, unless --input names a tensor for each, \
with {layer} in the place of the number: only then is what later layers show what they do in the model.

Examples:
  wgmoe inspect model.safetensors --layer 3 --input x.safetensors
  wgmoe inspect Qwen3-30B-A3B/ --all-layers --input acts.safetensors:layers.{layer}.mlp --labels tokens.txt
  wgmoe inspect mixtral.gguf --input x.safetensors --capacity 1.25 --save-trace trace.json
  wgmoe inspect model.safetensors --layer 3 --input x.safetensors --html experts.html
  wgmoe inspect model.safetensors --input x.safetensors --json -";

/// Show who does the work in a layer: loads, weights, pairs, contributions, similar experts
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The checkpoint
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Activations [..., hidden_size]; the tensor's name may be left out where the file holds only one
    #[arg(long, value_name = "FILE[:TENSOR]")]
    input: String,
    /// Layer of the model
    #[arg(long, value_name = "N", default_value_t = 0)]
    layer: u32,
    /// All layers that have experts
    #[arg(long, conflicts_with = "layer")]
    all_layers: bool,
    /// A text for each token: a line each, or a JSON array of strings
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// What if no expert took more than FACTOR times the mean load? Earlier tokens go first
    #[arg(long, value_name = "FACTOR", value_parser = factor)]
    capacity: Option<f64>,
    /// Compare only N rows of each matrix, spread evenly, where comparing the weights of large experts takes too long
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    similarity_rows: Option<u32>,
    /// Write who got which tokens, for `wgmoe bench --trace`
    #[arg(long, value_name = "FILE")]
    save_trace: Option<PathBuf>,
    /// Write a page with all of it in pictures: one file, nothing to fetch
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// For layers whose choices go by id: token ids [tokens], or experts [tokens, top_k] with -1 for nobody
    #[arg(long, value_name = "FILE[:TENSOR]")]
    ids: Option<String>,
    /// Model family: a description of your own, or the name of a built-in one; without it, config.json decides
    #[arg(long, value_name = "TOML|NAME")]
    family: Option<String>,
    /// Storage of the expert weights on the device, as for `bench` [default: as the file stores them]
    #[arg(long, value_name = "FORMAT", value_parser = crate::weight_format)]
    weights: Option<WeightFormat>,
    #[command(flatten)]
    memory: crate::Memory,
}

/// clap value parser for `--capacity`.
fn factor(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(factor) if factor.is_finite() && factor > 0.0 => Ok(factor),
        _ => Err("expected a positive factor of the mean load, such as 1.25".to_owned()),
    }
}

pub fn execute(args: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    must_exist("FILE", &args.file)?;
    for (option, argument) in [("--input", Some(&args.input)), ("--ids", args.ids.as_ref())] {
        // Before any work. Which layers there are is not known yet.
        if let Some(argument) = argument.filter(|argument| !argument.contains(LAYER)) {
            split_input(option, argument)?;
        }
    }
    let labels = args.labels.as_deref().map(read_labels).transpose()?;
    for (option, path) in [("--save-trace", &args.save_trace), ("--html", &args.html)] {
        if let Some(path) = path {
            must_be_writable(option, path)?;
        }
    }
    let family = args.family.as_deref().map(|family| chosen("--family", family)).transpose()?;
    let checkpoint = Checkpoint::open(&args.file)?;
    let layers = if args.all_layers { checkpoint.layers(family.as_ref())? } else { vec![args.layer] };
    let context = open(&device, output)?;
    let mut pass = Pass { args, family: family.as_ref(), device: &device, context, is_wide: false };

    let mut inspection = Inspection {
        schema: inspect::SCHEMA,
        file: args.file.display().to_string(),
        family: String::new(),
        device: pass.context.device().clone(),
        input: args.input.clone(),
        same_input: !args.input.contains(LAYER),
        num_tokens: 0,
        labels,
        definitions: inspect::DEFINITIONS.to_vec(),
        layers: Vec::new(),
    };
    for layer in layers {
        let (family, seen) = pass
            .layer(&checkpoint, layer, output)
            .with_context(|| format!("cannot inspect layer {layer} of {}", args.file.display()))?;
        check_tokens(&inspection, &seen)?;
        inspection.family = family;
        inspection.num_tokens = seen.experts.len();
        inspection.layers.push(seen);
    }
    output.line(&inspect_view::inspection(&inspection));
    if let Some(path) = &args.save_trace {
        inspection.trace().write(path)?;
        output.line(&format!("trace saved in {}", path.display()));
    }
    if let Some(path) = &args.html {
        output.page(path, &inspect_page::page(&inspection)?)?;
    }
    output.json(&inspection)?;
    Ok(Verdict::Right)
}

/// Labels and layers are of the same tokens.
fn check_tokens(inspection: &Inspection, seen: &LayerInspection) -> anyhow::Result<()> {
    let tokens = seen.experts.len();
    if let Some(labels) = inspection.labels.as_ref().filter(|labels| labels.len() != tokens) {
        return Err(unusable(format!("--labels: {} texts, expected one for each of {tokens} tokens", labels.len())));
    }
    if !inspection.layers.is_empty() && inspection.num_tokens != tokens {
        let (layer, expected) = (seen.layer, inspection.num_tokens);
        return Err(unusable(format!("--input: layer {layer} has {tokens} tokens, expected {expected} as before")));
    }
    Ok(())
}

/// What all layers have in common.
struct Pass<'a> {
    args: &'a Args,
    family: Option<&'a Family>,
    device: &'a DeviceChoice,
    context: Context,
    /// Opened with all limits.
    is_wide: bool,
}

impl Pass<'_> {
    /// The family's name, and what there is to see of one layer.
    fn layer(
        &mut self,
        checkpoint: &Checkpoint,
        layer: u32,
        output: &mut Output,
    ) -> anyhow::Result<(String, LayerInspection)> {
        let args = self.args;
        let of_layer = |text: &str| text.replace(LAYER, &layer.to_string());
        let (input, tensor) = split_input("--input", &of_layer(&args.input))?;
        let mut source = checkpoint.layer(self.family, layer)?;
        if let Some(format) = args.weights {
            source.convert_to(format)?;
        }
        let formats = source.formats()?;
        let config = source.config().clone();
        let (x, shape) = read_tensor(&input, tensor.as_deref())?;
        check_shape(&input, tensor.as_deref(), &shape, config.hidden_size())?;
        let ids = match &args.ids {
            Some(ids) => {
                let (file, tensor) = split_input("--ids", &of_layer(ids))?;
                read_integers(&file, tensor.as_deref())?
            }
            None => Vec::new(),
        };
        let num_tokens = u32::try_from(x.len() / config.hidden_size() as usize).unwrap_or(u32::MAX);
        if !self.is_wide && exceeds_webgpu_limits(&config, formats, num_tokens) {
            self.context = widen(self.context.clone(), self.device, true, output)?;
            self.is_wide = true;
        }
        let bar = Bytes::new("loading experts");
        let options = args.memory.options();
        let engine = MoeLayer::load(&self.context, &mut source, &options, |done, all| bar.set(done, all))?;
        drop(bar);
        let given = Ids::of(ids)?;
        let y = engine.forward_batch(&Batch {
            tokens_per_sequence: (shape.len() > 2).then(|| shape[shape.len() - 2] as u32).filter(|&tokens| tokens > 0),
            token_ids: Some(&given.tokens),
            experts: Some(&given.experts),
            ..Batch::from(&x)
        })?;
        let routing = engine.routing()?;
        // Its memory is for what follows.
        drop(engine);
        let options = inspect::Options { similarity_rows: args.similarity_rows, capacity: args.capacity };
        let status = Status::new();
        let show = |done, all| status.set(format!("layer {layer}: comparing experts, {done} of {all}"));
        let seen = inspect::layer(layer, &mut source, [&x, &y], &routing, options, show)?;
        Ok((source.family().to_owned(), seen))
    }
}

/// A text for each token.
fn read_labels(path: &Path) -> anyhow::Result<Vec<String>> {
    must_exist("--labels", path)?;
    let cannot = || format!("--labels {}", path.display());
    let size = std::fs::metadata(path).with_context(cannot)?.len();
    if size > MAX_LABEL_BYTES {
        return Err(unusable(format!("{}: {size} bytes, expected at most {MAX_LABEL_BYTES}", cannot())));
    }
    let text = std::fs::read_to_string(path).with_context(cannot)?;
    if text.trim_start().starts_with('[') {
        return serde_json::from_str(&text).map_err(|error| {
            unusable(format!("{}: {error}; expected a JSON array of strings, or a text on each line", cannot()))
        });
    }
    Ok(text.lines().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_lines_or_json() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("labels");
        let read = |text: &str| {
            std::fs::write(&path, text).expect("it can be written");
            read_labels(&path)
        };
        assert_eq!(read("The\n cat\n\n").expect("lines"), ["The", " cat", ""]);
        assert_eq!(read(r#"["a\n", "b"]"#).expect("JSON"), ["a\n", "b"]);
        assert!(read("[1, 2]").is_err_and(|error| error.to_string().contains("JSON array of strings")));
        assert!(read_labels(&folder.path().join("none")).is_err_and(|error| error.is::<crate::Unusable>()));
    }

    #[test]
    fn factors_are_positive() {
        assert_eq!(factor("1.25"), Ok(1.25));
        for wrong in ["0", "-1", "nan", "inf", "x"] {
            assert!(factor(wrong).is_err_and(|error| error.contains("1.25")), "{wrong}");
        }
    }
}
