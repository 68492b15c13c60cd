// matmul_subgroup: the grouped matmul as register tiles fed by subgroup broadcasts. No workgroup memory, no barriers.
// For adapters where a load costs much more than a broadcast: small subgroups and software drivers. No entry point.
//
// The idea
//     workgroup = one subgroup = up to 32 rows x (8 * subgroup size) packed columns of one expert
//     for each 4 inputs: lane l loads the weights of its own 8 columns (two quads), and the inputs of one or two rows
//         of each block of 8 (lanes_8, lanes_4); every row's inputs are broadcast to all lanes, which multiply them by
//         their own columns
// Departures from it
//     1. Sums are structs and functions, not arrays and loops: Mesa keeps an array in memory (4 times slower).
//     2. A tile of at most 8, 16 or 24 rows runs a shorter loop. Every row goes through the same operations in each.
//     3. Scales are loaded once for the inputs that share them.
//     4. The lane comes from subgroupExclusiveAdd, which numbers lanes on every adapter, whatever the order in which
//        it fills its subgroups.

override WG_SIZE: u32 = 8; // the adapter's subgroup size, at least 4

// Column quads that one lane owns.
const QUADS: u32 = 2u;

// Weights of a lane's columns for four inputs, and the sums of one row.
struct Weights { q0: mat4x4<f32>, q1: mat4x4<f32> }
struct Row { q0: vec4<f32>, q1: vec4<f32> }

// Sums of eight rows.
struct Rows8 { r0: Row, r1: Row, r2: Row, r3: Row, r4: Row, r5: Row, r6: Row, r7: Row }

fn zero8() -> Rows8 {
    let z = Row(vec4<f32>(0.0), vec4<f32>(0.0));
    return Rows8(z, z, z, z, z, z, z, z);
}

fn step_quads(sums: Row, x: vec4<f32>, w: Weights) -> Row {
    return Row(step(sums.q0, x, w.q0), step(sums.q1, x, w.q1));
}

// Scales of a lane's columns.
struct QuadScales { q0: Scales, q1: Scales }

fn load_quad_scales(quad: vec2<u32>, k: u32) -> QuadScales {
    return QuadScales(load_scales(quad.x, k), load_scales(quad.y, k));
}

fn load_quads(quad: vec2<u32>, k: u32, scales: QuadScales) -> Weights {
    return Weights(load_weights4x4(quad.x, k, scales.q0), load_weights4x4(quad.y, k, scales.q1));
}

fn grouped_matmul(group: u32, invocation: u32) {
    let slot = group / params.num_column_tiles;
    if slot >= params.num_tile_slots { return; }
    let tile = find_tile(slot);
    let place = place_of(tile.expert);
    if place < params.first_expert || place >= params.end_expert { return; }
    let lane = subgroupExclusiveAdd(1u);
    // Quads lane and lane + WG_SIZE of the tile. Past the last column, that again and nothing is stored: broadcasts
    // need every lane.
    let num_quads = params.num_columns / LANE_COLUMNS;
    let first_quad = params.begin_column / LANE_COLUMNS + (group % params.num_column_tiles) * QUADS * WG_SIZE;
    let own = first_quad + lane + vec2<u32>(0u, WG_SIZE);
    let quad = (place - params.first_expert) * num_quads + min(own, vec2<u32>(num_quads - 1u));

    var b0 = zero8();
    var b1 = zero8();
    var b2 = zero8();
    var b3 = zero8();
    let x0 = block_rows(tile, 0u, lane);
    if tile.num_rows <= 8u {
        for (var first = 0u; first < params.k4; first += SCALED_K4) {
            let scales = load_quad_scales(quad, first);
            for (var k = first; k < min(first + SCALED_K4, params.k4); k++) {
                b0 = step8(b0, x0, k, load_quads(quad, k, scales));
            }
        }
    } else if tile.num_rows <= 16u {
        let x1 = block_rows(tile, 8u, lane);
        for (var first = 0u; first < params.k4; first += SCALED_K4) {
            let scales = load_quad_scales(quad, first);
            for (var k = first; k < min(first + SCALED_K4, params.k4); k++) {
                let w = load_quads(quad, k, scales);
                b0 = step8(b0, x0, k, w);
                b1 = step8(b1, x1, k, w);
            }
        }
    } else if tile.num_rows <= 24u {
        let x1 = block_rows(tile, 8u, lane);
        let x2 = block_rows(tile, 16u, lane);
        for (var first = 0u; first < params.k4; first += SCALED_K4) {
            let scales = load_quad_scales(quad, first);
            for (var k = first; k < min(first + SCALED_K4, params.k4); k++) {
                let w = load_quads(quad, k, scales);
                b0 = step8(b0, x0, k, w);
                b1 = step8(b1, x1, k, w);
                b2 = step8(b2, x2, k, w);
            }
        }
    } else {
        let x1 = block_rows(tile, 8u, lane);
        let x2 = block_rows(tile, 16u, lane);
        let x3 = block_rows(tile, 24u, lane);
        for (var first = 0u; first < params.k4; first += SCALED_K4) {
            let scales = load_quad_scales(quad, first);
            for (var k = first; k < min(first + SCALED_K4, params.k4); k++) {
                let w = load_quads(quad, k, scales);
                b0 = step8(b0, x0, k, w);
                b1 = step8(b1, x1, k, w);
                b2 = step8(b2, x2, k, w);
                b3 = step8(b3, x3, k, w);
            }
        }
    }
    store8(tile, 0u, own, b0);
    store8(tile, 8u, own, b1);
    store8(tile, 16u, own, b2);
    store8(tile, 24u, own, b3);
}

fn store8(tile: Tile, first: u32, own: vec2<u32>, sums: Rows8) {
    store_row(tile, first, own, sums.r0);
    store_row(tile, first + 1u, own, sums.r1);
    store_row(tile, first + 2u, own, sums.r2);
    store_row(tile, first + 3u, own, sums.r3);
    store_row(tile, first + 4u, own, sums.r4);
    store_row(tile, first + 5u, own, sums.r5);
    store_row(tile, first + 6u, own, sums.r6);
    store_row(tile, first + 7u, own, sums.r7);
}

fn store_row(tile: Tile, i: u32, own: vec2<u32>, sums: Row) {
    if i >= tile.num_rows { return; }
    let columns = own * LANE_COLUMNS;
    if columns.x < params.end_column { store_sums(tile.expert, tile_row(tile, i), params.first_column + columns.x, sums.q0); }
    if columns.y < params.end_column { store_sums(tile.expert, tile_row(tile, i), params.first_column + columns.y, sums.q1); }
}
