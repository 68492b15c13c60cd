// drop_rows: zeros for the tokens that the router could make nothing of. Only where the layer drops such tokens.
//
//     y[t, :] = 0  if token t is marked
//
// CPU twin   src/reference/drop_rows.rs
// Mapping    workgroup = one token
// Grid       [num_tokens], folded
// Requires   nothing
// Numerics   none: whatever NaN the row held is overwritten

@group(0) @binding(0) var<uniform>             params: MoeParams;
@group(0) @binding(1) var<storage, read>       status: array<u32>; // [4] counts, then [num_tokens] marks
@group(0) @binding(2) var<storage, read_write> y:      array<f32>; // [num_tokens, hidden_size]

override WG_SIZE: u32 = 64;

@compute @workgroup_size(WG_SIZE)
fn drop_rows(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let token = flat_group(group, groups);
    if token >= params.num_tokens { return; }
    if status[4u + token] == 0u { return; }
    for (var column = lane; column < params.hidden_size; column += WG_SIZE) {
        y[token * params.hidden_size + column] = 0.0;
    }
}
