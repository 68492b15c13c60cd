//! One kernel at a time, away from the pass: for checking it against its reference and for timing it.

use super::context::{Gpu, read_mapped};
use super::layer::submit_and_wait;
use super::pipeline::pipeline;
use super::recorder::Recorder;
use super::weights::DeviceWeights;
use crate::error::{Error, Result};
use crate::kernels::Stage;
use crate::model::source::HostSource;
use crate::model::weights::MoeWeights;
use crate::plan::{Dispatch, LayerPlan, Plan};
use std::time::{Duration, Instant};

/// Bytes on either side of an output that nobody may touch.
pub(crate) const GUARD: u64 = 4096;
/// What outputs and guards hold before a run: as a float, a NaN.
pub(crate) const POISON: u32 = 0x7fc0_dead;

/// A layer's weights on the device and a way to run single dispatches of its plan.
pub(crate) struct Harness<'a> {
    gpu: &'a Gpu,
    weights: DeviceWeights,
}

/// What a kernel writes.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    pub(crate) name: &'static str,
    /// What it holds before the run.
    pub(crate) before: Vec<u32>,
}

impl Output {
    /// Poisoned: what a kernel leaves out shows.
    pub(crate) fn poisoned(name: &'static str, words: usize) -> Self {
        Self { name, before: vec![POISON; words] }
    }

    /// Zeros: for counters.
    pub(crate) fn zeroed(name: &'static str, words: usize) -> Self {
        Self { name, before: vec![0; words] }
    }
}

impl<'a> Harness<'a> {
    pub(crate) async fn new(gpu: &'a Gpu, plan: &LayerPlan, weights: &MoeWeights) -> Result<Self> {
        let mut source = HostSource { config: plan.config(), weights, formats: plan.formats() };
        let (weights, _) = DeviceWeights::upload(gpu, plan, weights, &mut source, &mut |_| {}).await?;
        Ok(Self { gpu, weights })
    }

    /// Runs every dispatch of `stage` in `plan`, in order, on the given inputs, and returns the outputs' words. All its
    /// dispatches write the same outputs, each its own page. Fails if a word outside of the outputs changed.
    pub(crate) async fn run(
        &self,
        plan: &Plan,
        stage: Stage,
        inputs: &[(&'static str, &[u32])],
        outputs: &[Output],
    ) -> Result<Vec<Vec<u32>>> {
        let bound = self.bind(plan, stage, inputs, outputs).await?;
        let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        let steps = bound.steps.iter().map(|(p, group, grid)| (&p.pipeline, group, *grid));
        Recorder::new(&mut encoder).pass(stage.name(), None, steps);
        let mut downloads = Vec::new();
        for (output, buffer) in outputs.iter().zip(&bound.outputs) {
            let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
            let download = self.gpu.buffer(output.name, buffer.size(), usage).await?;
            encoder.copy_buffer_to_buffer(buffer, 0, &download, 0, buffer.size());
            downloads.push(download);
        }
        submit_and_wait(self.gpu, encoder, "running one kernel").await?;
        let mut results = Vec::new();
        for (output, download) in outputs.iter().zip(&downloads) {
            let mapped = self.gpu.map(download, wgpu::MapMode::Read).await?;
            self.gpu.wait(&mapped, "reading a kernel's output").await?;
            let words: Vec<u32> = read_mapped(download, bytemuck::pod_collect_to_vec)?;
            results.push(check_guards(stage, output, &words)?);
        }
        Ok(results)
    }

    /// Wall time of each of `runs` runs of a stage, submit to completion, after one that warms up.
    pub(crate) async fn time(
        &self,
        plan: &Plan,
        stage: Stage,
        inputs: &[(&'static str, &[u32])],
        outputs: &[Output],
        runs: usize,
    ) -> Result<Vec<Duration>> {
        let bound = self.bind(plan, stage, inputs, outputs).await?;
        let mut times = Vec::new();
        for _ in 0..=runs {
            let start = Instant::now();
            let mut encoder = self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            let steps = bound.steps.iter().map(|(p, group, grid)| (&p.pipeline, group, *grid));
            Recorder::new(&mut encoder).pass(stage.name(), None, steps);
            submit_and_wait(self.gpu, encoder, "timing one kernel").await?;
            times.push(start.elapsed());
        }
        times.remove(0);
        Ok(times)
    }

    async fn bind(
        &self,
        plan: &Plan,
        stage: Stage,
        inputs: &[(&'static str, &[u32])],
        outputs: &[Output],
    ) -> Result<Bound> {
        use wgpu::BufferUsages as Usage;
        let mut read = Vec::new();
        for (name, words) in inputs {
            // A whole vec4 at least: kernels bind most buffers as vec4.
            let mut padded = words.to_vec();
            padded.resize(words.len().next_multiple_of(4).max(4), 0);
            read.push((*name, self.gpu.filled_buffer(name, bytemuck::cast_slice(&padded), Usage::STORAGE).await?));
        }
        let mut written = Vec::new();
        for output in outputs {
            let guard = vec![POISON; GUARD as usize / 4];
            let words = [&guard[..], &output.before, &guard].concat();
            let usage = Usage::STORAGE | Usage::COPY_SRC;
            written.push(self.gpu.filled_buffer(output.name, bytemuck::cast_slice(&words), usage).await?);
        }
        let mut steps = Vec::new();
        for dispatch in plan.dispatches.iter().filter(|d| d.kernel.stage == stage) {
            let uniform = self.gpu.filled_buffer("params", dispatch.uniform.bytes(), Usage::UNIFORM).await?;
            let pipeline = pipeline(self.gpu, &dispatch.kernel).await?;
            let find = |name: &'static str| {
                if let Some(index) = outputs.iter().position(|output| output.name == name) {
                    // The guard behind it is bound, too: what is written past the end of a binding, drivers drop.
                    return Some(wgpu::BufferBinding { buffer: &written[index], offset: GUARD, size: None });
                }
                let buffer = match name {
                    "params" => Some(&uniform),
                    other => self.own_buffer(dispatch, other).or(read.iter().find(|r| r.0 == other).map(|r| &r.1)),
                };
                buffer.map(wgpu::Buffer::as_entire_buffer_binding)
            };
            let group = pipeline.bind(self.gpu, find).await?;
            steps.push((pipeline, group, dispatch.grid));
        }
        Ok(Bound { steps, outputs: written })
    }

    /// Weights, unless the caller gave something of that name.
    fn own_buffer(&self, dispatch: &Dispatch, binding: &'static str) -> Option<&wgpu::Buffer> {
        self.weights.find(dispatch.buffer(binding), dispatch.page)
    }
}

struct Bound {
    steps: Vec<(std::sync::Arc<super::pipeline::Pipeline>, wgpu::BindGroup, [u32; 3])>,
    outputs: Vec<wgpu::Buffer>,
}

/// The words between the guards, if both are as they were.
fn check_guards(stage: Stage, output: &Output, words: &[u32]) -> Result<Vec<u32>> {
    let guard = GUARD as usize / 4;
    let (front, rest) = words.split_at(guard);
    let (content, back) = rest.split_at(output.before.len());
    if let Some(at) = front.iter().chain(back).position(|&word| word != POISON) {
        return Err(Error::Kernel {
            kernel: stage.name().to_owned(),
            message: format!("wrote outside of {}: guard word {at} changed", output.name),
        });
    }
    Ok(content.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_touched_guard_is_noticed() {
        let output = Output::poisoned("y", 3);
        let guard = GUARD as usize / 4;
        let clean = vec![POISON; 2 * guard + 3];
        assert_eq!(check_guards(Stage::Combine, &output, &clean).expect("clean guards").len(), 3);
        for at in [0, guard - 1, guard + 3, 2 * guard + 2] {
            let mut touched = clean.clone();
            touched[at] = 0;
            assert!(check_guards(Stage::Combine, &output, &touched).is_err(), "word {at}");
        }
    }
}
