// drop_second: the second choice is kept with probability twice its weight (Lepikhin et al. 2020). No entry point.

fn drop_choices(at: Place) {
    let second = at.token * params.top_k + 1u;
    let random = uniform_noise(params.noise_key, params.first_token + at.token, 0u);
    if 2.0 * topk_weights[second] <= random { topk_experts[second] = DROPPED; }
}
