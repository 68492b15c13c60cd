// choose_all: every token gets every expert; choice j is expert j. No entry point.

fn choose(at: Place, lane: u32) {
    for (var begin = 0u; begin < params.num_experts; begin += WG_SIZE / TOKENS) {
        let e = begin + at.own;
        if at.is_token && e < params.num_experts { topk_experts[at.row + e] = e; }
    }
    storageBarrier();
    workgroupBarrier();
}
