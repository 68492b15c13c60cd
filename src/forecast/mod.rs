//! What a layer will take on a device, before anything is downloaded or allocated: bytes, pages, dispatches, time, what does
//! not fit and what would make it fit.
//!
//! Bytes and dispatches come from the plan that the layer itself runs by, so they are exact. Time is a roofline: each stage
//! takes as long as its arithmetic, its memory traffic, or what it took on this very device in a small layer
//! ([`measure()`]), scaled by its work; the longest counts.

mod facts;
mod measure;

pub use facts::{DeviceFacts, MeasuredStage};
pub use measure::measure;

use crate::cpu;
use crate::error::Result;
use crate::model::config::MoeConfig;
use crate::model::formats::{LayerFormats, WeightFormat};
use crate::plan::cost::{self, Dispatched};
use crate::plan::predict::Footprint;
use crate::plan::{Allocation, DeviceBytes, LayerPlan, MatmulRequest, Plan, Purpose, StageCost, exceeds_webgpu_limits};
use serde::Serialize;

/// Stages that multiply by packed weights.
const MATMULS: [&str; 7] =
    ["gate_up", "down", "down_combine", "shared_gate_up", "shared_down", "latent_in", "latent_out"];

/// A layer on a device.
#[derive(Clone, Debug, Serialize)]
pub struct Forecast {
    /// How expert weights are stored.
    pub weights: String,
    /// Tokens of the batch.
    pub tokens: u32,
    /// Passes that it takes.
    pub passes: u32,
    /// Most tokens of a pass.
    pub max_tokens: u32,
    /// The device has to be opened with all its limits.
    pub all_limits: bool,
    /// Bytes on the device, by purpose.
    pub bytes: DeviceBytes,
    /// Each buffer.
    pub allocations: Vec<Allocation>,
    /// Pages of the matrices of routed experts.
    pub pages: u32,
    /// Routed experts on the device at a time, if not all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub places: Option<u32>,
    /// Dispatches of the whole batch; 0 for the CPU engine.
    pub dispatches: u32,
    /// The grouped matmul's variant in the first pass.
    pub matmul: String,
    /// Of all passes.
    pub stages: Vec<StageForecast>,
    /// Time of the batch; `None`: nothing is known of the device's rates, or experts are brought in, which takes as long as
    /// the copies do.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
}

/// One stage.
#[derive(Clone, Debug, Serialize)]
pub struct StageForecast {
    /// Its name.
    pub stage: &'static str,
    /// Dispatches.
    pub dispatches: u32,
    /// What it computes.
    pub flops: u64,
    /// What it has to move.
    pub bytes: u64,
    /// How long it takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seconds: Option<f64>,
    /// What that follows from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<Limit>,
}

/// Why a stage takes as long as it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    /// Arithmetic, or what feeds it.
    Compute,
    /// Memory.
    Memory,
    /// As measured in a small layer, scaled.
    Measured,
}

/// Experts that get a token, on average, if each token chooses evenly: `E (1 - (1 - k / E)^T)`.
pub fn active_experts(config: &MoeConfig, tokens: u32) -> f64 {
    let [e, k] = [config.num_weighted_experts(), config.top_k().min(config.num_weighted_experts())].map(f64::from);
    (e * (1.0 - (1.0 - k / e).powf(tokens.into()))).max(k.min(e)).max(1.0)
}

/// The stages of a pass with their costs under even routing, and their dispatches. Those of the CPU engine are its own.
fn stages_of(config: &MoeConfig, formats: &LayerFormats, plan: &Plan, is_cpu: bool) -> Vec<(StageCost, u32)> {
    let how = match is_cpu {
        true => Dispatched { sorted: true, logits_apart: false, combine_fused: false },
        false => Dispatched::of(&plan.stages),
    };
    let active = active_experts(config, plan.num_tokens).round() as u32;
    let stages = cost::stages(config, formats, plan.num_tokens, Some(active), how);
    let count = |stage: &StageCost| match is_cpu {
        true => 1,
        false => plan.names().filter(|name| *name == stage.name).count() as u32,
    };
    stages.into_iter().map(|stage| (stage, count(&stage))).collect()
}

/// What the layer takes on that device, with so many bytes for routed experts (`None`: with all of them there).
///
/// # Errors
/// What does not fit the device's limits at all.
pub fn forecast(
    facts: &DeviceFacts,
    config: &MoeConfig,
    weights: WeightFormat,
    tokens: u32,
    gpu_memory: Option<u64>,
) -> Result<Forecast> {
    let formats = LayerFormats::from(weights);
    let all_limits = !facts.cpu_engine && exceeds_webgpu_limits(config, formats, tokens);
    let mut layer = LayerPlan::new(config, formats, &facts.profile(all_limits), &MatmulRequest::default())?;
    if let Some(bytes) = gpu_memory.filter(|_| !facts.cpu_engine) {
        layer = layer.with_gpu_memory(bytes)?;
    }
    let allocations = match facts.cpu_engine {
        true => cpu_allocations(config, &formats, tokens),
        false => layer.allocations(tokens)?,
    };
    let mut result = Forecast {
        weights: weights.name(),
        tokens,
        passes: 0,
        max_tokens: layer.max_tokens(),
        all_limits,
        bytes: DeviceBytes::of(&allocations),
        pages: layer.matrices().iter().take(2).map(|matrix| matrix.pages.len() as u32).sum(),
        allocations,
        places: layer.places(),
        dispatches: 0,
        matmul: String::new(),
        stages: Vec::new(),
        seconds: None,
    };
    let mut pass_of: Option<Plan> = None;
    for (_, tokens) in layer.passes(tokens) {
        // All passes but the last are the same.
        let plan = match pass_of.take().filter(|plan| plan.num_tokens == tokens) {
            Some(plan) => plan,
            None => layer.plan(tokens)?,
        };
        result.add(facts, config, &formats, &plan);
        pass_of = Some(plan);
    }
    if facts.cpu_engine {
        (result.dispatches, result.matmul, result.pages) = (0, "cpu".to_owned(), 0);
    }
    if result.places.is_some() {
        result.seconds = None;
    }
    Ok(result)
}

/// The CPU engine's memory: experts' matrices to the byte, and what a pass keeps between its stages.
fn cpu_allocations(config: &MoeConfig, formats: &LayerFormats, tokens: u32) -> Vec<Allocation> {
    let [h, i, d, k] =
        [config.hidden_size(), config.intermediate_size(), config.expert_size(), config.top_k()].map(u64::from);
    let rows = u64::from(tokens) * k;
    [
        (Purpose::Weights, "experts", cpu::weight_bytes(config, formats)),
        (Purpose::Scratch, "packed", 4 * rows * d),
        (Purpose::Scratch, "intermediate", 4 * rows * i),
        (Purpose::Scratch, "expert_out", 4 * rows * d),
        (Purpose::InputOutput, "x", 4 * u64::from(tokens) * h),
        (Purpose::InputOutput, "y", 4 * u64::from(tokens) * h),
    ]
    .map(|(purpose, name, bytes)| Allocation { purpose, name, bytes })
    .into()
}

impl Forecast {
    /// One more pass.
    fn add(&mut self, facts: &DeviceFacts, config: &MoeConfig, formats: &LayerFormats, plan: &Plan) {
        let stages = stages_of(config, formats, plan, facts.cpu_engine);
        // What is read comes from as far away as all that the pass reads.
        let moved: u64 = stages.iter().map(|(stage, _)| stage.bytes).sum();
        let pass = Pass { facts, config, formats, plan, bandwidth: facts.bandwidth(moved as f64) };
        let mut seconds = 0.0;
        let mut starts = 0;
        for (cost, dispatches) in stages {
            let time = pass.stage(&cost, dispatches);
            let of_stage = time.map(|(seconds, _)| seconds);
            seconds += of_stage.unwrap_or(f64::NAN);
            starts += dispatches;
            match self.stages.iter_mut().find(|stage| stage.stage == cost.name) {
                Some(stage) => {
                    stage.dispatches += dispatches;
                    stage.flops += cost.flops;
                    stage.bytes += cost.bytes;
                    stage.seconds = stage.seconds.zip(of_stage).map(|(a, b)| a + b);
                }
                None => self.stages.push(StageForecast {
                    stage: cost.name,
                    dispatches,
                    flops: cost.flops,
                    bytes: cost.bytes,
                    seconds: of_stage,
                    limit: time.map(|(_, limit)| limit),
                }),
            }
        }
        seconds += f64::from(starts) * facts.between_s;
        let before = if self.passes == 0 { Some(0.0) } else { self.seconds };
        self.seconds = before.map(|before| before + seconds).filter(|seconds| seconds.is_finite());
        self.passes += 1;
        self.dispatches += plan.dispatches.len() as u32;
        if self.matmul.is_empty() {
            self.matmul = plan.matmul.label();
        }
    }
}

/// One pass on a device.
struct Pass<'a> {
    facts: &'a DeviceFacts,
    config: &'a MoeConfig,
    formats: &'a LayerFormats,
    plan: &'a Plan,
    /// GB/s
    bandwidth: Option<f64>,
}

impl Pass<'_> {
    /// Seconds of a stage, and why.
    fn stage(&self, cost: &StageCost, dispatches: u32) -> Option<(f64, Limit)> {
        let rates = self.facts.rates?;
        let by_memory = cost.bytes as f64 / self.bandwidth? / 1e9;
        let starting = f64::from(dispatches) * self.facts.dispatch_s;
        let by_compute = match MATMULS.contains(&cost.name) && !self.facts.cpu_engine {
            true => {
                let rows = self.rows(cost.name).ceil() as u32;
                let footprint = Footprint::of(self.plan.matmul, self.formats.gate_up, self.config.expert_size(), rows);
                cost.flops as f64 / footprint.attainable(&rates, cost.flops, 0) / 1e9
            }
            false => cost.flops as f64 / rates.gflops / 1e9,
        };
        let measured = self.measured(cost).unwrap_or(0.0);
        let (seconds, limit) = [(by_compute, Limit::Compute), (by_memory, Limit::Memory), (measured, Limit::Measured)]
            .into_iter()
            .max_by(|a, b| a.0.total_cmp(&b.0))?;
        Some((starting + seconds, limit))
    }

    /// Rows of each expert that has any.
    fn rows(&self, stage: &str) -> f64 {
        let tokens = f64::from(self.plan.num_tokens);
        match stage.starts_with("shared") || stage.starts_with("latent") {
            true => tokens,
            false => tokens * f64::from(self.config.top_k()) / active_experts(self.config, self.plan.num_tokens),
        }
    }

    /// What the stage took in small layers, without starting it, by its work.
    fn measured(&self, cost: &StageCost) -> Option<f64> {
        let name = match cost.name {
            "shared_gate_up" | "latent_in" => "gate_up",
            "shared_down" | "latent_out" => "down",
            name => name,
        };
        let has = |name: &str| self.facts.measured.iter().any(|stage| stage.stage == name);
        let name = if name == "down_combine" && !has(name) { "down" } else { name };
        let of_stage = |stage: &&MeasuredStage| stage.stage == name && (stage.flops > 0) == (cost.flops > 0);
        let mut all: Vec<&MeasuredStage> = self.facts.measured.iter().filter(of_stage).collect();
        let is_matmul = MATMULS.contains(&name);
        if is_matmul {
            // Those of the same format and of the same kernel, if there are any.
            let matmul = if self.facts.cpu_engine { "cpu".to_owned() } else { self.plan.matmul.label() };
            prefer(&mut all, |stage| stage.weights == self.formats.gate_up);
            prefer(&mut all, |stage| stage.matmul == matmul);
        }
        // What a stage does once for each weight, or row, or byte, depends on how many rows share it.
        let size = |stage: &MeasuredStage| if is_matmul { stage.rows } else { stage.tokens.into() };
        let wanted = if is_matmul { self.rows(cost.name) } else { self.plan.num_tokens.into() };
        let work =
            |flops: u64, bytes: u64, size: f64| if flops > 0 { flops as f64 / size } else { bytes as f64 / size };
        let points: Vec<(f64, f64)> = all
            .iter()
            .map(|stage| {
                let seconds = stage.seconds - f64::from(stage.dispatches) * self.facts.dispatch_s;
                (size(stage), seconds.max(0.0) / work(stage.flops, stage.bytes, size(stage)))
            })
            .collect();
        interpolate(&points, wanted).map(|unit| unit * work(cost.flops, cost.bytes, wanted))
    }
}

/// Only those for which it holds, if it holds for any.
fn prefer(all: &mut Vec<&MeasuredStage>, wanted: impl Fn(&MeasuredStage) -> bool) {
    if all.iter().any(|stage| wanted(stage)) {
        all.retain(|stage| wanted(stage));
    }
}

/// Between two points on a line; below the first in proportion to it, above the last in proportion to that. Points of the
/// same place are averaged.
fn interpolate(points: &[(f64, f64)], at: f64) -> Option<f64> {
    let mut sorted = points.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let merged: Vec<(f64, f64)> = sorted
        .chunk_by(|a, b| a.0 == b.0)
        .map(|same| (same[0].0, same.iter().map(|point| point.1).sum::<f64>() / same.len() as f64))
        .collect();
    let (first, last) = (merged.first()?, merged.last()?);
    if at <= first.0 {
        return Some(first.1 * (at / first.0));
    }
    if at >= last.0 {
        return Some(last.1 * (at / last.0));
    }
    let pair = merged.windows(2).find(|pair| at <= pair[1].0)?;
    let part = (at - pair[0].0) / (pair[1].0 - pair[0].0);
    Some(pair[0].1 + part * (pair[1].1 - pair[0].1))
}

/// Whether a layer fits, and what would make it fit.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Fit {
    /// `None`: nobody knows how much memory there is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fits: Option<bool>,
    /// Why not, in words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Each makes it fit alone.
    pub ways: Vec<Way>,
}

/// A change after which a layer fits.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Another format, and the bytes that it takes then.
    Weights(WeightFormat, u64),
    /// Fewer tokens at a time.
    Tokens(u32),
    /// Not all experts on the device at a time: `--gpu-memory`, and how many experts that is.
    GpuMemory(u64, u32),
}

/// Whether the layer fits the device's limits and its memory, and what would make it fit.
pub fn fit(
    facts: &DeviceFacts,
    config: &MoeConfig,
    weights: WeightFormat,
    tokens: u32,
    gpu_memory: Option<u64>,
) -> Fit {
    let available = facts.memory_bytes;
    let of = |weights, tokens, memory| forecast(facts, config, weights, tokens, memory);
    let total = |weights, tokens, memory| of(weights, tokens, memory).ok().map(|found| found.bytes.total());
    let is_enough = |bytes: u64| available.is_none_or(|available| bytes <= available);
    let reason = match (of(weights, tokens, gpu_memory), available) {
        (Err(error), _) => error.to_string(),
        (Ok(_), None) => return Fit::default(),
        (Ok(found), Some(available)) if found.bytes.total() <= available => {
            return Fit { fits: Some(true), ..Fit::default() };
        }
        (Ok(found), Some(available)) => format!("it takes {} bytes, there are {available}", found.bytes.total()),
    };
    let mut ways = Vec::new();
    let bits = |format: WeightFormat| format.bits_per_weight(config.expert_size());
    let mut smaller: Vec<WeightFormat> =
        WeightFormat::every().into_iter().filter(|&format| bits(format) < bits(weights)).collect();
    smaller.sort_by(|a, b| bits(*b).total_cmp(&bits(*a)));
    let fitting = smaller.iter().filter_map(|&format| Some((format, total(format, tokens, gpu_memory)?)));
    ways.extend(
        fitting.filter(|&(_, bytes)| is_enough(bytes)).take(3).map(|(format, bytes)| Way::Weights(format, bytes)),
    );
    let mut fewer = std::iter::successors(Some(tokens / 2), |tokens| Some(tokens / 2)).take_while(|&tokens| tokens > 0);
    let enough = |&tokens: &u32| total(weights, tokens, gpu_memory).is_some_and(is_enough);
    ways.extend(fewer.find(enough).map(Way::Tokens));
    if let (Some(available), false, None) = (available, facts.cpu_engine, gpu_memory) {
        ways.extend(residency(facts, config, weights, tokens, available));
    }
    Fit { fits: Some(false), reason: Some(reason), ways }
}

/// The most memory for routed experts with which all else fits, too.
fn residency(
    facts: &DeviceFacts,
    config: &MoeConfig,
    weights: WeightFormat,
    tokens: u32,
    available: u64,
) -> Option<Way> {
    // With one expert: what all else takes.
    let profile = facts.profile(exceeds_webgpu_limits(config, weights, tokens));
    let layer = LayerPlan::new(config, weights, &profile, &MatmulRequest::default()).ok()?;
    let expert = layer.expert_bytes();
    let one = forecast(facts, config, weights, tokens, Some(expert)).ok()?;
    let places = available.checked_sub(one.bytes.total())? / expert.max(1) + 1;
    let places = u32::try_from(places).ok()?.min(config.num_weighted_experts());
    // A layer with pages may take more than their sum: what is said has to hold.
    let found = forecast(facts, config, weights, tokens, Some(expert * u64::from(places))).ok()?;
    (found.bytes.total() <= available).then_some(Way::GpuMemory(expert * u64::from(places), places))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::presets::{Preset, SMALL};

    fn facts(name: &str) -> DeviceFacts {
        DeviceFacts::built_in(name).expect("it is built in")
    }

    #[test]
    fn points_are_joined_by_lines() {
        let points = [(4.0, 6.0), (1.0, 2.0), (1.0, 4.0)];
        assert_eq!(interpolate(&points, 1.0), Some(3.0));
        assert_eq!(interpolate(&points, 2.0), Some(4.0));
        assert_eq!(interpolate(&points, 8.0), Some(12.0));
        assert_eq!(interpolate(&points, 0.5), Some(1.5));
        assert_eq!(interpolate(&[], 1.0), None);
    }

    #[test]
    fn active_experts_are_between_one_tokens_and_all() {
        let config = SMALL.config().expect("valid");
        assert!((active_experts(&config, 1) - 4.0).abs() < 1e-12);
        // 32 experts, each missed by a token with probability 28 / 32.
        assert!((active_experts(&config, 2) - 32.0 * (1.0 - 0.875f64.powi(2))).abs() < 1e-12);
        assert!((active_experts(&config, 100_000) - 32.0).abs() < 1e-9);
    }

    #[test]
    fn a_device_without_rates_has_bytes_but_no_time() {
        let config = SMALL.config().expect("valid");
        let found = forecast(&facts("webgpu-defaults"), &config, WeightFormat::F16, 128, None).expect("it fits");
        assert_eq!((found.seconds, found.passes, found.stages[0].seconds), (None, 1, None));
        assert!(found.bytes.weights > 2 * SMALL.num_weights());
    }

    #[test]
    fn a_data_sheet_gives_the_roofline() {
        let config = Preset::find("qwen3-30b-a3b").and_then(|preset| preset.config().ok()).expect("a preset");
        let card = facts("rtx-4070");
        let found = forecast(&card, &config, WeightFormat::F16, 1, None).expect("it fits");
        let gate_up = found.stages.iter().find(|stage| stage.stage == "gate_up").expect("every layer has it");
        assert_eq!(gate_up.limit, Some(Limit::Memory));
        let seconds = gate_up.bytes as f64 / 504e9 + card.dispatch_s;
        assert!((gate_up.seconds.unwrap_or(0.0) / seconds - 1.0).abs() < 1e-9);
        let many = forecast(&card, &config, WeightFormat::F16, 2048, None).expect("it fits");
        assert_eq!(many.stages.iter().find(|s| s.stage == "gate_up").and_then(|s| s.limit), Some(Limit::Compute));
    }

    #[test]
    fn what_was_measured_is_scaled_by_its_work() {
        let config = SMALL.config().expect("valid");
        let mut device = facts("rtx-4070");
        let plain = forecast(&device, &config, WeightFormat::F16, 512, None).expect("it fits");
        let stage = plain.stages.iter().find(|stage| stage.stage == "gate_up").expect("it is there");
        // Half the work at the same number of rows took a second.
        device.measured.push(MeasuredStage {
            stage: "gate_up".to_owned(),
            weights: WeightFormat::F16,
            matmul: plain.matmul.clone(),
            tokens: 256,
            rows: 64.0,
            flops: stage.flops / 2,
            bytes: stage.bytes,
            dispatches: 1,
            seconds: 1.0 + device.dispatch_s,
        });
        let found = forecast(&device, &config, WeightFormat::F16, 512, None).expect("it fits");
        let seconds = found.stages.iter().find(|stage| stage.stage == "gate_up").and_then(|stage| stage.seconds);
        assert!((seconds.unwrap_or(0.0) - 2.0).abs() < 1e-3, "{seconds:?}");
    }

    #[test]
    fn what_does_not_fit_has_ways_out_that_work() {
        let config = Preset::find("mixtral-8x7b").and_then(|preset| preset.config().ok()).expect("a preset");
        let card = DeviceFacts { memory_bytes: Some(1_500_000_000), ..facts("rtx-4070") };
        let found = fit(&card, &config, WeightFormat::F16, 128, None);
        assert_eq!(found.fits, Some(false));
        assert!(found.reason.as_ref().is_some_and(|reason| reason.contains("1500000000")), "{found:?}");
        assert!(found.ways.iter().any(|way| matches!(way, Way::Weights(..))), "{found:?}");
        for way in &found.ways {
            let again = match *way {
                Way::Weights(format, _) => fit(&card, &config, format, 128, None),
                Way::Tokens(tokens) => fit(&card, &config, WeightFormat::F16, tokens, None),
                Way::GpuMemory(bytes, _) => fit(&card, &config, WeightFormat::F16, 128, Some(bytes)),
            };
            assert_eq!(again.fits, Some(true), "{way:?}");
        }
        assert!(found.ways.iter().any(|way| matches!(way, Way::GpuMemory(_, places) if *places < 8)), "{found:?}");
        assert_eq!(fit(&facts("xe-lp"), &config, WeightFormat::F16, 128, None).fits, None);
    }

    #[test]
    fn limits_that_are_too_small_are_reasons() {
        let config = Preset::find("mixtral-8x7b").and_then(|preset| preset.config().ok()).expect("a preset");
        let mut tiny = facts("webgpu-defaults");
        tiny.limits.max_buffer = 1 << 16;
        let found = fit(&tiny, &config, WeightFormat::F16, 1, None);
        assert!(found.fits == Some(false) && found.reason.is_some_and(|reason| reason.contains("65536")));
    }
}
