//! Stage 4: each expert's second projection, and any other. See `shaders/down.wgsl`.

use super::matmul::{MatmulChoice, Tiles};
use super::{Access, Input, Kernel, Stage, bind, wgsl};
use crate::model::formats::WeightFormat;

/// The grouped matmul `choice` on rows that are there already.
pub fn kernel(choice: MatmulChoice, tiles: Tiles, format: WeightFormat, bias: bool, input: Input) -> Kernel {
    let bias_part = if bias { wgsl!("bias_experts") } else { wgsl!("bias_none") };
    let mut kernel = choice.kernel(Stage::Down, tiles, format, input, &[bias_part, wgsl!("down")]);
    kernel.bindings.push(bind(5, "expert_out", Access::Write)); // [num_rows, hidden_size padded to 4]
    if bias {
        kernel.label.push_str(".bias");
        kernel.bindings.push(bind(6, "bias", Access::Read)); // [experts, packed columns]
    }
    kernel
}
