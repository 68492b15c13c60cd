//! Stage 2: assignments sorted by expert. See `shaders/permute.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 256;

/// llvmpipe ends all loops of an invocation, without a word, after 65,535 rounds in total. A chunk takes 33 rounds for
/// each `WG_SIZE` assignments of its own and one for each `WG_SIZE` of all; with these two limits the sum stays below
/// that, the tiles included.
const MAX_CHUNK_LEN: u32 = 1 << 18;
/// Most assignments of one pass.
pub const MAX_ASSIGNMENTS: u64 = 1 << 22;

/// Workgroup memory is sized for `num_experts`.
pub fn kernel(num_experts: u32) -> Kernel {
    Kernel {
        stage: Stage::Permute,
        label: "permute".to_owned(),
        parts: vec![wgsl!("moe_params"), wgsl!("permute")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "topk_experts", Access::Read),       // [num_tokens, top_k]
            bind(2, "expert_offsets", Access::Write),    // [num_experts + 1]
            bind(3, "assignment_of_row", Access::Write), // [num_rows]
            bind(4, "row_of_assignment", Access::Write), // [num_tokens, top_k]
            bind(5, "tiles", Access::Write),             // [num_tile_slots]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE), ("NUM_EXPERTS", num_experts)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}

/// Assignments for each workgroup. Every workgroup counts all assignments, so their number is kept small:
/// `max_workgroups` is about what the device runs at once.
pub fn chunk_len(num_assignments: u32, max_workgroups: u32) -> u32 {
    num_assignments.div_ceil(max_workgroups).next_multiple_of(WG_SIZE).min(MAX_CHUNK_LEN)
}

/// Workgroups for `num_assignments` assignments.
pub fn workgroups(num_assignments: u32, chunk_len: u32) -> u64 {
    u64::from(num_assignments.div_ceil(chunk_len))
}
