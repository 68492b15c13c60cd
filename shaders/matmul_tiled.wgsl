// matmul_tiled: the grouped matmul as tiles in workgroup memory, for GPUs with fast workgroup memory. No entry point.
//
// The idea
//     workgroup = TILE_M rows x TILE_N packed columns of one expert; lane = LANE_ROWS rows (lane_rows_*) x 4 columns
//     for each TILE_K inputs: all lanes copy the rows' inputs and the columns' weights to workgroup memory;
//         each lane multiplies its rows by its 4 columns from there
// Departures from it
//     1. tile_w holds the four columns of a lane as one vec4, and neighbouring lanes' vec4s side by side; rows of tile_x
//        are one vec4 wider than TILE_K: no bank conflicts.
//     2. Rows past the tile's end are loaded again, computed and not stored: every lane reaches every barrier.

override TILE_M: u32 = 32;
override TILE_N: u32 = 64;
override WG_SIZE: u32 = 128; // TILE_M / LANE_ROWS * TILE_N / LANE_COLUMNS

const TILE_K4: u32 = 4u;   // vec4s of a row per round
const STRIDE: u32 = 5u;    // TILE_K4 + 1

var<workgroup> tile_x: array<vec4<f32>, TILE_M * STRIDE>;  // [TILE_M, STRIDE] vec4 of inputs
var<workgroup> tile_w: array<vec4<f32>, TILE_N * TILE_K4>; // [4 * TILE_K4 inputs, TILE_N / 4] vec4 of columns

fn grouped_matmul(group: u32, lane: u32) {
    let slot = group / params.num_column_tiles;
    if slot >= params.num_tile_slots { return; }
    let tile = find_tile(slot);
    let place = place_of(tile.expert);
    if place < params.first_expert || place >= params.end_expert { return; }
    let first_column = params.begin_column + (group % params.num_column_tiles) * TILE_N;
    let first_quad = ((place - params.first_expert) * params.num_columns + first_column) / LANE_COLUMNS;
    let num_quads = min(TILE_N, params.end_column - first_column) / LANE_COLUMNS;

    let lanes_across = TILE_N / LANE_COLUMNS;
    let across = lane % lanes_across;
    let first = (lane / lanes_across) * LANE_ROWS;
    var sums = no_sums();
    for (var k = 0u; k < params.k4; k += TILE_K4) {
        workgroupBarrier();
        fill_tiles(tile, first_quad, num_quads, k, lane);
        workgroupBarrier();
        for (var i = 0u; i < TILE_K4; i++) {
            let at = 4u * i * lanes_across + across;
            let w = mat4x4<f32>(
                tile_w[at], tile_w[at + lanes_across], tile_w[at + 2u * lanes_across], tile_w[at + 3u * lanes_across]);
            sums = step_rows(sums, first, i, w);
        }
    }

    let column = first_column + across * LANE_COLUMNS;
    if column >= params.end_column { return; }
    store_rows(tile, first, params.first_column + column, sums);
}

// Sums of four rows; each vec4 is the lane's four columns.
struct Rows4 { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

fn zero4() -> Rows4 {
    let z = vec4<f32>(0.0);
    return Rows4(z, z, z, z);
}

// The sums of the rows from `first` of the tile on, plus their inputs in place i of this round times the lane's weights.
fn step4(sums: Rows4, first: u32, i: u32, w: mat4x4<f32>) -> Rows4 {
    return Rows4(
        step(sums.r0, tile_x[first * STRIDE + i], w),
        step(sums.r1, tile_x[(first + 1u) * STRIDE + i], w),
        step(sums.r2, tile_x[(first + 2u) * STRIDE + i], w),
        step(sums.r3, tile_x[(first + 3u) * STRIDE + i], w));
}

fn store4(tile: Tile, first: u32, column: u32, sums: Rows4) {
    store_row(tile, first, column, sums.r0);
    store_row(tile, first + 1u, column, sums.r1);
    store_row(tile, first + 2u, column, sums.r2);
    store_row(tile, first + 3u, column, sums.r3);
}

fn store_row(tile: Tile, i: u32, column: u32, sums: vec4<f32>) {
    if i < tile.num_rows { store_sums(tile.expert, tile_row(tile, i), column, sums); }
}

// Inputs 4*k .. 4*(k + TILE_K4) of the tile's rows and of its first num_quads column quads; zeros past the end.
// As many rounds for every lane: FXC takes barriers around a loop of a lane's own length for divergent.
fn fill_tiles(tile: Tile, first_quad: u32, num_quads: u32, k: u32, lane: u32) {
    for (var begin = 0u; begin < TILE_M * TILE_K4; begin += WG_SIZE) {
        let i = begin + lane;
        let row = i / TILE_K4;
        if row < TILE_M {
            let at = k + i % TILE_K4;
            var value = vec4<f32>(0.0);
            if at < params.k4 { value = load_input4(input_row(tile_row(tile, row)), params.x_stride, at); }
            tile_x[row * STRIDE + i % TILE_K4] = value;
        }
    }
    let quads = TILE_N / LANE_COLUMNS;
    for (var begin = 0u; begin < quads * TILE_K4; begin += WG_SIZE) {
        let i = begin + lane;
        let quad = i / TILE_K4;
        if quad < quads {
            let at = k + i % TILE_K4;
            var w = mat4x4<f32>();
            if at < params.k4 && quad < num_quads {
                w = load_weights4x4(first_quad + quad, at, load_scales(first_quad + quad, at));
            }
            let place = 4u * (i % TILE_K4) * quads + quad;
            tile_w[place] = w[0];
            tile_w[place + quads] = w[1];
            tile_w[place + 2u * quads] = w[2];
            tile_w[place + 3u * quads] = w[3];
        }
    }
}
