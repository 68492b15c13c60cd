//! Stage 4: each expert's second projection. See `shaders/down.wgsl`.

use super::matmul::MatmulChoice;
use super::{Access, Input, Kernel, Stage, bind, wgsl};
use crate::model::weights::WeightFormat;

/// The grouped matmul `choice` on the rows of `intermediate`, whose stride is always a multiple of 4.
pub fn kernel(choice: MatmulChoice, format: WeightFormat) -> Kernel {
    let mut kernel = choice.kernel(Stage::Down, format, Input::Vec4, &[wgsl!("down")]);
    kernel.bindings.push(bind(5, "expert_out", Access::Write)); // [num_rows, hidden_size padded to 4]
    kernel
}
