// matmul_vec_subgroup: the grouped matmul for up to 4 rows per tile, its inputs loaded once per subgroup and broadcast.
// For adapters where a load costs much more than a broadcast: small subgroups and software drivers. No entry point.
//
// The idea
//     workgroup = one subgroup = up to 4 rows x (4 * subgroup size) packed columns of one expert
//     lane l loads the inputs of row l % 4, or, for a tile of one row, every fourth vec4 of it; what it loaded is
//     broadcast to all lanes, which multiply it by the weights of their own 4 columns
// Departures from it
//     1. Sums are structs and functions, not arrays and loops: Mesa keeps an array in memory (4 times slower).
//     2. Tiles of one or two rows have loops of their own. Every row goes through the same operations in each.
//     3. The lane comes from subgroupExclusiveAdd, which numbers lanes on every adapter.

override WG_SIZE: u32 = 8; // the adapter's subgroup size, at least 4

// Sums of four rows; each vec4 is the lane's four columns.
struct Sums { r0: vec4<f32>, r1: vec4<f32>, r2: vec4<f32>, r3: vec4<f32> }

fn grouped_matmul(group: u32, invocation: u32) {
    let slot = group / params.num_column_tiles;
    if slot >= params.num_tile_slots { return; }
    let tile = find_tile(slot);
    let place = place_of(tile.expert);
    if place < params.first_expert || place >= params.end_expert { return; }
    let lane = subgroupExclusiveAdd(1u);
    let column = params.begin_column + ((group % params.num_column_tiles) * WG_SIZE + lane) * LANE_COLUMNS;
    // Lanes past the last column compute it again and store nothing: broadcasts need every lane.
    let quad = ((place - params.first_expert) * params.num_columns
        + min(column, params.num_columns - LANE_COLUMNS)) / LANE_COLUMNS;

    // Four steps share their scales, in every format, and what fits one read.
    let whole = params.k4 / 4u * 4u;
    var sums = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
    if tile.num_rows == 1u {
        sums.r0 = one_row(input_row(tile_row(tile, 0u)), quad, lane % 4u);
    } else if tile.num_rows == 2u {
        let row = input_row(tile_row(tile, lane % 2u));
        for (var k = 0u; k < whole; k += 4u) {
            let scales = load_scales(quad, k);
            let codes = load_codes(quad, k);
            sums = two_rows(sums, row, k, lane, decode_codes(codes, 0u, scales), decode_codes(codes, 1u, scales));
            sums = two_rows(sums, row, k + 2u, lane, decode_codes(codes, 2u, scales), decode_codes(codes, 3u, scales));
        }
        for (var k = whole; k < params.k4; k++) {
            sums = step2(sums, load_input4(row, params.x_stride, k), load_weights4x4(quad, k, load_scales(quad, k)));
        }
    } else {
        let row = input_row(tile_row(tile, lane % 4u));
        for (var k = 0u; k < whole; k += 4u) {
            let scales = load_scales(quad, k);
            let codes = load_codes(quad, k);
            sums = four_rows(sums, row, k, lane, decode_codes(codes, 0u, scales), decode_codes(codes, 1u, scales));
            sums = four_rows(sums, row, k + 2u, lane, decode_codes(codes, 2u, scales), decode_codes(codes, 3u, scales));
        }
        for (var k = whole; k < params.k4; k++) {
            sums = step4(sums, load_input4(row, params.x_stride, k), load_weights4x4(quad, k, load_scales(quad, k)));
        }
    }
    if column >= params.end_column { return; }
    let out = params.first_column + column;
    store_sums(tile.expert, tile_row(tile, 0u), out, sums.r0);
    if tile.num_rows > 1u { store_sums(tile.expert, tile_row(tile, 1u), out, sums.r1); }
    if tile.num_rows > 2u { store_sums(tile.expert, tile_row(tile, 2u), out, sums.r2); }
    if tile.num_rows > 3u { store_sums(tile.expert, tile_row(tile, 3u), out, sums.r3); }
}

// One step of two rows, whose inputs lanes 0 and 1 hold.
fn step2(sums: Sums, x: vec4<f32>, w: mat4x4<f32>) -> Sums {
    return Sums(
        step(sums.r0, subgroupBroadcast(x, 0u), w),
        step(sums.r1, subgroupBroadcast(x, 1u), w),
        sums.r2, sums.r3);
}

// Two steps of a tile of two rows. Four lanes load the inputs of both rows for both steps.
fn two_rows(sums: Sums, row: u32, k: u32, lane: u32, w: mat4x4<f32>, next: mat4x4<f32>) -> Sums {
    let x = load_input4(row, params.x_stride, k + lane / 2u % 2u);
    let first = step2(sums, x, w);
    return Sums(
        step(first.r0, subgroupBroadcast(x, 2u), next),
        step(first.r1, subgroupBroadcast(x, 3u), next),
        sums.r2, sums.r3);
}

// Two steps of a tile of three or four rows. Lane l % 4 loads the inputs of row l % 4, of one step in the lower half of
// 8 lanes and of the next in the upper half.
fn four_rows(sums: Sums, row: u32, k: u32, lane: u32, w: mat4x4<f32>, next: mat4x4<f32>) -> Sums {
    let x = load_input4(row, params.x_stride, k + lane / 4u % 2u);
    let first = step4(sums, x, w);
    if WG_SIZE < 8u { return step4(first, load_input4(row, params.x_stride, k + 1u), next); }
    return Sums(
        step(first.r0, subgroupBroadcast(x, 4u), next),
        step(first.r1, subgroupBroadcast(x, 5u), next),
        step(first.r2, subgroupBroadcast(x, 6u), next),
        step(first.r3, subgroupBroadcast(x, 7u), next));
}

// One step of four rows, whose inputs lanes 0 to 3 hold.
fn step4(sums: Sums, x: vec4<f32>, w: mat4x4<f32>) -> Sums {
    return Sums(
        step(sums.r0, subgroupBroadcast(x, 0u), w),
        step(sums.r1, subgroupBroadcast(x, 1u), w),
        step(sums.r2, subgroupBroadcast(x, 2u), w),
        step(sums.r3, subgroupBroadcast(x, 3u), w));
}

// The sums of a tile of one row: four vec4 of its inputs for each load.
fn one_row(row: u32, quad: u32, quarter: u32) -> vec4<f32> {
    var sums = vec4<f32>(0.0);
    let whole = params.k4 / 4u * 4u;
    for (var k = 0u; k < whole; k += 4u) {
        let x = load_input4(row, params.x_stride, k + quarter);
        let scales = load_scales(quad, k);
        let codes = load_codes(quad, k);
        sums = step(sums, subgroupBroadcast(x, 0u), decode_codes(codes, 0u, scales));
        sums = step(sums, subgroupBroadcast(x, 1u), decode_codes(codes, 1u, scales));
        sums = step(sums, subgroupBroadcast(x, 2u), decode_codes(codes, 2u, scales));
        sums = step(sums, subgroupBroadcast(x, 3u), decode_codes(codes, 3u, scales));
    }
    for (var k = whole; k < params.k4; k++) {
        sums = step(sums, load_input4(row, params.x_stride, k), load_weights4x4(quad, k, load_scales(quad, k)));
    }
    return sums;
}
