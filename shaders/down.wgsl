// down: each expert's second projection, for the rows routed to it.
//
//     expert_out[r, h] = intermediate[r, :] . down_proj[expert, h, :] (+ bias[expert, h])
//
// The projections into and out of a latent space are this kernel too, with one expert and every token
//
// CPU twin   src/reference/down.rs
// Mapping    that of the grouped matmul concatenated to it (matmul_*.wgsl). This file says what the rows of its
//            input are and what happens to its sums
// Grid       [num_tile_slots * num_column_tiles], folded, or fewer (tile_after_tile); one dispatch per weight page
// Requires   out_stride a multiple of 4
// Numerics   f32 sums, inputs ascending

@group(0) @binding(0) var<uniform>             params:     MatmulParams;
@group(0) @binding(5) var<storage, read_write> expert_out: array<vec4<f32>>; // [num_rows, out_stride]

// The input row of a row: itself.
fn input_row(row: u32) -> u32 {
    return row;
}

fn store_sums(expert: u32, row: u32, column: u32, sums: vec4<f32>) {
    expert_out[(row * params.out_stride + column) / 4u] = add_bias(expert, column, sums);
}

@compute @workgroup_size(WG_SIZE)
fn down(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    multiply_tiles(flat_group(group, groups), groups.x * groups.y, lane);
}
