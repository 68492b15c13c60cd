//! Checks and times a layer, batch size by batch size.

use crate::bench::cost::Cost;
use crate::bench::results::{Failure, FirstPasses, FirstResult, ResidencyResult, Row, StageResult};
use crate::bench::stats::{self, Summary};
use crate::bench::verify;
use crate::bench::workload::Workload;
use crate::error::Result;
use crate::model::config::MoeConfig;
use crate::model::formats::{LayerFormats, WeightFormat};
use crate::model::routing::RoutingDecision;
use crate::plan::cost;
use crate::{
    Context, GpuMemory, LayerOptions, MatmulVariant, MoeLayer, ResidencyStats, Roofline, Tuning, dense_matmul_time,
};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Batches from this size on are compared with a dense matmul: below, a dense matmul is a matrix-vector product.
const DENSE_FROM_TOKENS: u32 = 64;
/// Fewest timed runs, unless one alone takes longer than [`SLOW`].
const LEAST_RUNS: usize = 5;
/// Most timed runs: the median of more is no better.
const MOST_RUNS: usize = 200;
/// A pass that takes longer is timed fewer times, so that a slow device finishes within minutes.
const SLOW: Duration = Duration::from_secs(3);
/// A layer that takes longer to load is not loaded twice.
const SLOW_TO_LOAD: Duration = Duration::from_secs(5);
/// Passes from which each stage's median is taken.
const PROFILED_RUNS: usize = 5;

/// How to measure.
#[derive(Clone)]
pub struct Bench<'a> {
    /// The device.
    pub context: &'a Context,
    /// How long it took to open.
    pub device_time: Duration,
    /// Its measured peaks.
    pub roofline: Option<Roofline>,
    /// Storage of the expert weights.
    pub weights: WeightFormat,
    /// The grouped matmul; `None` leaves it to the plan.
    pub matmul: Option<MatmulVariant>,
    /// What the plan goes by where it was measured.
    pub tuning: Option<Arc<Tuning>>,
    /// GPU memory for routed experts.
    pub gpu_memory: GpuMemory,
    /// Experts that stay there.
    pub pinned_experts: Vec<u32>,
    /// Each timed pass has tokens of its own, so that experts come from memory, as in a model of many layers, and not
    /// from caches that the pass before filled. Where experts are brought in it is so in any case.
    pub fresh_tokens: bool,
    /// Timed runs; `None`: as many as fit `slice`.
    pub runs: Option<usize>,
    /// Time for the runs of one row.
    pub slice: Duration,
}

/// What is going on, for whoever waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Weights are being packed and uploaded.
    Loading,
    /// The batch of that many tokens is compared with the reference.
    Verifying(u32),
    /// The batch of that many tokens is timed: run, of runs.
    Timing(u32, usize, usize),
}

/// Result for one batch size.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// The layer's first passes, before any batch size's result.
    Started(FirstResult),
    /// Right, and this fast.
    Measured(Box<Row>),
    /// Wrong or impossible: there is no time to report.
    Failed(Failure),
}

impl Bench<'_> {
    /// Loads `workload` and measures it at each batch size. One that fails does not stop the others.
    pub fn run(
        &self,
        preset: Option<&str>,
        mut workload: Workload,
        batches: &[u32],
        progress: &mut dyn FnMut(Progress),
    ) -> Vec<Outcome> {
        let layer_name = describe(&workload.config, self.weights, workload.skew);
        let failed = |tokens, reason: String| Outcome::Failed(Failure { layer: layer_name.clone(), tokens, reason });
        progress(Progress::Loading);
        let options = LayerOptions {
            weights: self.weights,
            matmul: self.matmul,
            tuning: self.tuning.clone(),
            gpu_memory: self.gpu_memory,
            pinned_experts: self.pinned_experts.clone(),
            ..Default::default()
        };
        let first_tokens = batches.first().copied().unwrap_or(1);
        let (layer, first_result) = match self.start(&workload, &options, first_tokens) {
            Ok(started) => started,
            Err(error) => return vec![failed(None, error.to_string())],
        };
        // The reference gets what the layer holds. Floats hold the workload's weights exactly.
        if self.weights.scaled_inputs().is_some()
            && let Err(error) = workload.weights.round(&workload.config, self.weights)
        {
            return vec![failed(None, error.to_string())];
        }
        let workload = &workload;
        let started = first_result
            .into_iter()
            .map(|result| Outcome::Started(FirstResult { layer: layer_name.clone(), ..result }));
        let measured = batches.iter().map(|&tokens| match self.measure(preset, workload, &layer, tokens, progress) {
            Ok(Ok(row)) => Outcome::Measured(Box::new(row)),
            Ok(Err(wrong)) => failed(Some(tokens), format!("the result is wrong: {wrong}")),
            Err(error) => failed(Some(tokens), error.to_string()),
        });
        started.chain(measured).collect()
    }

    /// The layer, loaded, and the times of its first passes: once with nothing compiled, and once more, in the place of the
    /// first, with everything compiled. A batch that does not run leaves no times; why, its own measurement will say.
    fn start(
        &self,
        workload: &Workload,
        options: &LayerOptions,
        tokens: u32,
    ) -> Result<(MoeLayer, Option<FirstResult>)> {
        if let Some(gpu) = self.context.gpu() {
            gpu.forget_pipelines();
        }
        let load = || {
            let start = Instant::now();
            let layer = MoeLayer::with_options(self.context, workload.config.clone(), &workload.weights, options)?;
            Ok((layer, start.elapsed()))
        };
        let (layer, load_time) = load()?;
        let x = workload.input(tokens)?;
        let Ok(cold) = self.first_passes(&layer, load_time, &x) else { return Ok((layer, None)) };
        let mut result =
            FirstResult { layer: String::new(), tokens, device_s: self.device_time.as_secs_f64(), cold, warm: None };
        if load_time > SLOW_TO_LOAD {
            return Ok((layer, Some(result)));
        }
        // Never two at once: the memory may be for one.
        drop(layer);
        let (layer, load_time) = load()?;
        result.warm = self.first_passes(&layer, load_time, &x).ok();
        Ok((layer, Some(result)))
    }

    /// The first forward and the one after it.
    fn first_passes(&self, layer: &MoeLayer, load_time: Duration, x: &[f32]) -> Result<FirstPasses> {
        let pass = || {
            let start = Instant::now();
            layer.forward(x)?;
            Ok(start.elapsed().as_secs_f64())
        };
        let kernels = || self.context.gpu().map_or(0, |gpu| gpu.num_kernels());
        let before = kernels();
        let first_pass_s = pass()?;
        let kernels = kernels() - before;
        Ok(FirstPasses { load_s: load_time.as_secs_f64(), first_pass_s, kernels, second_pass_s: pass()? })
    }

    /// One batch size: the outer error is the device's, the inner one says what is wrong with the result.
    fn measure(
        &self,
        preset: Option<&str>,
        workload: &Workload,
        layer: &MoeLayer,
        tokens: u32,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Result<Row, String>> {
        progress(Progress::Verifying(tokens));
        let config = &workload.config;
        let x = workload.input(tokens)?;
        let y = layer.forward(&x)?;
        let routing = layer.routing()?;
        let verification = verify::verify(config, &workload.weights, &x, &y, &routing);
        if let Some(reason) = verification.reason {
            return Ok(Err(reason));
        }

        layer.upload(&x)?;
        // The first pass compiles and allocates.
        layer.run_resident()?;
        let before = layer.residency();
        let fresh_tokens = self.fresh_tokens || before.is_some();
        let times = self.time(layer, workload, tokens, fresh_tokens, progress)?;
        let residency = before.zip(layer.residency()).map(|(before, after)| residency_result(&before, &after));
        let stats = layer.pass_stats();
        let active_experts = routing.tokens_per_expert.iter().filter(|&&n| n > 0).count() as u32;
        let cost = Cost::of_forward(config, self.weights, tokens, active_experts);
        let gflops = cost.flops / times.median_s / 1e9;
        // What is read comes from a buffer of about this size: what the pass reads, which was read just before; or, where
        // each pass reads something else, all experts.
        let from = match fresh_tokens {
            true => Cost::of_forward(config, self.weights, tokens, config.num_weighted_experts()).bytes,
            false => cost.bytes,
        };
        let bandwidth = self.roofline.as_ref().map(|r| (r, r.bandwidth_for(from)));
        let attainable = bandwidth.map(|(r, bandwidth)| cost.attainable_gflops(r.gflops, bandwidth));
        let stages = self.stage_results(layer, tokens, bandwidth.map(|(r, bandwidth)| [r.gflops, bandwidth]))?;
        // A device that computes something else after a while has not earned its times.
        if layer.forward(&x)?.iter().map(|v| v.to_bits()).ne(y.iter().map(|v| v.to_bits())) {
            return Ok(Err("the same input gave other bits after the timed runs".to_owned()));
        }

        Ok(Ok(Row {
            preset: preset.map(str::to_owned),
            hidden_size: config.hidden_size(),
            intermediate_size: config.intermediate_size(),
            num_experts: config.num_experts(),
            top_k: config.top_k(),
            weights: self.weights,
            tokens,
            median_s: times.median_s,
            min_s: times.min_s,
            max_s: times.max_s,
            runs: times.runs,
            skew: workload.skew,
            matmul: match self.matmul {
                Some(variant) => variant.name(),
                None if layer.plan(tokens)?.tuned => "tuned",
                None => "auto",
            }
            .to_owned(),
            gflops,
            gbytes_per_s: cost.bytes / times.median_s / 1e9,
            read_fraction: bandwidth.map(|(_, bandwidth)| cost.bytes / times.median_s / 1e9 / bandwidth),
            roofline_fraction: attainable.map(|attainable| gflops / attainable),
            dense_ratio: self.dense_ratio(workload, tokens, times.median_s)?,
            active_experts,
            imbalance: imbalance(&routing),
            dispatches: stats.dispatches,
            readbacks: stats.readbacks,
            max_rel_error: verification.max_rel_error,
            tokens_checked: verification.tokens_checked,
            fresh_tokens,
            residency,
            stages,
        }))
    }

    /// Times whole passes on the resident input, or each on tokens of its own: a pass that is repeated finds its experts.
    fn time(
        &self,
        layer: &MoeLayer,
        workload: &Workload,
        tokens: u32,
        fresh_tokens: bool,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Summary> {
        let once = layer.run_resident()?;
        let least = if once > SLOW { 2 } else { LEAST_RUNS };
        let runs = self.runs.unwrap_or_else(|| stats::runs_within(self.slice, once, least, MOST_RUNS)).max(1);
        let mut seconds = Vec::with_capacity(runs);
        let mut reported = Instant::now();
        progress(Progress::Timing(tokens, 0, runs));
        for run in 0..runs {
            if fresh_tokens {
                layer.upload(&workload.input_from((run + 1) * tokens as usize, tokens)?)?;
            }
            seconds.push(layer.run_resident()?.as_secs_f64());
            // Seldom enough that drawing does not disturb short passes.
            if reported.elapsed() > Duration::from_millis(200) {
                progress(Progress::Timing(tokens, run + 1, runs));
                reported = Instant::now();
            }
        }
        Ok(Summary::of(&seconds).expect("at least one run was timed"))
    }

    /// How much longer the layer takes than one dense matmul with as many FLOPs as its experts have.
    fn dense_ratio(&self, workload: &Workload, tokens: u32, median_s: f64) -> Result<Option<f64>> {
        let config = &workload.config;
        let rows = tokens.checked_mul(config.top_k());
        let columns = config.intermediate_size().checked_mul(3);
        let (true, Some(rows), Some(columns)) = (tokens >= DENSE_FROM_TOKENS, rows, columns) else { return Ok(None) };
        let dense = dense_matmul_time(self.context, rows, columns, config.hidden_size(), self.weights)?;
        Ok(dense.map(|dense| median_s / dense.as_secs_f64()).filter(|ratio| ratio.is_finite()))
    }

    /// The plan's stages with the median of the times that the device measured, as far as it can. `peaks`: GFLOP/s and
    /// GB/s.
    fn stage_results(&self, layer: &MoeLayer, tokens: u32, peaks: Option<[f64; 2]>) -> Result<Vec<StageResult>> {
        let mut profiles = Vec::with_capacity(PROFILED_RUNS);
        for _ in 0..PROFILED_RUNS {
            profiles.push(layer.profile()?);
            // Devices without timestamps will not have them the next time either.
            if profiles[0].is_empty() {
                break;
            }
        }
        let seconds = |name: &str| {
            // A stage may be several dispatches: their times add up.
            let of_pass = |profile: &Vec<crate::StageTime>| {
                profile.iter().filter(|time| time.name == name).map(|time| time.seconds).reduce(|a, b| a + b)
            };
            Summary::of(&profiles.iter().filter_map(of_pass).collect::<Vec<_>>()).map(|summary| summary.median_s)
        };
        let plan = layer.plan(tokens)?;
        // Of the tokens that are resident now: with fresh ones, not those that were verified.
        let rows_of_expert = layer.routing()?.tokens_per_expert;
        let active_experts = rows_of_expert.iter().filter(|&&rows| rows > 0).count() as u32;
        let formats = LayerFormats::from(self.weights);
        let how = cost::Dispatched::of(&plan.stages);
        let least = cost::stages(layer.config(), &formats, tokens, Some(active_experts), how);
        // The engine has no workgroups; and where experts are brought in, dispatches are repeated as needed.
        let on_gpu = self.context.gpu().is_some() && layer.residency().is_none();
        let requests = on_gpu.then(|| plan.requests(&rows_of_expert));
        let stages = plan.stages.iter().zip(&least).enumerate().map(|(index, (stage, least))| {
            let median_s = seconds(stage.name).filter(|&s| s > 0.0);
            let ceiling_s =
                peaks.map(|[gflops, gbytes]| (least.flops as f64 / gflops).max(least.bytes as f64 / gbytes) / 1e9);
            let request = requests.as_ref().and_then(|requests| requests.get(index));
            StageResult {
                name: stage.name.to_owned(),
                median_s,
                flops: stage.flops,
                bytes: stage.bytes,
                dispatches: request.map(|request| request.dispatches),
                least_bytes: Some(least.bytes),
                requested_bytes: request.map(|request| request.bytes),
                roofline_fraction: ceiling_s.zip(median_s).map(|(ceiling, time)| ceiling / time),
            }
        });
        Ok(stages.collect())
    }
}

/// What happened between two looks.
fn residency_result(before: &ResidencyStats, after: &ResidencyStats) -> ResidencyResult {
    let passes = after.passes - before.passes;
    let per_pass = |n: u64| n as f64 / passes.max(1) as f64;
    let (hits, misses) = (after.hits - before.hits, after.misses - before.misses);
    ResidencyResult {
        places: after.places,
        pinned: after.pinned,
        expert_bytes: after.expert_bytes,
        hits,
        misses,
        hit_rate: hits as f64 / (hits + misses).max(1) as f64,
        passes,
        uploaded_bytes_per_pass: per_pass(after.uploaded_bytes - before.uploaded_bytes),
        rounds_per_pass: per_pass(after.rounds - before.rounds),
    }
}

/// The layer in one line.
pub fn describe(config: &MoeConfig, weights: WeightFormat, skew: f64) -> String {
    let skew = if skew > 0.0 { format!(", skew {skew}") } else { String::new() };
    format!(
        "hidden {}, intermediate {}, {} experts, top-{}, {} weights{skew}",
        config.hidden_size(),
        config.intermediate_size(),
        config.num_experts(),
        config.top_k(),
        weights.name(),
    )
}

/// Tokens of the busiest expert by the mean: 1 is perfectly even.
fn imbalance(routing: &RoutingDecision) -> f64 {
    let tokens = &routing.tokens_per_expert;
    let sum: f64 = tokens.iter().copied().map(f64::from).sum();
    let most = tokens.iter().copied().max().unwrap_or(0);
    if sum > 0.0 { f64::from(most) * tokens.len() as f64 / sum } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, DeviceChoice, Routing};

    fn workload() -> Workload {
        let routing = Routing::softmax(true);
        let config = MoeConfig::new(64, 24, 8, 2, routing, Activation::SWIGLU).expect("valid sizes");
        Workload::new(config, 0.0, 1).expect("small")
    }

    fn bench(context: &Context) -> Bench<'_> {
        Bench {
            context,
            device_time: Duration::from_millis(250),
            roofline: Some(Roofline { gflops: 100.0, gbytes_per_s: 10.0, bandwidths: Vec::new(), how: String::new() }),
            weights: WeightFormat::F16,
            matmul: None,
            tuning: None,
            gpu_memory: GpuMemory::All,
            pinned_experts: Vec::new(),
            fresh_tokens: false,
            runs: Some(3),
            slice: Duration::from_millis(10),
        }
    }

    #[test]
    fn rows_hold_what_was_measured() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let outcomes = bench(&context).run(Some("p"), workload(), &[1, 70], &mut |_| ());
        let [Outcome::Started(first), Outcome::Measured(one), Outcome::Measured(many)] = &outcomes[..] else {
            panic!("{outcomes:?}")
        };
        assert_eq!((first.tokens, first.device_s), (1, 0.25));
        let (cold, warm) = (first.cold, first.warm.expect("loading takes an instant"));
        for passes in [cold, warm] {
            assert!(passes.load_s > 0.0 && passes.first_pass_s > 0.0 && passes.second_pass_s > 0.0, "{passes:?}");
        }
        assert!(first.layer.contains("hidden 64") && first.cold_s() > 0.25, "{first:?}");
        assert_eq!((one.tokens, one.runs, one.active_experts, one.dense_ratio), (1, 3, 2, None));
        assert_eq!((many.tokens, many.active_experts, many.tokens_checked), (70, 8, 70));
        for row in [one, many] {
            assert!(row.min_s > 0.0 && row.min_s <= row.median_s && row.median_s <= row.max_s);
            let flops = f64::from(2 * row.tokens * (2 * 3 * 64 * 24 + 64 * 8));
            assert!((row.gflops * row.median_s * 1e9 / flops - 1.0).abs() < 1e-9);
            assert!(row.roofline_fraction.is_some_and(|fraction| fraction > 0.0) && row.max_rel_error < 1e-5);
        }
    }

    #[test]
    fn a_layer_that_cannot_be_loaded_is_a_failure_with_a_reason() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let mut broken = workload();
        broken.weights.up_proj.pop();
        let outcomes = bench(&context).run(None, broken, &[1], &mut |_| ());
        let [Outcome::Failed(failure)] = &outcomes[..] else { panic!("{outcomes:?}") };
        assert!(failure.tokens.is_none() && failure.reason.contains("up_proj"), "{failure:?}");
    }

    #[test]
    fn other_weights_on_the_device_than_claimed_are_noticed() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let right = workload();
        let layer = MoeLayer::new(&context, right.config.clone(), &right.weights).expect("valid");
        let mut claimed = workload();
        claimed.weights.down_proj.iter_mut().for_each(|w| *w *= 1.001);
        let found = bench(&context).measure(None, &claimed, &layer, 4, &mut |_| ());
        assert!(matches!(&found, Ok(Err(reason)) if reason.contains("off by")), "{found:?}");
    }
}
