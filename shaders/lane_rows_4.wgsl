// lane_rows_4: a lane of a tile in workgroup memory computes 4 rows of its four columns. No entry point.

const LANE_ROWS: u32 = 4u;

alias Sums = Rows4;

fn no_sums() -> Sums {
    return zero4();
}

fn step_rows(sums: Sums, first: u32, i: u32, w: mat4x4<f32>) -> Sums {
    return step4(sums, first, i, w);
}

fn store_rows(tile: Tile, first: u32, column: u32, sums: Sums) {
    store4(tile, first, column, sums);
}
