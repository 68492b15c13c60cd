// lanes_8: how a subgroup of 8 or more lanes holds and broadcasts the inputs of 8 rows. No entry point.

// The input row whose values this lane loads: row lane % 8 of the block that starts at `first`.
alias BlockRows = u32;

fn block_rows(tile: Tile, first: u32, lane: u32) -> BlockRows {
    return input_row(tile_row(tile, first + lane % 8u));
}

// The sums of 8 rows, plus their inputs 4*k .. 4*k+3 times the weights of this lane's columns.
fn step8(sums: Rows8, rows: BlockRows, k: u32, w: Weights) -> Rows8 {
    let x = load_input4(rows, params.x_stride, k);
    return Rows8(
        step_quads(sums.r0, subgroupBroadcast(x, 0u), w), step_quads(sums.r1, subgroupBroadcast(x, 1u), w),
        step_quads(sums.r2, subgroupBroadcast(x, 2u), w), step_quads(sums.r3, subgroupBroadcast(x, 3u), w),
        step_quads(sums.r4, subgroupBroadcast(x, 4u), w), step_quads(sums.r5, subgroupBroadcast(x, 5u), w),
        step_quads(sums.r6, subgroupBroadcast(x, 6u), w), step_quads(sums.r7, subgroupBroadcast(x, 7u), w));
}
