// router_params: the uniform of the router. No entry point.
// Rust side: src/kernels/params.rs, compared field by field in tests/shader_contract.rs.

struct RouterParams {
    num_tokens: u32,
    hidden_size: u32,
    num_experts: u32,
    top_k: u32,
    num_rows: u32,     // rows of router_weights: experts, then shared experts, groups, noise
    first_row: u32,    // rows before this one are not computed: their logits are given
    num_shared: u32,   // shared experts with a gate
    num_groups: u32,
    keep_groups: u32,
    masked_bits: u32,  // the rank of an expert in a group that is not kept, as bits
    nan_bits: u32,     // a quiet NaN: WGSL has no way to write one down
    renormalize: u32,  // 1: divide a token's weights by their norm
    noise_key: u32,    // of this pass
    first_token: u32,  // of this pass in the batch: noise depends on it
    scale: f32,        // of every weight
    logit_scale: f32,
    logit_softcap: f32,
    norm_p: f32,       // the norm is (sum |w|^p)^(1/p) + epsilon, at least floor
    norm_epsilon: f32,
    norm_floor: f32,
    jitter: f32,       // half the width of the noise on the input
    close: f32,        // half the width of what sparsemixer calls close
}

// Grids are folded above 65,535 workgroups along one axis; this unfolds them.
fn flat_group(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.y * groups.x + group.x;
}

const DROPPED: u32 = 0xffffffffu;
