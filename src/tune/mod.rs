//! Choosing kernels by measurement: every choice that a device can run is checked against the f64 reference, the right
//! ones are timed, and the fastest is kept for the shape of the work that it was measured on.
//!
//! A [`Tuning`] is of one device, driver and version of this crate. It is a value like any other option:
//! [`LayerOptions::tuning`](crate::LayerOptions::tuning) puts it in force. The library never reads one by itself.
//!
//! ```no_run
//! use std::sync::Arc;
//! use wgmoe::{Context, DeviceChoice, LayerOptions, Tuning};
//!
//! let context = Context::new(&DeviceChoice::Auto)?;
//! let tuning = Tuning::for_context(&context)?.map(Arc::new); // what `wgmoe tune` stored
//! let options = LayerOptions { tuning, ..LayerOptions::default() };
//! # Ok::<(), wgmoe::Error>(())
//! ```

mod contest;
mod file;
mod jobs;
mod race;

pub use file::SCHEMA;
pub(crate) use file::date_of;
pub use jobs::{DEFAULT_FORMATS, DEFAULT_TOKENS, Job, default_presets, jobs};

use crate::bench::Workload;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::gpu::DeviceInfo;
use crate::kernels::matmul::MatmulChoice;
use crate::layer::{LayerOptions, MoeLayer};
use crate::model::formats::WeightFormat;
use crate::plan::{DeviceProfile, ShapeClass, TunedChoices, variant};
use contest::LayerContest;
use race::Time;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The best choices of one device.
#[derive(Clone, Debug, PartialEq)]
pub struct Tuning {
    device: Identity,
    date: String,
    entries: Vec<Entry>,
    choices: Arc<TunedChoices>,
}

/// Whose times they are. Another driver, or other kernels, may turn them round.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The adapter's name.
    pub name: String,
    /// Vulkan, Metal, ...
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// Version of this crate.
    pub wgmoe_version: String,
}

impl Identity {
    /// That of this device and this version.
    pub fn of(device: &DeviceInfo) -> Self {
        let DeviceInfo { name, backend, driver, .. } = device.clone();
        Self { name, backend, driver, wgmoe_version: env!("CARGO_PKG_VERSION").to_owned() }
    }

    /// The first field in which they differ: what it is, here, there.
    fn difference<'a>(&'a self, expected: &'a Identity) -> Option<(&'static str, &'a str, &'a str)> {
        let fields = [
            ("the adapter", &self.name, &expected.name),
            ("the backend", &self.backend, &expected.backend),
            ("the driver", &self.driver, &expected.driver),
            ("the version of wgmoe", &self.wgmoe_version, &expected.wgmoe_version),
        ];
        fields.into_iter().find(|(_, a, b)| a != b).map(|(what, a, b)| (what, a.as_str(), b.as_str()))
    }
}

/// What was found for one class of work.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The work.
    pub shape: ShapeClass,
    /// Storage of the expert weights.
    pub weights: WeightFormat,
    /// The layer that was timed.
    pub layer: String,
    /// Its batches of this class. Where there are several, times are geometric means over them.
    pub tokens: Vec<u32>,
    /// The choice to use.
    pub chosen: Timed,
    /// The table's choice, which wins ties; absent if its results were wrong.
    pub default: Option<Timed>,
    /// The best of the others.
    pub runner_up: Option<Timed>,
    /// Choices that the device can run.
    pub candidates: usize,
    /// Of those, how many were tried before time ran out.
    pub tried: usize,
}

/// A choice and its time.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Timed {
    /// The choice.
    pub choice: MatmulChoice,
    /// Wall time of a whole pass, in seconds.
    pub median_s: f64,
    /// Timed runs: rounds of the race until it dropped out.
    pub runs: usize,
}

impl From<Time<MatmulChoice>> for Timed {
    fn from(time: Time<MatmulChoice>) -> Self {
        Self { choice: time.candidate, median_s: time.median_s, runs: time.runs }
    }
}

impl Entry {
    /// How many times as long the table's choice takes.
    pub fn gain(&self) -> Option<f64> {
        self.default.map(|default| default.median_s / self.chosen.median_s)
    }
}

/// What a measurement found.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// The choices.
    pub tuning: Tuning,
    /// Wrong results, and layers that could not be measured.
    pub failures: Vec<Failure>,
    /// Work for which there was no time: layer, tokens.
    pub untried: Vec<(String, Vec<u32>)>,
}

/// Something that was not measured, because it does not work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Failure {
    /// The layer.
    pub layer: String,
    /// Storage of its weights.
    pub weights: WeightFormat,
    /// The batches; empty if the layer could not be made.
    pub tokens: Vec<u32>,
    /// The choice whose result is wrong; absent if it is not about one.
    pub choice: Option<MatmulChoice>,
    /// What is wrong.
    pub reason: String,
}

/// What is going on, for whoever waits.
#[derive(Clone, Copy, Debug)]
pub struct Progress<'a> {
    /// The layer.
    pub layer: &'a str,
    /// Storage of its weights.
    pub weights: WeightFormat,
    /// What happens to it.
    pub doing: Doing<'a>,
    /// Classes of work that are done, ...
    pub done: usize,
    /// ... of this many.
    pub total: usize,
    /// Most that remains of the time.
    pub left: Duration,
}

/// A step of a measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Doing<'a> {
    /// Weights are made, packed and uploaded.
    Loading,
    /// The result of a choice is compared with the reference, for batches of these sizes.
    Checking(&'a [u32], MatmulChoice),
    /// Round of a race, with this many choices.
    Racing(&'a [u32], usize, usize),
}

impl Tuning {
    fn new(device: Identity, date: String, entries: Vec<Entry>) -> Self {
        let mut choices = TunedChoices::default();
        let mut entries = entries;
        entries.retain(|entry| choices.insert(entry.shape, entry.weights, entry.chosen.choice));
        Self { device, date, entries, choices: Arc::new(choices) }
    }

    /// The device it is of.
    pub fn device(&self) -> &Identity {
        &self.device
    }

    /// The day it was made, as 2026-01-31.
    pub fn date(&self) -> &str {
        &self.date
    }

    /// What was found, class by class.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The choices, for a plan on a device that calls itself so.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if it is another one.
    pub fn choices_for(&self, device: &DeviceInfo) -> Result<Arc<TunedChoices>> {
        match self.device.difference(&Identity::of(device)) {
            None => Ok(self.choices.clone()),
            Some((what, found, expected)) => {
                Err(Error::config("tuning", format!("of {what} {found:?}"), format!("one of {expected:?}")))
            }
        }
    }

    /// This tuning, and what `older` has for other classes; of another device it has nothing.
    pub fn or(self, older: Tuning) -> Tuning {
        let same = self.device == older.device;
        let older = older.entries.into_iter().filter(|_| same);
        Tuning::new(self.device, self.date, self.entries.into_iter().chain(older).collect())
    }

    /// Measures `jobs` on the context's device, within about `budget`: what is left when it is over is reported as
    /// untried. The time is shared out evenly over classes of work; what one does not use goes to those after it.
    ///
    /// No choice is timed before its result was right. One whose result is wrong is reported and never chosen.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for the CPU engine, and a device that is lost or hangs. What only concerns a layer or a
    /// choice is a [`Failure`].
    pub fn measure(
        context: &Context,
        jobs: &[Job],
        budget: Duration,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Outcome> {
        let Some(gpu) = context.gpu() else { return Err(crate::layer::nothing_to_tune()) };
        // What is stored has to run with whatever limits the device is opened the next time.
        let floor = DeviceProfile::webgpu_floor();
        let device = DeviceProfile {
            max_invocations: gpu.profile().max_invocations.min(floor.max_invocations),
            max_workgroup_storage: gpu.profile().max_workgroup_storage.min(floor.max_workgroup_storage),
            ..gpu.profile().clone()
        };
        let begin = Instant::now();
        let left = || budget.saturating_sub(begin.elapsed());
        let total = jobs.iter().map(|job| job.classes().len()).sum();
        let mut done = 0;
        let mut entries: Vec<Entry> = Vec::new();
        let (mut failures, mut untried) = (Vec::new(), Vec::new());
        for job in jobs {
            let (layer, weights) = (job.layer.as_str(), job.weights);
            let classes = job.classes();
            let failure = |tokens: &[u32], choice, reason| {
                let layer = layer.to_owned();
                Failure { layer, weights, tokens: tokens.to_vec(), choice, reason }
            };
            let mut loaded = None;
            for (index, (shape, tokens)) in classes.iter().enumerate() {
                if left().is_zero() {
                    untried.push((format!("{layer}, {}", weights.name()), tokens.clone()));
                    done += 1;
                    continue;
                }
                if loaded.is_none() {
                    progress(Progress { layer, weights, doing: Doing::Loading, done, total, left: left() });
                    match load(context, job) {
                        Ok(layer) => loaded = Some(layer),
                        Err(error) => failures.push(failure(&[], None, of_the_layer(error)?)),
                    }
                }
                let Some((moe, workload)) = &mut loaded else {
                    done += classes.len() - index;
                    break;
                };
                let share = left() / (total - done).max(1) as u32;
                let mut show =
                    |doing: Doing<'_>| progress(Progress { layer, weights, doing, done, total, left: left() });
                let config = &job.config;
                let most = tokens.iter().copied().max().unwrap_or(1);
                let candidates = variant::candidates(config.top_k(), config.num_weighted_experts(), most, &device);
                let finish = LayerContest::new(moe, workload, job, (*shape, tokens), share, &mut show)
                    .and_then(|mut contest| race::race(&candidates, &mut contest));
                done += 1;
                match finish {
                    Err(error) => failures.push(failure(tokens, None, of_the_layer(error)?)),
                    Ok(finish) => {
                        for (choice, reason) in finish.wrong {
                            failures.push(failure(tokens, Some(choice), reason));
                        }
                        entries.extend(finish.winner.map(|winner| Entry {
                            shape: *shape,
                            weights,
                            layer: layer.to_owned(),
                            tokens: tokens.clone(),
                            chosen: winner.into(),
                            default: finish.default.map(Timed::from),
                            runner_up: finish.runner_up.map(Timed::from),
                            candidates: candidates.len(),
                            tried: finish.checked,
                        }));
                    }
                }
            }
        }
        let tuning = Tuning::new(Identity::of(context.device()), file::today(), entries);
        Ok(Outcome { tuning, failures, untried })
    }
}

/// The job's layer on the device, and its workload with the weights that the layer holds.
fn load(context: &Context, job: &Job) -> Result<(MoeLayer, Workload)> {
    let mut workload = Workload::new(job.config.clone(), 0.0, 1)?;
    let options = LayerOptions { weights: job.weights, ..LayerOptions::default() };
    let layer = MoeLayer::with_options(context, job.config.clone(), &workload.weights, &options)?;
    if job.weights.scaled_inputs().is_some() {
        workload.weights.round(&job.config, job.weights)?;
    }
    Ok((layer, workload))
}

/// In words, what concerns one layer or choice; as an error, what concerns the device.
fn of_the_layer(error: Error) -> Result<String> {
    match error {
        Error::DeviceLost { .. } | Error::Timeout { .. } => Err(error),
        other => Ok(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::activation::Activation;
    use crate::model::config::MoeConfig;
    use crate::model::routing::Routing;

    fn device(driver: &str) -> DeviceInfo {
        DeviceInfo { name: "GPU".to_owned(), driver: driver.to_owned(), ..DeviceInfo::default() }
    }

    fn entry(num_tokens: u32, tile_m: u32) -> Entry {
        let config = MoeConfig::new(64, 32, 8, 2, Routing::softmax(true), Activation::SWIGLU).expect("valid sizes");
        let chosen = Timed { choice: MatmulChoice::Tiled { tile_m, tile_n: 64 }, median_s: 1.0, runs: 3 };
        Entry {
            shape: ShapeClass::of(&config, num_tokens),
            weights: WeightFormat::F16,
            layer: String::new(),
            tokens: vec![num_tokens],
            chosen,
            default: None,
            runner_up: None,
            candidates: 1,
            tried: 1,
        }
    }

    fn tuning(driver: &str, entries: Vec<Entry>) -> Tuning {
        Tuning::new(Identity::of(&device(driver)), "2026-11-25".to_owned(), entries)
    }

    #[test]
    fn a_tuning_of_another_device_is_refused() {
        let tuning = tuning("1.0", vec![entry(100, 32)]);
        assert!(tuning.choices_for(&device("1.0")).is_ok());
        let error = tuning.choices_for(&device("1.1")).expect_err("another driver");
        assert!(matches!(error, Error::InvalidConfig { field: "tuning", .. }), "{error}");
        assert!(error.to_string().contains("1.0") && error.to_string().contains("1.1"), "{error}");
    }

    #[test]
    fn what_is_new_goes_before_what_is_old() {
        let new = || tuning("1.0", vec![entry(100, 32)]);
        let both = new().or(tuning("1.0", vec![entry(100, 64), entry(1000, 64)]));
        let tiles: Vec<u32> = both.entries().iter().map(|entry| entry.chosen.choice.tile_m()).collect();
        assert_eq!(tiles, [32, 64]);
        assert_eq!(both.choices.get(entry(100, 0).shape, WeightFormat::F16).map(MatmulChoice::tile_m), Some(32));
        assert_eq!(new().or(tuning("0.9", vec![entry(1000, 64)])), new(), "another driver's is worth nothing");
    }

    #[test]
    fn the_devices_faults_end_a_measurement_and_a_layers_do_not() {
        let lost = Error::DeviceLost { message: String::new() };
        assert!(matches!(of_the_layer(lost), Err(Error::DeviceLost { .. })));
        let kernel = Error::Kernel { kernel: "gate_up".to_owned(), message: "no".to_owned() };
        assert!(of_the_layer(kernel).is_ok_and(|reason| reason.contains("gate_up")));
    }
}
