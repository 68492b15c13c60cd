// groups_limited: only experts of a token's best groups may be chosen (DeepSeek-V2, V3). No entry point.
// A group is scored by its best rank, or by the sum of its two best.

override SUM_TOP2: u32 = 1u;

const MAX_GROUPS: u32 = 128u;

var<workgroup> group_scores: array<f32, TOKENS * MAX_GROUPS>;

fn mask_groups(at: Place, lane: u32) {
    let size = params.num_experts / params.num_groups;
    let first = (lane / (WG_SIZE / TOKENS)) * MAX_GROUPS;
    for (var begin = 0u; begin < params.num_groups; begin += WG_SIZE / TOKENS) {
        let g = begin + at.own;
        if g < params.num_groups { group_scores[first + g] = group_score(ranks_at(at) + g * size, size); }
    }
    workgroupBarrier();
    for (var begin = 0u; begin < params.num_groups; begin += WG_SIZE / TOKENS) {
        let g = begin + at.own;
        if at.is_token && g < params.num_groups {
            let own = order_key(group_scores[first + g]);
            var better = 0u; // groups that go before this one; on a tie the lower index does
            for (var other = 0u; other < params.num_groups; other++) {
                let key = order_key(group_scores[first + other]);
                better += select(0u, 1u, key > own || (key == own && other < g));
            }
            if better < params.keep_groups { continue; }
            for (var i = 0u; i < size; i++) {
                router_logits[ranks_at(at) + g * size + i] = bitcast<f32>(params.masked_bits);
            }
        }
    }
    storageBarrier();
    workgroupBarrier();
}

fn group_score(first: u32, size: u32) -> f32 {
    var best = router_logits[first];
    if SUM_TOP2 == 0u {
        for (var i = 1u; i < size; i++) { best = max(best, router_logits[first + i]); }
        return best;
    }
    var second = router_logits[first + 1u];
    if second > best {
        second = best;
        best = router_logits[first + 1u];
    }
    for (var i = 2u; i < size; i++) {
        let rank = router_logits[first + i];
        second = max(second, min(rank, best));
        best = max(best, rank);
    }
    return best + second;
}
