// combine: what the routed experts have for each token, and what is added to it.
//
//     y[t, :] = finish(routed(t, :))        rows_*.wgsl, tail_*.wgsl
//
// for the columns that expert_out holds: all, or hidden_stride of them from first_column on.
//
// CPU twin   src/reference/combine.rs
// Mapping    one invocation = four neighbouring elements of y; workgroup = WG_SIZE such invocations of one token
// Grid       [num_tokens * ceil(hidden_stride / 4 / WG_SIZE)], folded
// Requires   hidden_stride a multiple of 4
// Numerics   f32, choices ascending, no atomics: the same bits every time

@group(0) @binding(0) var<uniform>             params: MoeParams;
@group(0) @binding(4) var<storage, read_write> y:      array<f32>; // [num_tokens, hidden_size]

override WG_SIZE: u32 = 64;

@compute @workgroup_size(WG_SIZE)
fn combine(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let hidden4 = params.hidden_stride / 4u;
    let blocks = (hidden4 + WG_SIZE - 1u) / WG_SIZE;
    let index = flat_group(group, groups);
    let token = index / blocks;
    let column4 = (index % blocks) * WG_SIZE + lane;
    if token >= params.num_tokens || column4 >= hidden4 { return; }

    let column = params.first_column + column4 * 4u;
    let value = finish(token, column, routed(token, column4, column));
    // y has no padding: the caller's rows are as wide as the layer.
    let first = token * params.hidden_size + column;
    let width = params.hidden_size - column;
    y[first] = value.x;
    if width > 1u { y[first + 1u] = value.y; }
    if width > 2u { y[first + 2u] = value.z; }
    if width > 3u { y[first + 3u] = value.w; }
}
