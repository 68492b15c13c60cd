//! wgmoe
#![deny(missing_docs)]

pub mod error;
pub mod golden;
pub mod model;
pub mod reference;

pub use error::{Error, Result};
pub use model::activation::Activation;
pub use model::checkpoint::{Checkpoint, LoadedLayer};
pub use model::config::MoeConfig;
pub use model::family::Family;
pub use model::routing::{Routing, RoutingDecision, Scores};
pub use model::weights::{MoeWeights, WeightFormat};
