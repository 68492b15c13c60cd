//! How fast is the machine right now? A fixed piece of work, repeated between everything that is timed.
//!
//! Clocks change, throttle, and are shared with others. What a pass takes in units of the yardsticks around it changes
//! less, which makes results of different runs comparable. The work has nothing to do with the layers' kernels: a
//! kernel that gets slower must not slow its yardstick down.

use crate::bench::results::YardstickResult;
use crate::bench::stats;
use crate::context::{Context, Engine};
use crate::cpu;
use crate::error::Result;
use crate::gpu::{Gpu, Yard};
use std::time::{Duration, Instant};

/// Runs at the start: they warm up, and say what is usual.
const FIRST_RUNS: usize = 10;
/// Times outside of the run's median by more than this factor are of another clock.
const DRIFT: f64 = 1.2;
/// Side of the CPU engine's matmul.
const CPU_SIDE: usize = 256;
/// Words that it reads: 4 MiB.
const CPU_WORDS: usize = 1 << 20;

/// A device's yardstick and what it took so far.
pub struct Yardstick<'a> {
    work: Work<'a>,
    began: Instant,
    /// Seconds since the start, seconds taken.
    times: Vec<(f64, f64)>,
}

enum Work<'a> {
    Gpu(&'a Gpu, Box<Yard>),
    Cpu { a: Vec<f32>, c: Vec<f32>, words: Vec<u32> },
}

impl<'a> Yardstick<'a> {
    /// Compiles what is needed and runs it a few times.
    pub fn new(context: &'a Context) -> Result<Yardstick<'a>> {
        let work = match context.engine() {
            Engine::Gpu(gpu) => Work::Gpu(gpu, Box::new(pollster::block_on(gpu.yard())?)),
            Engine::Cpu => Work::Cpu {
                a: vec![0.5; CPU_SIDE * CPU_SIDE],
                c: vec![0.0; CPU_SIDE * CPU_SIDE],
                words: vec![1; CPU_WORDS],
            },
        };
        let mut yardstick = Yardstick { work, began: Instant::now(), times: Vec::new() };
        // The first run pays for touching memory.
        yardstick.run()?;
        yardstick.began = Instant::now();
        for _ in 0..FIRST_RUNS {
            yardstick.time()?;
        }
        Ok(yardstick)
    }

    /// Seconds that the work takes now.
    pub fn time(&mut self) -> Result<f64> {
        let start = Instant::now();
        self.run()?;
        let seconds = start.elapsed().as_secs_f64();
        self.times.push((self.began.elapsed().as_secs_f64(), seconds));
        Ok(seconds)
    }

    /// As [`Yardstick::time`], for as long as this, at least once: the mean, as what interrupts a long pass adds up, too.
    pub fn time_for(&mut self, duration: Duration) -> Result<f64> {
        let begin = Instant::now();
        let (mut seconds, mut runs) = (self.time()?, 1.0);
        while begin.elapsed() < duration {
            seconds += self.time()?;
            runs += 1.0;
        }
        Ok(seconds / runs)
    }

    fn run(&mut self) -> Result<()> {
        match &mut self.work {
            Work::Gpu(gpu, yard) => pollster::block_on(yard.run(gpu)),
            Work::Cpu { a, c, words } => {
                cpu::dense_matmul([CPU_SIDE; 3], a, a, c);
                std::hint::black_box(cpu::fold(words));
                Ok(())
            }
        }
    }

    /// Some of `seconds` are of another clock than most of the run so far.
    pub fn drifted(&self, seconds: &[f64]) -> bool {
        let usual = stats::median_of(&self.seconds());
        // One in ten may be an accident.
        stats::quantile(seconds, 0.9) > usual * DRIFT || stats::quantile(seconds, 0.1) < usual / DRIFT
    }

    fn seconds(&self) -> Vec<f64> {
        self.times.iter().map(|&(_, seconds)| seconds).collect()
    }

    /// What it took all along.
    pub fn result(&self) -> YardstickResult {
        let what = match self.work {
            Work::Gpu(..) => Yard::WHAT.to_owned(),
            Work::Cpu { .. } => format!("a dense matmul of {CPU_SIDE} and reads of {} MiB", CPU_WORDS >> 18),
        };
        let seconds = self.seconds();
        YardstickResult {
            what,
            median_s: stats::median_of(&seconds),
            fast_s: stats::quantile(&seconds, 0.1),
            slow_s: stats::quantile(&seconds, 0.9),
            times: self.times.clone(),
        }
    }
}

/// How long the work between two yardsticks may take before they say nothing about it.
pub const REACH: Duration = Duration::from_millis(50);
