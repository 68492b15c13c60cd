//! Before the router, where choices go by token id. See `shaders/token_table.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Looks up each token's experts.
pub fn kernel() -> Kernel {
    Kernel {
        stage: Stage::TokenTable,
        label: "token_table".to_owned(),
        parts: vec![wgsl!("router_params"), wgsl!("token_table")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "table", Access::Read),         // [vocab_size, top_k]
            bind(2, "token_ids", Access::Read),     // [num_tokens]
            bind(3, "topk_experts", Access::Write), // [num_tokens, top_k]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
