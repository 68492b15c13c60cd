//! After capacity, where weights are normalised over what it has left. See `shaders/reweigh.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Normalises each token's weights.
pub fn kernel() -> Kernel {
    Kernel {
        stage: Stage::Reweigh,
        label: "reweigh".to_owned(),
        parts: vec![wgsl!("router_params"), wgsl!("reweigh")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "kept_experts", Access::Read),  // [num_tokens, top_k]
            bind(2, "topk_weights", Access::Write), // [num_tokens, top_k]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
