//! The only door to wgpu: devices, buffers, pipelines, recording, waiting.
//!
//! Knows kernels and plans; does not know what a layer means. Everything that can block is `async` with a thin blocking
//! wrapper elsewhere, so that the same code can run in a browser.

pub mod adapter;
pub mod context;
pub mod fault;
pub(crate) mod harness;
pub mod layer;
pub mod pipeline;
mod probe;
pub mod recorder;
pub mod weights;

pub use adapter::{AdapterFacts, DeviceChoice, DeviceInfo, adapters};
pub use context::Gpu;
pub use fault::Fault;
pub use layer::ResidencyStats;
pub(crate) use probe::Yard;
pub use recorder::{PassStats, StageTime};

/// wgpu's types that appear in this crate's interface.
pub use wgpu::{Adapter, Buffer, CommandEncoder, Device, Queue};
