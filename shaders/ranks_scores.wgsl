// ranks_scores: experts are ranked by score, or logit, plus a bias that weights do not see; groups may be masked.
// No entry point.

override RANK_BY_LOGITS: u32 = 0u;

fn rank(at: Place, e: u32) -> f32 {
    return router_logits[ranks_at(at) + e];
}

fn before_choice(at: Place, lane: u32) -> Row {
    let row = row_totals(at, lane, row_max(at, lane));
    for (var begin = 0u; begin < params.num_experts; begin += WG_SIZE / TOKENS) {
        let e = begin + at.own;
        if at.is_token && e < params.num_experts {
            let logit = router_logits[at.row + e];
            var rank = logit;
            if RANK_BY_LOGITS == 0u { rank = score(logit, row); }
            router_logits[ranks_at(at) + e] = rank + router_vectors[params.num_experts + e];
        }
    }
    storageBarrier();
    workgroupBarrier();
    mask_groups(at, lane);
    return row;
}

fn after_choice(at: Place, lane: u32, before: Row) -> Row {
    return before;
}
