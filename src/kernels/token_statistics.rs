//! What the auxiliary losses need to know of each token. See `shaders/token_statistics.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Sums over each token's logits.
pub fn kernel() -> Kernel {
    Kernel {
        stage: Stage::TokenStatistics,
        label: "token_statistics".to_owned(),
        parts: vec![wgsl!("statistics_params"), wgsl!("token_statistics")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "router_logits", Access::Read), // [num_tokens, num_experts]
            bind(2, "tokens", Access::Write),       // [num_tokens, 3]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
