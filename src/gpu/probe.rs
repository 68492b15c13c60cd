//! The device's ceilings, measured with the plainest kernels there are.

use super::context::Gpu;
use super::layer::submit_and_wait;
use super::pipeline::{Pipeline, pipeline};
use super::recorder::Recorder;
use crate::error::Result;
use crate::kernels::{Kernel, probe_fma, probe_read};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long each probe may take in all.
const BUDGET: Duration = Duration::from_millis(80);

impl Gpu {
    /// FLOP/s of multiply-adds in registers, the best of several runs.
    pub(crate) async fn peak_flops(&self) -> Result<f64> {
        let workgroups: u32 = if self.profile().software { 64 } else { 4096 };
        let mut loops = 16;
        loop {
            let seconds = self.best_time(&probe_fma::kernel(loops), workgroups, None).await?;
            // Long enough that starting and waiting do not count.
            if seconds > 0.02 || loops >= 1 << 14 {
                let invocations = u64::from(workgroups) * u64::from(probe_fma::WG_SIZE);
                return Ok((invocations * u64::from(loops) * probe_fma::ROUND_FLOPS) as f64 / seconds);
            }
            loops *= 4;
        }
    }

    /// Bytes per second of reads from a buffer of `bytes` bytes (a multiple of 1 MiB), the best of several runs.
    pub(crate) async fn read_bandwidth(&self, bytes: u64) -> Result<f64> {
        // 8 vec4 for each of the workgroup's lanes divide every whole MiB.
        let workgroups = (bytes >> 17) as u32;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let data = self.buffer("probe data", bytes, usage).await?;
        let mut best = f64::INFINITY;
        for own_runs in [false, true] {
            best = best.min(self.best_time(&probe_read::kernel(own_runs), workgroups, Some(&data)).await?);
        }
        Ok(bytes as f64 / best)
    }

    async fn best_time(&self, kernel: &Kernel, workgroups: u32, data: Option<&wgpu::Buffer>) -> Result<f64> {
        let step = [self.step(kernel, workgroups, data).await?];
        let begin = Instant::now();
        let mut best = f64::INFINITY;
        for run in 0..500 {
            let start = Instant::now();
            self.run_steps(&step).await?;
            // The first run may pay for compiling and for touching memory.
            if run > 0 {
                best = best.min(start.elapsed().as_secs_f64());
            }
            if run > 1 && begin.elapsed() > BUDGET {
                break;
            }
        }
        Ok(best)
    }

    /// A fixed piece of work, alike on every device of a kind: arithmetic, then reads.
    pub(crate) async fn yard(&self) -> Result<Yard> {
        let (workgroups, loops, bytes) = if self.profile().software { (64, 48, 2 << 20) } else { (4096, 16, 64 << 20) };
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let data = self.buffer("probe data", bytes, usage).await?;
        let arithmetic = self.step(&probe_fma::kernel(loops), workgroups, None).await?;
        let reads = self.step(&probe_read::kernel(false), (bytes >> 17) as u32, Some(&data)).await?;
        Ok(Yard { steps: [arithmetic, reads] })
    }

    async fn step(&self, kernel: &Kernel, workgroups: u32, data: Option<&wgpu::Buffer>) -> Result<Step> {
        let bytes = u64::from(workgroups * kernel.workgroup_size) * 16;
        let out = self.buffer("probe out", bytes, wgpu::BufferUsages::STORAGE).await?;
        let pipeline = pipeline(self, kernel).await?;
        let find = |name: &'static str| match name {
            "out" => Some(out.as_entire_buffer_binding()),
            _ => data.map(wgpu::Buffer::as_entire_buffer_binding),
        };
        let group = pipeline.bind(self, find).await?;
        Ok(Step { pipeline, group, workgroups })
    }

    async fn run_steps(&self, steps: &[Step]) -> Result<()> {
        let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let steps = steps.iter().map(|step| (&step.pipeline.pipeline, &step.group, [step.workgroups, 1, 1]));
        Recorder::new(&mut encoder).pass("probe", None, steps);
        submit_and_wait(self, encoder, "measuring the device").await
    }
}

/// A dispatch of a probe, ready to run. The bind group keeps its buffers alive.
struct Step {
    pipeline: Arc<Pipeline>,
    group: wgpu::BindGroup,
    workgroups: u32,
}

/// The work of [`Gpu::yard`], ready to run again and again.
pub(crate) struct Yard {
    steps: [Step; 2],
}

impl Yard {
    /// What it does.
    pub(crate) const WHAT: &'static str = "multiply-adds in registers, then reads of memory, in plain kernels";

    /// Runs it and waits for it.
    pub(crate) async fn run(&self, gpu: &Gpu) -> Result<()> {
        gpu.run_steps(&self.steps).await
    }
}
