// tile_after_tile: a workgroup multiplies one tile after the other, for software drivers. No entry point.
//
// Mesa's llvmpipe jumps nowhere but at the end of loops: a workgroup that returns at once goes through all of the code with
// its lanes switched off. So there are few workgroups, which take turns with the tiles that are due.

fn multiply_tiles(group: u32, num_groups: u32, lane: u32) {
    let due = due_slots() * params.num_column_tiles;
    for (var tile = due.x + group; tile < due.y; tile += num_groups) {
        grouped_matmul(tile, lane);
    }
}
