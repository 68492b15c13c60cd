// token_table: choices by token id.
//
//     topk_experts[t, j] = table[token_ids[t], j], or DROPPED for an id that the table does not have
//
// CPU twin   src/reference/router.rs
// Mapping    one invocation = one assignment
// Grid       [ceil(num_assignments / WG_SIZE)], folded
// Requires   nothing
// Numerics   integers

@group(0) @binding(0) var<uniform>             params:       RouterParams;
@group(0) @binding(1) var<storage, read>       table:        array<u32>; // [vocab_size, top_k]
@group(0) @binding(2) var<storage, read>       token_ids:    array<u32>; // [num_tokens]
@group(0) @binding(3) var<storage, read_write> topk_experts: array<u32>; // [num_tokens, top_k]

override WG_SIZE: u32 = 64;

@compute @workgroup_size(WG_SIZE)
fn token_table(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let a = flat_group(group, groups) * WG_SIZE + lane;
    if a >= params.num_tokens * params.top_k { return; }
    let id = token_ids[a / params.top_k];
    var expert = DROPPED;
    if id < arrayLength(&table) / params.top_k { expert = table[id * params.top_k + a % params.top_k]; }
    topk_experts[a] = expert;
}
