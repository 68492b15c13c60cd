//! Passes on host data and on a resident input, their times, and the routing: all that submits and waits.

use super::super::context::{read_mapped, write_mapped};
use super::super::recorder::{PassStats, Recorder, StageTime, Timestamps, by_stage};
use super::{GpuLayer, Io, State, submit_and_wait, unprepared};
use crate::error::{Error, Result};
use crate::model::routing::RoutingDecision;

/// What one pass over a host slice did.
struct Done {
    dispatches: u32,
    readbacks: u32,
    /// Tokens whose logits were not finite.
    bad_tokens: u32,
}

impl GpuLayer {
    /// x from the host, y to the host; as many passes as the batch takes.
    pub(crate) async fn forward(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let mut state = self.state.lock().await;
        let h = self.plan.config().hidden_size() as usize;
        let num_tokens = (x.len() / h) as u32;
        let allocations = self.gpu.allocations();
        self.prepare_io(&mut state, num_tokens).await?;
        state.resident = 0;
        let several = num_tokens > self.plan.max_tokens();
        let mut routing: Option<RoutingDecision> = None;
        let (mut dispatches, mut readbacks, mut bad_tokens) = (0, 0, 0);
        for (first_token, tokens) in self.plan.passes(num_tokens) {
            let range = first_token as usize * h..(first_token + tokens) as usize * h;
            let done = self.forward_pass(&mut state, tokens, &x[range.clone()], &mut y[range]).await?;
            dispatches += done.dispatches;
            readbacks += done.readbacks;
            bad_tokens += done.bad_tokens;
            if several {
                let part = self.read_routing(&state, tokens).await?;
                match &mut routing {
                    None => routing = Some(part),
                    Some(all) => append(all, part),
                }
            }
        }
        state.routing = routing;
        state.resident = if several { 0 } else { num_tokens };
        let allocations = (self.gpu.allocations() - allocations) as u32;
        state.last = PassStats { num_tokens, dispatches, readbacks, allocations };
        match bad_tokens {
            0 => Ok(()),
            num_tokens => Err(Error::NonFiniteLogits { num_tokens }),
        }
    }

    /// A forward of zero tokens: nothing but the memory of what came before it changes.
    pub(crate) async fn forward_nothing(&self) {
        let mut state = self.state.lock().await;
        state.last = PassStats::default();
        state.routing = None;
    }

    async fn prepare_io(&self, state: &mut State, num_tokens: u32) -> Result<()> {
        self.prepare_passes(state, num_tokens).await?;
        let tokens = num_tokens.min(self.plan.max_tokens());
        if state.io.as_ref().is_some_and(|io| io.capacity >= tokens) {
            return Ok(());
        }
        state.io = None;
        state.bound.clear();
        let capacity = state.capacity;
        let bytes = u64::from(capacity) * u64::from(self.plan.config().hidden_size()) * 4;
        use wgpu::BufferUsages as Usage;
        let io = Io {
            x: self.gpu.buffer("x", bytes, Usage::STORAGE | Usage::COPY_DST).await?,
            y: self.gpu.buffer("y", bytes, Usage::STORAGE | Usage::COPY_SRC).await?,
            upload: self.gpu.mapped_buffer("x upload", bytes, Usage::MAP_WRITE | Usage::COPY_SRC).await?,
            download: self.gpu.buffer("y download", bytes + 16, Usage::MAP_READ | Usage::COPY_DST).await?,
            capacity,
        };
        state.io = Some(io);
        Ok(())
    }

    /// One pass over one host slice.
    async fn forward_pass(&self, state: &mut State, tokens: u32, x: &[f32], y: &mut [f32]) -> Result<Done> {
        // Until the pass is complete the staging buffers are in no known state: an error drops them.
        let Some(io) = state.io.take() else { return Err(unprepared(tokens)) };
        self.bind(state, tokens, 0, &io.x, &io.y).await?;
        let bytes = (x.len() * 4) as u64;
        write_mapped(&io.upload, bytemuck::cast_slice(x))?;
        io.upload.unmap();
        let mut encoder = self.encoder();
        encoder.copy_buffer_to_buffer(&io.upload, 0, &io.x, 0, bytes);
        let readbacks = self.gpu.readbacks();
        let dispatches = self.record_pass(state, &mut encoder, tokens, None)?;
        // The result itself is read after the last dispatch; what counts is a readback that a dispatch waits for.
        let readbacks = (self.gpu.readbacks() - readbacks) as u32;
        encoder.copy_buffer_to_buffer(&io.y, 0, &io.download, 0, bytes);
        let status_at = io.download.size() - 16;
        if let Some(status) = state.scratch.get("status") {
            encoder.copy_buffer_to_buffer(status, 0, &io.download, status_at, 16);
        }
        self.submit(encoder).await?;
        let read = self.gpu.map(&io.download, wgpu::MapMode::Read).await?;
        let write = self.gpu.map(&io.upload, wgpu::MapMode::Write).await?;
        self.gpu.wait(&read, "the forward pass").await?;
        self.gpu.wait(&write, "mapping the upload buffer").await?;
        self.gpu.check("the forward pass")?;
        let bad_tokens = read_mapped(&io.download, |bytes| {
            bytemuck::cast_slice_mut(y).copy_from_slice(&bytes[..x.len() * 4]);
            let at = status_at as usize;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        })?;
        state.io = Some(io);
        Ok(Done { dispatches, readbacks, bad_tokens })
    }

    /// Makes `x` the resident input of [`GpuLayer::run_resident`]; it has to fit one pass.
    pub(crate) async fn upload(&self, x: &[f32]) -> Result<()> {
        let mut state = self.state.lock().await;
        let num_tokens = (x.len() / self.plan.config().hidden_size() as usize) as u32;
        if num_tokens > self.plan.max_tokens() {
            return Err(Error::LimitExceeded {
                what: "tokens of a resident input".to_owned(),
                required: num_tokens.into(),
                available: self.plan.max_tokens().into(),
                hint: "use fewer tokens, or forward, which takes several passes",
            });
        }
        self.prepare_io(&mut state, num_tokens).await?;
        state.resident = 0;
        let Some(io) = state.io.take() else { return Err(unprepared(num_tokens)) };
        write_mapped(&io.upload, bytemuck::cast_slice(x))?;
        io.upload.unmap();
        let mut encoder = self.encoder();
        encoder.copy_buffer_to_buffer(&io.upload, 0, &io.x, 0, (x.len() * 4) as u64);
        self.submit(encoder).await?;
        let mapped = self.gpu.map(&io.upload, wgpu::MapMode::Write).await?;
        self.gpu.wait(&mapped, "uploading x").await?;
        state.io = Some(io);
        state.resident = num_tokens;
        Ok(())
    }

    /// Everything for a pass on the resident input, whatever was bound or evicted since. Returns its tokens.
    async fn bind_resident(&self, state: &mut State) -> Result<u32> {
        let num_tokens = state.resident;
        let Some((x, y)) = state.io.as_ref().map(|io| (io.x.clone(), io.y.clone())) else {
            return Err(unprepared(num_tokens));
        };
        if num_tokens == 0 {
            return Err(unprepared(num_tokens));
        }
        self.prepare_passes(state, num_tokens).await?;
        self.bind(state, num_tokens, 0, &x, &y).await?;
        Ok(num_tokens)
    }

    /// One pass on the resident input, from recording to completion, waited for.
    pub(crate) async fn run_resident(&self) -> Result<()> {
        let mut state = self.state.lock().await;
        let before = (self.gpu.readbacks(), self.gpu.allocations());
        let num_tokens = self.bind_resident(&mut state).await?;
        let mut encoder = self.encoder();
        let dispatches = self.record_pass(&state, &mut encoder, num_tokens, None)?;
        submit_and_wait(&self.gpu, encoder, "the forward pass").await?;
        state.routing = None;
        state.last = self.stats(num_tokens, dispatches, before.0, before.1);
        Ok(())
    }

    /// Seconds of each stage of one pass on the resident input.
    pub(crate) async fn profile(&self) -> Result<Vec<StageTime>> {
        let mut state = self.state.lock().await;
        let num_tokens = self.bind_resident(&mut state).await?;
        let Some(pass) = state.passes.get(&num_tokens) else { return Err(unprepared(num_tokens)) };
        let stages: Vec<_> = pass.plan.stage_of_dispatch().collect();
        let times = if self.gpu.has_timestamps() {
            let timestamps = Timestamps::new(&self.gpu, stages.len() as u32).await?;
            let mut encoder = self.encoder();
            self.record_pass(&state, &mut encoder, num_tokens, Some(&timestamps))?;
            timestamps.resolve(&mut encoder);
            submit_and_wait(&self.gpu, encoder, "the profiled pass").await?;
            timestamps.read(&self.gpu).await?
        } else {
            self.profile_by_waiting(&state, num_tokens).await?
        };
        Ok(by_stage(stages.into_iter().zip(times)))
    }

    /// Without timestamps: each dispatch is submitted alone and waited for, so times include that.
    async fn profile_by_waiting(&self, state: &State, num_tokens: u32) -> Result<Vec<f64>> {
        let (Some(pass), Some(bound)) = (state.passes.get(&num_tokens), state.bound.get(&num_tokens)) else {
            return Err(unprepared(num_tokens));
        };
        let mut times = Vec::new();
        for ((pipeline, group), dispatch) in pass.pipelines.iter().zip(&bound.bind_groups).zip(&pass.plan.dispatches) {
            let mut encoder = self.encoder();
            let step = (&pipeline.pipeline, group, dispatch.grid);
            Recorder::new(&mut encoder).pass(dispatch.kernel.label(), None, std::iter::once(step));
            let start = std::time::Instant::now();
            submit_and_wait(&self.gpu, encoder, "a stage").await?;
            times.push(start.elapsed().as_secs_f64());
        }
        Ok(times)
    }

    /// The routing of the last forward or recorded pass; the caller has submitted what was recorded.
    pub(crate) async fn routing(&self) -> Result<RoutingDecision> {
        let state = self.state.lock().await;
        match &state.routing {
            Some(routing) => Ok(routing.clone()),
            None if state.last.num_tokens > self.plan.max_tokens() => Err(Error::Unsupported {
                what: "the routing of a recorded batch that took several passes".to_owned(),
                by: "after the fact (each pass overwrites that of the one before)".to_owned(),
                hint: format!("record at most {} tokens at a time, or call forward", self.plan.max_tokens()),
            }),
            None => self.read_routing(&state, state.last.num_tokens).await,
        }
    }

    async fn read_routing(&self, state: &State, num_tokens: u32) -> Result<RoutingDecision> {
        let c = self.plan.config();
        let [t, e, k] = [num_tokens, c.num_experts(), c.top_k()].map(|n| n as usize);
        let topk_experts = self.read_words(state, "topk_experts", t * k).await?;
        let floats = |words: Vec<u32>| words.into_iter().map(f32::from_bits).collect::<Vec<_>>();
        let topk_weights = floats(self.read_words(state, "topk_weights", t * k).await?);
        let router_logits = floats(self.read_words(state, "router_logits", t * e).await?);
        let mut tokens_per_expert = vec![0; e];
        for &expert in &topk_experts {
            if let Some(count) = tokens_per_expert.get_mut(expert as usize) {
                *count += 1;
            }
        }
        Ok(RoutingDecision {
            num_tokens: t,
            topk_experts,
            topk_weights,
            router_logits,
            tokens_per_expert,
            ..RoutingDecision::default()
        })
    }

    async fn read_words(&self, state: &State, name: &'static str, count: usize) -> Result<Vec<u32>> {
        let Some(buffer) = state.scratch.get(name) else { return Ok(Vec::new()) };
        if count == 0 {
            return Ok(Vec::new());
        }
        let bytes = (count * 4) as u64;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let download = self.gpu.buffer(name, bytes, usage).await?;
        let mut encoder = self.encoder();
        encoder.copy_buffer_to_buffer(buffer, 0, &download, 0, bytes);
        self.submit(encoder).await?;
        let mapped = self.gpu.map(&download, wgpu::MapMode::Read).await?;
        self.gpu.wait(&mapped, "reading the routing").await?;
        read_mapped(&download, bytemuck::pod_collect_to_vec)
    }
}

/// Adds the routing of the next pass of the same batch.
fn append(all: &mut RoutingDecision, part: RoutingDecision) {
    all.num_tokens += part.num_tokens;
    all.topk_experts.extend(part.topk_experts);
    all.topk_weights.extend(part.topk_weights);
    all.router_logits.extend(part.router_logits);
    for (sum, count) in all.tokens_per_expert.iter_mut().zip(part.tokens_per_expert) {
        *sum += count;
    }
}
