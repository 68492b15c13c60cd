//! wgmoe
#![deny(missing_docs)]

pub mod cpu;
pub mod error;
pub mod model;
pub mod reference;

pub use error::{Error, Result};
pub use model::activation::Activation;
pub use model::config::MoeConfig;
pub use model::routing::{Routing, RoutingDecision, Scores};
pub use model::weights::{MoeWeights, WeightFormat};
