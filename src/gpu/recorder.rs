//! Turns a prepared pass into commands: labels, counts, optional timestamps.

use super::context::{Gpu, read_mapped};
use crate::error::Result;
use serde::Serialize;

/// What a pass did, as the recorder counted it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PassStats {
    /// Kernels dispatched.
    pub dispatches: u32,
    /// Buffers read back to the host between the first and the last dispatch.
    pub readbacks: u32,
    /// Buffers created.
    pub allocations: u32,
    /// Bind groups created.
    pub bind_groups: u32,
    /// Tokens.
    pub num_tokens: u32,
}

/// How long one stage took in one pass.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct StageTime {
    /// The stage's name.
    pub name: &'static str,
    /// Seconds.
    pub seconds: f64,
}

/// Records dispatches into an encoder.
pub(super) struct Recorder<'a> {
    encoder: &'a mut wgpu::CommandEncoder,
    pub(super) dispatches: u32,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(encoder: &'a mut wgpu::CommandEncoder) -> Self {
        Self { encoder, dispatches: 0 }
    }

    /// Dispatches in one compute pass. wgpu puts a barrier where one writes what another reads.
    pub(super) fn pass<'b>(
        &mut self,
        label: &str,
        timestamps: Option<(&wgpu::QuerySet, u32)>,
        steps: impl Iterator<Item = (&'b wgpu::ComputePipeline, &'b wgpu::BindGroup, [u32; 3])>,
    ) {
        let timestamp_writes = timestamps.map(|(query_set, first)| wgpu::ComputePassTimestampWrites {
            query_set,
            beginning_of_pass_write_index: Some(first),
            end_of_pass_write_index: Some(first + 1),
        });
        let desc = wgpu::ComputePassDescriptor { label: Some(label), timestamp_writes };
        let mut pass = self.encoder.begin_compute_pass(&desc);
        for (pipeline, bind_group, [x, y, z]) in steps {
            pass.set_pipeline(pipeline);
            pass.set_bind_group(0, bind_group, &[]);
            pass.dispatch_workgroups(x, y, z);
            self.dispatches += 1;
        }
    }
}

/// Timestamps around each dispatch, where the device has them.
pub(super) struct Timestamps {
    pub(super) queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    download: wgpu::Buffer,
    count: u32,
}

impl Timestamps {
    pub(super) async fn new(gpu: &Gpu, num_passes: u32) -> Result<Self> {
        let count = 2 * num_passes;
        let desc = wgpu::QuerySetDescriptor { label: Some("stage times"), ty: wgpu::QueryType::Timestamp, count };
        let queries = gpu.scoped("creating timestamp queries", |device| device.create_query_set(&desc)).await?;
        let bytes = u64::from(count) * 8;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = gpu.buffer("timestamps", bytes, usage).await?;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let download = gpu.buffer("timestamps on the host", bytes, usage).await?;
        Ok(Self { queries, resolved, download, count })
    }

    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.resolve_query_set(&self.queries, 0..self.count, &self.resolved, 0);
        encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.download, 0, self.download.size());
    }

    /// Seconds of each pass.
    pub(super) async fn read(&self, gpu: &Gpu) -> Result<Vec<f64>> {
        let mapped = gpu.map(&self.download, wgpu::MapMode::Read).await?;
        gpu.wait(&mapped, "reading timestamps").await?;
        let period = f64::from(gpu.queue().get_timestamp_period()) * 1e-9;
        read_mapped(&self.download, |bytes| {
            let ticks = bytemuck::pod_collect_to_vec::<u8, u64>(bytes);
            ticks.chunks_exact(2).map(|t| t[1].saturating_sub(t[0]) as f64 * period).collect()
        })
    }
}

/// Adds up times by stage, in the order in which they first come.
pub(super) fn by_stage(times: impl Iterator<Item = (&'static str, f64)>) -> Vec<StageTime> {
    let mut stages: Vec<StageTime> = Vec::new();
    for (name, seconds) in times {
        match stages.iter_mut().find(|stage| stage.name == name) {
            Some(stage) => stage.seconds += seconds,
            None => stages.push(StageTime { name, seconds }),
        }
    }
    stages
}
