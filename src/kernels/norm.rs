//! Rows divided by their root mean square, where a layer has that. See `shaders/norm.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// `scale_first`: weights are applied before the division, too.
pub fn kernel(scale_first: bool) -> Kernel {
    Kernel {
        stage: Stage::Norm,
        label: if scale_first { "norm.scale_first".to_owned() } else { "norm".to_owned() },
        parts: vec![wgsl!("norm")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "v", Access::Read),            // [num_rows, v_stride]
            bind(2, "norm_weights", Access::Read), // [width]
            bind(3, "normed", Access::Write),      // [num_rows, normed_stride]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE), ("SCALE_FIRST", scale_first.into())],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
