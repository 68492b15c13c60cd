//! Suites: which layers, at which batch sizes, how much time for each, and how long it will take.
//!
//! The same cases for every device. What is adapted to it is the number of experts, where a layer is too large for its
//! memory or would take too long to load, and the number of rounds.

use crate::bench::cost::Cost;
use crate::bench::presets::Preset;
use crate::error::Result;
use crate::{DeviceInfo, Roofline};
use std::time::Duration;

/// Seconds that it takes one thread to make, pack, upload and read back in the reference one weight: measured on two
/// cores of 2.1 GHz, where it took 15 ns of both.
const SECONDS_PER_WEIGHT: f64 = 30e-9;
/// Share of a job's time that may go to loading.
const LOADING_SHARE: f64 = 0.08;
/// Kernels that a layer of one weight format compiles for each kind of batch, in seconds each: software drivers compile
/// with a whole optimiser.
const COMPILING: Duration = Duration::from_millis(300);
const COMPILING_SOFTWARE: Duration = Duration::from_millis(2000);
/// A check against the reference takes so long on one core, whatever the layer ([`crate::bench::verify`]).
const CHECKING: Duration = Duration::from_millis(1000);
/// Passes of a row beside its rounds: check, warm-up, stages, last look.
const OTHER_PASSES: f64 = 8.0;
/// What passes reach of the roofline, as a rule; large batches less, small ones more.
const USUAL_FRACTION: f64 = 0.4;
/// Time for the rounds of one row.
const SLICES: [Duration; 2] = [Duration::from_millis(1000), Duration::from_millis(4000)];

/// A named set of cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// Three layers: about a minute.
    Quick,
    /// Ten layers: several minutes.
    Standard,
    /// Every preset.
    Full,
}

impl Suite {
    /// All of them.
    pub const ALL: [Suite; 3] = [Suite::Quick, Suite::Standard, Suite::Full];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Quick => "quick",
            Suite::Standard => "standard",
            Suite::Full => "full",
        }
    }

    /// The time that it is planned for. A slow device gets fewer rounds, down to the least that say something.
    pub fn budget(self) -> Duration {
        Duration::from_secs(match self {
            Suite::Quick => 60,
            Suite::Standard => 420,
            Suite::Full => 2400,
        })
    }

    /// Preset, skew, tokens.
    fn cases(self) -> Vec<(Preset, f64, &'static [u32])> {
        let of = |cases: &[(&str, f64, &'static [u32])]| {
            cases.iter().filter_map(|&(name, skew, tokens)| Some((Preset::find(name)?, skew, tokens))).collect()
        };
        match self {
            Suite::Quick => of(QUICK),
            Suite::Standard => of(STANDARD),
            Suite::Full => {
                let presets = super::presets::ALL
                    .iter()
                    .flat_map(|&preset| [(preset, 0.0, FULL_TOKENS), (preset, 1.0, FULL_SKEWED_TOKENS)]);
                presets.collect()
            }
        }
    }
}

const QUICK: &[(&str, f64, &[u32])] =
    &[("small", 0.0, &[1, 16, 128]), ("granite-3-3b-a800m", 0.0, &[1, 4]), ("qwen3-30b-a3b", 1.0, &[1, 4])];
const STANDARD: &[(&str, f64, &[u32])] = &[
    ("small", 0.0, &[1, 16, 128, 512]),
    ("granite-3-3b-a800m", 0.0, &[1, 16, 128]),
    ("qwen3-30b-a3b", 0.0, &[1, 16, 128, 512]),
    ("qwen3-30b-a3b", 1.0, &[1, 16, 128]),
    ("olmoe-1b-7b", 0.0, &[1, 16, 128]),
    ("gpt-oss-20b", 0.0, &[1, 16, 128]),
    ("deepseek-v3", 0.0, &[1, 16, 128]),
    ("mixtral-8x7b", 0.0, &[1, 16, 128]),
    ("llama-4-scout", 0.0, &[1, 16, 128]),
    ("switch-base-8", 0.0, &[1, 16, 128]),
];
const FULL_TOKENS: &[u32] = &[1, 16, 128, 512, 2048];
const FULL_SKEWED_TOKENS: &[u32] = &[1, 128];

/// One layer of a suite.
#[derive(Clone, Debug, PartialEq)]
pub struct SuiteJob {
    /// The layer, perhaps with fewer experts.
    pub preset: Preset,
    /// Why it has fewer.
    pub scaled: Option<Scaled>,
    /// Exponent of the Zipf distribution over experts.
    pub skew: f64,
    /// Tokens of each row.
    pub tokens: Vec<u32>,
    /// What loading and checking take, and what a pass of each row takes.
    fixed: Duration,
    passes: Vec<Duration>,
}

/// What a job's time follows from.
struct Host<'a> {
    roofline: Option<&'a Roofline>,
    seconds_per_weight: f64,
    /// What a row takes beside its passes.
    row: Duration,
}

/// What a layer was too large for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scaled {
    /// The memory.
    Memory,
    /// The time.
    Time,
}

/// A suite for one device.
#[derive(Clone, Debug, PartialEq)]
pub struct SuitePlan {
    /// Its layers.
    pub jobs: Vec<SuiteJob>,
    /// Presets of which not even the fewest experts fit.
    pub left_out: Vec<&'static str>,
}

impl SuitePlan {
    /// Cuts the suite's layers to what fits, and estimates what they take.
    ///
    /// `available`: bytes of memory. `threads`: of the host, which makes the weights and runs the reference.
    pub fn new(
        suite: Suite,
        device: &DeviceInfo,
        roofline: Option<&Roofline>,
        available: u64,
        threads: usize,
    ) -> Result<SuitePlan> {
        let cases = suite.cases();
        let compiling = match device.kind.as_str() {
            "cpu-engine" => Duration::ZERO,
            "software" => COMPILING_SOFTWARE,
            _ => COMPILING,
        };
        let threads = threads.max(1) as u32;
        let seconds_per_weight = SECONDS_PER_WEIGHT / f64::from(threads);
        let host = Host { roofline, seconds_per_weight, row: compiling + CHECKING / threads };
        let loading = suite.budget().as_secs_f64() / cases.len() as f64 * LOADING_SHARE;
        let in_time = (loading / seconds_per_weight) as u64;
        let mut plan = SuitePlan { jobs: Vec::new(), left_out: Vec::new() };
        for (preset, skew, tokens) in cases {
            // The f32 weights, what is packed from them, and, where device memory is host memory, the device's copy.
            let bytes = (4.0 + 2.0 * preset.weights.bits_per_weight(preset.hidden_size) / 8.0).ceil() as u64;
            let Some(fitting) = preset.scaled_to(available, bytes) else {
                plan.left_out.push(preset.name);
                continue;
            };
            // Of a layer whose fewest experts take longer, those.
            let timely = fewest(fitting, in_time);
            let scaled = match timely.num_experts {
                experts if experts < fitting.num_experts => Some(Scaled::Time),
                experts if experts < preset.num_experts => Some(Scaled::Memory),
                _ => None,
            };
            plan.jobs.push(SuiteJob::new(timely, scaled, skew, tokens, &host)?);
        }
        Ok(plan)
    }

    /// What the jobs from `first` on take, if they have so much left.
    pub fn expected(&self, first: usize, left: Duration) -> Duration {
        let slice = self.slice(first, left);
        self.jobs[first..].iter().map(|job| job.expected(slice)).sum()
    }

    /// Time for the rounds of one row of the jobs from `first` on, if all of them have so much left.
    pub fn slice(&self, first: usize, left: Duration) -> Duration {
        let jobs = &self.jobs[first..];
        let rows: usize = jobs.iter().map(|job| job.tokens.len()).sum();
        let others: Duration = jobs.iter().map(|job| job.expected(Duration::ZERO)).sum();
        let [least, most] = SLICES;
        (left.saturating_sub(others) / rows.max(1) as u32).clamp(least, most)
    }
}

/// Experts halved until the layer has at most `most` weights, or cannot have fewer.
fn fewest(preset: Preset, most: u64) -> Preset {
    let mut fewer = preset;
    while fewer.num_weights() > most {
        let half = Preset { num_experts: fewer.num_experts / 2, ..fewer };
        if half.config().is_err() {
            break;
        }
        fewer = half;
    }
    fewer
}

impl SuiteJob {
    fn new(preset: Preset, scaled: Option<Scaled>, skew: f64, tokens: &[u32], host: &Host<'_>) -> Result<SuiteJob> {
        let config = preset.config()?;
        let loading = Duration::from_secs_f64(preset.num_weights() as f64 * host.seconds_per_weight);
        let pass = |&tokens: &u32| {
            let active = config.num_experts().min(tokens.saturating_mul(config.top_k()));
            let cost = Cost::of_forward(&config, preset.weights, tokens, active);
            let seconds = host.roofline.map_or(0.0, |roofline| {
                cost.flops / cost.attainable_gflops(roofline.gflops, roofline.bandwidth_for(cost.bytes)) / 1e9
            });
            Duration::try_from_secs_f64(seconds / USUAL_FRACTION).unwrap_or(Duration::ZERO)
        };
        let rows = tokens.len() as u32;
        Ok(SuiteJob {
            scaled,
            skew,
            tokens: tokens.to_vec(),
            fixed: loading + host.row * rows,
            passes: tokens.iter().map(pass).collect(),
            preset,
        })
    }

    /// Name for tables and files.
    pub fn name(&self) -> String {
        let full = Preset::find(self.preset.name).map_or(self.preset.num_experts, |preset| preset.num_experts);
        match self.scaled {
            None => self.preset.name.to_owned(),
            Some(why) => {
                let why = if why == Scaled::Memory { "memory" } else { "time" };
                format!("{} ({} of {full} experts: {why})", self.preset.name, self.preset.num_experts)
            }
        }
    }

    /// What it takes with so much time for the rounds of each row.
    fn expected(&self, slice: Duration) -> Duration {
        let rounds = |pass: &Duration| slice.max(*pass * super::measure::LEAST_ROUNDS as u32);
        let rows: Duration = self.passes.iter().map(|pass| rounds(pass) + pass.mul_f64(OTHER_PASSES)).sum();
        self.fixed + rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::presets;

    fn plan(suite: Suite, speed: f64, available: u64) -> SuitePlan {
        let text = String::new;
        let device = DeviceInfo { name: text(), backend: text(), driver: text(), kind: "software".to_owned() };
        let [gflops, gbytes_per_s] = [speed * 30.0, speed * 0.5];
        let roofline = Roofline { gflops, gbytes_per_s, bandwidths: Vec::new(), how: text() };
        SuitePlan::new(suite, &device, Some(&roofline), available, 2).expect("presets are layers")
    }

    #[test]
    fn every_case_of_every_suite_is_there() {
        for suite in Suite::ALL {
            let plan = plan(suite, 1.0, u64::MAX);
            assert_eq!((plan.jobs.len(), plan.left_out.len()), (suite.cases().len(), 0), "{suite:?}: names exist");
        }
        assert_eq!(plan(Suite::Full, 1.0, u64::MAX).jobs.len(), 2 * presets::ALL.len());
        assert_eq!(QUICK.len() + STANDARD.len(), plan(Suite::Quick, 1.0, u64::MAX).jobs.len() + 10);
    }

    #[test]
    fn what_does_not_fit_has_fewer_experts_and_says_so() {
        let quick = plan(Suite::Quick, 1.0, u64::MAX);
        let names: Vec<String> = quick.jobs.iter().map(SuiteJob::name).collect();
        assert_eq!(names[0], "small");
        assert!(names[2].ends_with("of 128 experts: time)"), "{names:?}");
        let small = plan(Suite::Quick, 1.0, 100 << 20);
        assert!(small.jobs[0].name().contains("of 32 experts: memory"), "{}", small.jobs[0].name());
        assert_eq!(plan(Suite::Quick, 1.0, 1 << 20).left_out.len(), 3);
    }

    #[test]
    fn slow_devices_take_longer_and_fast_ones_use_the_budget() {
        let budget = Suite::Quick.budget();
        let [slow, fast] = [0.1, 10.0].map(|speed| plan(Suite::Quick, speed, u64::MAX));
        assert_eq!(slow.slice(0, budget), SLICES[0]);
        assert!(slow.expected(0, budget) > 2 * budget, "{:?}", slow.expected(0, budget));
        assert!(fast.expected(0, budget) <= budget, "{:?}", fast.expected(0, budget));
        // Less time left, less for each row; fewer jobs left, less to wait for.
        assert!(fast.slice(0, budget / 2) <= fast.slice(0, budget));
        assert!(fast.expected(1, budget) < fast.expected(0, budget));
        assert_eq!(fast.expected(3, budget), Duration::ZERO);
    }
}
