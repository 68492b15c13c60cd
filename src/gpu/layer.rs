//! A layer on a device: its weights, its scratch buffers, and its prepared passes.

use super::context::{Gpu, read_mapped, write_mapped};
use super::pipeline::{self, Pipeline};
use super::recorder::{PassStats, Recorder, StageTime, Timestamps, by_stage};
use super::weights::DeviceWeights;
use crate::error::{Error, Result};
use crate::kernels::Stage;
use crate::model::routing::RoutingDecision;
use crate::model::weights::MoeWeights;
use crate::plan::{LayerPlan, Plan};
use async_lock::Mutex;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

/// Prepared passes that are kept, one for each number of tokens seen.
const MAX_PASSES: usize = 64;
/// Uniforms of one pass share a buffer; each starts at a multiple of this.
const UNIFORM_ALIGNMENT: u64 = 256;
/// Bindings that are a part of a storage buffer start at a multiple of this on every device.
const OFFSET_ALIGNMENT: u64 = 256;

/// A layer's GPU side.
pub(crate) struct GpuLayer {
    gpu: Gpu,
    plan: LayerPlan,
    weights: DeviceWeights,
    state: Mutex<State>,
}

/// What changes from call to call.
#[derive(Default)]
struct State {
    /// Tokens that the scratch buffers have room for.
    capacity: u32,
    scratch: HashMap<&'static str, wgpu::Buffer>,
    io: Option<Io>,
    passes: HashMap<u32, Prepared>,
    /// Bind groups of the last (pass, x, y), so that repeating a pass creates nothing.
    bound: HashMap<u32, Bound>,
    last: PassStats,
    /// Tokens in the layer's own x, for passes on resident input; 0 if there is nothing.
    resident: u32,
    /// Set when the last forward took several passes, whose device buffers no longer hold all of the routing.
    routing: Option<RoutingDecision>,
}

/// The layer's own input and output, for calls that take host slices.
struct Io {
    x: wgpu::Buffer,
    y: wgpu::Buffer,
    /// Mapped between calls, so that an upload allocates nothing.
    upload: wgpu::Buffer,
    /// y, then the status word.
    download: wgpu::Buffer,
    capacity: u32,
}

/// A pass with everything but x and y in place.
struct Prepared {
    plan: Plan,
    uniforms: wgpu::Buffer,
    pipelines: Vec<Arc<Pipeline>>,
}

struct Bound {
    x: wgpu::Buffer,
    y: wgpu::Buffer,
    first_token: u32,
    bind_groups: Vec<wgpu::BindGroup>,
}

impl GpuLayer {
    pub(crate) async fn new(gpu: &Gpu, plan: LayerPlan, weights: &MoeWeights) -> Result<Self> {
        let weights = DeviceWeights::upload(gpu, &plan, weights).await?;
        Ok(Self { gpu: gpu.clone(), plan, weights, state: Mutex::new(State::default()) })
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(crate) fn plan(&self) -> &LayerPlan {
        &self.plan
    }

    pub(crate) async fn last(&self) -> PassStats {
        self.state.lock().await.last
    }

    /// Buffers, pipelines and uniforms for batches of `num_tokens` tokens.
    pub(crate) async fn prepare(&self, num_tokens: u32) -> Result<()> {
        let mut state = self.state.lock().await;
        self.prepare_passes(&mut state, num_tokens).await
    }

    async fn prepare_passes(&self, state: &mut State, num_tokens: u32) -> Result<()> {
        self.grow(state, num_tokens.min(self.plan.max_tokens())).await?;
        // All passes but the last have the same size.
        let wanted: BTreeSet<u32> = self.plan.passes(num_tokens).map(|(_, tokens)| tokens).collect();
        let missing: Vec<u32> = wanted.iter().copied().filter(|tokens| !state.passes.contains_key(tokens)).collect();
        if state.passes.len() + missing.len() > MAX_PASSES {
            state.passes.retain(|tokens, _| wanted.contains(tokens));
            state.bound.retain(|tokens, _| wanted.contains(tokens));
        }
        for tokens in missing {
            let prepared = self.prepare_pass(tokens).await?;
            state.passes.insert(tokens, prepared);
        }
        Ok(())
    }

    /// Scratch for at least `num_tokens` tokens; a power of two, so that growing batches do not reallocate each time.
    async fn grow(&self, state: &mut State, num_tokens: u32) -> Result<()> {
        if num_tokens <= state.capacity {
            return Ok(());
        }
        let capacity = num_tokens.next_power_of_two().min(self.plan.max_tokens());
        // Old buffers go first: both generations together may be more than the device has.
        *state = State { last: state.last, ..State::default() };
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        for buffer in self.plan.scratch(capacity) {
            state.scratch.insert(buffer.name, self.gpu.buffer(buffer.name, buffer.bytes, usage).await?);
        }
        // Without a sort, rows are assignments.
        let few = crate::plan::variant::FEW_TOKENS * self.plan.config().top_k();
        let identity: Vec<u32> = (0..few).collect();
        let identity = self.gpu.filled_buffer("identity", bytemuck::cast_slice(&identity), usage).await?;
        state.scratch.insert("identity", identity);
        state.capacity = capacity;
        Ok(())
    }

    async fn prepare_pass(&self, num_tokens: u32) -> Result<Prepared> {
        let plan = self.plan.plan(num_tokens)?;
        let mut pipelines = Vec::new();
        let mut uniforms = vec![0u8; plan.dispatches.len() * UNIFORM_ALIGNMENT as usize];
        for (dispatch, slot) in plan.dispatches.iter().zip(uniforms.chunks_exact_mut(UNIFORM_ALIGNMENT as usize)) {
            let bytes = match &dispatch.matmul {
                Some((params, _)) => bytemuck::bytes_of(params),
                None => bytemuck::bytes_of(&plan.params),
            };
            slot[..bytes.len()].copy_from_slice(bytes);
            pipelines.push(pipeline::pipeline(&self.gpu, &dispatch.kernel).await?);
        }
        let uniforms = self.gpu.filled_buffer("params", &uniforms, wgpu::BufferUsages::UNIFORM).await?;
        Ok(Prepared { plan, uniforms, pipelines })
    }

    /// Bind groups of a prepared pass over tokens `first_token..` of `x` and `y`.
    async fn bind(
        &self,
        state: &mut State,
        num_tokens: u32,
        first_token: u32,
        x: &wgpu::Buffer,
        y: &wgpu::Buffer,
    ) -> Result<()> {
        let same = |b: &Bound| b.x == *x && b.y == *y && b.first_token == first_token;
        if state.bound.get(&num_tokens).is_some_and(same) {
            return Ok(());
        }
        let Some(pass) = state.passes.get(&num_tokens) else { return Err(unprepared(num_tokens)) };
        let row_bytes = u64::from(self.plan.config().hidden_size()) * 4;
        let tokens = |buffer| wgpu::BufferBinding {
            buffer,
            offset: u64::from(first_token) * row_bytes,
            size: std::num::NonZeroU64::new(u64::from(num_tokens) * row_bytes),
        };
        let mut bind_groups = Vec::new();
        for (index, (dispatch, pipeline)) in pass.plan.dispatches.iter().zip(&pass.pipelines).enumerate() {
            let stage = dispatch.kernel.stage;
            let page = dispatch.matmul.map_or(0, |(_, page)| page);
            let find = |name: &'static str| {
                let buffer = match name {
                    "params" => {
                        return Some(wgpu::BufferBinding {
                            buffer: &pass.uniforms,
                            offset: index as u64 * UNIFORM_ALIGNMENT,
                            size: std::num::NonZeroU64::new(48),
                        });
                    }
                    // down reads what gate_up wrote
                    "x" if stage == Stage::Down => state.scratch.get("intermediate"),
                    "x" => return Some(tokens(x)),
                    "y" => return Some(tokens(y)),
                    "router_weights" => Some(&self.weights.router),
                    "router_bias" => Some(&self.weights.router_bias),
                    "weights" if stage == Stage::GateUp => self.weights.gate_up.get(page),
                    "weights" => self.weights.down.get(page),
                    "row_of_assignment" if !pass.plan.matmul.sorted() => state.scratch.get("identity"),
                    other => state.scratch.get(other),
                };
                buffer.map(wgpu::Buffer::as_entire_buffer_binding)
            };
            bind_groups.push(pipeline.bind(&self.gpu, find).await?);
        }
        state.bound.insert(num_tokens, Bound { x: x.clone(), y: y.clone(), first_token, bind_groups });
        Ok(())
    }

    /// Puts a prepared and bound pass into `encoder`. With `timestamps`, each dispatch is a compute pass of its own.
    fn record_pass(
        &self,
        state: &State,
        encoder: &mut wgpu::CommandEncoder,
        num_tokens: u32,
        timestamps: Option<&Timestamps>,
    ) -> Result<u32> {
        let (Some(pass), Some(bound)) = (state.passes.get(&num_tokens), state.bound.get(&num_tokens)) else {
            return Err(unprepared(num_tokens));
        };
        if let Some(status) = state.scratch.get("status") {
            encoder.clear_buffer(status, 0, None);
        }
        let mut recorder = Recorder::new(encoder);
        let steps = pass.pipelines.iter().zip(&bound.bind_groups).zip(&pass.plan.dispatches);
        let steps = steps.map(|((pipeline, group), dispatch)| (&pipeline.pipeline, group, dispatch.grid));
        match timestamps {
            None => recorder.pass("moe", None, steps),
            Some(timestamps) => {
                for (index, step) in steps.enumerate() {
                    let label = pass.plan.dispatches[index].kernel.label();
                    recorder.pass(label, Some((&timestamps.queries, 2 * index as u32)), std::iter::once(step));
                }
            }
        }
        Ok(recorder.dispatches)
    }

    /// The whole batch into the caller's encoder: no submit, no wait.
    pub(crate) async fn record(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        x: &wgpu::Buffer,
        y: &wgpu::Buffer,
        num_tokens: u32,
    ) -> Result<()> {
        let bytes = u64::from(num_tokens) * u64::from(self.plan.config().hidden_size()) * 4;
        for (what, buffer) in [("x", x), ("y", y)] {
            if buffer.size() < bytes {
                return Err(Error::LimitExceeded {
                    what: format!("buffer {what} for {num_tokens} tokens"),
                    required: bytes,
                    available: buffer.size(),
                    hint: "pass a buffer of num_tokens * hidden_size f32 values",
                });
            }
            if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
                return Err(Error::Unsupported {
                    what: format!("buffer {what} without BufferUsages::STORAGE"),
                    by: "in MoeLayer::record".to_owned(),
                    hint: "create it with that usage".to_owned(),
                });
            }
        }
        if x == y {
            return Err(Error::Unsupported {
                what: "the same buffer as x and y".to_owned(),
                by: "in MoeLayer::record".to_owned(),
                hint: "pass two buffers".to_owned(),
            });
        }
        let max_tokens = self.plan.max_tokens();
        let pass_bytes = u64::from(max_tokens) * u64::from(self.plan.config().hidden_size()) * 4;
        if num_tokens > max_tokens && !pass_bytes.is_multiple_of(OFFSET_ALIGNMENT) {
            return Err(Error::LimitExceeded {
                what: "tokens of one recorded pass".to_owned(),
                required: num_tokens.into(),
                available: max_tokens.into(),
                hint: "record fewer tokens at a time, from buffers of their own, or call forward",
            });
        }
        let mut state = self.state.lock().await;
        let readbacks = self.gpu.readbacks();
        let allocations = self.gpu.allocations();
        self.prepare_passes(&mut state, num_tokens).await?;
        let mut dispatches = 0;
        for (first_token, tokens) in self.plan.passes(num_tokens) {
            self.bind(&mut state, tokens, first_token, x, y).await?;
            dispatches += self.record_pass(&state, encoder, tokens, None)?;
        }
        state.routing = None;
        state.last = self.stats(num_tokens, dispatches, readbacks, allocations);
        Ok(())
    }

    fn stats(&self, num_tokens: u32, dispatches: u32, readbacks: u64, allocations: u64) -> PassStats {
        PassStats {
            num_tokens,
            dispatches,
            readbacks: (self.gpu.readbacks() - readbacks) as u32,
            allocations: (self.gpu.allocations() - allocations) as u32,
        }
    }

    /// x from the host, y to the host; as many passes as the batch takes.
    pub(crate) async fn forward(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let mut state = self.state.lock().await;
        let h = self.plan.config().hidden_size() as usize;
        let num_tokens = (x.len() / h) as u32;
        let before = (self.gpu.readbacks(), self.gpu.allocations());
        self.prepare_io(&mut state, num_tokens).await?;
        state.resident = 0;
        let several = num_tokens > self.plan.max_tokens();
        let mut routing: Option<RoutingDecision> = None;
        let (mut dispatches, mut bad_tokens) = (0, 0);
        for (first_token, tokens) in self.plan.passes(num_tokens) {
            let range = first_token as usize * h..(first_token + tokens) as usize * h;
            let (count, bad) = self.forward_pass(&mut state, tokens, &x[range.clone()], &mut y[range]).await?;
            dispatches += count;
            bad_tokens += bad;
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
        // What forward reads back is its result, after the last dispatch of each pass: none of it stalls a pass.
        state.last = self.stats(num_tokens, dispatches, self.gpu.readbacks(), before.1);
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

    /// One pass over one host slice. Returns its dispatches and the tokens whose logits were not finite.
    async fn forward_pass(&self, state: &mut State, tokens: u32, x: &[f32], y: &mut [f32]) -> Result<(u32, u32)> {
        // Until the pass is complete the staging buffers are in no known state: an error drops them.
        let Some(io) = state.io.take() else { return Err(unprepared(tokens)) };
        self.bind(state, tokens, 0, &io.x, &io.y).await?;
        let bytes = (x.len() * 4) as u64;
        write_mapped(&io.upload, bytemuck::cast_slice(x))?;
        io.upload.unmap();
        let mut encoder = self.encoder();
        encoder.copy_buffer_to_buffer(&io.upload, 0, &io.x, 0, bytes);
        let dispatches = self.record_pass(state, &mut encoder, tokens, None)?;
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
        let bad = read_mapped(&io.download, |bytes| {
            bytemuck::cast_slice_mut(y).copy_from_slice(&bytes[..x.len() * 4]);
            let at = status_at as usize;
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        })?;
        state.io = Some(io);
        Ok((dispatches, bad))
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
        Ok(RoutingDecision { num_tokens: t, topk_experts, topk_weights, router_logits, tokens_per_expert })
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

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.gpu.device().create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("moe") })
    }

    async fn submit(&self, encoder: wgpu::CommandEncoder) -> Result<()> {
        let commands = self.gpu.scoped("recording commands", |_| encoder.finish()).await?;
        self.gpu.submit(commands).await
    }
}

/// Submits what was recorded and waits for its end.
pub(super) async fn submit_and_wait(gpu: &Gpu, encoder: wgpu::CommandEncoder, during: &'static str) -> Result<()> {
    let commands = gpu.scoped("recording commands", |_| encoder.finish()).await?;
    gpu.run(commands, during).await
}

fn append(all: &mut RoutingDecision, part: RoutingDecision) {
    all.num_tokens += part.num_tokens;
    all.topk_experts.extend(part.topk_experts);
    all.topk_weights.extend(part.topk_weights);
    all.router_logits.extend(part.router_logits);
    for (sum, count) in all.tokens_per_expert.iter_mut().zip(part.tokens_per_expert) {
        *sum += count;
    }
}

fn unprepared(num_tokens: u32) -> Error {
    Error::Device {
        during: format!("running a pass of {num_tokens} tokens"),
        message: "nothing is prepared for it; call upload first".to_owned(),
    }
}
