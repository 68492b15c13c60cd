// weigh_scores: a choice is weighted by its score, divided by the norm of all and scaled. No entry point.
// One lane does it for a token: choices are few.

fn weigh(at: Place, all: Row) -> bool {
    var row = all;
    let first = at.token * params.top_k;
    if SCORES == SOFTMAX_SELECTED {
        row.max = chosen_logit(at, first);
        for (var j = 1u; j < params.top_k; j++) {
            let logit = chosen_logit(at, first + j);
            if order_key(logit) > order_key(row.max) { row.max = logit; }
        }
    }
    var sum = 0.0;
    var total = 0.0;
    for (var j = 0u; j < params.top_k; j++) {
        var weight = 0.0;
        if topk_experts[first + j] < params.num_experts { weight = score(chosen_logit(at, first + j), row); }
        topk_weights[first + j] = weight;
        sum += power(weight);
        total += weight;
    }
    if SCORES == SOFTMAX_SELECTED && total > 0.0 {
        sum = 0.0;
        for (var j = 0u; j < params.top_k; j++) {
            let weight = topk_weights[first + j] / total;
            topk_weights[first + j] = weight;
            sum += power(weight);
        }
    }
    return finish_weights(at, row, sum);
}

// The logit of an assignment's expert; the first expert's if it is nobody.
fn chosen_logit(at: Place, a: u32) -> f32 {
    let e = topk_experts[a];
    return router_logits[at.row + select(0u, e, e < params.num_experts)];
}
