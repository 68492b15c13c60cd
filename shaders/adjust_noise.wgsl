// adjust_noise: each logit gets normal noise, as wide as a router row of its own says (Shazeer et al. 2017).
// No entry point.

fn adjust_logits(at: Place) {
    for (var begin = 0u; begin < params.num_experts; begin += WG_SIZE / TOKENS) {
        let e = begin + at.own;
        if at.is_token && e < params.num_experts {
            let width = softplus(router_logits[other_logit(at.token, params.num_rows - params.num_experts + e)]);
            router_logits[at.row + e] += width * normal_noise(params.noise_key, params.first_token + at.token, e);
        }
    }
    storageBarrier();
    workgroupBarrier();
}
