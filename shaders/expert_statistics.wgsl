// expert_statistics: how much of each sequence each expert got, and sums over its tokens.
//
//     experts[s, e]           = sum of probability of e, tokens whose best expert is e, assignments that e computes
//     experts[s, num_experts] = sum of log_sum_exp^2, sum of entropy, assignments that nobody computes
//
// CPU twin   src/reference/statistics.rs
// Mapping    workgroup = one expert, or what is not about experts, of one sequence
// Grid       [(num_experts + 1) * num_tokens / tokens_per_sequence], folded
// Requires   WG_SIZE a power of two
// Numerics   f32 sums in a fixed order, integer counts

@group(0) @binding(0) var<uniform>             params:        StatisticsParams;
@group(0) @binding(1) var<storage, read>       router_logits: array<f32>;              // [num_tokens, num_experts]
@group(0) @binding(2) var<storage, read>       topk_experts:  array<u32>;              // [num_tokens, top_k], after capacity
@group(0) @binding(3) var<storage, read>       tokens:        array<TokenStatistics>;  // [num_tokens]
@group(0) @binding(4) var<storage, read_write> experts:       array<ExpertStatistics>; // [num_sequences, num_experts + 1]

struct ExpertStatistics { sum: f32, other_sum: f32, best: u32, assigned: u32 }

override WG_SIZE: u32 = 64;

var<workgroup> scratch_sums: array<vec2<f32>, WG_SIZE>;
var<workgroup> scratch_counts: array<vec2<u32>, WG_SIZE>;

@compute @workgroup_size(WG_SIZE)
fn expert_statistics(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    let expert = index % (params.num_experts + 1u);
    let first = (index / (params.num_experts + 1u)) * params.tokens_per_sequence;
    if first >= params.num_tokens { return; }
    let is_expert = expert < params.num_experts;

    var sums = vec2<f32>(0.0);
    var counts = vec2<u32>(0u);
    for (var t = first + lane; t < first + params.tokens_per_sequence; t += WG_SIZE) {
        let token = tokens[t];
        if token.best >= params.num_experts {
            // Its logits are no numbers.
        } else if is_expert {
            let below = router_logits[t * params.num_experts + expert] - token.log_sum_exp;
            sums.x += exp(max(below, -100.0));
            counts.x += select(0u, 1u, token.best == expert);
        } else {
            sums += vec2<f32>(token.log_sum_exp * token.log_sum_exp, token.entropy);
        }
        for (var a = t * params.top_k; a < (t + 1u) * params.top_k; a++) {
            let mine = topk_experts[a] == expert || (!is_expert && topk_experts[a] > expert);
            counts.y += select(0u, 1u, mine);
        }
    }
    scratch_sums[lane] = sums;
    scratch_counts[lane] = counts;
    workgroupBarrier();
    for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
        if lane < half {
            scratch_sums[lane] += scratch_sums[lane + half];
            scratch_counts[lane] += scratch_counts[lane + half];
        }
        workgroupBarrier();
    }
    if lane == 0u {
        experts[index] =
            ExpertStatistics(scratch_sums[0].x, scratch_sums[0].y, scratch_counts[0].x, scratch_counts[0].y);
    }
}
