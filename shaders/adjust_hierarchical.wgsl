// adjust_hierarchical: logits whose softmax over all experts is a softmax over groups times one within the group
// (Jordan and Jacobs 1994). No entry point.

fn adjust_logits(at: Place) {
    let size = params.num_experts / params.num_groups;
    for (var begin = 0u; begin < params.num_groups; begin += WG_SIZE / TOKENS) {
        let g = begin + at.own;
        if at.is_token && g < params.num_groups {
            let first = at.row + g * size;
            var max = router_logits[first];
            for (var i = 1u; i < size; i++) {
                let logit = router_logits[first + i];
                if order_key(logit) > order_key(max) { max = logit; }
            }
            var total = 0.0;
            for (var i = 0u; i < size; i++) { total += weight_of(router_logits[first + i], max); }
            // logit - log sum exp(logits of the group) + logit of the group
            let shift = router_logits[other_logit(at.token, params.num_experts + params.num_shared + g)] - max - log(total);
            for (var i = 0u; i < size; i++) { router_logits[first + i] += shift; }
        }
    }
    storageBarrier();
    workgroupBarrier();
}
