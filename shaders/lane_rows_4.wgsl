// lane_rows_4: a lane of a tile in workgroup memory computes 4 rows of its four columns. No entry point.

const LANE_ROWS: u32 = 4u;

struct Sums { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

fn no_sums() -> Sums {
    let z = vec4<f32>(0.0);
    return Sums(z, z, z, z);
}

// The sums of the rows from `first` of the tile on, plus their inputs in place i of this round times the lane's weights.
fn step_rows(sums: Sums, first: u32, i: u32, w: mat4x4<f32>) -> Sums {
    return Sums(
        step(sums.r0, tile_x[first * STRIDE + i], w),
        step(sums.r1, tile_x[(first + 1u) * STRIDE + i], w),
        step(sums.r2, tile_x[(first + 2u) * STRIDE + i], w),
        step(sums.r3, tile_x[(first + 3u) * STRIDE + i], w));
}

fn store_rows(tile: Tile, first: u32, column: u32, sums: Sums) {
    store_row(tile, first, column, sums.r0);
    store_row(tile, first + 1u, column, sums.r1);
    store_row(tile, first + 2u, column, sums.r2);
    store_row(tile, first + 3u, column, sums.r3);
}
