// reweigh: weights normalised over what capacity has left of a token's choices.
//
//     topk_weights[t, j] = scale * topk_weights[t, j] / norm of those not dropped, 0 for a dropped one
//
// CPU twin   src/reference/capacity.rs
// Mapping    one invocation = one token
// Grid       [ceil(num_tokens / WG_SIZE)], folded
// Requires   nothing
// Numerics   f32, j ascending

@group(0) @binding(0) var<uniform>             params:       RouterParams;
@group(0) @binding(1) var<storage, read>       kept_experts: array<u32>; // [num_tokens, top_k]
@group(0) @binding(2) var<storage, read_write> topk_weights: array<f32>; // [num_tokens, top_k]

override WG_SIZE: u32 = 64;

@compute @workgroup_size(WG_SIZE)
fn reweigh(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let token = flat_group(group, groups) * WG_SIZE + lane;
    if token >= params.num_tokens { return; }
    let first = token * params.top_k;
    var sum = 0.0;
    for (var a = first; a < first + params.top_k; a++) {
        if kept_experts[a] == DROPPED { topk_weights[a] = 0.0; }
        sum += pow(abs(topk_weights[a]), params.norm_p);
    }
    let norm = max(pow(sum, 1.0 / params.norm_p) + params.norm_epsilon, params.norm_floor);
    for (var a = first; a < first + params.top_k; a++) {
        // All dropped, and neither epsilon nor floor: zero weights stay zero.
        if topk_weights[a] != 0.0 { topk_weights[a] *= params.scale / norm; }
    }
}
