//! Checks and times a layer, all its batch sizes side by side.
//!
//! Timing goes in rounds: one batch size after the other, each between two runs of the yardstick, over and over. What
//! disturbs the machine for a while then disturbs all of them, and their yardsticks.

use crate::bench::cost::Cost;
use crate::bench::results::{Failure, FirstPasses, FirstResult, ResidencyResult, Round, Row, StageResult, Timing};
use crate::bench::stats::{self, Summary};
use crate::bench::verify::{self, Verification};
use crate::bench::workload::Workload;
use crate::bench::yardstick::{self, Yardstick};
use crate::error::Result;
use crate::gpu::StageTime;
use crate::model::config::MoeConfig;
use crate::model::formats::{LayerFormats, WeightFormat};
use crate::model::routing::{DROPPED, RoutingDecision};
use crate::plan::cost;
use crate::{
    Context, GpuMemory, LayerOptions, MatmulVariant, MoeLayer, ResidencyStats, Roofline, Tuning, dense_matmul_time,
};
use std::hash::{DefaultHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Batches from this size on are compared with a dense matmul: below, a dense matmul is a matrix-vector product.
const DENSE_FROM_TOKENS: u32 = 64;
/// Fewest rounds, unless one pass alone takes longer than [`SLOW`].
pub(super) const LEAST_ROUNDS: usize = 11;
/// Most rounds: the median of more is no better.
const MOST_ROUNDS: usize = 60;
/// Most passes in a round.
const MOST_PASSES: usize = 50;
/// A pass that takes longer is timed fewer times, so that a slow device finishes within minutes.
const SLOW: Duration = Duration::from_secs(3);
/// A layer that takes longer to load is not loaded twice.
const SLOW_TO_LOAD: Duration = Duration::from_secs(5);
/// Passes from which each stage's median is taken.
const PROFILED_RUNS: usize = 5;
/// Share of a row's time that goes to warming up, at most, and to its stages.
const WARM_UP_SHARE: u32 = 4;
/// The yardstick runs for this share of a long pass before it and after it: a short burst says little about a pass that
/// others interrupted many times.
const YARDSTICK_SHARE: u32 = 4;

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
    /// Rounds of one pass each; `None`: as many as fit `slice`, of as many passes as are worth a yardstick.
    pub runs: Option<usize>,
    /// Time for the rounds of one row.
    pub slice: Duration,
    /// Where the workload's choices come from, if it has recorded ones.
    pub trace: Option<String>,
    /// Leave out what takes time beside the rows: loading twice, and comparing large batches with a dense matmul.
    pub brief: bool,
    /// Once it is true, what was measured by then is the result.
    pub stop: Option<&'a AtomicBool>,
}

/// What is going on, for whoever waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Weights are being packed and uploaded.
    Loading,
    /// The batch of that many tokens is compared with the reference.
    Verifying(u32),
    /// All batches are timed: round, of rounds.
    Timing(usize, usize),
    /// The stages of the batch of that many tokens are timed.
    Profiling(u32),
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

/// A batch that was found right, on its way to becoming a row.
struct Entrant {
    tokens: u32,
    /// `[tokens, hidden_size]`
    x: Vec<f32>,
    /// Of the output's bits: what is computed later must be the same.
    fingerprint: u64,
    verification: Verification,
    routing: RoutingDecision,
    warm_up_passes: usize,
    settled: bool,
    plan: Rounds,
    rounds: Vec<Round>,
    /// Every timed pass.
    seconds: Vec<f64>,
    residency: Option<ResidencyResult>,
}

/// How often to time what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Rounds {
    rounds: usize,
    /// In each round.
    passes: usize,
    /// The yardstick runs for so long after them, at least once.
    yardstick: Duration,
}

impl<'a> Bench<'a> {
    /// The device as it is, f16 weights, two seconds for each row.
    pub fn new(context: &'a Context) -> Bench<'a> {
        Bench {
            context,
            device_time: Duration::ZERO,
            roofline: None,
            weights: WeightFormat::F16,
            matmul: None,
            tuning: None,
            gpu_memory: GpuMemory::All,
            pinned_experts: Vec::new(),
            fresh_tokens: false,
            runs: None,
            slice: Duration::from_secs(2),
            trace: None,
            brief: false,
            stop: None,
        }
    }

    /// Loads `workload` and measures it at each batch size. One that fails does not stop the others; where the run is
    /// stopped, those that were not timed yet are left out.
    pub fn run(
        &self,
        preset: Option<&str>,
        mut workload: Workload,
        batches: &[u32],
        yardstick: &mut Yardstick<'_>,
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
        let started = first_result.map(|result| Outcome::Started(FirstResult { layer: layer_name.clone(), ..result }));
        let mut outcomes: Vec<Outcome> = started.into_iter().collect();
        for (tokens, row) in self.rows(preset, &workload, &layer, batches, yardstick, progress) {
            outcomes.push(match row {
                Ok(Ok(row)) => Outcome::Measured(Box::new(row)),
                Ok(Err(wrong)) => failed(Some(tokens), format!("the result is wrong: {wrong}")),
                Err(error) => failed(Some(tokens), error.to_string()),
            });
        }
        outcomes
    }

    /// Each batch size with what became of it: the outer error is the device's, the inner one says what is wrong with
    /// the result.
    fn rows(
        &self,
        preset: Option<&str>,
        workload: &Workload,
        layer: &MoeLayer,
        batches: &[u32],
        yardstick: &mut Yardstick<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Vec<(u32, Result<Result<Row, String>>)> {
        let mut entrants = Vec::new();
        for &tokens in batches.iter().take_while(|_| !self.stopped()) {
            progress(Progress::Verifying(tokens));
            entrants.push((tokens, self.enter(workload, layer, tokens)));
        }
        let mut racing: Vec<&mut Result<Result<Entrant, String>>> = entrants.iter_mut().map(|(_, e)| e).collect();
        // Where experts are brought in, what a pass finds on the device depends on the passes before: one batch after the other.
        let together = if layer.residency().is_some() { 1 } else { racing.len().max(1) };
        for batches in racing.chunks_mut(together) {
            self.time(workload, layer, batches, yardstick, progress);
        }
        let mut rows = Vec::new();
        for (tokens, entrant) in entrants {
            match entrant {
                Ok(Ok(entrant)) if entrant.rounds.is_empty() => {}
                Ok(Ok(entrant)) => {
                    progress(Progress::Profiling(tokens));
                    rows.push((tokens, self.finish(preset, workload, layer, entrant, yardstick)));
                }
                Ok(Err(wrong)) => rows.push((tokens, Ok(Err(wrong)))),
                Err(error) => rows.push((tokens, Err(error))),
            }
        }
        rows
    }

    fn stopped(&self) -> bool {
        self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
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
        if self.brief || load_time > SLOW_TO_LOAD {
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

    /// Compares a batch with the reference, and warms it up.
    fn enter(&self, workload: &Workload, layer: &MoeLayer, tokens: u32) -> Result<Result<Entrant, String>> {
        let x = workload.input(tokens)?;
        let y = layer.forward(&x)?;
        let routing = layer.routing()?;
        let verification = verify::verify(&workload.config, &workload.weights, &x, &y, &routing);
        if let Some(reason) = verification.reason {
            return Ok(Err(reason));
        }
        if let Some(reason) = other_choice(workload, &routing, tokens) {
            return Ok(Err(reason));
        }
        layer.upload(&x)?;
        // The first pass compiles and allocates.
        layer.run_resident()?;
        let (warm_up, settled) = self.warm_up(layer)?;
        let once = stats::median_of(&warm_up[warm_up.len().saturating_sub(3)..]);
        Ok(Ok(Entrant {
            tokens,
            x,
            fingerprint: fingerprint(&y),
            verification,
            routing,
            warm_up_passes: 2 + warm_up.len(),
            settled,
            plan: self.plan_rounds(Duration::from_secs_f64(once)),
            rounds: Vec::new(),
            seconds: Vec::new(),
            residency: None,
        }))
    }

    /// Passes until they no longer get faster, or for a share of the row's time, and whether they settled.
    fn warm_up(&self, layer: &MoeLayer) -> Result<(Vec<f64>, bool)> {
        let begin = Instant::now();
        let mut seconds = Vec::new();
        while !stats::has_settled(&seconds) {
            seconds.push(layer.run_resident()?.as_secs_f64());
            if begin.elapsed() > self.slice / WARM_UP_SHARE {
                return Ok((seconds, false));
            }
        }
        Ok((seconds, true))
    }

    fn plan_rounds(&self, once: Duration) -> Rounds {
        if let Some(runs) = self.runs {
            return Rounds { rounds: runs.max(1), passes: 1, yardstick: Duration::ZERO };
        }
        let passes = stats::runs_within(yardstick::REACH / 2, once, 1, MOST_PASSES);
        let yardstick = once / YARDSTICK_SHARE;
        let least = if once > SLOW { 2 } else { LEAST_ROUNDS };
        // One more for the pass that finds the input moved, and the yardstick.
        let round = once * (passes as u32 + 1) + yardstick * 2;
        Rounds { rounds: stats::runs_within(self.slice, round, least, MOST_ROUNDS), passes, yardstick }
    }

    /// All rounds of these batches, as far as they are right, interleaved.
    fn time(
        &self,
        workload: &Workload,
        layer: &MoeLayer,
        entrants: &mut [&mut Result<Result<Entrant, String>>],
        yardstick: &mut Yardstick<'_>,
        progress: &mut dyn FnMut(Progress),
    ) {
        let wanted = |entrant: &Result<Result<Entrant, String>>| match entrant {
            Ok(Ok(entrant)) => entrant.plan.rounds,
            _ => 0,
        };
        let most = entrants.iter().map(|entrant| wanted(entrant)).max().unwrap_or(0);
        let mut reported: Option<Instant> = None;
        let before = layer.residency();
        for round in 0..most {
            // Seldom enough that drawing does not disturb short passes.
            if reported.is_none_or(|reported| reported.elapsed() > Duration::from_millis(200)) {
                progress(Progress::Timing(round, most));
                reported = Some(Instant::now());
            }
            for slot in entrants.iter_mut() {
                // Those with fewer rounds have them spread over all.
                let rounds = wanted(slot);
                if (round + 1) * rounds / most == round * rounds / most || self.stopped() {
                    continue;
                }
                let Ok(Ok(entrant)) = &mut **slot else { continue };
                if let Err(error) = self.time_round(workload, layer, entrant, yardstick) {
                    **slot = Err(error);
                }
            }
        }
        if let (Some((before, after)), [Ok(Ok(entrant))]) = (before.zip(layer.residency()), entrants) {
            entrant.residency = Some(residency_result(&before, &after));
        }
    }

    /// One round: whole passes on the resident input, or each on tokens of its own, as a pass that is repeated finds
    /// its experts; and the yardstick before and after.
    fn time_round(
        &self,
        workload: &Workload,
        layer: &MoeLayer,
        entrant: &mut Entrant,
        yardstick: &mut Yardstick<'_>,
    ) -> Result<()> {
        let tokens = entrant.tokens;
        let Rounds { passes, yardstick: yardstick_for, .. } = entrant.plan;
        let fresh_tokens = self.has_fresh_tokens(layer);
        if !fresh_tokens {
            layer.upload(&entrant.x)?;
            if self.runs.is_none() && yardstick_for < yardstick::REACH / YARDSTICK_SHARE {
                // After other batches' passes and the yardstick.
                layer.run_resident()?;
            }
        }
        let before = yardstick.time_for(yardstick_for)?;
        let mut seconds = Vec::with_capacity(passes);
        for pass in 0..passes {
            if fresh_tokens {
                let first = (entrant.seconds.len() + pass + 1) * tokens as usize;
                layer.upload(&workload.input_from(first, tokens)?)?;
            }
            seconds.push(layer.run_resident()?.as_secs_f64());
        }
        let after = yardstick.time_for(yardstick_for)?;
        entrant.rounds.push(Round { seconds: stats::median_of(&seconds), yardstick_s: (before + after) / 2.0 });
        entrant.seconds.extend(seconds);
        Ok(())
    }

    fn has_fresh_tokens(&self, layer: &MoeLayer) -> bool {
        self.fresh_tokens || layer.residency().is_some()
    }

    /// What the rounds say, and where the time goes.
    fn finish(
        &self,
        preset: Option<&str>,
        workload: &Workload,
        layer: &MoeLayer,
        entrant: Entrant,
        yardstick: &Yardstick<'_>,
    ) -> Result<Result<Row, String>> {
        let Entrant { tokens, x, fingerprint: expected, verification, routing, rounds, seconds, residency, .. } =
            entrant;
        let config = &workload.config;
        let yardsticks: Vec<f64> = rounds.iter().map(|round| round.yardstick_s).collect();
        let median_s = stats::median_of(&rounds.iter().map(|round| round.seconds).collect::<Vec<_>>());
        let timing = Timing::of(rounds).map(|timing| Timing {
            drifted: yardstick.drifted(&yardsticks),
            warm_up_passes: entrant.warm_up_passes,
            settled: entrant.settled,
            ..timing
        });
        let times = Summary::of(&seconds).expect("at least one pass was timed");
        let fresh_tokens = self.has_fresh_tokens(layer);
        if !fresh_tokens {
            layer.upload(&x)?;
            layer.run_resident()?;
        }
        let stats = layer.pass_stats();
        let active_experts = routing.tokens_per_expert.iter().filter(|&&n| n > 0).count() as u32;
        let cost = Cost::of_forward(config, self.weights, tokens, active_experts);
        let gflops = cost.flops / median_s / 1e9;
        // What is read comes from a buffer of about this size: what the pass reads, which was read just before; or, where
        // each pass reads something else, all experts.
        let from = match fresh_tokens {
            true => Cost::of_forward(config, self.weights, tokens, config.num_weighted_experts()).bytes,
            false => cost.bytes,
        };
        let bandwidth = self.roofline.as_ref().map(|r| (r, r.bandwidth_for(from)));
        let attainable = bandwidth.map(|(r, bandwidth)| cost.attainable_gflops(r.gflops, bandwidth));
        let stages = self.stage_results(layer, tokens, median_s, bandwidth.map(|(r, rate)| [r.gflops, rate]))?;
        // A device that computes something else after a while has not earned its times.
        if fingerprint(&layer.forward(&x)?) != expected {
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
            trace: self.trace.clone(),
            median_s,
            min_s: times.min_s,
            max_s: times.max_s,
            runs: times.runs,
            timing,
            skew: workload.skew,
            matmul: match self.matmul {
                Some(variant) => variant.name(),
                None if layer.plan(tokens)?.tuned => "tuned",
                None => "auto",
            }
            .to_owned(),
            gflops,
            gbytes_per_s: cost.bytes / median_s / 1e9,
            read_fraction: bandwidth.map(|(_, bandwidth)| cost.bytes / median_s / 1e9 / bandwidth),
            roofline_fraction: attainable.map(|attainable| gflops / attainable),
            dense_ratio: self.dense_ratio(workload, tokens, median_s)?,
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

    /// How much longer the layer takes than one dense matmul with as many FLOPs as its experts have.
    fn dense_ratio(&self, workload: &Workload, tokens: u32, median_s: f64) -> Result<Option<f64>> {
        let config = &workload.config;
        let rows = tokens.checked_mul(config.top_k());
        let columns = config.intermediate_size().checked_mul(3);
        let is_compared = !self.brief && tokens >= DENSE_FROM_TOKENS && !self.stopped();
        let (true, Some(rows), Some(columns)) = (is_compared, rows, columns) else { return Ok(None) };
        let dense = dense_matmul_time(self.context, rows, columns, config.hidden_size(), self.weights)?;
        Ok(dense.map(|dense| median_s / dense.as_secs_f64()).filter(|ratio| ratio.is_finite()))
    }

    /// The plan's stages with the median of the times that the device measured, as far as it can. `peaks`: GFLOP/s and
    /// GB/s.
    fn stage_results(
        &self,
        layer: &MoeLayer,
        tokens: u32,
        median_s: f64,
        peaks: Option<[f64; 2]>,
    ) -> Result<Vec<StageResult>> {
        let once = Duration::from_secs_f64(median_s);
        let runs = stats::runs_within(self.slice / WARM_UP_SHARE, once, 1, PROFILED_RUNS);
        let mut profiles = Vec::with_capacity(runs);
        for _ in 0..runs {
            profiles.push(layer.profile()?);
            // Devices without timestamps will not have them the next time either.
            if profiles[0].is_empty() {
                break;
            }
        }
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
            let median_s = stage_median(&profiles, stage.name);
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

/// A token that chose other experts than recorded ones. A capacity may have dropped some of its choices.
fn other_choice(workload: &Workload, routing: &RoutingDecision, tokens: u32) -> Option<String> {
    if !workload.is_recorded() {
        return None;
    }
    let top_k = workload.config.top_k() as usize;
    (0..tokens as usize).find_map(|t| {
        let (chosen, meant) = (&routing.topk_experts[t * top_k..][..top_k], workload.meant_for(t));
        let is_other = chosen.iter().any(|&e| e != DROPPED && !meant.contains(&e));
        is_other.then(|| format!("token {t} chose experts {chosen:?}, the trace says {meant:?}"))
    })
}

/// The median over passes of what a stage took, in seconds: a stage may be several dispatches, whose times add up. `None` if
/// nothing was measured.
pub(crate) fn stage_median(profiles: &[Vec<StageTime>], name: &str) -> Option<f64> {
    let of_pass = |profile: &Vec<StageTime>| {
        profile.iter().filter(|time| time.name == name).map(|time| time.seconds).reduce(|a, b| a + b)
    };
    let summary = Summary::of(&profiles.iter().filter_map(of_pass).collect::<Vec<_>>());
    summary.map(|summary| summary.median_s).filter(|&seconds| seconds > 0.0)
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

/// Of the bits of `y`: different outputs have different ones, as far as 64 bits go.
fn fingerprint(y: &[f32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    y.iter().for_each(|v| hasher.write_u32(v.to_bits()));
    hasher.finish()
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
            device_time: Duration::from_millis(250),
            roofline: Some(Roofline { gflops: 100.0, gbytes_per_s: 10.0, bandwidths: Vec::new(), how: String::new() }),
            runs: Some(3),
            slice: Duration::from_millis(10),
            ..Bench::new(context)
        }
    }

    fn run(bench: &Bench<'_>, workload: Workload, batches: &[u32]) -> Vec<Outcome> {
        let mut yardstick = Yardstick::new(bench.context).expect("the CPU engine has one");
        bench.run(Some("p"), workload, batches, &mut yardstick, &mut |_| ())
    }

    #[test]
    fn rows_hold_what_was_measured() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let outcomes = run(&bench(&context), workload(), &[1, 70]);
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
            let timing = row.timing.as_ref().expect("it was timed");
            assert_eq!((timing.rounds.len(), timing.interval_s.contains(row.median_s)), (3, true), "{timing:?}");
            assert!(timing.interval_in_yardsticks.contains(timing.in_yardsticks) && timing.warm_up_passes > 2);
            assert!(row.roofline_fraction.is_some_and(|fraction| fraction > 0.0) && row.max_rel_error < 1e-5);
        }
    }

    #[test]
    fn a_layer_that_cannot_be_loaded_is_a_failure_with_a_reason() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let mut broken = workload();
        broken.weights.up_proj.pop();
        let outcomes = run(&bench(&context), broken, &[1]);
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
        let found = bench(&context).enter(&claimed, &layer, 4).expect("the engine runs");
        assert!(found.is_err_and(|reason| reason.contains("off by")));
    }

    #[test]
    fn rounds_fill_the_slice_and_long_passes_get_a_longer_yardstick() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let bench = Bench { slice: Duration::from_secs(2), ..Bench::new(&context) };
        let plan = |micros| bench.plan_rounds(Duration::from_micros(micros));
        assert_eq!(
            plan(10),
            Rounds { rounds: MOST_ROUNDS, passes: MOST_PASSES, yardstick: Duration::from_nanos(2500) }
        );
        assert_eq!(plan(10_000).passes, 2);
        let second = plan(1_000_000);
        assert_eq!(second, Rounds { rounds: LEAST_ROUNDS, passes: 1, yardstick: Duration::from_millis(250) });
        assert_eq!(plan(10_000_000).rounds, 2);
        let counted = Bench { runs: Some(3), ..bench }.plan_rounds(Duration::from_micros(10));
        assert_eq!((counted.rounds, counted.passes), (3, 1));
    }

    #[test]
    fn batches_take_turns_until_somebody_stops_them() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let stop = AtomicBool::new(false);
        let bench = Bench { runs: Some(1000), stop: Some(&stop), ..bench(&context) };
        let mut yardstick = Yardstick::new(&context).expect("the CPU engine has one");
        let outcomes = bench.run(None, workload(), &[1, 70], &mut yardstick, &mut |progress| {
            if matches!(progress, Progress::Timing(round, 1000) if round > 0) {
                stop.store(true, Ordering::Relaxed);
            }
        });
        let [_, Outcome::Measured(one), Outcome::Measured(many)] = &outcomes[..] else { panic!("{outcomes:?}") };
        assert!((1..1000).contains(&one.runs) && one.runs == many.runs, "{} {}", one.runs, many.runs);
        // Stopped before the first check, there is nothing to report but the first passes.
        assert!(matches!(run(&bench, workload(), &[1, 70])[..], [Outcome::Started(_)]));
    }

    #[test]
    fn choices_that_are_not_the_recorded_ones_are_noticed() {
        let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
        let recorded = |choices: &[i32]| workload().with_choices(choices).expect("different experts");
        let outcomes = run(&bench(&context), recorded(&[3, 1, 0, 7]), &[5]);
        let [_, Outcome::Measured(row)] = &outcomes[..] else { panic!("{outcomes:?}") };
        assert_eq!(row.active_experts, 4);
        let routing = RoutingDecision { topk_experts: vec![1, 3, 7, DROPPED, 1, 2], ..RoutingDecision::default() };
        assert_eq!(other_choice(&recorded(&[3, 1, 0, 7]), &routing, 2), None);
        let reason = other_choice(&recorded(&[3, 1, 0, 7]), &routing, 3).expect("2 is not 3");
        assert!(reason.contains("token 2 chose experts [1, 2]"), "{reason}");
        assert_eq!(other_choice(&workload(), &routing, 3), None, "nothing is recorded");
    }

    #[test]
    fn other_bits_have_another_fingerprint() {
        let y = [1.0, -0.0, 2.5];
        assert_eq!(fingerprint(&y), fingerprint(&y));
        assert_ne!(fingerprint(&y), fingerprint(&[1.0, 0.0, 2.5]));
    }
}
