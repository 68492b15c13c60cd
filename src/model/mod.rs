//! What a layer is: its sizes, how it routes, its weights, and how a checkpoint stores them.
//! Nothing here knows that GPUs exist.

pub mod activation;
pub mod checkpoint;
pub mod config;
pub mod family;
mod model_config;
pub mod routing;
pub(crate) mod tensor_file;
mod tensor_header;
pub mod weights;
