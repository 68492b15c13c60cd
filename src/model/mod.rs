//! What a layer is: its sizes, how it routes, its weights, and how a checkpoint stores them.
//! Nothing here knows that GPUs exist.

pub mod activation;
pub mod batch;
pub mod checkpoint;
pub mod config;
pub mod family;
pub mod formats;
mod gguf;
pub(crate) mod host_copy;
pub(crate) mod layer_reader;
mod model_config;
pub(crate) mod noise;
pub mod quantize;
pub mod routing;
pub(crate) mod source;
pub mod statistics;
pub(crate) mod stored;
pub(crate) mod tensor_file;
mod tensor_header;
pub mod weights;
