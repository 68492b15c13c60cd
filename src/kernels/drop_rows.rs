//! After everything else, where broken tokens are dropped: their rows of y are zero. See `shaders/drop_rows.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Zeroes the rows of tokens that the router marked.
pub fn kernel() -> Kernel {
    Kernel {
        stage: Stage::DropRows,
        label: "drop_rows".to_owned(),
        parts: vec![wgsl!("moe_params"), wgsl!("drop_rows")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "status", Access::Read), // [4 + num_tokens]
            bind(2, "y", Access::Write),     // [num_tokens, hidden_size]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
