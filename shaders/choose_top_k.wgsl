// choose_top_k: the experts with the best ranks, best first, the lowest index on a tie. No entry point.

var<workgroup> scratch_keys: array<vec2<u32>, WG_SIZE>;

// The better of two candidates (key, expert): larger key, then lower expert.
fn better(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let b_wins = b.x > a.x || (b.x == a.x && b.y < a.y);
    return select(a, b, b_wins);
}

fn choose(at: Place, lane: u32) {
    // Round j takes the best candidate that ranks after the one of round j-1, so nothing needs to be marked.
    var last = vec2<u32>(0xffffffffu, 0u);
    for (var j = 0u; j < params.top_k; j++) {
        var best = vec2<u32>(0u, 0xffffffffu);
        for (var begin = 0u; begin < params.num_experts; begin += WG_SIZE / TOKENS) {
            let e = begin + at.own;
            if e < params.num_experts {
                let candidate = vec2<u32>(order_key(rank(at, e)), e);
                let after_last = candidate.x < last.x || (candidate.x == last.x && (j == 0u || candidate.y > last.y));
                if after_last { best = better(best, candidate); }
            }
        }
        workgroupBarrier();
        scratch_keys[lane] = best;
        workgroupBarrier();
        for (var half = WG_SIZE / TOKENS / 2u; half > 0u; half /= 2u) {
            if at.own < half { scratch_keys[lane] = better(scratch_keys[lane], scratch_keys[lane + half]); }
            workgroupBarrier();
        }
        last = scratch_keys[lane - at.own];
        if at.is_token && at.own == 0u { topk_experts[at.token * params.top_k + j] = last.y; }
    }
}
