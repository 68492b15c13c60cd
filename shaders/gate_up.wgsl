// gate_up: each expert's first projections and its activation, for the rows routed to it.
//
//     intermediate[r, i] = activate(x[token, :] . gate_proj[expert, i, :], x[token, :] . up_proj[expert, i, :])
//
// or activate(x . up_proj) where there is no gate; with biases, and the token's weight on x, where the layer has them
//
// CPU twin   src/reference/gate_up.rs
// Mapping    that of the grouped matmul concatenated to it (matmul_*.wgsl). This file says what the rows of its
//            input are and what happens to its sums
// Grid       [num_tile_slots * num_column_tiles], folded, or fewer (tile_after_tile); one dispatch per weight page
// Requires   with a gate, packed columns interleave: 2*i is gate_proj row i, 2*i+1 is up_proj row i
// Numerics   f32 sums, inputs ascending; x is gathered while loading and the result is written once

@group(0) @binding(0) var<uniform> params: MatmulParams;

// The input row of a row: its token.
fn input_row(row: u32) -> u32 {
    return token_of(row);
}

// Takes the sums of packed columns column .. column+3.
fn store_sums(expert: u32, row: u32, column: u32, sums: vec4<f32>) {
    store_activated(row, column, add_bias(expert, column, weigh_input(row, sums)));
}

@compute @workgroup_size(WG_SIZE)
fn gate_up(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    multiply_tiles(flat_group(group, groups), groups.x * groups.y, lane);
}
