//! Passes on host data and on a resident input, their times, and the routing: all that submits and waits.

use super::super::context::{read_mapped, write_mapped};
use super::super::pipeline::pipeline;
use super::super::recorder::{PassStats, Recorder, StageTime, Timestamps, by_stage};
use super::{GpuLayer, Io, PassKey, State, UNIFORM_ALIGNMENT, submit_and_wait, unprepared};
use crate::error::{Error, Result};
use crate::kernels::params::{RouterParams, StatisticsParams};
use crate::kernels::router::FrontKind;
use crate::kernels::{Stage, expert_statistics, token_statistics};
use crate::model::batch::{Batch, Front};
use crate::model::config::MoeConfig;
use crate::model::noise;
use crate::model::routing::{Noise, NonFinite, PassStatus, RoutingDecision, Selection};
use crate::model::statistics::{SequenceSums, Statistics};
use crate::plan::{PassKind, STATUS_BYTES, grid};

/// What one pass over a host slice did.
struct Done {
    dispatches: u32,
    readbacks: u32,
    status: PassStatus,
}

impl GpuLayer {
    /// x from the host, y to the host; as many passes as the batch takes. The batch has been checked.
    pub(crate) async fn forward(&self, batch: &Batch<'_>, y: &mut [f32]) -> Result<()> {
        let mut state = self.state.lock().await;
        let h = self.plan.config().hidden_size() as usize;
        let num_tokens = (batch.x.len() / h) as u32;
        let kind = self.kind_of(batch);
        let before = self.counts();
        self.prepare_io(&mut state, num_tokens, kind).await?;
        state.resident = 0;
        let several = num_tokens > self.plan.max_tokens();
        let mut routing: Option<RoutingDecision> = None;
        let (mut dispatches, mut readbacks, mut status) = (0, 0, PassStatus::default());
        state.last_kind = kind;
        state.last_sequence = batch.tokens_per_sequence;
        for (first_token, tokens) in self.plan.passes(num_tokens) {
            let front = self.front_words(batch, first_token, tokens);
            let range = first_token as usize * h..(first_token + tokens) as usize * h;
            let (x, y) = (&batch.x[range.clone()], &mut y[range]);
            let done = self.forward_pass(&mut state, (tokens, kind), x, &front, y).await?;
            dispatches += done.dispatches;
            readbacks += done.readbacks;
            status.non_finite_tokens += done.status.non_finite_tokens;
            status.over_capacity += done.status.over_capacity;
            if several {
                let part = self.read_routing(&state, tokens).await?;
                match &mut routing {
                    None => routing = Some(part),
                    Some(all) => append(all, part),
                }
            }
        }
        state.routing = routing;
        state.status = Some(status);
        state.resident = if several || !front_is_kept(kind, self.plan.config()) { 0 } else { num_tokens };
        // Of the readbacks, only those that a dispatch waited for.
        state.last = PassStats { readbacks, ..self.stats(num_tokens, dispatches, before) };
        match (self.plan.non_finite(), status.non_finite_tokens) {
            (_, 0) | (NonFinite::Drop | NonFinite::Propagate, _) => Ok(()),
            (NonFinite::Error, num_tokens) => Err(Error::NonFiniteLogits { num_tokens }),
        }
    }

    fn kind_of(&self, batch: &Batch<'_>) -> PassKind {
        let routing = self.plan.config().routing();
        PassKind {
            front: match batch.front {
                Front::Router => FrontKind::Router,
                Front::Logits(_) => FrontKind::Logits,
                Front::Assignments { .. } => FrontKind::Assignments,
            },
            noise: batch.seed.is_some() && routing.noise != Noise::None,
            tokens_per_sequence: batch
                .tokens_per_sequence
                .filter(|_| routing.capacity.is_some_and(|capacity| capacity.per_sequence)),
        }
    }

    /// What tokens of the batch bring beside x, and the buffers that it goes to.
    fn front_words(&self, batch: &Batch<'_>, first_token: u32, tokens: u32) -> Vec<(FrontTarget, Vec<u32>)> {
        let c = self.plan.config();
        let [e, k] = [c.num_experts(), c.top_k()].map(|n| n as usize);
        let range = |columns: usize| first_token as usize * columns..(first_token + tokens) as usize * columns;
        let ids = |ids: &[i32]| ids.iter().map(|&id| id as u32).collect::<Vec<u32>>(); // -1 is DROPPED
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        let mut words = Vec::new();
        match batch.front {
            Front::Router => {}
            Front::Logits(logits) => words.push((FrontTarget::Scratch("router_logits"), bits(&logits[range(e)]))),
            Front::Assignments { experts, weights } => {
                words.push((FrontTarget::Scratch("topk_experts"), ids(&experts[range(k)])));
                words.push((FrontTarget::Scratch("topk_weights"), bits(&weights[range(k)])));
                return words;
            }
        }
        match (c.routing().selection, batch.token_ids, batch.experts) {
            (Selection::TokenTable { .. }, Some(ids), _) => {
                words.push((FrontTarget::Scratch("token_ids"), ids[range(1)].to_vec()));
            }
            (Selection::Given, _, Some(experts)) => {
                words.push((FrontTarget::Scratch("topk_experts"), ids(&experts[range(k)])));
            }
            _ => {}
        }
        if let Some(seed) = batch.seed.filter(|_| c.routing().noise != Noise::None) {
            words.push((FrontTarget::Noise, vec![noise::key(seed), first_token]));
        }
        words
    }

    /// A forward of zero tokens: nothing but the memory of what came before it changes.
    pub(crate) async fn forward_nothing(&self) {
        let mut state = self.state.lock().await;
        state.last = PassStats::default();
        state.routing = None;
        state.status = Some(PassStatus::default());
    }

    async fn prepare_io(&self, state: &mut State, num_tokens: u32, kind: PassKind) -> Result<()> {
        self.prepare_passes(state, num_tokens, kind).await?;
        let tokens = num_tokens.min(self.plan.max_tokens());
        if state.io.as_ref().is_some_and(|io| io.capacity >= tokens) {
            return Ok(());
        }
        state.io = None;
        state.bound.clear();
        let capacity = state.capacity;
        let bytes = u64::from(capacity) * u64::from(self.plan.config().hidden_size()) * 4;
        use wgpu::BufferUsages as Usage;
        let choices = match &self.residency {
            Some(_) => {
                let bytes = u64::from(capacity) * u64::from(self.plan.config().top_k()) * 4;
                Some(self.gpu.buffer("choices", bytes, Usage::MAP_READ | Usage::COPY_DST).await?)
            }
            None => None,
        };
        let io = Io {
            x: self.gpu.buffer("x", bytes, Usage::STORAGE | Usage::COPY_DST).await?,
            y: self.gpu.buffer("y", bytes, Usage::STORAGE | Usage::COPY_SRC).await?,
            upload: self.gpu.mapped_buffer("x upload", bytes, Usage::MAP_WRITE | Usage::COPY_SRC).await?,
            download: self.gpu.buffer("y download", bytes + STATUS_BYTES, Usage::MAP_READ | Usage::COPY_DST).await?,
            front: None,
            choices,
            capacity,
        };
        state.io = Some(io);
        Ok(())
    }

    /// One pass over one host slice.
    async fn forward_pass(
        &self,
        state: &mut State,
        key: PassKey,
        x: &[f32],
        front: &[(FrontTarget, Vec<u32>)],
        y: &mut [f32],
    ) -> Result<Done> {
        // Until the pass is complete the staging buffers are in no known state: an error drops them.
        let Some(mut io) = state.io.take() else { return Err(unprepared(key.0)) };
        self.bind(state, key, 0, &io.x, &io.y).await?;
        let bytes = (x.len() * 4) as u64;
        write_mapped(&io.upload, bytemuck::cast_slice(x))?;
        io.upload.unmap();
        let mut encoder = self.encoder();
        encoder.copy_buffer_to_buffer(&io.upload, 0, &io.x, 0, bytes);
        if !front.is_empty() {
            self.upload_front(state, key, front, &mut io, &mut encoder).await?;
        }
        let readbacks = self.gpu.readbacks();
        let (mut encoder, dispatches) = self.run_pass(state, encoder, key, io.choices.as_ref()).await?;
        // The result itself is read after the last dispatch; what counts is a readback that a dispatch waits for.
        let readbacks = (self.gpu.readbacks() - readbacks) as u32;
        encoder.copy_buffer_to_buffer(&io.y, 0, &io.download, 0, bytes);
        let status_at = io.download.size() - STATUS_BYTES;
        if let Some(status) = state.scratch.get("status") {
            encoder.copy_buffer_to_buffer(status, 0, &io.download, status_at, STATUS_BYTES);
        }
        self.submit(encoder).await?;
        let read = self.gpu.map(&io.download, wgpu::MapMode::Read).await?;
        let write = self.gpu.map(&io.upload, wgpu::MapMode::Write).await?;
        self.gpu.wait(&read, "the forward pass").await?;
        self.gpu.wait(&write, "mapping the upload buffer").await?;
        if let Some(front) = io.front.as_ref().filter(|_| !front.is_empty()) {
            let mapped = self.gpu.map(front, wgpu::MapMode::Write).await?;
            self.gpu.wait(&mapped, "mapping the upload buffer").await?;
        }
        self.gpu.check("the forward pass")?;
        let status = read_mapped(&io.download, |bytes| {
            bytemuck::cast_slice_mut(y).copy_from_slice(&bytes[..x.len() * 4]);
            pass_status(&bytemuck::pod_collect_to_vec(&bytes[status_at as usize..]))
        })?;
        state.io = Some(io);
        Ok(Done { dispatches, readbacks, status })
    }

    /// Puts what the pass gets beside x where it belongs.
    async fn upload_front(
        &self,
        state: &State,
        key: PassKey,
        front: &[(FrontTarget, Vec<u32>)],
        io: &mut Io,
        encoder: &mut wgpu::CommandEncoder,
    ) -> Result<()> {
        let words: Vec<u32> = front.iter().flat_map(|(_, words)| words).copied().collect();
        let bytes = words.len() as u64 * 4;
        if io.front.as_ref().is_none_or(|buffer| buffer.size() < bytes) {
            let usage = wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC;
            let room = bytes / u64::from(key.0) * u64::from(io.capacity) + 16;
            io.front = Some(self.gpu.mapped_buffer("front upload", room.next_multiple_of(4), usage).await?);
        }
        let (Some(buffer), Some(pass)) = (&io.front, state.passes.get(&key)) else { return Err(unprepared(key.0)) };
        write_mapped(buffer, bytemuck::cast_slice(&words))?;
        buffer.unmap();
        let mut at = 0;
        for (target, words) in front {
            let bytes = words.len() as u64 * 4;
            match target {
                FrontTarget::Scratch(name) => {
                    let Some(scratch) = state.scratch.get(name) else { return Err(unprepared(key.0)) };
                    encoder.copy_buffer_to_buffer(buffer, at, scratch, 0, bytes);
                }
                FrontTarget::Noise => {
                    let routers = pass.plan.dispatches.iter().enumerate();
                    for (index, _) in routers.filter(|(_, d)| d.kernel.stage == Stage::Router) {
                        let field = std::mem::offset_of!(RouterParams, noise_key) as u64;
                        let to = index as u64 * UNIFORM_ALIGNMENT + field;
                        encoder.copy_buffer_to_buffer(buffer, at, &pass.uniforms, to, bytes);
                    }
                }
            }
            at += bytes;
        }
        Ok(())
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
        self.prepare_io(&mut state, num_tokens, PassKind::default()).await?;
        state.resident = 0;
        state.last_kind = PassKind::default();
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
    async fn bind_resident(&self, state: &mut State) -> Result<PassKey> {
        let num_tokens = state.resident;
        let Some((x, y)) = state.io.as_ref().map(|io| (io.x.clone(), io.y.clone())) else {
            return Err(unprepared(num_tokens));
        };
        if num_tokens == 0 {
            return Err(unprepared(num_tokens));
        }
        let key = (num_tokens, PassKind::default());
        self.prepare_passes(state, num_tokens, key.1).await?;
        self.bind(state, key, 0, &x, &y).await?;
        Ok(key)
    }

    /// One pass on the resident input, from recording to completion, waited for.
    pub(crate) async fn run_resident(&self) -> Result<()> {
        let mut state = self.state.lock().await;
        let before = self.counts();
        let key = self.bind_resident(&mut state).await?;
        let io = state.io.take();
        let choices = io.as_ref().and_then(|io| io.choices.as_ref());
        let ran = self.run_pass(&state, self.encoder(), key, choices).await;
        if ran.is_err() {
            // The buffer of the choices is in no known state, and goes with the resident input.
            state.resident = 0;
        } else {
            state.io = io;
        }
        let (encoder, dispatches) = ran?;
        submit_and_wait(&self.gpu, encoder, "the forward pass").await?;
        state.routing = None;
        state.status = None;
        state.last_kind = key.1;
        state.last_sequence = None;
        state.last = self.stats(key.0, dispatches, before);
        Ok(())
    }

    /// Seconds of each stage of one pass on the resident input. None where experts are brought in between: what that
    /// takes depends on what was there before.
    pub(crate) async fn profile(&self) -> Result<Vec<StageTime>> {
        if self.residency.is_some() {
            return Ok(Vec::new());
        }
        let mut state = self.state.lock().await;
        let key = self.bind_resident(&mut state).await?;
        let Some(pass) = state.passes.get(&key) else { return Err(unprepared(key.0)) };
        let stages: Vec<_> = pass.plan.names().collect();
        let times = if self.gpu.has_timestamps() {
            let timestamps = Timestamps::new(&self.gpu, stages.len() as u32).await?;
            let mut encoder = self.encoder();
            self.record_pass(&state, &mut encoder, (key, 0), Some(&timestamps))?;
            timestamps.resolve(&mut encoder);
            submit_and_wait(&self.gpu, encoder, "the profiled pass").await?;
            timestamps.read(&self.gpu).await?
        } else {
            self.profile_by_waiting(&state, key).await?
        };
        Ok(by_stage(stages.into_iter().zip(times)))
    }

    /// Without timestamps: each dispatch is submitted alone and waited for, so times include that.
    async fn profile_by_waiting(&self, state: &State, key: PassKey) -> Result<Vec<f64>> {
        let (Some(pass), Some(bound)) = (state.passes.get(&key), state.bound.get(&(key, 0))) else {
            return Err(unprepared(key.0));
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

    /// What the last pass counted; the caller has submitted what was recorded.
    pub(crate) async fn status(&self) -> Result<PassStatus> {
        let state = self.state.lock().await;
        match state.status {
            Some(status) => Ok(status),
            None if state.last.num_tokens > self.plan.max_tokens() => Err(self.overwritten("the status")),
            None => Ok(pass_status(&self.read_words(&state, "status", STATUS_BYTES as usize / 4).await?)),
        }
    }

    /// Of a recorded batch of several passes only the last is there.
    fn overwritten(&self, what: &str) -> Error {
        Error::Unsupported {
            what: format!("{what} of a recorded batch that took several passes"),
            by: "after the fact (each pass overwrites that of the one before)".to_owned(),
            hint: format!("record at most {} tokens at a time, or call forward", self.plan.max_tokens()),
        }
    }

    /// The routing of the last forward or recorded pass; the caller has submitted what was recorded.
    pub(crate) async fn routing(&self) -> Result<RoutingDecision> {
        let state = self.state.lock().await;
        match &state.routing {
            Some(routing) => Ok(routing.clone()),
            None if state.last.num_tokens > self.plan.max_tokens() => Err(self.overwritten("the routing")),
            None => self.read_routing(&state, state.last.num_tokens).await,
        }
    }

    async fn read_routing(&self, state: &State, num_tokens: u32) -> Result<RoutingDecision> {
        let c = self.plan.config();
        let [t, e, k] = [num_tokens, c.num_experts(), c.top_k()].map(|n| n as usize);
        let topk_experts = self.read_words(state, final_experts(c, state.last_kind), t * k).await?;
        let floats = |words: Vec<u32>| words.into_iter().map(f32::from_bits).collect::<Vec<_>>();
        let topk_weights = floats(self.read_words(state, "topk_weights", t * k).await?);
        let given = state.last_kind.front == FrontKind::Assignments;
        let router_logits =
            if given { Vec::new() } else { floats(self.read_words(state, "router_logits", t * e).await?) };
        let gates = t * c.num_gated_shared() as usize;
        let shared_weights = floats(self.read_words(state, "shared_weights", gates).await?);
        let mut tokens_per_expert = vec![0; e];
        let mut num_dropped = 0;
        for &expert in &topk_experts {
            match tokens_per_expert.get_mut(expert as usize) {
                Some(count) => *count += 1,
                None => num_dropped += 1,
            }
        }
        let (drops, words) = (self.plan.non_finite() == NonFinite::Drop, STATUS_BYTES as usize / 4);
        let status = self.read_words(state, "status", if drops { words + t } else { words }).await?;
        let non_finite_tokens = match self.plan.non_finite() {
            NonFinite::Drop => {
                let marks = status.get(words..).unwrap_or_default();
                (0..).zip(marks).filter(|(_, mark)| **mark != 0).map(|(t, _)| t).collect()
            }
            _ => {
                let broken = |weights: &[f32]| weights.iter().any(|w| !w.is_finite());
                (0..).zip(topk_weights.chunks(k)).filter(|(_, weights)| broken(weights)).map(|(t, _)| t).collect()
            }
        };
        Ok(RoutingDecision {
            num_tokens: t,
            topk_experts,
            topk_weights,
            shared_weights,
            router_logits,
            tokens_per_expert,
            num_dropped,
            over_capacity: pass_status(&status).over_capacity,
            non_finite_tokens,
        })
    }

    /// Sums over the last pass, made on the device from what it left there.
    pub(crate) async fn statistics(&self) -> Result<Statistics> {
        let state = self.state.lock().await;
        let c = self.plan.config();
        let num_tokens = state.last.num_tokens;
        if num_tokens == 0 {
            return Ok(Statistics::default());
        }
        let unsupported = |what: &str, hint: String| Error::Unsupported {
            what: format!("statistics of {what}"),
            by: "after the fact".to_owned(),
            hint,
        };
        if num_tokens > self.plan.max_tokens() {
            let hint = format!("run at most {} tokens at a time", self.plan.max_tokens());
            return Err(unsupported("a batch that took several passes", hint));
        }
        if state.last_kind.front == FrontKind::Assignments {
            return Err(unsupported("a pass whose assignments were given", "give logits instead".to_owned()));
        }
        let tokens_per_sequence = state.last_sequence.unwrap_or(num_tokens);
        let params =
            StatisticsParams { num_tokens, tokens_per_sequence, num_experts: c.num_experts(), top_k: c.top_k() };
        let columns = u64::from(c.num_experts()) + 1;
        let sequences = u64::from(num_tokens / tokens_per_sequence);
        let storage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
        let uniform = bytemuck::bytes_of(&params);
        let uniform = self.gpu.filled_buffer("params", uniform, wgpu::BufferUsages::UNIFORM).await?;
        let tokens = self.gpu.buffer("tokens", u64::from(num_tokens) * 12, storage).await?;
        let experts = self.gpu.buffer("experts", sequences * columns * 16, storage).await?;
        let mut encoder = self.encoder();
        let dispatches =
            [(token_statistics::kernel(), u64::from(num_tokens)), (expert_statistics::kernel(), sequences * columns)];
        for (kernel, workgroups) in dispatches {
            let pipeline = pipeline(&self.gpu, &kernel).await?;
            let find = |name: &'static str| {
                let buffer = match name {
                    "params" => Some(&uniform),
                    "tokens" => Some(&tokens),
                    "experts" => Some(&experts),
                    "topk_experts" => state.scratch.get(final_experts(c, state.last_kind)),
                    other => state.scratch.get(other),
                };
                buffer.map(wgpu::Buffer::as_entire_buffer_binding)
            };
            let group = pipeline.bind(&self.gpu, find).await?;
            let grid = grid::fold(workgroups, self.gpu.profile().max_workgroups_per_dimension)?;
            let step = (&pipeline.pipeline, &group, grid);
            Recorder::new(&mut encoder).pass(kernel.label(), None, std::iter::once(step));
        }
        let words = self.read_buffer(&experts, encoder, (sequences * columns * 4) as usize).await?;
        let e = c.num_experts() as usize;
        let sums = words.chunks_exact(4 * (e + 1)).map(|words| {
            let mut sums = SequenceSums::new(tokens_per_sequence as usize, e);
            for (expert, entry) in words.chunks_exact(4).enumerate() {
                let [sum, other_sum] = [entry[0], entry[1]].map(|bits| f64::from(f32::from_bits(bits)));
                if expert < e {
                    sums.probability[expert] = sum;
                    sums.best[expert] = entry[2];
                    sums.assigned[expert] = entry[3];
                } else {
                    sums.squared_log_sum_exp = sum;
                    sums.entropy = other_sum;
                    sums.dropped = entry[3];
                }
            }
            sums
        });
        Ok(Statistics::new(sums.collect()))
    }

    /// The first `count` words of a buffer, after what `encoder` does.
    pub(super) async fn read_buffer(
        &self,
        buffer: &wgpu::Buffer,
        mut encoder: wgpu::CommandEncoder,
        count: usize,
    ) -> Result<Vec<u32>> {
        let bytes = (count * 4) as u64;
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let download = self.gpu.buffer("download", bytes, usage).await?;
        encoder.copy_buffer_to_buffer(buffer, 0, &download, 0, bytes);
        self.submit(encoder).await?;
        let mapped = self.gpu.map(&download, wgpu::MapMode::Read).await?;
        self.gpu.wait(&mapped, "reading the routing").await?;
        read_mapped(&download, bytemuck::pod_collect_to_vec)
    }

    async fn read_words(&self, state: &State, name: &'static str, count: usize) -> Result<Vec<u32>> {
        let Some(buffer) = state.scratch.get(name) else { return Ok(Vec::new()) };
        if count == 0 {
            return Ok(Vec::new());
        }
        self.read_buffer(buffer, self.encoder(), count).await
    }
}

/// Where something goes that a pass gets beside x.
enum FrontTarget {
    /// A scratch buffer.
    Scratch(&'static str),
    /// The router's uniform.
    Noise,
}

/// What the words at the front of the status buffer say.
fn pass_status(words: &[u32]) -> PassStatus {
    let word = |index: usize| words.get(index).copied().unwrap_or(0);
    PassStatus { non_finite_tokens: word(0), over_capacity: word(1) }
}

/// The buffer that holds the choices which count.
pub(super) fn final_experts(config: &MoeConfig, kind: PassKind) -> &'static str {
    let limited = config.routing().capacity.is_some() && kind.front != FrontKind::Assignments;
    if limited { "kept_experts" } else { "topk_experts" }
}

/// Repeating the pass on the resident input does the same again.
fn front_is_kept(kind: PassKind, config: &MoeConfig) -> bool {
    kind == PassKind::default() && !config.routing().choices_are_given()
}

/// Adds the routing of the next pass of the same batch.
fn append(all: &mut RoutingDecision, part: RoutingDecision) {
    let first_token = all.num_tokens as u32;
    all.non_finite_tokens.extend(part.non_finite_tokens.into_iter().map(|t| first_token + t));
    all.num_tokens += part.num_tokens;
    all.topk_experts.extend(part.topk_experts);
    all.topk_weights.extend(part.topk_weights);
    all.router_logits.extend(part.router_logits);
    all.shared_weights.extend(part.shared_weights);
    all.num_dropped += part.num_dropped;
    all.over_capacity += part.over_capacity;
    for (sum, count) in all.tokens_per_expert.iter_mut().zip(part.tokens_per_expert) {
        *sum += count;
    }
}
