//! `wgmoe info`: what there is to run on, and what each kernel variant would make of it.

use crate::output::Output;
use crate::{Verdict, unusable};
use serde::Serialize;
use wgmoe::{AdapterFacts, DeviceChoice, DeviceInfo, MatmulVariant, Tuning, adapters};

const EXAMPLES: &str = "\
Examples:
  wgmoe info
  wgmoe info --device 0
  wgmoe info --json -";

/// List devices with their limits and features, and what each kernel will use
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {}

#[derive(Serialize)]
struct Adapter {
    index: usize,
    #[serde(flatten)]
    device: DeviceInfo,
    limits: serde_json::Map<String, serde_json::Value>,
    features: Vec<&'static str>,
    subgroup: Option<(u32, u32)>,
    matmul: Vec<Variant>,
    /// Where `wgmoe tune` stores its choices.
    tuning: Option<String>,
    /// Whether it has.
    is_tuned: bool,
}

#[derive(Serialize)]
struct Variant {
    name: &'static str,
    usable: bool,
    why: String,
}

#[derive(Serialize)]
struct CpuEngine {
    threads: usize,
    simd: Vec<&'static str>,
}

#[derive(Serialize)]
struct Report {
    adapters: Vec<Adapter>,
    cpu_engine: CpuEngine,
}

pub fn execute(_: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    let all = adapters();
    let cpu_engine = CpuEngine { threads: std::thread::available_parallelism().map_or(1, usize::from), simd: simd() };
    let chosen: Vec<&AdapterFacts> = all.iter().filter(|facts| matches(facts, &device)).collect();
    if chosen.is_empty() && matches!(device, DeviceChoice::Index(_) | DeviceChoice::Name(_)) {
        let found: Vec<String> = all.iter().map(|facts| format!("{}: {}", facts.index, facts.device.name)).collect();
        let found = if found.is_empty() { "no adapters at all".to_owned() } else { found.join(", ") };
        return Err(unusable(format!("no adapter matches {device:?}; found: {found}")));
    }
    let report = Report { adapters: chosen.into_iter().map(adapter).collect(), cpu_engine };
    if report.adapters.is_empty() && device != DeviceChoice::Cpu {
        output.line("no adapters: no Vulkan, Metal or DX12 driver answered; the embedded CPU engine is used");
    }
    for adapter in &report.adapters {
        output.line(&describe(adapter));
    }
    let simd =
        if report.cpu_engine.simd.is_empty() { "baseline".to_owned() } else { report.cpu_engine.simd.join(", ") };
    output.line(&format!("cpu: embedded CPU engine, {} threads, SIMD: {simd}", report.cpu_engine.threads));
    output.json(&report)?;
    Ok(Verdict::Right)
}

fn matches(facts: &AdapterFacts, device: &DeviceChoice) -> bool {
    match device {
        DeviceChoice::Cpu => false,
        DeviceChoice::Index(index) => facts.index == *index,
        DeviceChoice::Name(part) => {
            let part = part.to_lowercase();
            [&facts.device.name, &facts.device.driver].iter().any(|name| name.to_lowercase().contains(&part))
        }
        _ => true,
    }
}

fn adapter(facts: &AdapterFacts) -> Adapter {
    let tuning = Tuning::stored_path(&facts.device);
    Adapter {
        index: facts.index,
        device: facts.device.clone(),
        limits: facts.limits.iter().map(|&(name, value)| (name.to_owned(), value.into())).collect(),
        features: facts.features.clone(),
        subgroup: facts.subgroup,
        matmul: MatmulVariant::ALL.iter().map(|&variant| usable(variant, facts)).collect(),
        is_tuned: tuning.as_ref().is_some_and(|path| path.exists()),
        tuning: tuning.map(|path| path.display().to_string()),
    }
}

/// Whether this adapter can run `variant`, in words. The plan decides at run time; this says what it goes by.
fn usable(variant: MatmulVariant, facts: &AdapterFacts) -> Variant {
    let (usable, why) = match (variant, facts.subgroup) {
        (MatmulVariant::Subgroup, None) => (false, "no: the adapter has no subgroup operations".to_owned()),
        (MatmulVariant::Subgroup, Some((least, most))) => {
            let sizes = if least == most { least.to_string() } else { format!("{least} to {most}") };
            (true, format!("yes: tiles of rows broadcast within subgroups of {sizes}"))
        }
        (MatmulVariant::Vec, _) => (true, "yes: for few rows to an expert".to_owned()),
        _ => (true, "yes: tiles in workgroup memory".to_owned()),
    };
    Variant { name: variant.name(), usable, why }
}

fn describe(adapter: &Adapter) -> String {
    let DeviceInfo { name, backend, driver, kind, .. } = &adapter.device;
    let mut text = format!("{}: {name}\n   {kind}, {backend}, {driver}\n", adapter.index);
    let subgroup = match adapter.subgroup {
        Some((least, most)) if least == most => least.to_string(),
        Some((least, most)) => format!("{least} to {most}"),
        None => "none".to_owned(),
    };
    text.push_str(&format!("   subgroup size  {subgroup}\n   limits\n"));
    let width = adapter.limits.keys().map(String::len).max().unwrap_or(0);
    for (limit, value) in &adapter.limits {
        text.push_str(&format!("     {limit:width$}  {value}\n"));
    }
    let features = if adapter.features.is_empty() { "none".to_owned() } else { adapter.features.join(", ") };
    text.push_str(&format!("   features  {features}\n   grouped matmul\n"));
    for variant in &adapter.matmul {
        text.push_str(&format!("     {:10}{}\n", variant.name, variant.why));
    }
    let tuning = match (&adapter.tuning, adapter.is_tuned) {
        (Some(path), true) => path.clone(),
        (Some(path), false) => format!("none; `wgmoe tune` would store it in {path}"),
        (None, _) => "none; this user has no cache folder to store one in".to_owned(),
    };
    text.push_str(&format!("   tuning  {tuning}\n"));
    text
}

/// The SIMD extensions that the CPU engine's matmul can choose from.
fn simd() -> Vec<&'static str> {
    #[cfg(target_arch = "x86_64")]
    {
        let all = [
            ("avx", is_x86_feature_detected!("avx")),
            ("avx2", is_x86_feature_detected!("avx2")),
            ("fma", is_x86_feature_detected!("fma")),
            ("f16c", is_x86_feature_detected!("f16c")),
            ("avx512f", is_x86_feature_detected!("avx512f")),
        ];
        all.into_iter().filter(|&(_, there)| there).map(|(name, _)| name).collect()
    }
    #[cfg(target_arch = "aarch64")]
    {
        vec!["neon"]
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    {
        Vec::new()
    }
}
