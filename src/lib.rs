//! wgmoe
#![deny(missing_docs)]

pub mod bench;
pub mod check;
pub mod context;
pub mod cpu;
pub mod error;
pub mod golden;
pub mod gpu;
pub mod kernels;
pub mod layer;
pub mod model;
pub mod plan;
pub mod reference;

pub use bench::roofline::{Roofline, dense_matmul_time, roofline};
pub use check::{KernelCheck, check_kernels};
pub use context::Context;
pub use error::{Error, Result};
pub use gpu::{AdapterFacts, DeviceChoice, DeviceInfo, Gpu, PassStats, StageTime, adapters};
pub use kernels::matmul::{MatmulChoice, MatmulVariant};
pub use layer::{LayerOptions, MoeLayer};
pub use model::activation::Activation;
pub use model::checkpoint::{Checkpoint, LoadedLayer};
pub use model::config::MoeConfig;
pub use model::family::Family;
pub use model::routing::{Routing, RoutingDecision, Scores};
pub use model::weights::{MoeWeights, WeightFormat};
pub use plan::Plan;
pub use wgpu;
