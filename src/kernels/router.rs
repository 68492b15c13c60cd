//! Stage 1: which experts each token gets, and with which weight. See `shaders/router.wgsl`.

use super::{Access, Input, Kernel, Stage, bind, wgsl};

/// Tokens of one workgroup.
pub const TOKENS: u32 = 4;
/// Experts whose logits one lane computes at a time.
const EXPERTS: u32 = 4;
/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// `k_lanes` lanes share a dot product.
pub fn kernel(input: Input, workgroup_size: u32, k_lanes: u32) -> Kernel {
    Kernel {
        stage: Stage::Router,
        label: format!("router{}", input.suffix()),
        parts: vec![wgsl!("moe_params"), wgsl!("step"), wgsl!("reduce"), input.part(), wgsl!("router")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "router_weights", Access::Read), // [num_experts, hidden_size padded to 4]
            bind(2, "x", Access::Read),              // [num_tokens, hidden_size]
            bind(3, "router_bias", Access::Read),    // [num_experts]
            bind(4, "router_logits", Access::Write), // [num_tokens, num_experts]
            bind(5, "topk_experts", Access::Write),  // [num_tokens, top_k]
            bind(6, "topk_weights", Access::Write),  // [num_tokens, top_k]
            bind(7, "status", Access::Write),        // [1]
        ],
        overrides: vec![("WG_SIZE", workgroup_size), ("K_LANES", k_lanes)],
        workgroup_size,
        needs_subgroups: false,
    }
}

/// As many lanes share a dot product as are left when every group of experts has one.
/// Depends on the layer alone, never on the batch, so that a token's logits do not either.
pub fn k_lanes(num_experts: u32) -> u32 {
    (WG_SIZE / num_experts.div_ceil(EXPERTS).next_power_of_two().min(WG_SIZE)).clamp(1, 32)
}

/// Rounds of a lane's loops over the inputs, all its experts together.
pub fn rounds(num_experts: u32, hidden_size: u32) -> u64 {
    let k_lanes = k_lanes(num_experts);
    let blocks = num_experts.div_ceil(EXPERTS * (WG_SIZE / k_lanes));
    u64::from(blocks) * u64::from(hidden_size.div_ceil(4).div_ceil(k_lanes))
}

/// Workgroups for `num_tokens` tokens.
pub fn workgroups(num_tokens: u32) -> u64 {
    u64::from(num_tokens.div_ceil(TOKENS))
}
