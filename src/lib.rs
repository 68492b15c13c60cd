//! Mixture-of-Experts layers as hand-written WGSL kernels, with a small runtime on wgpu, an embedded CPU engine, and
//! an f64 reference that says what is right.
//!
//! ```text
//!     x [num_tokens, hidden_size]
//!       └ router            logits, selection, weights                topk_experts, topk_weights [num_tokens, top_k]
//!           └ permute       assignments sorted by expert              one row for each choice of each token
//!               └ gate_up   grouped matmul, silu(x Wg^T) * (x Wu^T)   intermediate [num_rows, intermediate_size]
//!                   └ down  grouped matmul                            expert_out [num_rows, hidden_size]
//!                       └ combine  weighted sum for each token        y [num_tokens, hidden_size]
//! ```
//!
//! Nothing in a pass is read back to the host. A batch of up to 16 tokens takes four dispatches (it skips permute), a
//! single one mostly three (its down and combine are one), a larger batch five, and each further page of weights adds one.
//! What only some layers have adds its own: shared experts two, a latent space two, a capacity one, each norm one. A
//! layer's semantics are a [`MoeConfig`]: [`Routing`], [`Activation`] and [`LayerExtras`].
//!
//! # Example
//!
//! ```
//! use wgmoe::{Context, DeviceChoice, MoeConfig, MoeLayer, MoeWeights};
//!
//! let config = MoeConfig::builder(64, 32).num_experts(8).top_k(2).build()?; // hidden, intermediate
//! let numbers = |len: usize| (0..len).map(|n| (n * 7919 % 1009) as f32 / 504.5 - 1.0).collect::<Vec<f32>>();
//! let weights = MoeWeights {
//!     router: numbers(8 * 64),         // [experts, hidden]
//!     gate_proj: numbers(8 * 32 * 64), // [experts, intermediate, hidden]
//!     up_proj: numbers(8 * 32 * 64),
//!     down_proj: numbers(8 * 64 * 32), // [experts, hidden, intermediate]
//!     ..MoeWeights::default()
//! };
//! let context = Context::new(&DeviceChoice::Auto)?; // a GPU, or the CPU engine where there is none
//! let layer = MoeLayer::new(&context, config, &weights)?;
//! let y = layer.forward(&numbers(16 * 64))?; // sixteen tokens
//! assert_eq!(y.len(), 16 * 64);
//! # Ok::<(), wgmoe::Error>(())
//! ```
//!
//! Weights of a real model come from [`Checkpoint`]. A program that owns a `wgpu::Device` makes its [`Context`] with
//! [`Context::from_wgpu`] and puts the pass into its own encoder with [`MoeLayer::record`].
//!
//! # Where to look
//!
//! | for | read |
//! | --- | --- |
//! | what a layer computes, exactly | [`mod@reference`] |
//! | using a layer | [`MoeLayer`], [`LayerOptions`], [`Context`] |
//! | what a pass will do, without a GPU | [`plan`] |
//! | the kernels | [`kernels`], and `shaders/` in the repository |
//! | checkpoints and model families | [`Checkpoint`], [`Family`] |
//! | routers of every kind | [`model::routing`] |
//! | measuring | [`mod@bench`] |
//! | kernels chosen by measurement | [`mod@tune`] |
//!
//! # When not to use this
//!
//! - The model has one expert, or nearly all experts are chosen for every token: a dense matmul does the same work
//!   without a router and a sort.
//! - The program runs on one vendor's GPUs only and already depends on that vendor's libraries, which use matrix units
//!   that WGSL does not reach.
//! - Training. There is no backward pass.
//! - A whole model is needed. This is one layer: attention, normalisation and sampling are somebody else's.
//!
//! # Features
//!
//! `cli` (default) builds the `wgmoe` binary and what only it needs. A library user turns it off:
//! `wgmoe = { version = "0.1", default-features = false }`. `lint`, a part of it, is the module [`mod@lint`] alone.
// The examples in README.md are tested with the others.
#![cfg_attr(doctest, doc = include_str!("../README.md"))]
#![deny(missing_docs)]

mod atomic_file;
pub mod bench;
pub mod check;
pub mod context;
pub mod cpu;
pub mod error;
pub mod forecast;
pub mod golden;
pub mod gpu;
pub mod inspect;
pub mod kernels;
pub mod layer;
#[cfg(feature = "lint")]
pub mod lint;
pub mod model;
pub mod plan;
pub mod reference;
mod small_file;
pub mod trace;
pub mod tune;

pub use bench::roofline::{Roofline, dense_matmul_time, roofline};
pub use check::{
    CaseId, CheckKind, KernelCheck, LoadReport, LoadRequest, LoadSample, check_cases, check_determinism, check_exact,
    check_kernels, check_load, check_rows,
};
pub use context::Context;
pub use error::{Error, Result};
pub use gpu::{AdapterFacts, DeviceChoice, DeviceInfo, Fault, Gpu, PassStats, ResidencyStats, StageTime, adapters};
pub use kernels::matmul::{MatmulChoice, MatmulVariant};
pub use layer::{GpuMemory, LayerOptions, MoeLayer};
pub use model::activation::{Activation, Form, Function};
pub use model::batch::{Batch, Front};
pub use model::checkpoint::{Checkpoint, LayerSource, LoadedLayer};
pub use model::config::{LayerExtras, MoeConfig, MoeConfigBuilder, Norm, SharedExperts, SharedGate, SpecialKind};
pub use model::family::Family;
pub use model::formats::{IntGroups, LayerFormats, WeightFormat};
pub use model::routing::{
    Capacity, CapacityLimit, DROPPED, GroupScore, Groups, Masked, Noise, NonFinite, PassStatus, Priority, RankBy,
    Renormalize, Routing, RoutingDecision, Scores, Selection,
};
pub use model::statistics::Statistics;
pub use model::weights::{ExpertWeights, ExtraWeights, MoeWeights};
pub use plan::Plan;
pub use trace::{Trace, TraceLayer};
pub use tune::Tuning;
pub use wgpu;
