//! `wgmoe shader`: the text that a backend would get for a kernel, through naga.

use crate::output::Output;
use crate::{Verdict, must_be_writable, unusable};
use anyhow::{Context as _, anyhow};
use clap::ValueEnum;
use naga::back::{PipelineConstants, hlsl, msl, pipeline_constants::process_overrides, spv};
use naga::valid::{Capabilities, ModuleInfo, ShaderStages, SubgroupOperationSet, ValidationFlags, Validator};
use naga::{Module, ShaderStage};
use serde::Serialize;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use wgmoe::kernels::{self, Kernel};

const EXAMPLES: &str = "\
wgsl is the assembled source as it goes to wgpu; the others are what naga makes of it for a backend, with the kernel's \
default overrides. SPIR-V is binary: give --output, or send it to a program.

Examples:
  wgmoe shader                                       the names of all kernels
  wgmoe shader combine --to msl
  wgmoe shader combine --to spirv --output combine.spv
  wgmoe shader combine --to spirv | spirv-dis
  wgmoe shader --all --to hlsl --output folder       every kernel, and kernels.json about them";

/// Print a kernel as a backend would get it
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The kernel; without one, all names are listed
    #[arg(value_name = "NAME")]
    name: Option<String>,
    /// Language
    #[arg(long, value_enum, default_value_t = Target::Wgsl)]
    to: Target,
    /// List the names of all kernels
    #[arg(long, conflicts_with = "name")]
    list: bool,
    /// Write every kernel to a file in the folder --output, which is made where it is missing
    #[arg(long, conflicts_with_all = ["name", "list"], requires = "output")]
    all: bool,
    /// Write to this file instead of standard output; with --all, to this folder
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// One kernel of `--all`, for those who hand it to a compiler.
#[derive(Serialize)]
struct Written {
    kernel: String,
    file: String,
    /// The entry point in that file: a backend renames what is a word of its language.
    entry_point: String,
    needs_subgroups: bool,
    needs_int64: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Target {
    Wgsl,
    Spirv,
    Msl,
    Hlsl,
}

impl Target {
    fn extension(self) -> &'static str {
        match self {
            Target::Wgsl => "wgsl",
            Target::Spirv => "spv",
            Target::Msl => "metal",
            Target::Hlsl => "hlsl",
        }
    }
}

/// A translated kernel, with the name that its entry point has there.
struct Translated {
    code: Code,
    entry_point: String,
}

/// Text, or words for SPIR-V.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
enum Code {
    Text(String),
    Words(Vec<u32>),
}

impl Code {
    fn into_bytes(self) -> Vec<u8> {
        match self {
            Code::Text(text) => text.into_bytes(),
            Code::Words(words) => words.into_iter().flat_map(u32::to_le_bytes).collect(),
        }
    }
}

pub fn execute(args: &Args, output: &mut Output) -> anyhow::Result<Verdict> {
    if let (true, Some(folder)) = (args.all, &args.output) {
        return write_all(folder, args.to, output);
    }
    let Some(name) = args.name.as_deref().filter(|_| !args.list) else {
        let labels: Vec<String> = kernels::all().into_iter().map(|kernel| kernel.label).collect();
        output.line(&labels.join("\n"));
        output.json(&serde_json::json!({ "kernels": labels }))?;
        return Ok(Verdict::Right);
    };
    let kernel = find(name)?;
    if let Some(path) = &args.output {
        must_be_writable("--output", path)?;
    } else if args.to == Target::Spirv && !output.wants_json() && std::io::stdout().is_terminal() {
        return Err(unusable("SPIR-V is binary and would garble the terminal; give --output FILE or a pipe"));
    }
    let label = kernel.label().to_owned();
    let code = translate(&kernel, args.to).with_context(|| format!("cannot translate {label}"))?.code;
    if output.wants_json() {
        output.json(&serde_json::json!({ "kernel": label, "to": args.to, "code": code }))?;
    }
    match &args.output {
        Some(path) => {
            std::fs::write(path, code.into_bytes()).with_context(|| format!("cannot write {}", path.display()))?;
            output.line(&format!("{label} written to {}", path.display()));
        }
        // JSON on standard output is the product then.
        None if output.wants_json() => {}
        None => output.bytes(&code.into_bytes()),
    }
    Ok(Verdict::Right)
}

fn write_all(folder: &Path, to: Target, output: &mut Output) -> anyhow::Result<Verdict> {
    std::fs::create_dir_all(folder).with_context(|| format!("cannot make the folder {}", folder.display()))?;
    let write = |file: &str, bytes: &[u8]| {
        let path = folder.join(file);
        std::fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))
    };
    let mut written = Vec::new();
    for kernel in kernels::all() {
        let label = kernel.label().to_owned();
        let translated = translate(&kernel, to).with_context(|| format!("cannot translate {label}"))?;
        let file = format!("{label}.{}", to.extension());
        write(&file, &translated.code.into_bytes())?;
        written.push(Written {
            kernel: label,
            file,
            entry_point: translated.entry_point,
            needs_subgroups: kernel.needs_subgroups,
            needs_int64: kernel.needs_int64(),
        });
    }
    let list = serde_json::json!({ "to": to, "kernels": written });
    write("kernels.json", serde_json::to_string_pretty(&list)?.as_bytes())?;
    output.line(&format!("{} kernels written to {}", written.len(), folder.display()));
    output.json(&list)?;
    Ok(Verdict::Right)
}

/// The kernel of that label; or of that stage, if it has but one variant.
fn find(name: &str) -> anyhow::Result<Kernel> {
    let mut all = kernels::all();
    if let Some(at) = all.iter().position(|kernel| kernel.label == name) {
        return Ok(all.swap_remove(at));
    }
    let labels = |all: &[Kernel]| all.iter().map(|kernel| kernel.label()).collect::<Vec<_>>().join(", ");
    let mut same: Vec<Kernel> = all.iter().filter(|kernel| kernel.stage.name() == name).cloned().collect();
    match same.len() {
        1 => Ok(same.swap_remove(0)),
        0 => Err(unusable(format!("no kernel {name:?}; there are: {}", labels(&all)))),
        _ => Err(unusable(format!("{name:?} has several variants: {}", labels(&same)))),
    }
}

fn translate(kernel: &Kernel, to: Target) -> anyhow::Result<Translated> {
    let wgsl = kernel.wgsl();
    let (module, info) = parse(&wgsl)?;
    let entry = module.entry_points.first().context("the source has no entry point")?.name.clone();
    if to == Target::Wgsl {
        return Ok(Translated { code: Code::Text(wgsl), entry_point: entry });
    }
    let mut constants = PipelineConstants::default();
    constants.extend(kernel.overrides.iter().map(|&(name, value)| (name.to_owned(), f64::from(value))));
    let (module, info) = process_overrides(&module, &info, Some((ShaderStage::Compute, &entry)), &constants)?;
    if to == Target::Spirv {
        let words = spirv(&module, &info, entry.clone())?;
        return Ok(Translated { code: Code::Words(words), entry_point: entry });
    }
    let (text, names) = if to == Target::Msl { msl(&module, &info)? } else { hlsl(&module, &info)? };
    let entry_point = names.into_iter().next().context("the entry point was not translated")?;
    Ok(Translated { code: Code::Text(text), entry_point })
}

/// Parses and validates as for an adapter with everything: a real adapter's limits are its driver's business.
fn parse(wgsl: &str) -> anyhow::Result<(Module, ModuleInfo)> {
    let module = naga::front::wgsl::parse_str(wgsl).map_err(|error| anyhow!("{}", error.emit_to_string(wgsl)))?;
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .subgroup_stages(ShaderStages::COMPUTE)
        .subgroup_operations(SubgroupOperationSet::all())
        .validate(&module)
        .map_err(|error| anyhow!("{}", error.emit_to_string(wgsl)))?;
    Ok((module, info))
}

fn spirv(module: &Module, info: &ModuleInfo, entry_point: String) -> anyhow::Result<Vec<u32>> {
    // 1.3 is the first version with subgroup operations, and what Vulkan 1.1 takes.
    let options = spv::Options { lang_version: (1, 3), ..Default::default() };
    let pipeline = spv::PipelineOptions { shader_stage: ShaderStage::Compute, entry_point };
    Ok(spv::write_vec(module, info, &options, Some(&pipeline))?)
}

/// The text and the names of its entry points.
fn msl(module: &Module, info: &ModuleInfo) -> anyhow::Result<(String, Vec<String>)> {
    let options = msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
    let (text, about) = msl::write_string(module, info, &options, &msl::PipelineOptions::default())?;
    Ok((text, about.entry_point_names.into_iter().collect::<Result<_, _>>()?))
}

/// The text and the names of its entry points.
fn hlsl(module: &Module, info: &ModuleInfo) -> anyhow::Result<(String, Vec<String>)> {
    // 6.0 is the first shader model with wave operations.
    let options =
        hlsl::Options { shader_model: hlsl::ShaderModel::V6_0, fake_missing_bindings: true, ..Default::default() };
    let mut text = String::new();
    let about = hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default()).write(module, info, None)?;
    Ok((text, about.entry_point_names.into_iter().collect::<Result<_, _>>()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kernel_translates_to_every_language() {
        assert!(!kernels::all().is_empty());
        for kernel in kernels::all() {
            for to in [Target::Wgsl, Target::Spirv, Target::Msl, Target::Hlsl] {
                let code = translate(&kernel, to);
                let code = code.unwrap_or_else(|error| panic!("{} to {to:?}: {error:?}", kernel.label()));
                assert!(!code.entry_point.is_empty());
                assert!(!code.code.into_bytes().is_empty());
            }
        }
    }

    #[test]
    fn broken_wgsl_is_an_error_that_shows_the_place() {
        let error = parse("fn f() { let x = y; }").expect_err("y is unknown").to_string();
        assert!(error.contains('y') && error.contains("let x"), "{error}");
    }
}
