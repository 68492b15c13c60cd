//! Stage 5: expert outputs back into token order. See `shaders/combine.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Weighted sum of each token's expert outputs.
pub fn kernel() -> Kernel {
    Kernel {
        stage: Stage::Combine,
        label: "combine".to_owned(),
        parts: vec![wgsl!("moe_params"), wgsl!("combine")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "expert_out", Access::Read),        // [num_rows, hidden_stride]
            bind(2, "row_of_assignment", Access::Read), // [num_tokens, top_k]
            bind(3, "topk_weights", Access::Read),      // [num_tokens, top_k]
            bind(4, "y", Access::Write),                // [num_tokens, hidden_size]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}

/// Workgroups for `num_tokens` tokens and this many columns.
pub fn workgroups(num_tokens: u32, num_columns: u32) -> u64 {
    u64::from(num_tokens) * u64::from(num_columns.div_ceil(4 * WG_SIZE))
}
