//! Stage 2: assignments sorted by expert. See `shaders/permute.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 256;

/// Rows that a kernel multiplies at a time (`ROW_BLOCK` in `shaders/permute.wgsl`).
const ROW_BLOCK: u32 = 8;

/// Workgroup memory is sized for `num_experts`.
pub fn kernel(num_experts: u32) -> Kernel {
    Kernel {
        stage: Stage::Permute,
        label: "permute".to_owned(),
        parts: vec![wgsl!("moe_params"), wgsl!("permute")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "topk_experts", Access::Read),       // [num_tokens, top_k]
            bind(2, "expert_offsets", Access::Write),    // [num_weighted + 1]
            bind(3, "assignment_of_row", Access::Write), // [num_rows]
            bind(4, "row_of_assignment", Access::Write), // [num_tokens, top_k]
            bind(5, "tiles", Access::Write),             // [num_tile_slots]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE), ("NUM_EXPERTS", num_experts)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}

/// Most assignments of one dispatch. Mesa's llvmpipe silently ends every loop of an invocation once it has run 65,535
/// iterations in all: counting 2^23 assignments takes 32,768 of them, placing a chunk of 2^16 another 17,000.
pub const MAX_ASSIGNMENTS: u32 = 1 << 23;
/// Most assignments of one workgroup, for the same reason.
const MAX_CHUNK: u32 = 1 << 16;

/// Assignments for each workgroup. Every workgroup counts all assignments, so their number is kept small:
/// `max_workgroups` is about what the device runs at once, and only large batches take more.
pub fn chunk_len(num_assignments: u32, max_workgroups: u32) -> u32 {
    num_assignments.div_ceil(max_workgroups).next_multiple_of(WG_SIZE).min(MAX_CHUNK)
}

/// Workgroups for `num_assignments` assignments.
pub fn workgroups(num_assignments: u32, chunk_len: u32) -> u64 {
    u64::from(num_assignments.div_ceil(chunk_len))
}

/// Rows of each tile but the last, where `rows` rows of one expert are cut into as few tiles of at most `tile_m` as will do;
/// 1 at least. Tiles of 24 and 16 rows take less than such of 32 and 8, whose weights serve few rows.
pub fn tile_height(rows: u32, tile_m: u32) -> u32 {
    let num_tiles = rows.div_ceil(tile_m).max(1);
    rows.div_ceil(num_tiles).next_multiple_of(ROW_BLOCK).clamp(1, tile_m)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_as_few_as_can_be_and_about_as_high() {
        let height = |rows| tile_height(rows, 32);
        assert_eq!(
            [1, 8, 9, 32, 33, 40, 48, 49, 64, 65, 72, 97].map(height),
            [8, 8, 16, 32, 24, 24, 24, 32, 32, 24, 24, 32]
        );
        assert_eq!((tile_height(0, 32), tile_height(5, 4), tile_height(13, 12)), (1, 4, 8));
        for (rows, tile_m) in (1..300).flat_map(|rows| [4, 12, 16, 32, 64].map(|tile_m| (rows, tile_m))) {
            let height = tile_height(rows, tile_m);
            assert!((1..=tile_m).contains(&height), "{rows} rows, {tile_m}");
            assert_eq!(rows.div_ceil(height), rows.div_ceil(tile_m), "{rows} rows, {tile_m}");
        }
    }
}
