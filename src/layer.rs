//! The layer as a program uses it: load, forward, record.

use crate::context::{Context, Engine};
use crate::cpu::CpuLayer;
use crate::error::{Error, Result};
use crate::gpu::context::lock;
use crate::gpu::layer::GpuLayer;
use crate::gpu::{Buffer, CommandEncoder, PassStats, StageTime};
use crate::kernels::matmul::{MatmulChoice, MatmulVariant};
use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::routing::RoutingDecision;
use crate::model::weights::{MoeWeights, WeightFormat, check_finite};
use crate::plan::{DeviceProfile, LayerPlan, MatmulRequest, Plan};
use std::sync::Mutex;
use std::time::{Duration, Instant};

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
}

/// One MoE layer, resident on a device.
///
/// ```
/// use wgmoe::{Activation, Context, DeviceChoice, MoeConfig, MoeLayer, MoeWeights, Routing, Scores};
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
        let engine = match context.engine() {
            Engine::Gpu(gpu) => {
                let mut device = gpu.profile().clone();
                if let Some(most) = options.max_binding_bytes {
                    device.max_storage_binding = device.max_storage_binding.min(most);
                }
                let request = MatmulRequest { variant: options.matmul, choice: options.tile };
                let plan = LayerPlan::new(&config, options.weights, &device, &request)?;
                LayerEngine::Gpu(Box::new(gpu.explain(GpuLayer::new(gpu, plan, weights).await)?))
            }
            Engine::Cpu => {
                let layer = CpuLayer::new(config.clone(), weights, options.weights)?;
                LayerEngine::Cpu(Box::new(CpuState { layer, last: Mutex::default() }))
            }
        };
        Ok(Self { config, options: options.clone(), engine })
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
    /// touching the device; NaN and infinities in `x`, or router logits that are not finite, are errors.
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
        let num_tokens = self.check_input(x)?;
        if y.len() != x.len() {
            let shape = format!("[{num_tokens}, {}]", self.config.hidden_size());
            return Err(Error::LengthMismatch { tensor: "y", shape, expected: x.len(), found: y.len() });
        }
        match &self.engine {
            LayerEngine::Gpu(layer) if num_tokens > 0 => layer.gpu().explain(layer.forward(x, y).await),
            LayerEngine::Gpu(layer) => {
                layer.forward_nothing().await;
                Ok(())
            }
            LayerEngine::Cpu(cpu) => {
                let routing = cpu.layer.forward_into(x, y)?;
                let mut last = lock(&cpu.last);
                last.num_tokens = num_tokens;
                last.routing = Some(routing);
                Ok(())
            }
        }
    }

    /// Puts the pass into the caller's encoder: no submit, no wait, no readback. `x` and `y` are storage buffers of at
    /// least `num_tokens * hidden_size` f32 values. What a NaN or an infinity in `x` makes of its token's row is that
    /// row's NaN: nobody looks at it here. Zero tokens record nothing.
    ///
    /// The layer's scratch buffers are shared by all passes recorded with it, so submit encoders in the order in which
    /// they were recorded, all on the queue the context was made from.
    pub fn record(&self, encoder: &mut CommandEncoder, x: &Buffer, y: &Buffer, num_tokens: u32) -> Result<()> {
        match &self.engine {
            _ if num_tokens == 0 => Ok(()),
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.record(encoder, x, y, num_tokens))),
            LayerEngine::Cpu(_) => Err(Error::Unsupported {
                what: "recording into an encoder".to_owned(),
                by: "by the embedded CPU engine".to_owned(),
                hint: "call forward".to_owned(),
            }),
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

    /// Makes `x [num_tokens, hidden_size]` the resident input of [`MoeLayer::run_resident`] and
    /// [`MoeLayer::profile`].
    pub fn upload(&self, x: &[f32]) -> Result<()> {
        let num_tokens = self.check_input(x)?;
        if num_tokens == 0 {
            return Err(Error::config("num_tokens", 0, "at least 1 for a resident input"));
        }
        match &self.engine {
            LayerEngine::Gpu(layer) => layer.gpu().explain(pollster::block_on(layer.upload(x))),
            LayerEngine::Cpu(cpu) => {
                let mut last = lock(&cpu.last);
                *last = CpuLast { x: x.to_vec(), y: vec![0.0; x.len()], num_tokens, routing: None };
                Ok(())
            }
        }
    }

    /// Wall time of one whole forward on the resident input and weights, router included, from the start of recording
    /// to the end of the last dispatch.
    pub fn run_resident(&self) -> Result<Duration> {
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
    /// running the stages one by one.
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
            LayerEngine::Cpu(_) => {
                let device = DeviceProfile { max_storage_binding: u64::MAX, ..DeviceProfile::webgpu_floor() };
                LayerPlan::new(&self.config, self.options.weights, &device, &MatmulRequest::default())?.plan(num_tokens)
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

    /// Number of tokens in `x`, whose values are all finite.
    fn check_input(&self, x: &[f32]) -> Result<u32> {
        let h = self.config.hidden_size() as usize;
        if !x.len().is_multiple_of(h) || u32::try_from(x.len() / h).is_err() {
            let shape = format!("[num_tokens, {h}]");
            let expected = x.len().div_ceil(h) * h;
            return Err(Error::LengthMismatch { tensor: "x", shape, expected, found: x.len() });
        }
        check_finite("x", x)?;
        Ok((x.len() / h) as u32)
    }
}
