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
use std::path::PathBuf;
use wgmoe::kernels::{self, Kernel};

const EXAMPLES: &str = "\
wgsl is the assembled source as it goes to wgpu; the others are what naga makes of it for a backend, with the kernel's \
default overrides. SPIR-V is binary: give --output, or send it to a program.

Examples:
  wgmoe shader                                       the names of all kernels
  wgmoe shader combine --to msl
  wgmoe shader combine --to spirv --output combine.spv
  wgmoe shader combine --to spirv | spirv-dis";

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
    /// Write to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Target {
    Wgsl,
    Spirv,
    Msl,
    Hlsl,
}

/// A translated kernel: text, or words for SPIR-V.
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
    let code = translate(&kernel, args.to).with_context(|| format!("cannot translate {label}"))?;
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

fn translate(kernel: &Kernel, to: Target) -> anyhow::Result<Code> {
    let wgsl = kernel.wgsl();
    let (module, info) = parse(&wgsl)?;
    if to == Target::Wgsl {
        return Ok(Code::Text(wgsl));
    }
    let entry = module.entry_points.first().context("the source has no entry point")?.name.clone();
    let mut constants = PipelineConstants::default();
    constants.extend(kernel.overrides.iter().map(|&(name, value)| (name.to_owned(), f64::from(value))));
    let (module, info) = process_overrides(&module, &info, Some((ShaderStage::Compute, &entry)), &constants)?;
    match to {
        Target::Spirv => Ok(Code::Words(spirv(&module, &info, entry)?)),
        Target::Msl => {
            let options = msl::Options { lang_version: (2, 4), fake_missing_bindings: true, ..Default::default() };
            Ok(Code::Text(msl::write_string(&module, &info, &options, &msl::PipelineOptions::default())?.0))
        }
        Target::Hlsl | Target::Wgsl => Ok(Code::Text(hlsl(&module, &info)?)),
    }
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

fn hlsl(module: &Module, info: &ModuleInfo) -> anyhow::Result<String> {
    // 6.0 is the first shader model with wave operations.
    let options =
        hlsl::Options { shader_model: hlsl::ShaderModel::V6_0, fake_missing_bindings: true, ..Default::default() };
    let mut text = String::new();
    hlsl::Writer::new(&mut text, &options, &hlsl::PipelineOptions::default()).write(module, info, None)?;
    Ok(text)
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
                let bytes = code.unwrap_or_else(|error| panic!("{} to {to:?}: {error:?}", kernel.label())).into_bytes();
                assert!(!bytes.is_empty());
            }
        }
    }

    #[test]
    fn broken_wgsl_is_an_error_that_shows_the_place() {
        let error = parse("fn f() { let x = y; }").expect_err("y is unknown").to_string();
        assert!(error.contains('y') && error.contains("let x"), "{error}");
    }
}
