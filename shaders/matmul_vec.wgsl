// matmul_vec: the grouped matmul for up to 4 rows per tile: matrix-vector products that read each weight once for all
// rows of the tile. No entry point.
//
// The idea
//     workgroup = up to 4 rows x (4 * WG_SIZE / K_LANES) packed columns of one expert
//     K_LANES neighbouring lanes share 4 columns: each takes every K_LANES-th vec4 of the inputs, and their partial
//     sums are added up in workgroup memory
// Departures from it
//     1. A tile of one row runs a shorter loop. Every row goes through the same operations in both.
//     2. With K_LANES = 1 (software drivers, where barriers cost more than uncoalesced loads) nothing is added up.

override WG_SIZE: u32 = 64;

// Sums of four rows; each vec4 is the lane's four columns.
struct Sums { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

fn grouped_matmul(group: u32, lane: u32) {
    let slot = group / params.num_column_tiles;
    if slot >= params.num_tile_slots { return; }
    let tile = find_tile(slot);
    let place = place_of(tile.expert);
    if place < params.first_expert || place >= params.end_expert { return; }
    let column = params.begin_column + ((group % params.num_column_tiles) * (WG_SIZE / K_LANES) + lane / K_LANES) * LANE_COLUMNS;
    let quad = ((place - params.first_expert) * params.num_columns
        + min(column, params.num_columns - LANE_COLUMNS)) / LANE_COLUMNS;

    var sums = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
    let x0 = input_row(tile_row(tile, 0u));
    if tile.num_rows == 1u {
        for (var k = lane % K_LANES; k < params.k4; k += K_LANES) {
            sums.r0 = step(sums.r0, load_input4(x0, params.x_stride, k), load_weights4x4(quad, k, load_scales(quad, k)));
        }
    } else {
        let x1 = input_row(tile_row(tile, 1u));
        let x2 = input_row(tile_row(tile, 2u));
        let x3 = input_row(tile_row(tile, 3u));
        for (var k = lane % K_LANES; k < params.k4; k += K_LANES) {
            let w = load_weights4x4(quad, k, load_scales(quad, k));
            sums.r0 = step(sums.r0, load_input4(x0, params.x_stride, k), w);
            sums.r1 = step(sums.r1, load_input4(x1, params.x_stride, k), w);
            sums.r2 = step(sums.r2, load_input4(x2, params.x_stride, k), w);
            sums.r3 = step(sums.r3, load_input4(x3, params.x_stride, k), w);
        }
    }
    sums.r0 = reduce_k_lanes(sums.r0, lane);
    if tile.num_rows > 1u {
        sums.r1 = reduce_k_lanes(sums.r1, lane);
        sums.r2 = reduce_k_lanes(sums.r2, lane);
        sums.r3 = reduce_k_lanes(sums.r3, lane);
    }
    if lane % K_LANES != 0u || column >= params.end_column { return; }
    let out = params.first_column + column;
    store_sums(tile.expert, tile_row(tile, 0u), out, sums.r0);
    if tile.num_rows > 1u { store_sums(tile.expert, tile_row(tile, 1u), out, sums.r1); }
    if tile.num_rows > 2u { store_sums(tile.expert, tile_row(tile, 2u), out, sums.r2); }
    if tile.num_rows > 3u { store_sums(tile.expert, tile_row(tile, 3u), out, sums.r3); }
}
