// moe_params: the uniform that router, permute and combine share, and helpers of every kernel.
// No entry point. Rust side: src/kernels/params.rs, compared field by field in tests/shader_contract.rs.

struct MoeParams {
    num_tokens: u32,
    hidden_size: u32,
    num_experts: u32,
    top_k: u32,
    num_assignments: u32, // num_tokens * top_k
    num_tile_slots: u32,  // length of the tile list
    tile_m: u32,          // rows in a tile
    renormalize: u32,     // 1: divide a token's weights by their sum
    hidden_stride: u32,   // elements from one row of expert_out to the next
    chunk_len: u32,       // assignments that one workgroup of permute places
    nan_bits: u32,        // a quiet NaN: WGSL has no way to write one down
    first_column: u32,    // column of y that the first column of expert_out is
}

// A row id that no assignment has: the assignment contributes nothing.
const DROPPED: u32 = 0xffffffffu;

// Grids are folded above 65,535 workgroups along one axis; this unfolds them.
fn flat_group(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.y * groups.x + group.x;
}
