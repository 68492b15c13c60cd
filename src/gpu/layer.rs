//! A layer on a device: its weights, its scratch buffers, and its prepared passes.

use super::context::Gpu;
use super::pipeline::{self, Pipeline};
use super::recorder::{PassStats, Recorder, Timestamps};
use super::weights::DeviceWeights;
use crate::error::{Error, Result};
use crate::kernels::router::FrontKind;
use crate::model::routing::{PassStatus, RoutingDecision};
use crate::model::source::ExpertSource;
use crate::model::weights::{MoeWeights, OptionalTensors};
use crate::plan::memory::UNIFORM_ALIGNMENT;
use crate::plan::{DeviceBytes, LayerPlan, PassKind, Plan, Purpose, TunedChoices};
use async_lock::Mutex;
use residency::Residency;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

mod edit;
mod host;
mod residency;

pub(crate) use edit::Edit;
pub use residency::ResidencyStats;

/// Prepared passes that are kept, one for each number of tokens seen.
const MAX_PASSES: usize = 64;
/// Bytes of a uniform that are bound: at least those of the larger one.
const UNIFORM_BYTES: u64 = 96;
/// Bindings that are a part of a storage buffer start at a multiple of this on every device.
const OFFSET_ALIGNMENT: u64 = 256;

/// A layer's GPU side.
pub(crate) struct GpuLayer {
    gpu: Gpu,
    plan: LayerPlan,
    weights: DeviceWeights,
    tensors: OptionalTensors,
    state: Mutex<State>,
    /// Of a layer that has only some of its experts on the device.
    residency: Option<Mutex<Residency>>,
}

/// What changes from call to call.
#[derive(Default)]
struct State {
    /// Tokens that the scratch buffers have room for.
    capacity: u32,
    scratch: HashMap<&'static str, wgpu::Buffer>,
    io: Option<Io>,
    passes: HashMap<PassKey, Prepared>,
    /// Bind groups of the last (x, y) of each pass, by its first token, so that repeating a batch creates nothing.
    bound: HashMap<(PassKey, u32), Bound>,
    last: PassStats,
    /// What kind of pass the last one was.
    last_kind: PassKind,
    /// Tokens of each of its sequences.
    last_sequence: Option<u32>,
    /// Tokens in the layer's own x, for passes on resident input; 0 if there is nothing.
    resident: u32,
    /// What the last pass counted, if that has been read back.
    status: Option<PassStatus>,
    /// Set when the last forward took several passes, whose device buffers no longer hold all of the routing.
    routing: Option<RoutingDecision>,
}

/// The layer's own input and output, for calls that take host slices.
struct Io {
    x: wgpu::Buffer,
    y: wgpu::Buffer,
    /// Mapped between calls, so that an upload allocates nothing.
    upload: wgpu::Buffer,
    /// y, then the status words.
    download: wgpu::Buffer,
    /// What a pass gets beside x, for those that get more; mapped between calls.
    front: Option<wgpu::Buffer>,
    /// The router's choices on the host, for layers that bring experts in.
    choices: Option<wgpu::Buffer>,
    capacity: u32,
}

/// Tokens of a pass, and its kind.
type PassKey = (u32, PassKind);

/// A pass with everything but x and y in place.
struct Prepared {
    plan: Plan,
    uniforms: wgpu::Buffer,
    pipelines: Vec<Arc<Pipeline>>,
}

/// A plan of a layer, with the passes that were prepared by it, while the layer runs by another. Weights and scratch
/// buffers stay with the layer.
pub(crate) struct SetAside {
    plan: LayerPlan,
    passes: HashMap<PassKey, Prepared>,
    bound: HashMap<(PassKey, u32), Bound>,
}

struct Bound {
    x: wgpu::Buffer,
    y: wgpu::Buffer,
    bind_groups: Vec<wgpu::BindGroup>,
}

impl GpuLayer {
    /// Experts from `source`, all else from `weights`. Of a plan with places, `pinned` experts never leave the device.
    /// `progress(bytes)` is told what has been read.
    pub(crate) async fn new(
        gpu: &Gpu,
        plan: LayerPlan,
        weights: &MoeWeights,
        source: &mut dyn ExpertSource,
        pinned: &[u32],
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self> {
        let gpu = gpu.counting();
        let tensors = OptionalTensors::of(weights);
        let (weights, host) = DeviceWeights::upload(&gpu, &plan, weights, source, progress).await?;
        let residency = match plan.places() {
            Some(places) => Some(Residency::new(&gpu, &plan, &weights, host, places, pinned).await?),
            None => None,
        };
        let residency = residency.map(Mutex::new);
        Ok(Self { gpu, plan, weights, tensors, state: Mutex::new(State::default()), residency })
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    pub(crate) fn plan(&self) -> &LayerPlan {
        &self.plan
    }

    /// Another plan for this layer: the same, with other measured choices.
    pub(crate) fn with_tuned(&self, tuned: Arc<TunedChoices>) -> Result<SetAside> {
        Ok(SetAside { plan: self.plan.with_tuned(tuned)?, passes: HashMap::new(), bound: HashMap::new() })
    }

    /// Runs by the other plan from now on, and sets the present one aside. Nothing is uploaded or compiled again.
    pub(crate) fn exchange(&mut self, other: &mut SetAside) {
        let state = self.state.get_mut();
        std::mem::swap(&mut self.plan, &mut other.plan);
        std::mem::swap(&mut state.passes, &mut other.passes);
        // Bind groups know their x and y. Where scratch buffers have grown since, those are others too.
        std::mem::swap(&mut state.bound, &mut other.bound);
    }

    pub(crate) async fn last(&self) -> PassStats {
        self.state.lock().await.last
    }

    /// Bytes of the buffers that it keeps, as they were created.
    pub(crate) async fn device_bytes(&self) -> DeviceBytes {
        let state = self.state.lock().await;
        let mut bytes = DeviceBytes::default();
        let mut add = |purpose, buffer: &wgpu::Buffer| bytes.add(purpose, buffer.size());
        self.weights.buffers().for_each(|buffer| add(Purpose::Weights, buffer));
        state.scratch.values().for_each(|buffer| add(Purpose::Scratch, buffer));
        state.passes.values().for_each(|pass| add(Purpose::Scratch, &pass.uniforms));
        if let Some(Io { x, y, upload, download, front, choices, capacity: _ }) = &state.io {
            let always = [x, y, upload, download].into_iter();
            always.chain(front).chain(choices).for_each(|buffer| add(Purpose::InputOutput, buffer));
        }
        bytes
    }

    /// Buffers, pipelines and uniforms for batches of `num_tokens` tokens.
    pub(crate) async fn prepare(&self, num_tokens: u32) -> Result<()> {
        let mut state = self.state.lock().await;
        self.prepare_passes(&mut state, num_tokens, PassKind::default()).await
    }

    async fn prepare_passes(&self, state: &mut State, num_tokens: u32, kind: PassKind) -> Result<()> {
        let max_tokens = self.plan.max_tokens();
        if num_tokens > max_tokens && self.plan.config().routing().capacity.is_some() {
            return Err(Error::LimitExceeded {
                what: "tokens of a batch whose experts have a capacity".to_owned(),
                required: num_tokens.into(),
                available: max_tokens.into(),
                hint: "who is dropped depends on the whole batch, so it has to fit one pass; use fewer tokens",
            });
        }
        self.grow(state, num_tokens.min(max_tokens)).await?;
        // All passes but the last have the same size.
        let wanted: HashSet<PassKey> = self.plan.passes(num_tokens).map(|(_, tokens)| (tokens, kind)).collect();
        let missing: Vec<PassKey> = wanted.iter().copied().filter(|key| !state.passes.contains_key(key)).collect();
        if state.passes.len() + missing.len() > MAX_PASSES {
            state.passes.retain(|key, _| wanted.contains(key));
            state.bound.retain(|(key, _), _| wanted.contains(key));
        }
        for key in missing {
            let prepared = self.prepare_pass(key).await?;
            state.passes.insert(key, prepared);
        }
        Ok(())
    }

    /// Scratch for at least `num_tokens` tokens.
    async fn grow(&self, state: &mut State, num_tokens: u32) -> Result<()> {
        if num_tokens <= state.capacity {
            return Ok(());
        }
        let capacity = self.plan.capacity(num_tokens);
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

    async fn prepare_pass(&self, (num_tokens, kind): PassKey) -> Result<Prepared> {
        let plan = self.plan.plan_pass(num_tokens, kind)?;
        let mut pipelines = Vec::new();
        let mut uniforms = vec![0u8; plan.dispatches.len() * UNIFORM_ALIGNMENT as usize];
        for (dispatch, slot) in plan.dispatches.iter().zip(uniforms.chunks_exact_mut(UNIFORM_ALIGNMENT as usize)) {
            let bytes = dispatch.uniform.bytes();
            slot[..bytes.len()].copy_from_slice(bytes);
            pipelines.push(pipeline::pipeline(&self.gpu, &dispatch.kernel).await?);
        }
        // The key of the router's noise is written for each pass.
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let uniforms = self.gpu.filled_buffer("params", &uniforms, usage).await?;
        Ok(Prepared { plan, uniforms, pipelines })
    }

    /// Bind groups of a prepared pass over tokens `first_token..` of `x` and `y`.
    async fn bind(
        &self,
        state: &mut State,
        key: PassKey,
        first_token: u32,
        x: &wgpu::Buffer,
        y: &wgpu::Buffer,
    ) -> Result<()> {
        let same = |b: &Bound| b.x == *x && b.y == *y;
        if state.bound.get(&(key, first_token)).is_some_and(same) {
            return Ok(());
        }
        // Of a batch of many passes, too, only the last buffers are kept alive.
        state.bound.retain(|(other, _), bound| *other != key || same(bound));
        let num_tokens = key.0;
        let Some(pass) = state.passes.get(&key) else { return Err(unprepared(num_tokens)) };
        let row_bytes = u64::from(self.plan.config().hidden_size()) * 4;
        let tokens = |buffer| wgpu::BufferBinding {
            buffer,
            offset: u64::from(first_token) * row_bytes,
            size: std::num::NonZeroU64::new(u64::from(num_tokens) * row_bytes),
        };
        let mut bind_groups = Vec::new();
        for (index, (dispatch, pipeline)) in pass.plan.dispatches.iter().zip(&pass.pipelines).enumerate() {
            let find = |binding: &'static str| {
                let buffer = match dispatch.buffer(binding) {
                    "params" => {
                        return Some(wgpu::BufferBinding {
                            buffer: &pass.uniforms,
                            offset: index as u64 * UNIFORM_ALIGNMENT,
                            size: std::num::NonZeroU64::new(UNIFORM_BYTES),
                        });
                    }
                    "x" => return Some(tokens(x)),
                    "y" => return Some(tokens(y)),
                    name => self.weights.find(name, dispatch.page).or_else(|| state.scratch.get(name)),
                };
                buffer.map(wgpu::Buffer::as_entire_buffer_binding)
            };
            bind_groups.push(pipeline.bind(&self.gpu, find).await?);
        }
        state.bound.insert((key, first_token), Bound { x: x.clone(), y: y.clone(), bind_groups });
        Ok(())
    }

    /// Puts a pass that is prepared, and bound from its first token on, into `encoder`. With `timestamps`, each dispatch is
    /// a compute pass of its own.
    fn record_pass(
        &self,
        state: &State,
        encoder: &mut wgpu::CommandEncoder,
        of: (PassKey, u32),
        timestamps: Option<&Timestamps>,
    ) -> Result<u32> {
        self.record_part(state, encoder, of, 0..usize::MAX, timestamps)
    }

    /// The dispatches of `part` of a prepared and bound pass, as far as there are any.
    fn record_part(
        &self,
        state: &State,
        encoder: &mut wgpu::CommandEncoder,
        of: (PassKey, u32),
        part: Range<usize>,
        timestamps: Option<&Timestamps>,
    ) -> Result<u32> {
        let (Some(pass), Some(bound)) = (state.passes.get(&of.0), state.bound.get(&of)) else {
            return Err(unprepared(of.0.0));
        };
        if let Some(status) = state.scratch.get("status").filter(|_| part.start == 0) {
            encoder.clear_buffer(status, 0, None);
        }
        let mut recorder = Recorder::new(encoder);
        let steps = pass.pipelines.iter().zip(&bound.bind_groups).zip(&pass.plan.dispatches);
        let steps = steps.skip(part.start).take(part.len());
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
    pub(crate) async fn record(&self, encoder: &mut wgpu::CommandEncoder, recording: &Recording<'_>) -> Result<()> {
        let Recording { x, y, num_tokens, .. } = *recording;
        if self.residency.is_some() {
            return Err(Error::Unsupported {
                what: "recording into an encoder".to_owned(),
                by: "by a layer that brings its experts in as they are chosen (gpu_memory)".to_owned(),
                hint: "call forward, or give it the memory of all experts".to_owned(),
            });
        }
        let c = self.plan.config();
        let tokens_bytes = |columns: u32| u64::from(num_tokens) * u64::from(columns) * 4;
        let bytes = tokens_bytes(c.hidden_size());
        check_buffer("x", x, num_tokens, bytes, wgpu::BufferUsages::STORAGE)?;
        check_buffer("y", y, num_tokens, bytes, wgpu::BufferUsages::STORAGE)?;
        // (buffer of the caller, where it goes)
        let copies: Vec<(&wgpu::Buffer, &'static str, u64)> = match recording.front {
            RecordedFront::Router => Vec::new(),
            RecordedFront::Ids(ids) if c.vocab_size().is_some() => vec![(ids, "token_ids", tokens_bytes(1))],
            RecordedFront::Ids(ids) => vec![(ids, "topk_experts", tokens_bytes(c.top_k()))],
            RecordedFront::Logits(logits) => vec![(logits, "router_logits", tokens_bytes(c.num_experts()))],
            RecordedFront::Assignments { experts, weights } => vec![
                (experts, "topk_experts", tokens_bytes(c.top_k())),
                (weights, "topk_weights", tokens_bytes(c.top_k())),
            ],
        };
        for &(buffer, name, bytes) in &copies {
            check_buffer(name, buffer, num_tokens, bytes, wgpu::BufferUsages::COPY_SRC)?;
        }
        let wants_ids = c.routing().choices_are_given();
        let is_router = matches!(recording.front, RecordedFront::Router);
        if (wants_ids && is_router) || (!wants_ids && matches!(recording.front, RecordedFront::Ids(_))) {
            return Err(Error::Unsupported {
                what: if wants_ids { "recording without ids" } else { "recording with ids" }.to_owned(),
                by: format!("by a layer whose choices are {:?}", c.routing().selection),
                hint: if wants_ids { "call record_with_ids" } else { "call record" }.to_owned(),
            });
        }
        let kind = PassKind {
            front: match recording.front {
                RecordedFront::Router | RecordedFront::Ids(_) => FrontKind::Router,
                RecordedFront::Logits(_) => FrontKind::Logits,
                RecordedFront::Assignments { .. } => FrontKind::Assignments,
            },
            ..PassKind::default()
        };
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
        let before = self.counts();
        self.prepare_passes(&mut state, num_tokens, kind).await?;
        let mut dispatches = 0;
        for (first_token, tokens) in self.plan.passes(num_tokens) {
            for &(buffer, name, bytes) in &copies {
                let row_bytes = bytes / u64::from(num_tokens);
                let Some(scratch) = state.scratch.get(name) else { return Err(unprepared(tokens)) };
                let (from, size) = (u64::from(first_token) * row_bytes, u64::from(tokens) * row_bytes);
                encoder.copy_buffer_to_buffer(buffer, from, scratch, 0, size);
            }
            self.bind(&mut state, (tokens, kind), first_token, x, y).await?;
            dispatches += self.record_pass(&state, encoder, ((tokens, kind), first_token), None)?;
        }
        state.routing = None;
        state.status = None;
        state.last_kind = kind;
        state.last_sequence = None;
        state.last = self.stats(num_tokens, dispatches, before);
        Ok(())
    }

    /// Readbacks, buffers and bind groups so far.
    fn counts(&self) -> [u64; 3] {
        [self.gpu.readbacks(), self.gpu.allocations(), self.gpu.bind_groups()]
    }

    /// What was done since `before` was counted.
    fn stats(&self, num_tokens: u32, dispatches: u32, before: [u64; 3]) -> PassStats {
        let now = self.counts();
        let [readbacks, allocations, bind_groups] = std::array::from_fn(|i| (now[i] - before[i]) as u32);
        PassStats { num_tokens, dispatches, readbacks, allocations, bind_groups }
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

/// What is recorded, and where.
pub(crate) struct Recording<'a> {
    pub(crate) x: &'a wgpu::Buffer,
    pub(crate) y: &'a wgpu::Buffer,
    pub(crate) num_tokens: u32,
    pub(crate) front: RecordedFront<'a>,
}

/// Who routes a recorded pass, with buffers.
#[derive(Clone, Copy)]
pub(crate) enum RecordedFront<'a> {
    Router,
    /// Token ids, or given experts.
    Ids(&'a wgpu::Buffer),
    Logits(&'a wgpu::Buffer),
    Assignments {
        experts: &'a wgpu::Buffer,
        weights: &'a wgpu::Buffer,
    },
}

fn check_buffer(what: &str, buffer: &wgpu::Buffer, tokens: u32, bytes: u64, usage: wgpu::BufferUsages) -> Result<()> {
    if buffer.size() < bytes {
        return Err(Error::LimitExceeded {
            what: format!("buffer {what} for {tokens} tokens"),
            required: bytes,
            available: buffer.size(),
            hint: "pass a buffer of 4 bytes for each element: num_tokens * hidden_size for x and y",
        });
    }
    if !buffer.usage().contains(usage) {
        return Err(Error::Unsupported {
            what: format!("buffer {what} without {usage:?}"),
            by: "in MoeLayer::record".to_owned(),
            hint: "create it with that usage".to_owned(),
        });
    }
    Ok(())
}

fn unprepared(num_tokens: u32) -> Error {
    Error::Device {
        during: format!("running a pass of {num_tokens} tokens"),
        message: "nothing is prepared for it; call upload first".to_owned(),
    }
}
