// combine: weighted sum of each token's expert outputs, back in token order.
//
//     y[t, :] = sum over j < top_k of topk_weights[t, j] * expert_out[row_of_assignment[t, j], :]
//
// for the columns that expert_out holds: all, or hidden_stride of them from first_column on.
//
// CPU twin   src/reference/combine.rs
// Mapping    one invocation = four neighbouring elements of y; workgroup = WG_SIZE such invocations of one token
// Grid       [num_tokens * ceil(hidden_stride / 4 / WG_SIZE)], folded
// Requires   hidden_stride a multiple of 4
// Numerics   f32, j ascending, no atomics: the same bits every time

@group(0) @binding(0) var<uniform>             params:            MoeParams;
@group(0) @binding(1) var<storage, read>       expert_out:        array<vec4<f32>>; // [num_rows, hidden_stride]
@group(0) @binding(2) var<storage, read>       row_of_assignment: array<u32>;       // [num_tokens, top_k]
@group(0) @binding(3) var<storage, read>       topk_weights:      array<f32>;       // [num_tokens, top_k]
@group(0) @binding(4) var<storage, read_write> y:                 array<f32>;       // [num_tokens, hidden_size]

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

    var sum = vec4<f32>(0.0);
    for (var a = token * params.top_k; a < (token + 1u) * params.top_k; a++) {
        let row = row_of_assignment[a];
        if row == DROPPED { continue; }
        sum = fma(vec4<f32>(topk_weights[a]), expert_out[row * hidden4 + column4], sum);
    }
    // y has no padding: the caller's rows are as wide as the layer.
    let column = params.first_column + column4 * 4u;
    let first = token * params.hidden_size + column;
    let width = params.hidden_size - column;
    y[first] = sum.x;
    if width > 1u { y[first + 1u] = sum.y; }
    if width > 2u { y[first + 2u] = sum.z; }
    if width > 3u { y[first + 3u] = sum.w; }
}
