// ranks_logits: experts are ranked by their logits. No entry point.
// Every score grows with its logit, so this is also the way to rank by scores that nothing is added to.

fn rank(at: Place, e: u32) -> f32 {
    return router_logits[at.row + e];
}

fn before_choice(at: Place, lane: u32) -> Row {
    return Row(0.0, 0.0, false);
}

// The best expert has the largest logit.
fn after_choice(at: Place, lane: u32, before: Row) -> Row {
    storageBarrier();
    workgroupBarrier();
    let best = topk_experts[min(at.token, params.num_tokens - 1u) * params.top_k];
    return row_totals(at, lane, router_logits[at.row + best]);
}
