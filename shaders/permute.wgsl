// permute: assignments sorted by expert, order kept within an expert, and the tiles of the grouped matmul.
//
//     expert_offsets[e]      = number of assignments with an expert below e
//     row_of_assignment[a]   = expert_offsets[topk_experts[a]] + number of earlier assignments of the same expert,
//                              DROPPED for one of no expert that has weights
//     assignment_of_row      = its inverse
//     tiles                  = each expert's rows cut into as few runs of at most tile_m as will do, about as long as
//                              each other, experts ascending
//
// CPU twin   src/reference/permute.rs
// Mapping    workgroup = chunk_len neighbouring assignments. Each counts all assignments by expert (and those before
//            its own chunk), so that the chunks need nothing from each other and one dispatch does it all
// Grid       [ceil(num_assignments / chunk_len)]
// Requires   num_weighted <= NUM_EXPERTS; chunk_len a multiple of WG_SIZE, WG_SIZE of 4; at most 2^23 assignments in
//            chunks of at most 2^16: Mesa's llvmpipe ends all loops of an invocation after 65,535 iterations in sum
// Numerics   integers; counts by atomics in workgroup memory, whose order does not matter; places by rank, not by ticket

@group(0) @binding(0) var<uniform>             params:            MoeParams;
@group(0) @binding(1) var<storage, read>       topk_experts:      array<u32>;  // [num_tokens, top_k]
@group(0) @binding(2) var<storage, read_write> expert_offsets:    array<u32>;  // [num_weighted + 1]
@group(0) @binding(3) var<storage, read_write> assignment_of_row: array<u32>;  // [num_rows]
@group(0) @binding(4) var<storage, read_write> row_of_assignment: array<u32>;  // [num_tokens, top_k]
@group(0) @binding(5) var<storage, read_write> tiles:             array<Tile>; // [num_tile_slots]

struct Tile {
    expert: u32, // num_weighted: a surplus slot, nothing to do
    first_row: u32,
    num_rows: u32,
}

const ROW_BLOCK: u32 = 8u; // rows that a kernel multiplies at a time: Rows8

override WG_SIZE: u32 = 256;
override NUM_EXPERTS: u32 = 1024;

var<workgroup> first_row:  array<atomic<u32>, NUM_EXPERTS>; // each expert's number of assignments; scanned: its first row
var<workgroup> next_row:   array<atomic<u32>, NUM_EXPERTS>; // assignments before this chunk; scanned: the next free row
var<workgroup> first_tile: array<u32, NUM_EXPERTS>;
var<workgroup> scratch:    array<vec2<u32>, WG_SIZE>;       // (rows, tiles) before a lane's experts
var<workgroup> chunk:      array<u32, WG_SIZE>;

@compute @workgroup_size(WG_SIZE)
fn permute(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first = group.x * params.chunk_len;
    count_assignments(first, lane);
    let total = scan_experts(group.x, lane);
    write_tiles(group.x, groups.x, lane, total);
    place_chunk(first, lane);
}

fn count_assignments(first: u32, lane: u32) {
    for (var e = lane; e < NUM_EXPERTS; e += WG_SIZE) {
        atomicStore(&first_row[e], 0u);
        atomicStore(&next_row[e], 0u);
    }
    workgroupBarrier();
    for (var a = lane; a < params.num_assignments; a += WG_SIZE) {
        let e = topk_experts[a];
        if e < params.num_weighted {
            atomicAdd(&first_row[e], 1u);
            if a < first { atomicAdd(&next_row[e], 1u); }
        }
    }
    workgroupBarrier();
}

// Exclusive prefix sums over the experts: rows and tiles. Returns the totals.
fn scan_experts(group: u32, lane: u32) -> vec2<u32> {
    let experts_per_lane = (params.num_weighted + WG_SIZE - 1u) / WG_SIZE;
    let first = lane * experts_per_lane;
    let end = min(first + experts_per_lane, params.num_weighted);
    var own = vec2<u32>(0u);
    for (var e = first; e < end; e++) {
        let rows = atomicLoad(&first_row[e]);
        own += vec2<u32>(rows, (rows + params.tile_m - 1u) / params.tile_m);
    }
    scratch[lane] = own;
    workgroupBarrier();
    for (var distance = 1u; distance < WG_SIZE; distance *= 2u) {
        var earlier = vec2<u32>(0u);
        if lane >= distance { earlier = scratch[lane - distance]; }
        workgroupBarrier();
        scratch[lane] += earlier;
        workgroupBarrier();
    }
    let total = scratch[WG_SIZE - 1u];
    var before = scratch[lane] - own;
    for (var e = first; e < end; e++) {
        let rows = atomicLoad(&first_row[e]);
        first_tile[e] = before.y;
        atomicStore(&first_row[e], before.x);
        atomicAdd(&next_row[e], before.x);
        if group == 0u { expert_offsets[e] = before.x; }
        before += vec2<u32>(rows, (rows + params.tile_m - 1u) / params.tile_m);
    }
    if group == 0u && lane == 0u { expert_offsets[params.num_weighted] = total.x; }
    workgroupBarrier();
    return total;
}

// All workgroups share the tile list: each slot looks up its expert, so one crowded expert costs no lane more.
fn write_tiles(group: u32, groups: u32, lane: u32, total: vec2<u32>) {
    for (var slot = group * WG_SIZE + lane; slot < params.num_tile_slots; slot += groups * WG_SIZE) {
        if slot >= total.y {
            tiles[slot] = Tile(params.num_weighted, 0u, 0u);
            continue;
        }
        // the last expert whose first tile is not after this slot
        var low = 0u;
        var high = params.num_weighted;
        while high - low > 1u {
            let middle = (low + high) / 2u;
            if first_tile[middle] <= slot { low = middle; } else { high = middle; }
        }
        // Experts without rows share their first tile with the next expert; the last of them is the one with rows.
        let first = atomicLoad(&first_row[low]);
        var end = total.x;
        if low + 1u < params.num_weighted { end = atomicLoad(&first_row[low + 1u]); }
        let height = tile_height(end - first);
        let row = first + (slot - first_tile[low]) * height;
        tiles[slot] = Tile(low, row, min(height, end - row));
    }
}

// Rows of each tile of an expert but its last: tiles of 24 and 16 rows take less than such of 32 and 8, whose weights
// serve few rows.
fn tile_height(rows: u32) -> u32 {
    let num_tiles = (rows + params.tile_m - 1u) / params.tile_m;
    let even = (rows + num_tiles - 1u) / num_tiles;
    return min(params.tile_m, (even + ROW_BLOCK - 1u) / ROW_BLOCK * ROW_BLOCK);
}

fn place_chunk(first: u32, lane: u32) {
    for (var round = 0u; round < params.chunk_len; round += WG_SIZE) {
        let a = first + round + lane;
        var e = params.num_weighted;
        if a < params.num_assignments { e = topk_experts[a]; }
        chunk[lane] = e;
        workgroupBarrier();
        var rank = 0u;
        for (var i = 0u; i < lane; i += 4u) {
            let same = vec4<u32>(chunk[i], chunk[i + 1u], chunk[i + 2u], chunk[i + 3u]) == vec4<u32>(e);
            let earlier = vec4<u32>(i, i + 1u, i + 2u, i + 3u) < vec4<u32>(lane);
            let hits = select(vec4<u32>(0u), vec4<u32>(1u), same & earlier);
            rank += hits.x + hits.y + hits.z + hits.w;
        }
        var row = DROPPED;
        if e < params.num_weighted { row = atomicLoad(&next_row[e]) + rank; }
        workgroupBarrier();
        if e < params.num_weighted {
            atomicAdd(&next_row[e], 1u);
            assignment_of_row[row] = a;
        }
        if a < params.num_assignments { row_of_assignment[a] = row; }
        workgroupBarrier();
    }
}
