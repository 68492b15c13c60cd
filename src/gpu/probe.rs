//! The device's ceilings, measured with the plainest kernels there are.

use super::context::Gpu;
use super::layer::submit_and_wait;
use super::pipeline::pipeline;
use super::recorder::Recorder;
use crate::error::Result;
use crate::kernels::{Kernel, probe_fma, probe_read};
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
        let bytes = u64::from(workgroups * kernel.workgroup_size) * 16;
        let out = self.buffer("probe out", bytes, wgpu::BufferUsages::STORAGE).await?;
        let compiled = pipeline(self, kernel).await?;
        let find = |name: &'static str| match name {
            "out" => Some(out.as_entire_buffer_binding()),
            _ => data.map(wgpu::Buffer::as_entire_buffer_binding),
        };
        let group = compiled.bind(self, find).await?;
        let begin = Instant::now();
        let mut best = f64::INFINITY;
        for run in 0..500 {
            let start = Instant::now();
            let mut encoder = self.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let step = (&compiled.pipeline, &group, [workgroups, 1, 1]);
            Recorder::new(&mut encoder).pass(kernel.label(), None, std::iter::once(step));
            submit_and_wait(self, encoder, "measuring the device").await?;
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
}
