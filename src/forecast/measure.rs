//! Facts of the device at hand: its limits, its roofline, and the stages of small layers, timed.
//!
//! What a kernel makes of a device is no matter of data sheets, above all where a driver runs shaders on a processor. So
//! two layers run for a moment: one that is small, but large enough for what its stages do to count, and one that is so
//! small that nothing counts but starting them.

use super::facts::{DeviceFacts, MeasuredStage, SCHEMA};
use super::{active_experts, stages_of};
use crate::bench::measure::stage_median;
use crate::bench::memory;
use crate::bench::roofline::roofline;
use crate::bench::stats::Summary;
use crate::bench::workload::Workload;
use crate::context::Context;
use crate::error::Result;
use crate::layer::{LayerOptions, MoeLayer};
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use crate::plan::DeviceProfile;
use crate::plan::predict::Rates;

/// Tokens of the timed passes: one row for each expert, two without a sort and four with one, then full tiles.
const BATCHES: [u32; 5] = [1, 16, 32, 128, 512];
/// Runs of each pass, of which the median counts.
const RUNS: usize = 5;

/// A layer of the usual proportions that takes 50 MB as f16.
fn layer() -> Result<MoeConfig> {
    MoeConfig::new(1024, 512, 16, 2, Routing::softmax(true), Activation::SWIGLU)
}

/// As few as there can be of everything, but for what decides about kernels.
fn nothing() -> Result<MoeConfig> {
    MoeConfig::new(32, 32, 16, 2, Routing::softmax(true), Activation::SWIGLU)
}

/// Measures the context's device with expert weights of these formats, in a few seconds. `progress` is told what is going
/// on. The limits are those that the context was opened with.
///
/// # Errors
/// What the device reports.
pub fn measure(context: &Context, formats: &[WeightFormat], progress: &mut dyn FnMut(&str)) -> Result<DeviceFacts> {
    progress("measuring the roofline");
    let measured = roofline(context)?;
    let limits = context.gpu().map_or_else(DeviceProfile::webgpu_floor, |gpu| gpu.profile().clone());
    let is_host = context.gpu().is_none() || limits.software;
    // Nobody has measured the caches; a bound that is never reached leaves them out.
    let rates = Rates {
        gflops: measured.gflops,
        memory: measured.gbytes_per_s,
        cache: measured.gflops * 1e3,
        workgroup_memory: measured.gflops * 1e3,
    };
    let mut facts = DeviceFacts {
        schema: SCHEMA,
        name: context.device().name.clone(),
        cpu_engine: context.gpu().is_none(),
        memory_bytes: memory::available().filter(|_| is_host),
        limits,
        rates: Some(rates),
        bandwidths: measured.bandwidths,
        dispatch_s: 0.0,
        between_s: 0.0,
        measured: Vec::new(),
    };
    progress("measuring what starting a stage takes");
    let (workload, small) = load(context, nothing()?, WeightFormat::F16)?;
    let (stages, pass_s) = time(context, &workload, &small, WeightFormat::F16, 1)?;
    let dispatches = stages.iter().map(|stage| stage.dispatches).sum::<u32>().max(1);
    let in_stages: f64 = stages.iter().map(|stage| stage.seconds).sum();
    facts.dispatch_s = in_stages / f64::from(dispatches);
    facts.between_s = (pass_s - in_stages) / f64::from(dispatches);
    for &format in formats {
        let (workload, layer) = load(context, layer()?, format)?;
        for tokens in BATCHES {
            progress(&format!("measuring stages: {} weights, {tokens} tokens", format.name()));
            facts.measured.extend(time(context, &workload, &layer, format, tokens)?.0);
        }
    }
    Ok(facts)
}

fn load(context: &Context, config: MoeConfig, weights: WeightFormat) -> Result<(Workload, MoeLayer)> {
    let workload = Workload::new(config.clone(), 0.0, 1)?;
    let options = LayerOptions { weights, ..LayerOptions::default() };
    let layer = MoeLayer::with_options(context, config, &workload.weights, &options)?;
    Ok((workload, layer))
}

/// The stages of a pass, and the time of all of it.
fn time(
    context: &Context,
    workload: &Workload,
    layer: &MoeLayer,
    format: WeightFormat,
    tokens: u32,
) -> Result<(Vec<MeasuredStage>, f64)> {
    let config = layer.config();
    layer.upload(&workload.input(tokens)?)?;
    layer.run_resident()?;
    let (mut passes, mut profiles) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        passes.push(layer.run_resident()?.as_secs_f64());
        profiles.push(layer.profile()?);
    }
    let plan = layer.plan(tokens)?;
    let is_cpu = context.gpu().is_none();
    let rows = f64::from(tokens * config.top_k()) / active_experts(config, tokens);
    let mut stages = Vec::new();
    for (cost, dispatches) in stages_of(config, &format.into(), &plan, is_cpu) {
        if let Some(seconds) = stage_median(&profiles, cost.name) {
            stages.push(MeasuredStage {
                stage: cost.name.to_owned(),
                weights: format,
                matmul: if is_cpu { "cpu".to_owned() } else { plan.matmul.label() },
                tokens,
                rows,
                flops: cost.flops,
                bytes: cost.bytes,
                dispatches,
                seconds,
            });
        }
    }
    Ok((stages, Summary::of(&passes).map_or(0.0, |summary| summary.median_s)))
}
