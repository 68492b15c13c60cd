//! Where layers run: an open GPU, or the embedded CPU engine.

use crate::error::Result;
use crate::gpu::{self, DeviceChoice, DeviceInfo, Gpu};

/// A device that layers can be built on. Cheap to clone; all clones are the same device.
#[derive(Clone)]
pub struct Context {
    engine: Engine,
    info: DeviceInfo,
    reason: String,
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").field("device", &self.info).field("reason", &self.reason).finish()
    }
}

/// Who computes.
#[derive(Clone)]
pub(crate) enum Engine {
    Gpu(Gpu),
    Cpu,
}

impl Context {
    /// Opens the device that `choice` means, with the limits that WebGPU guarantees: what runs here runs anywhere.
    /// Without any adapter, [`DeviceChoice::Auto`] is the embedded CPU engine.
    pub fn new(choice: &DeviceChoice) -> Result<Self> {
        pollster::block_on(Self::open(choice, false))
    }

    /// As [`Context::new`], with all that the adapter offers: larger pages and batches.
    pub fn with_all_limits(choice: &DeviceChoice) -> Result<Self> {
        pollster::block_on(Self::open(choice, true))
    }

    /// As [`Context::new`] (`all_limits` false) or [`Context::with_all_limits`], without blocking.
    pub async fn open(choice: &DeviceChoice, all_limits: bool) -> Result<Self> {
        let (adapters, mut reason) = gpu::adapter::select(choice).await?;
        for adapter in adapters {
            match Gpu::open(&adapter, all_limits).await {
                Ok(gpu) => return Ok(Self { info: gpu.info().clone(), engine: Engine::Gpu(gpu), reason }),
                // A driver that lists an adapter but cannot open it must not keep others from working.
                Err(error) if *choice == DeviceChoice::Auto => reason = format!("{error}; the next best is used"),
                Err(error) => return Err(error),
            }
        }
        Ok(Self { reason, ..Self::cpu() })
    }

    /// The embedded CPU engine.
    pub fn cpu() -> Self {
        let threads = rayon::current_num_threads();
        let info = DeviceInfo {
            name: format!("embedded CPU engine, {threads} threads"),
            backend: "cpu".to_owned(),
            driver: format!("wgmoe {}", env!("CARGO_PKG_VERSION")),
            kind: "cpu-engine".to_owned(),
        };
        Self { engine: Engine::Cpu, info, reason: "asked for".to_owned() }
    }

    /// A device that the caller opened. Layers share it: nothing is submitted behind the caller's back by
    /// [`MoeLayer::record`](crate::MoeLayer::record), and the caller's error and loss handlers stay in place.
    pub fn from_wgpu(device: gpu::Device, queue: gpu::Queue) -> Self {
        let gpu = Gpu::wrap(device, queue);
        let reason = "the caller's own device".to_owned();
        Self { info: gpu.info().clone(), engine: Engine::Gpu(gpu), reason }
    }

    /// Opens an adapter that the caller found, with the limits that WebGPU guarantees or all that it has. The device is
    /// this context's own.
    pub fn from_adapter(adapter: &gpu::Adapter, all_limits: bool) -> Result<Self> {
        let gpu = pollster::block_on(Gpu::open(adapter, all_limits))?;
        let reason = "the caller's own adapter".to_owned();
        Ok(Self { info: gpu.info().clone(), engine: Engine::Gpu(gpu), reason })
    }

    /// Name, backend, driver, kind.
    pub fn device(&self) -> &DeviceInfo {
        &self.info
    }

    /// Why this device, in words.
    pub fn choice_reason(&self) -> &str {
        &self.reason
    }

    /// The open GPU; `None` for the CPU engine.
    pub fn gpu(&self) -> Option<&Gpu> {
        match &self.engine {
            Engine::Gpu(gpu) => Some(gpu),
            Engine::Cpu => None,
        }
    }

    pub(crate) fn engine(&self) -> &Engine {
        &self.engine
    }
}
