//! What a layer is: its sizes, how it routes, its weights, and how a checkpoint stores them.
//! Nothing here knows that GPUs exist.

pub mod activation;
pub mod config;
pub mod routing;
pub mod weights;
