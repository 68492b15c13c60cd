//! Stage 3: each expert's first projections and its activation. See `shaders/gate_up.wgsl`.

use super::matmul::MatmulChoice;
use super::{Access, Input, Kernel, Part, Stage, bind, wgsl};
use crate::model::activation::Activation;
use crate::model::weights::WeightFormat;

/// The grouped matmul `choice` with gathered input and fused activation.
pub fn kernel(choice: MatmulChoice, format: WeightFormat, activation: Activation, input: Input) -> Kernel {
    let activation: Part = match activation {
        _ => wgsl!("activation_swiglu"),
    };
    let mut kernel = choice.kernel(Stage::GateUp, format, input, &[activation, wgsl!("gate_up")]);
    kernel.bindings.push(bind(5, "intermediate", Access::Write)); // [num_rows, intermediate_size padded to 4]
    kernel
}
