//! Many passes in a row: memory has to stay where it was, and results have to keep their bits.
//!
//! Two contexts of the same device, each shared by several threads, run batches of changing sizes on layers that are
//! dropped and built anew. From time to time everything is dropped, and what is left is counted.

use super::Progress;
use crate::bench::stats::median_of;
use crate::bench::workload::Workload;
use crate::context::{Context, Engine};
use crate::error::{Error, Result};
use crate::gpu::context::lock;
use crate::layer::{LayerOptions, MoeLayer};
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use serde::Serialize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};

/// Times that everything is dropped and memory is looked at.
const SAMPLES: u64 = 20;
/// Of those, the first ones, in which kernels are compiled and pools find their size.
const WARM_UP: usize = 4;
/// Bytes that the process may have more without a leak: what an allocator keeps goes up and down by as much from one look to
/// the next, and one layer in a hundred left behind would be more.
const ALLOCATOR_NOISE: f64 = 1048576.0;
/// Passes that a layer lives for; fewer while warming up, where twice as many threads run, so that no later moment needs
/// more memory at once: drivers and allocators keep what the greatest moment took.
const LIFE: u64 = 100;
const SHORT_LIFE: u64 = 5;
/// Batch sizes, of every way through the plan: one token, few, and enough for a sort.
const TOKENS: [u32; 6] = [1, 3, 16, 17, 40, 130];
const FORMATS: [WeightFormat; 3] = [WeightFormat::F16, WeightFormat::F32, WeightFormat::INT4];

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct LoadRequest {
    /// Passes, of all threads together.
    pub forwards: u64,
    /// Threads of each of the two contexts.
    pub threads: usize,
    /// A control: no layer is ever dropped, which has to be found.
    pub keep_layers: bool,
}

/// What was left after everything had been dropped.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LoadSample {
    /// Passes so far.
    pub forwards: u64,
    /// Memory of the process, where the system says (Linux).
    pub process_bytes: Option<u64>,
    /// Buffers on the device and their bytes; 0 for the CPU engine.
    pub device_buffers: u64,
    /// As above.
    pub device_bytes: u64,
}

/// How it went.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Passes that ran.
    pub forwards: u64,
    /// Layers that were built.
    pub layers: u64,
    /// Passes whose results had other bits than the first of their kind.
    pub wrong: u64,
    /// After each twentieth of the passes.
    pub samples: Vec<LoadSample>,
    /// Growth of the process from the first quarter after warming up to the last quarter, as a share.
    pub process_growth: Option<f64>,
    /// The same in bytes.
    pub process_growth_bytes: Option<f64>,
    /// The same of the device's memory.
    pub device_growth: f64,
}

impl LoadReport {
    /// No wrong bit, and no memory that grew by more than `share`; of the process, by more than a mebibyte, too.
    pub fn passed(&self, share: f64) -> bool {
        let is_noise = self.process_growth_bytes.is_none_or(|bytes| bytes <= ALLOCATOR_NOISE);
        let is_flat = self.process_growth.is_none_or(|growth| growth <= share);
        self.wrong == 0 && self.device_growth <= share && (is_flat || is_noise)
    }
}

/// One layer's parts, the batches that run on it, and what each is to give.
struct Case {
    workload: Workload,
    options: LayerOptions,
    x: Vec<f32>,
    /// By [`TOKENS`].
    expected: Vec<Vec<f32>>,
}

/// Runs `request` on two contexts of the same device. `progress` is told of every twentieth of it.
pub fn check_load(contexts: &[Context; 2], request: &LoadRequest, progress: Progress<'_>) -> Result<LoadReport> {
    let config = MoeConfig::new(64, 32, 8, 2, Routing::softmax(true), Activation::SWIGLU)?;
    let mut cases = Vec::new();
    for format in FORMATS {
        let workload = Workload::new(config.clone(), 0.5, 11)?;
        let options = LayerOptions { weights: format, ..LayerOptions::default() };
        let x = workload.input(TOKENS.iter().copied().max().unwrap_or(1))?;
        let mut case = Case { workload, options, x, expected: Vec::new() };
        let layer = case.layer(&contexts[0])?;
        for index in 0..TOKENS.len() {
            case.expected.push(layer.forward(case.batch(index))?);
        }
        cases.push(case);
    }
    let (layers, wrong, done) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let kept = Mutex::new(Vec::new());
    let mut samples = Vec::new();
    let due = |sample: u64| request.forwards * (sample + 1) / SAMPLES - request.forwards * sample / SAMPLES;
    let (left, failed) = (AtomicU64::new(0), Mutex::new(None));
    let work = |context: &Context, seed: u64, life: u64| -> Result<()> {
        for turn in seed.. {
            let case = &cases[turn as usize % cases.len()];
            let layer = case.layer(context)?;
            layers.fetch_add(1, Ordering::Relaxed);
            for pass in 0..life {
                let next = |left: u64| left.checked_sub(1);
                if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_err() {
                    return Ok(());
                }
                let index = ((turn * 5 + pass) % TOKENS.len() as u64) as usize;
                let y = layer.forward(case.batch(index))?;
                let same = y.iter().map(|v| v.to_bits()).eq(case.expected[index].iter().map(|v| v.to_bits()));
                wrong.fetch_add(u64::from(!same), Ordering::Relaxed);
                done.fetch_add(1, Ordering::Relaxed);
            }
            if request.keep_layers {
                lock(&kept).push(layer);
            }
        }
        Ok(())
    };
    // The same threads from beginning to end: allocators keep memory for each. They wait while memory is looked at.
    let threads = request.threads.max(1) as u64;
    let meet = Barrier::new(4 * threads as usize + 1);
    std::thread::scope(|scope| {
        for (thread, context) in (0..2 * threads).flat_map(|thread| contexts.iter().map(move |c| (thread, c))) {
            let (meet, work, failed) = (&meet, &work, &failed);
            scope.spawn(move || {
                for sample in 0..SAMPLES {
                    meet.wait();
                    // Whoever fails goes on meeting the others.
                    let (is_due, life) = match sample < WARM_UP as u64 {
                        true => (true, SHORT_LIFE),
                        false => (thread < threads, LIFE),
                    };
                    if is_due && lock(failed).is_none() {
                        // Nor must a panic keep the others waiting.
                        let run = AssertUnwindSafe(|| work(context, sample * 7 + thread, life));
                        if let Err(error) = catch_unwind(run).unwrap_or_else(|_| Err(panicked())) {
                            lock(failed).get_or_insert(error);
                        }
                    }
                    meet.wait();
                }
            });
        }
        for sample in 0..SAMPLES {
            progress(sample as usize, SAMPLES as usize, "passes");
            left.store(due(sample), Ordering::Relaxed);
            meet.wait();
            meet.wait();
            match look(contexts, done.load(Ordering::Relaxed)) {
                Ok(seen) => samples.push(seen),
                Err(error) => {
                    lock(&failed).get_or_insert(error);
                }
            }
        }
    });
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error);
    }
    let quarter = (samples.len() - WARM_UP) / 4;
    // (from, to): medians of the first quarter after warming up, and of the last.
    let change = |of: &dyn Fn(&LoadSample) -> f64| {
        let median = |samples: &[LoadSample]| median_of(&samples.iter().map(of).collect::<Vec<f64>>());
        (median(&samples[WARM_UP..][..quarter]), median(&samples[samples.len() - quarter..]))
    };
    // From nothing to something is without bounds.
    let growth = |(first, last): (f64, f64)| if last == first { 0.0 } else { last / first - 1.0 };
    let process = change(&|sample| sample.process_bytes.unwrap_or(0) as f64);
    let device = change(&|sample| sample.device_bytes as f64);
    let is_known = samples.iter().all(|sample| sample.process_bytes.is_some());
    Ok(LoadReport {
        forwards: done.into_inner(),
        layers: layers.into_inner(),
        wrong: wrong.into_inner(),
        process_growth: is_known.then(|| growth(process)),
        process_growth_bytes: is_known.then_some(process.1 - process.0),
        device_growth: growth(device),
        samples,
    })
}

impl Case {
    fn layer(&self, context: &Context) -> Result<MoeLayer> {
        MoeLayer::with_options(context, self.workload.config.clone(), &self.workload.weights, &self.options)
    }

    fn batch(&self, index: usize) -> &[f32] {
        &self.x[..(TOKENS[index] * self.workload.config.hidden_size()) as usize]
    }
}

fn panicked() -> Error {
    Error::Device { during: "the load test".to_owned(), message: "a thread panicked, which is a bug".to_owned() }
}

fn look(contexts: &[Context; 2], forwards: u64) -> Result<LoadSample> {
    let mut sample = LoadSample { forwards, process_bytes: process_bytes(), device_buffers: 0, device_bytes: 0 };
    for context in contexts {
        if let Engine::Gpu(gpu) = context.engine() {
            let (buffers, bytes) = pollster::block_on(gpu.alive())?;
            sample.device_buffers += buffers;
            sample.device_bytes += bytes;
        }
    }
    Ok(sample)
}

/// Resident memory of this process.
fn process_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
