//! Stages 4 and 5 in one, for a single token. See `shaders/down_combine.wgsl`.

use super::matmul::{MatmulChoice, Tiles};
use super::{Access, Input, Kernel, Stage, bind, wgsl};
use crate::model::formats::WeightFormat;

/// The grouped matmul `choice`, which is not sorted, for one choice of the token after the other. `weigh`: the experts'
/// outputs are weighted; otherwise their inputs were.
pub fn kernel(
    choice: MatmulChoice,
    tiles: Tiles,
    format: WeightFormat,
    bias: bool,
    weigh: bool,
    input: Input,
) -> Kernel {
    let bias_part = if bias { wgsl!("bias_experts") } else { wgsl!("bias_none") };
    let mut kernel = choice.kernel(Stage::DownCombine, tiles, format, input, &[bias_part, wgsl!("down_combine")]);
    kernel.overrides.push(("WEIGH", weigh.into()));
    kernel.bindings.push(bind(5, "y", Access::Write)); // [hidden_size]
    if bias {
        kernel.label.push_str(".bias");
        kernel.bindings.push(bind(6, "bias", Access::Read)); // [experts, packed columns]
    }
    kernel.bindings.push(bind(7, "topk_weights", Access::Read)); // [top_k]
    kernel
}
