// token_statistics: what the auxiliary losses need to know of each token. Runs only when statistics are asked for.
//
//     log_sum_exp = ln(sum over e of exp(router_logits[t, e]))
//     entropy     = -sum over e of p[e] * ln(p[e]),  p = softmax(router_logits[t, :])
//     best        = the expert with the largest logit, the lowest on a tie
//
// For a token with NaN or infinite logits both are 0, and its best is nobody: num_experts.
//
// CPU twin   src/reference/statistics.rs
// Mapping    workgroup = one token
// Grid       [num_tokens], folded
// Requires   WG_SIZE a power of two
// Numerics   f32, fixed order

@group(0) @binding(0) var<uniform>             params:           StatisticsParams;
@group(0) @binding(1) var<storage, read>       router_logits:    array<f32>;             // [num_tokens, num_experts]
@group(0) @binding(2) var<storage, read_write> tokens:           array<TokenStatistics>; // [num_tokens]

override WG_SIZE: u32 = 64;

var<workgroup> scratch_best: array<u32, WG_SIZE>;
var<workgroup> scratch_sums: array<vec3<f32>, WG_SIZE>;

@compute @workgroup_size(WG_SIZE)
fn token_statistics(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let token = group.y * groups.x + group.x;
    if token >= params.num_tokens { return; }
    let row = token * params.num_experts;

    var best = min(lane, params.num_experts - 1u);
    for (var e = lane; e < params.num_experts; e += WG_SIZE) {
        if router_logits[row + e] > router_logits[row + best] { best = e; }
    }
    scratch_best[lane] = best;
    workgroupBarrier();
    for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
        if lane < half {
            let a = scratch_best[lane];
            let b = scratch_best[lane + half];
            let logit_a = router_logits[row + a];
            let logit_b = router_logits[row + b];
            if logit_b > logit_a || (logit_b == logit_a && b < a) { scratch_best[lane] = b; }
        }
        workgroupBarrier();
    }
    let largest = router_logits[row + scratch_best[0]];

    // sum of exp(l - max), of exp(l - max) * (l - max), and of logits that are NaN or +infinity
    var sums = vec3<f32>(0.0);
    for (var e = lane; e < params.num_experts; e += WG_SIZE) {
        let logit = router_logits[row + e];
        let bits = bitcast<u32>(logit);
        let bad = (bits & 0x7fffffffu) > 0x7f800000u || bits == 0x7f800000u;
        let below = max(logit - largest, -100.0);
        let weight = exp(below);
        sums += vec3<f32>(weight, weight * below, select(0.0, 1.0, bad));
    }
    scratch_sums[lane] = sums;
    workgroupBarrier();
    for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
        if lane < half { scratch_sums[lane] += scratch_sums[lane + half]; }
        workgroupBarrier();
    }
    if lane == 0u {
        // Minus infinity is the largest where all are masked.
        if scratch_sums[0].z > 0.0 || bitcast<u32>(largest) == 0xff800000u {
            tokens[token] = TokenStatistics(0.0, 0.0, params.num_experts);
            return;
        }
        let total = scratch_sums[0].x;
        tokens[token] = TokenStatistics(largest + log(total), log(total) - scratch_sums[0].y / total, scratch_best[0]);
    }
}
