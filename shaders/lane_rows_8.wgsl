// lane_rows_8: a lane of a tile in workgroup memory computes 8 rows of its four columns. No entry point.

const LANE_ROWS: u32 = 8u;

struct Sums { low: Rows4, high: Rows4 }

fn no_sums() -> Sums {
    return Sums(zero4(), zero4());
}

fn step_rows(sums: Sums, first: u32, i: u32, w: mat4x4<f32>) -> Sums {
    return Sums(step4(sums.low, first, i, w), step4(sums.high, first + 4u, i, w));
}

fn store_rows(tile: Tile, first: u32, column: u32, sums: Sums) {
    store4(tile, first, column, sums.low);
    store4(tile, first + 4u, column, sums.high);
}
