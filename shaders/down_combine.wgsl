// down_combine: a single token's second projections and their weighted sum: down and combine in one dispatch.
//
//     y[h] = sum over the token's choices j of topk_weights[j] * (intermediate[j, :] . down_proj[expert, h, :] (+ bias[expert, h]))
//
// CPU twin   src/reference/combine.rs
// Mapping    that of the grouped matmul concatenated to it (matmul_vec*.wgsl), for one choice after the other: a lane keeps
//            the sum of its columns
// Grid       [num_column_tiles], folded
// Requires   one token, whose assignments are its rows; all experts in one page; no assignment dropped
// Numerics   f32 sums, inputs ascending, then choices ascending: the bits of down followed by combine

@group(0) @binding(0) var<uniform>             params:       MatmulParams;
@group(0) @binding(5) var<storage, read_write> y:            array<f32>; // [out_stride]
@group(0) @binding(7) var<storage, read>       topk_weights: array<f32>; // [top_k]

override WEIGH: u32 = 1; // 0: the experts' input was weighted, not their output

const NO_COLUMN: u32 = 0xffffffffu;

// What this lane has summed up so far, and its first column; lanes that only help others have none.
var<private> own_sum: vec4<f32>;
var<private> own_column: u32 = NO_COLUMN;

fn input_row(row: u32) -> u32 {
    return row;
}

fn store_sums(expert: u32, row: u32, column: u32, sums: vec4<f32>) {
    var weight = 1.0;
    if WEIGH != 0u { weight = topk_weights[row]; }
    own_sum = fma(vec4<f32>(weight), add_bias(expert, column, sums), own_sum);
    own_column = column;
}

@compute @workgroup_size(WG_SIZE)
fn down_combine(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let column_tile = flat_group(group, groups);
    if column_tile >= params.num_column_tiles { return; }
    for (var slot = 0u; slot < params.num_tile_slots; slot++) {
        grouped_matmul(slot * params.num_column_tiles + column_tile, lane);
    }
    if own_column == NO_COLUMN { return; }
    // y has no padding: the caller's row is as wide as the layer.
    for (var i = 0u; i < 4u; i++) {
        if own_column + i < params.out_stride { y[own_column + i] = own_sum[i]; }
    }
}
