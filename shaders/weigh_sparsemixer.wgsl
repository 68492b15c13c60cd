// weigh_sparsemixer: a choice is weighted by a softmax over the experts that are left and close to it (Phi-3.5-MoE).
// No entry point.

fn weigh(at: Place, row: Row) -> bool {
    let first = at.token * params.top_k;
    var sum = 0.0;
    for (var j = 0u; j < params.top_k; j++) {
        let s = router_logits[at.row + topk_experts[first + j]];
        var total = 0.0;
        for (var e = 0u; e < params.num_experts; e++) {
            var taken = false;
            for (var i = 0u; i < j; i++) { taken = taken || topk_experts[first + i] == e; }
            let logit = router_logits[at.row + e];
            // As the definition divides: 0 / 0 is not above the threshold.
            let far = s - logit > 2.0 * params.close * max(abs(logit), s);
            if !taken && !far { total += weight_of(logit, s); }
        }
        // A masked expert weighs nothing.
        let weight = select(1.0 / total, 0.0, is_neg_infinity(s));
        topk_weights[first + j] = weight;
        sum += power(weight);
    }
    return finish_weights(at, row, sum);
}
