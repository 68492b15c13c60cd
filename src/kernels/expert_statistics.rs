//! Sums over each sequence's tokens, by expert. See `shaders/expert_statistics.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Sums by expert.
pub fn kernel() -> Kernel {
    Kernel {
        stage: Stage::ExpertStatistics,
        label: "expert_statistics".to_owned(),
        parts: vec![wgsl!("statistics_params"), wgsl!("expert_statistics")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "router_logits", Access::Read), // [num_tokens, num_experts]
            bind(2, "topk_experts", Access::Read),  // [num_tokens, top_k]
            bind(3, "tokens", Access::Read),        // [num_tokens, 3]
            bind(4, "experts", Access::Write),      // [num_sequences, num_experts + 1, 4]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
