// matmul_subgroup: the grouped matmul as register tiles fed by subgroup broadcasts. No workgroup memory, no barriers.
// For adapters where a load costs much more than a broadcast: small subgroups and software drivers. No entry point.
//
// The idea
//     workgroup = one subgroup = up to 32 rows x (4 * subgroup size) packed columns of one expert
//     for each 4 inputs: lane l loads the weights of its own 4 columns, and the inputs of one or two rows of each block
//         of 8 (lanes_8, lanes_4); every row's inputs are broadcast to all lanes, which multiply them by their columns
// Departures from it
//     1. Sums are structs and functions, not arrays and loops: Mesa keeps an array in memory (4 times slower).
//     2. A tile of at most 8 or 16 rows runs a shorter loop. Every row goes through the same operations in each.
//     3. The lane comes from subgroupExclusiveAdd, which numbers lanes on every adapter, whatever the order in which
//        it fills its subgroups.

override WG_SIZE: u32 = 8; // the adapter's subgroup size, at least 4

// Sums of eight rows; each vec4 is the lane's four columns.
struct Rows8 {
    r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32>,
    r4: vec4<f32>, r5: vec4<f32>, r6: vec4<f32>, r7: vec4<f32>,
}

fn zero8() -> Rows8 {
    let z = vec4<f32>(0.0);
    return Rows8(z, z, z, z, z, z, z, z);
}

fn grouped_matmul(group: u32, invocation: u32) {
    let slot = group / params.num_column_tiles;
    if slot >= params.num_tile_slots { return; }
    let tile = find_tile(slot);
    if tile.expert < params.first_expert || tile.expert >= params.end_expert { return; }
    let lane = subgroupExclusiveAdd(1u);
    let column = ((group % params.num_column_tiles) * WG_SIZE + lane) * LANE_COLUMNS;
    // Lanes past the last column compute it again and store nothing: broadcasts need every lane.
    let quad = ((tile.expert - params.first_expert) * params.num_columns
        + min(column, params.num_columns - LANE_COLUMNS)) / LANE_COLUMNS;

    var b0 = zero8();
    var b1 = zero8();
    var b2 = zero8();
    var b3 = zero8();
    let x0 = block_rows(tile, 0u, lane);
    if tile.num_rows <= 8u {
        for (var k = 0u; k < params.k4; k++) {
            b0 = step8(b0, x0, k, load_weights4x4(quad, k));
        }
    } else if tile.num_rows <= 16u {
        let x1 = block_rows(tile, 8u, lane);
        for (var k = 0u; k < params.k4; k++) {
            let w = load_weights4x4(quad, k);
            b0 = step8(b0, x0, k, w);
            b1 = step8(b1, x1, k, w);
        }
    } else {
        let x1 = block_rows(tile, 8u, lane);
        let x2 = block_rows(tile, 16u, lane);
        let x3 = block_rows(tile, 24u, lane);
        for (var k = 0u; k < params.k4; k++) {
            let w = load_weights4x4(quad, k);
            b0 = step8(b0, x0, k, w);
            b1 = step8(b1, x1, k, w);
            b2 = step8(b2, x2, k, w);
            b3 = step8(b3, x3, k, w);
        }
    }
    if column >= params.num_columns { return; }
    store8(tile, 0u, params.first_column + column, b0);
    store8(tile, 8u, params.first_column + column, b1);
    store8(tile, 16u, params.first_column + column, b2);
    store8(tile, 24u, params.first_column + column, b3);
}

fn store8(tile: Tile, first: u32, column: u32, sums: Rows8) {
    store_row(tile, first, column, sums.r0);
    store_row(tile, first + 1u, column, sums.r1);
    store_row(tile, first + 2u, column, sums.r2);
    store_row(tile, first + 3u, column, sums.r3);
    store_row(tile, first + 4u, column, sums.r4);
    store_row(tile, first + 5u, column, sums.r5);
    store_row(tile, first + 6u, column, sums.r6);
    store_row(tile, first + 7u, column, sums.r7);
}

fn store_row(tile: Tile, i: u32, column: u32, sums: vec4<f32>) {
    if i < tile.num_rows { store_sums(tile_row(tile, i), column, sums); }
}
