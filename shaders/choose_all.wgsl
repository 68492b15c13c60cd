// choose_all: every token gets every expert; choice j is expert j. No entry point.

fn choose(at: Place, lane: u32) {
    if at.is_token {
        for (var e = at.own; e < params.num_experts; e += WG_SIZE / TOKENS) { topk_experts[at.row + e] = e; }
    }
    storageBarrier();
    workgroupBarrier();
}
