// one_tile: a workgroup multiplies one tile of rows by one tile of columns. No entry point.

fn multiply_tiles(group: u32, num_groups: u32, lane: u32) {
    grouped_matmul(group, lane);
}
