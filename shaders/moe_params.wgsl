// moe_params: the uniform that permute and combine share, and helpers of several kernels.
// No entry point. Rust side: src/kernels/params.rs, compared field by field in tests/shader_contract.rs.

struct MoeParams {
    num_tokens: u32,
    hidden_size: u32,     // width of a row of y
    num_experts: u32,     // experts that a token can choose
    num_weighted: u32,    // the first of them, which have weights
    top_k: u32,
    num_assignments: u32, // num_tokens * top_k
    num_tile_slots: u32,  // length of the tile list
    tile_m: u32,          // rows in a tile
    hidden_stride: u32,   // elements from one row of expert_out to the next
    first_column: u32,    // column of y that the first column of expert_out is
    chunk_len: u32,       // assignments that one workgroup of permute places
    in_stride: u32,       // elements from one row of what experts read to the next
    in_width: u32,        // elements of such a row
    num_shared: u32,      // shared experts
    out_stride: u32,      // elements from one row of shared_out to the next
    routed_scale: f32,    // factor of the routed experts
    shared_scale: f32,    // factor of the shared experts
}

// A row id that no assignment has: the assignment contributes nothing.
const DROPPED: u32 = 0xffffffffu;

// Grids are folded above 65,535 workgroups along one axis; this unfolds them.
fn flat_group(group: vec3<u32>, groups: vec3<u32>) -> u32 {
    return group.y * groups.x + group.x;
}
