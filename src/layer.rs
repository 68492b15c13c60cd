//! The layer as a program uses it: load, forward, record.

use crate::context::{Context, Engine};
use crate::cpu::{self, CpuLayer};
use crate::error::{Error, Result};
use crate::gpu::context::lock;
use crate::gpu::layer::{Edit, GpuLayer, RecordedFront, Recording, SetAside};
use crate::gpu::{Buffer, CommandEncoder, PassStats, ResidencyStats, StageTime};
use crate::kernels::matmul::{MatmulChoice, MatmulVariant};
use crate::model::batch::{Batch, Front};
use crate::model::checkpoint::LayerSource;
use crate::model::config::MoeConfig;
use crate::model::formats::{LayerFormats, WeightFormat};
use crate::model::host_copy::{HostCopy, Keeping};
use crate::model::routing::{NonFinite, PassStatus, RoutingDecision};
use crate::model::source::{ExpertSource, HostSource};
use crate::model::statistics::Statistics;
use crate::model::weights::{ExpertWeights, MoeWeights, OptionalTensors};
use crate::plan::{DeviceBytes, DeviceProfile, LayerPlan, MatmulRequest, Plan, TunedChoices};
use crate::tune::Tuning;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tracing::{Instrument, debug_span};

/// Choices that are not part of what the layer computes.
#[derive(Clone, Debug, Default)]
pub struct LayerOptions {
    /// How expert weights are stored on the device.
    pub weights: WeightFormat,
    /// The grouped matmul's variant whatever the batch; then a token's result has the same bits in every batch.
    /// `None` lets the plan decide by rows per expert.
    pub matmul: Option<MatmulVariant>,
    /// Exact tile sizes; for tests and tuning.
    pub tile: Option<MatmulChoice>,
    /// Pretend that no binding may be larger than this, in bytes: weights and batches are cut accordingly.
    pub max_binding_bytes: Option<u64>,
    /// GPU memory for the weights of routed experts. There is nothing to bring in for the CPU engine.
    pub gpu_memory: GpuMemory,
    /// What becomes of tokens whose router logits are NaN or infinite.
    pub non_finite: NonFinite,
    /// Keep a copy of the weights on the host, packed as on the device, from which [`MoeLayer::recover`] rebuilds the
    /// layer.
    pub recoverable: bool,
    /// Experts that stay on the GPU, if not all do. One place has to be left for others.
    pub pinned_experts: Vec<u32>,
    /// Choices that were measured on this very device: where one fits a pass, it goes before the plan's table. `matmul`
    /// and `tile` go before it. The library reads no file by itself, so that results do not depend on what somebody once
    /// stored: a program that wants what `wgmoe tune` stored asks for it with [`Tuning::for_context`]. The CPU engine has
    /// nothing to choose.
    pub tuning: Option<Arc<Tuning>>,
}

/// What routed experts may take of a GPU's memory. If they do not all fit, they stay on the host and are brought in as
/// tokens are routed to them. Each pass then waits for its router's choices to be read back, and cannot be recorded
/// into the caller's encoder; results keep their bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GpuMemory {
    /// They have to fit; if not, loading the layer is [`Error::OutOfMemory`].
    #[default]
    All,
    /// As many as the device has memory for, found by allocating it, less an eighth for everything else.
    Available,
    /// As many as fit this many bytes.
    Bytes(u64),
}

/// One MoE layer, resident on a device.
///
/// ```
/// use wgmoe::{Activation, Context, DeviceChoice, MoeConfig, MoeLayer, MoeWeights, Routing};
///
/// let routing = Routing::softmax(true);
/// let config = MoeConfig::new(8, 4, 2, 1, routing, Activation::SWIGLU)?; // hidden, intermediate, experts, top-k
/// let weights = MoeWeights {
///     router: vec![0.1; 2 * 8],
///     router_bias: None,
///     gate_proj: vec![0.1; 2 * 4 * 8],
///     up_proj: vec![0.1; 2 * 4 * 8],
///     down_proj: vec![0.1; 2 * 8 * 4],
///     ..MoeWeights::default()
/// };
/// let context = Context::new(&DeviceChoice::Auto)?;
/// let layer = MoeLayer::new(&context, config, &weights)?;
/// let y = layer.forward(&[1.0; 3 * 8])?; // three tokens
/// assert_eq!(y.len(), 3 * 8);
/// # Ok::<(), wgmoe::Error>(())
/// ```
pub struct MoeLayer {
    config: MoeConfig,
    options: LayerOptions,
    engine: LayerEngine,
    host: Option<HostCopy>,
}

enum LayerEngine {
    Gpu(Box<GpuLayer>),
    Cpu(Box<CpuState>),
}

struct CpuState {
    layer: CpuLayer,
    last: Mutex<CpuLast>,
}

/// What the CPU engine remembers between calls.
#[derive(Default)]
struct CpuLast {
    x: Vec<f32>,
    y: Vec<f32>,
    num_tokens: u32,
    tokens_per_sequence: Option<u32>,
    routing: Option<RoutingDecision>,
}

impl MoeLayer {
    /// A layer with f32 weights. Checks every length and value of `weights` first.
    pub fn new(context: &Context, config: MoeConfig, weights: &MoeWeights) -> Result<Self> {
        Self::with_options(context, config, weights, &LayerOptions::default())
    }

    /// A layer with choices.
    pub fn with_options(
        context: &Context,
        config: MoeConfig,
        weights: &MoeWeights,
        options: &LayerOptions,
    ) -> Result<Self> {
        pollster::block_on(Self::create(context, config, weights, options))
    }

    /// As [`MoeLayer::with_options`], without blocking.
    pub async fn create(
        context: &Context,
        config: MoeConfig,
        weights: &MoeWeights,
        options: &LayerOptions,
    ) -> Result<Self> {
        weights.validate(&config, options.weights)?;
        let mut source = HostSource { config: &config, weights, formats: options.weights.into() };
        let span = load_span(&config);
        Self::from_source(context, config.clone(), weights, &mut source, options, &mut |_, _| {}).instrument(span).await
    }

    /// A layer of a checkpoint, in the formats that `layer` says ([`LayerSource::formats`]; `options.weights` does not
    /// count). Experts go to the device as they are read, one by one, so the host needs room for few of them.
    /// `progress(done, total)` is told of their bytes.
    ///
    /// # Errors
    /// What is wrong with the files; a device without the memory.
    pub fn load(
        context: &Context,
        layer: &mut LayerSource<'_>,
        options: &LayerOptions,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        let config = layer.config().clone();
        let (weights, mut source) = layer.parts()?;
        let span = load_span(&config);
        let load = Self::from_source(context, config, weights, &mut source, options, &mut progress);
        pollster::block_on(load.instrument(span))
    }

    async fn from_source(
        context: &Context,
        config: MoeConfig,
        weights: &MoeWeights,
        source: &mut dyn ExpertSource,
        options: &LayerOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let experts = config.num_experts();
        if !options.recoverable {
            let engine = Self::engine(context, &config, experts, weights, source, options, progress).await?;
            return Ok(Self { config, options: options.clone(), engine, host: None });
        }
        let copy = HostCopy::new(weights, source.formats(), experts);
        let mut source = Keeping { source, copy };
        let engine = Self::engine(context, &config, experts, weights, &mut source, options, progress).await?;
        Ok(Self { config, options: options.clone(), engine, host: Some(source.copy) })
    }

    /// The layer on its device, with kernels as for `nominal_experts`.
    async fn engine(
        context: &Context,
        config: &MoeConfig,
        nominal_experts: u32,
        weights: &MoeWeights,
        source: &mut dyn ExpertSource,
        options: &LayerOptions,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<LayerEngine> {
        Ok(match context.engine() {
            Engine::Gpu(gpu) => {
                let mut device = gpu.profile().clone();
                if let Some(most) = options.max_binding_bytes {
                    device.max_storage_binding = device.max_storage_binding.min(most);
                }
                let tuned = options.tuning.as_ref().map(|tuning| tuning.choices_for(gpu.info())).transpose()?;
                let request = MatmulRequest { variant: options.matmul, choice: options.tile, tuned };
                let tensors = OptionalTensors::of(weights);
                let formats = source.formats();
                let plan = LayerPlan::with_tensors(config, tensors, formats, &device, &request, nominal_experts)?;
                let plan = plan.with_non_finite(options.non_finite)?;
                let total = plan.matrices().iter().map(|matrix| matrix.bytes()).sum();
                let most = match options.gpu_memory {
                    GpuMemory::All => None,
                    GpuMemory::Available => gpu.room_for_experts(&plan).await?,
                    GpuMemory::Bytes(bytes) => Some(bytes),
                };
                let plan = match most {
                    Some(bytes) => plan.with_gpu_memory(bytes)?,
                    None => plan,
                };
                let mut show = |done| progress(done, total);
                let layer = GpuLayer::new(gpu, plan, weights, source, &options.pinned_experts, &mut show).await;
                LayerEngine::Gpu(Box::new(gpu.explain(layer)?))
            }
            Engine::Cpu => {
                let mut layer = CpuLayer::from_source(config.clone(), weights, source, progress)?;
                layer.set_non_finite(options.non_finite);
                LayerEngine::Cpu(Box::new(CpuState { layer, last: Mutex::default() }))
            }
        })
    }

    /// Builds the layer again on another context, after [`Error::DeviceLost`]: with the weights that it has now, added,
    /// removed and replaced experts included, and the kernels that it had, so that results on the same kind of device
    /// have the same bits. What the last pass left (routing, statistics, a resident input) is gone.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the layer was not built with [`LayerOptions::recoverable`]; those of building it. The
    /// layer stays as it was then.
    pub fn recover(&mut self, context: &Context) -> Result<()> {
        let Some(host) = &self.host else {
            return Err(Error::Unsupported {
                what: "recovering".to_owned(),
                by: "by a layer that keeps no copy of its weights on the host".to_owned(),
                hint: "build it with LayerOptions::recoverable, or build a new one from its weights".to_owned(),
            });
        };
        let (config, mut source) = (&self.config, host);
        let (nominal, weights, options) = (host.nominal_experts, &host.weights, &self.options);
        let span = load_span(config);
        let mut silent = |_, _| {};
        let engine = Self::engine(context, config, nominal, weights, &mut source, options, &mut silent);
        self.engine = pollster::block_on(engine.instrument(span))?;
        Ok(())
    }

    /// Another plan for this layer, with other measured choices; [`MoeLayer::exchange`] puts it in force.
    pub(crate) fn with_tuned(&self, tuned: Arc<TunedChoices>) -> Result<SetAside> {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.with_tuned(tuned),
            LayerEngine::Cpu(_) => Err(nothing_to_tune()),
        }
    }

    /// Runs by the other plan from now on, and sets the present one aside. Weights stay where they are.
    pub(crate) fn exchange(&mut self, other: &mut SetAside) {
        if let LayerEngine::Gpu(layer) = &mut self.engine {
            layer.exchange(other);
        }
    }

    /// How its experts are stored.
    pub fn formats(&self) -> LayerFormats {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.plan().formats(),
            LayerEngine::Cpu(cpu) => cpu.layer.formats(),
        }
    }

    /// Bytes of weight matrices on the device, as they are stored there.
    pub fn weight_bytes(&self) -> u64 {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.plan().matrices().iter().map(|matrix| matrix.bytes()).sum(),
            LayerEngine::Cpu(cpu) => cpu.layer.weight_bytes(),
        }
    }

    /// Bytes that it keeps on its device by now: those of [`LayerPlan::allocations`] once it has seen a batch. The CPU
    /// engine's are the weights of experts.
    pub fn device_bytes(&self) -> DeviceBytes {
        match &self.engine {
            LayerEngine::Gpu(layer) => pollster::block_on(layer.device_bytes()),
            LayerEngine::Cpu(_) => DeviceBytes { weights: self.weight_bytes(), ..DeviceBytes::default() },
        }
    }

    /// What bringing experts in has cost so far; `None`: all are on the device ([`LayerOptions::gpu_memory`]).
    pub fn residency(&self) -> Option<ResidencyStats> {
        match &self.engine {
            LayerEngine::Gpu(layer) => pollster::block_on(layer.residency()),
            LayerEngine::Cpu(_) => None,
        }
    }

    /// The layer's sizes and semantics.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The choices it was built with.
    pub fn options(&self) -> &LayerOptions {
        &self.options
    }

    /// `x [num_tokens, hidden_size]` to `y [num_tokens, hidden_size]`. Zero tokens give an empty result without
    /// touching the device; NaN and infinities in `x`, or router logits that are not finite, are errors unless
    /// [`LayerOptions::non_finite`] says otherwise.
    pub fn forward(&self, x: &[f32]) -> Result<Vec<f32>> {
        let mut y = vec![0.0; x.len()];
        self.forward_into(x, &mut y)?;
        Ok(y)
    }

    /// As [`MoeLayer::forward`], into `y [num_tokens, hidden_size]`. Once it has seen a batch size, it allocates
    /// nothing on the device.
    pub fn forward_into(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        pollster::block_on(self.forward_async(x, y))
    }

    /// As [`MoeLayer::forward_into`], without blocking.
    pub async fn forward_async(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        self.forward_batch_async(&Batch::from(x), y).await
    }

    /// As [`MoeLayer::forward`], for a batch that brings more than activations: token ids, given experts, sequences of
    /// a length, a seed for the router's noise, logits or assignments.
    ///
    /// # Errors
    /// Those of [`Batch::check`]; logits that are not finite; what the device reports.
    pub fn forward_batch(&self, batch: &Batch<'_>) -> Result<Vec<f32>> {
        let mut y = vec![0.0; batch.x.len()];
        pollster::block_on(self.forward_batch_async(batch, &mut y))?;
        Ok(y)
    }

    /// The layer behind a router of the caller's: `logits [num_tokens, num_experts]`, after scale and cap. Scores,
    /// selection, weights and capacity are the layer's.
    pub fn forward_with_logits(&self, x: &[f32], logits: &[f32]) -> Result<Vec<f32>> {
        self.forward_batch(&Batch { front: Front::Logits(logits), ..Batch::from(x) })
    }

    /// The layer without its router: `experts` and `weights`, each `[num_tokens, top_k]`, are final. -1 is nobody, and
    /// contributes nothing.
    pub fn forward_with_assignments(&self, x: &[f32], experts: &[i32], weights: &[f32]) -> Result<Vec<f32>> {
        self.forward_batch(&Batch { front: Front::Assignments { experts, weights }, ..Batch::from(x) })
    }

    /// As [`MoeLayer::forward_batch`], into `y [num_tokens, hidden_size]`, without blocking.
    pub async fn forward_batch_async(&self, batch: &Batch<'_>, y: &mut [f32]) -> Result<()> {
        let num_tokens = batch.check_for(&self.config, self.options.non_finite)?;
        let span = debug_span!("forward", num_tokens);
        self.forward_checked(batch, num_tokens, y).instrument(span).await?;
        self.fill_non_finite_rows(batch.x, y);
        Ok(())
    }

    /// A token that is NaN or infinite itself, where that is no error. The router has marked it, if it looked at it.
    fn fill_non_finite_rows(&self, x: &[f32], y: &mut [f32]) {
        let Some(value) = self.options.non_finite.row_value() else { return };
        let h = self.config.hidden_size() as usize;
        for (x, y) in x.chunks_exact(h).zip(y.chunks_exact_mut(h)) {
            if x.iter().any(|v| !v.is_finite()) {
                y.fill(value);
            }
        }
    }

    async fn forward_checked(&self, batch: &Batch<'_>, num_tokens: u32, y: &mut [f32]) -> Result<()> {
        if y.len() != batch.x.len() {
            let shape = format!("[{num_tokens}, {}]", self.config.hidden_size());
            return Err(Error::LengthMismatch { tensor: "y", shape, expected: batch.x.len(), found: y.len() });
        }
        match &self.engine {
            LayerEngine::Gpu(layer) if num_tokens > 0 => layer.gpu().explain(layer.forward(batch, y).await),
            LayerEngine::Gpu(layer) => {
                layer.forward_nothing().await;
                Ok(())
            }
            LayerEngine::Cpu(cpu) => {
                let routing = cpu.layer.forward_batch(batch, y)?;
                let mut last = lock(&cpu.last);
                last.num_tokens = num_tokens;
                last.tokens_per_sequence = batch.tokens_per_sequence;
                last.routing = Some(routing);
                Ok(())
            }
        }
    }

    /// Puts the pass into the caller's encoder: no submit, no wait, no readback. `x` and `y` are storage buffers of at
    /// least `num_tokens * hidden_size` f32 values. What a NaN or an infinity in `x` makes of its token's row is that
    /// row's NaN: nobody looks at it here. Zero tokens record nothing. The router's noise is off.
    ///
    /// The layer's scratch buffers are shared by all passes recorded with it, so submit encoders in the order in which
    /// they were recorded, all on the queue the context was made from.
    pub fn record(&self, encoder: &mut CommandEncoder, x: &Buffer, y: &Buffer, num_tokens: u32) -> Result<()> {
        self.record_front(encoder, Recording { x, y, num_tokens, front: RecordedFront::Router })
    }

    /// As [`MoeLayer::record`], for a layer whose choices are given: `ids` holds token ids `[num_tokens]` (u32) for a
    /// token table, or experts `[num_tokens, top_k]` (i32, -1 for nobody). Ids out of range are nobody. The buffer has
    /// to allow `COPY_SRC`.
    pub fn record_with_ids(
        &self,
        encoder: &mut CommandEncoder,
        x: &Buffer,
        ids: &Buffer,
        y: &Buffer,
        num_tokens: u32,
    ) -> Result<()> {
        self.record_front(encoder, Recording { x, y, num_tokens, front: RecordedFront::Ids(ids) })
    }

    /// As [`MoeLayer::record`], behind a router of the caller's: `logits [num_tokens, num_experts]` as in
    /// [`MoeLayer::forward_with_logits`], in a buffer that allows `COPY_SRC`.
    pub fn record_with_logits(
        &self,
        encoder: &mut CommandEncoder,
        x: &Buffer,
        logits: &Buffer,
        y: &Buffer,
        num_tokens: u32,
    ) -> Result<()> {
        self.record_front(encoder, Recording { x, y, num_tokens, front: RecordedFront::Logits(logits) })
    }

    /// As [`MoeLayer::record`], without the layer's router: `experts` (i32) and `weights` as in
    /// [`MoeLayer::forward_with_assignments`], in buffers that allow `COPY_SRC`. Experts out of range are nobody.
    pub fn record_with_assignments(
        &self,
        encoder: &mut CommandEncoder,
        x: &Buffer,
        [experts, weights]: [&Buffer; 2],
        y: &Buffer,
        num_tokens: u32,
    ) -> Result<()> {
        let front = RecordedFront::Assignments { experts, weights };
        self.record_front(encoder, Recording { x, y, num_tokens, front })
    }

    fn record_front(&self, encoder: &mut CommandEncoder, recording: Recording<'_>) -> Result<()> {
        let _span = debug_span!("record", num_tokens = recording.num_tokens).entered();
        match &self.engine {
            _ if recording.num_tokens == 0 => Ok(()),
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.record(encoder, &recording))),
            LayerEngine::Cpu(_) => Err(Error::Unsupported {
                what: "recording into an encoder".to_owned(),
                by: "by the embedded CPU engine".to_owned(),
                hint: "call forward".to_owned(),
            }),
        }
    }

    /// Adds an expert after the others that have weights, and returns its id; experts without weights move up by one.
    /// The others stay as they are, on the device, and the kernels too: results of tokens whose choices and weights do
    /// not depend on the new expert keep their bits. What a softmax over all experts says of the others does depend on
    /// it, unless it is divided by its sum over the chosen ones.
    ///
    /// # Errors
    /// Tensors that do not fit; a layer that cannot have one more: token tables, groups that would no longer divide, the
    /// most experts. Nothing changes then.
    pub fn add_expert(&mut self, expert: &ExpertWeights) -> Result<u32> {
        let id = self.config.num_weighted_experts();
        self.edit(Edit::Add(expert))?;
        Ok(id)
    }

    /// Takes an expert out; those after it move down by one. As for [`MoeLayer::add_expert`], the others stay.
    pub fn remove_expert(&mut self, id: u32) -> Result<()> {
        self.edit(Edit::Remove(id))
    }

    /// Puts another expert in the place of this one.
    pub fn replace_expert(&mut self, id: u32, expert: &ExpertWeights) -> Result<()> {
        self.edit(Edit::Replace(id, expert))
    }

    fn edit(&mut self, edit: Edit<'_>) -> Result<()> {
        let before = self.config.clone();
        let change = self.host.as_ref().map(|host| host.prepare(&before, edit.parts(&before))).transpose()?;
        match &mut self.engine {
            LayerEngine::Gpu(layer) => {
                let result = pollster::block_on(layer.edit(edit));
                layer.gpu().explain(result)?;
                self.config = layer.plan().config().clone();
            }
            LayerEngine::Cpu(cpu) => {
                match edit {
                    Edit::Add(expert) => cpu.layer.add_expert(expert).map(drop),
                    Edit::Remove(id) => cpu.layer.remove_expert(id),
                    Edit::Replace(id, expert) => cpu.layer.replace_expert(id, expert),
                }?;
                self.config = cpu.layer.config().clone();
                *lock(&cpu.last) = CpuLast::default();
            }
        }
        if let (Some(host), Some(change)) = (&mut self.host, change) {
            host.apply(&before, change);
        }
        Ok(())
    }

    /// How evenly the last forward, or the last recorded pass once it was submitted, used its experts: load-balancing
    /// losses, router z-loss, entropy, dropped assignments. On a GPU the sums are made there, and read back.
    pub fn statistics(&self) -> Result<Statistics> {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.statistics())),
            LayerEngine::Cpu(cpu) => {
                let last = lock(&cpu.last);
                let Some(routing) = &last.routing else { return Ok(Statistics::default()) };
                let tokens = last.tokens_per_sequence.unwrap_or(last.num_tokens) as usize;
                Ok(cpu::statistics(&self.config, routing, tokens))
            }
        }
    }

    /// Compiles and allocates what batches of `num_tokens` tokens need, so that the first one costs no more than the
    /// others.
    pub async fn prepare(&self, num_tokens: u32) -> Result<()> {
        match &self.engine {
            LayerEngine::Gpu(layer) if num_tokens > 0 => layer.gpu().explain(layer.prepare(num_tokens).await),
            _ => Ok(()),
        }
    }

    /// Who got which expert in the last forward, or in the last recorded pass once it was submitted. Reads back from
    /// the device.
    pub fn routing(&self) -> Result<RoutingDecision> {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.routing())),
            LayerEngine::Cpu(cpu) => Ok(lock(&cpu.last).routing.clone().unwrap_or_else(|| RoutingDecision {
                tokens_per_expert: vec![0; self.config.num_experts() as usize],
                ..RoutingDecision::default()
            })),
        }
    }

    /// What the last forward counted, or the last recorded pass once it was submitted: tokens without finite logits,
    /// assignments beyond a capacity. Passes count as they go; only after recorded and resident ones does asking read
    /// back from the device.
    pub fn status(&self) -> Result<PassStatus> {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.status())),
            LayerEngine::Cpu(cpu) => {
                let last = lock(&cpu.last);
                let non_finite = last.routing.as_ref().map_or(0, |routing| routing.non_finite_tokens.len());
                let over_capacity = last.routing.as_ref().map_or(0, |routing| routing.over_capacity);
                Ok(PassStatus { non_finite_tokens: non_finite as u32, over_capacity })
            }
        }
    }

    /// Makes `x [num_tokens, hidden_size]` the resident input of [`MoeLayer::run_resident`] and
    /// [`MoeLayer::profile`].
    pub fn upload(&self, x: &[f32]) -> Result<()> {
        if self.config.routing().choices_are_given() {
            return Err(Error::Unsupported {
                what: "a resident input".to_owned(),
                by: format!("by a layer whose choices are {:?}", self.config.routing().selection),
                hint: "call forward_batch, or record_with_ids".to_owned(),
            });
        }
        let num_tokens = Batch::from(x).check_for(&self.config, self.options.non_finite)?;
        if num_tokens == 0 {
            return Err(Error::config("num_tokens", 0, "at least 1 for a resident input"));
        }
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.upload(x))),
            LayerEngine::Cpu(cpu) => {
                let mut last = lock(&cpu.last);
                let y = vec![0.0; x.len()];
                *last = CpuLast { x: x.to_vec(), y, num_tokens, ..CpuLast::default() };
                Ok(())
            }
        }
    }

    /// Wall time of one whole forward on the resident input and weights, router included, from the start of recording
    /// to the end of the last dispatch.
    pub fn run_resident(&self) -> Result<Duration> {
        let _span = debug_span!("forward", resident = true).entered();
        let start = Instant::now();
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.run_resident()))?,
            LayerEngine::Cpu(cpu) => {
                let CpuLast { x, y, routing, .. } = &mut *lock(&cpu.last);
                *routing = Some(cpu.layer.forward_into(x, y)?);
            }
        }
        Ok(start.elapsed())
    }

    /// Seconds of each stage of one pass on the resident input: by GPU timestamps where there are any, otherwise by
    /// running the stages one by one. Empty where experts are brought in ([`LayerOptions::gpu_memory`]): what a stage
    /// takes then depends on what was there before.
    pub fn profile(&self) -> Result<Vec<StageTime>> {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.profile())),
            LayerEngine::Cpu(cpu) => {
                let CpuLast { x, y, .. } = &mut *lock(&cpu.last);
                let (_, times) = cpu.layer.forward_profiled(&Batch::from(&x[..]), y)?;
                let stage = |(name, time): (_, Duration)| StageTime { name, seconds: time.as_secs_f64() };
                Ok(times.into_iter().map(stage).collect())
            }
        }
    }

    /// What the last pass did, as it was counted. The CPU engine dispatches nothing.
    pub fn pass_stats(&self) -> PassStats {
        match &self.engine {
            LayerEngine::Gpu(layer) => pollster::block_on(layer.last()),
            LayerEngine::Cpu(cpu) => PassStats { num_tokens: lock(&cpu.last).num_tokens, ..PassStats::default() },
        }
    }

    /// The plan of a pass over `num_tokens` tokens. For the CPU engine, that of a device with WebGPU's limits: its
    /// costs are the same.
    pub fn plan(&self, num_tokens: u32) -> Result<Plan> {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.plan().plan(num_tokens),
            LayerEngine::Cpu(cpu) => {
                let device = DeviceProfile { max_storage_binding: u64::MAX, ..DeviceProfile::webgpu_floor() };
                LayerPlan::new(&self.config, cpu.layer.formats(), &device, &MatmulRequest::default())?.plan(num_tokens)
            }
        }
    }

    /// Passes that a batch of `num_tokens` tokens takes: more than one where the device's buffers are too small.
    pub fn num_passes(&self, num_tokens: u32) -> usize {
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.plan().passes(num_tokens).count(),
            LayerEngine::Cpu(_) => usize::from(num_tokens > 0),
        }
    }
}

fn load_span(config: &MoeConfig) -> tracing::Span {
    debug_span!("load", hidden_size = config.hidden_size(), num_experts = config.num_experts())
}

/// The CPU engine has one kernel.
pub(crate) fn nothing_to_tune() -> Error {
    Error::Unsupported {
        what: "tuning".to_owned(),
        by: "by the embedded CPU engine, which has one kernel and nothing to choose".to_owned(),
        hint: "choose an adapter; `wgmoe info` lists them".to_owned(),
    }
}
