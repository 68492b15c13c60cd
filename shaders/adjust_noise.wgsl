// adjust_noise: each logit gets normal noise, as wide as a router row of its own says (Shazeer et al. 2017).
// No entry point.

fn adjust_logits(at: Place) {
    if at.is_token {
        for (var e = at.own; e < params.num_experts; e += WG_SIZE / TOKENS) {
            let width = softplus(router_logits[other_logit(at.token, params.num_rows - params.num_experts + e)]);
            router_logits[at.row + e] += width * normal_noise(params.noise_key, params.first_token + at.token, e);
        }
    }
    storageBarrier();
    workgroupBarrier();
}
