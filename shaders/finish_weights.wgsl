// finish_weights: what happens to the weights of a token's choices after their scores. No entry point.

override FIRST_SCORES: u32 = 0u; // 1: capacity wants to know the score of each first choice
override DROP_BROKEN: u32 = 0u;  // 1: a token whose weights mean nothing gets nobody; 0: experts, with NaN for weights

// |weight|^p
fn power(weight: f32) -> f32 {
    if params.norm_p == 1.0 { return abs(weight); }
    return pow(abs(weight), params.norm_p);
}

// Divides by the norm, given the sum of |weight|^p, and multiplies by the scales. Whether the token is broken: a logit or
// a weight of it is not finite.
fn finish_weights(at: Place, row: Row, sum: f32) -> bool {
    let first = at.token * params.top_k;
    if FIRST_SCORES != 0u {
        router_logits[params.num_tokens * (params.num_rows + params.num_experts) + at.token] = topk_weights[first];
    }
    var factor = params.scale;
    if params.renormalize != 0u {
        var norm = sum + joint_norm(at);
        if params.norm_p != 1.0 { norm = pow(norm, 1.0 / params.norm_p); }
        norm = max(norm + params.norm_epsilon, params.norm_floor);
        if norm > 0.0 { factor = params.scale / norm; } // weights that are all zero stay so
    }
    let rest = weigh_shared(at, factor);
    var broken = row.broken;
    for (var j = 0u; j < params.top_k; j++) {
        let a = first + j;
        let e = topk_experts[a];
        if e < params.num_experts {
            topk_weights[a] *= factor * (rest * router_vectors[2u * params.num_experts + e]);
            broken = broken || (bitcast<u32>(topk_weights[a]) & 0x7f800000u) == 0x7f800000u;
        }
    }
    if broken { break_choices(first); }
    drop_choices(at);
    return broken;
}

// A broken token's choices begin at first.
fn break_choices(first: u32) {
    for (var a = first; a < first + params.top_k; a++) {
        if DROP_BROKEN != 0u {
            topk_experts[a] = DROPPED;
            topk_weights[a] = 0.0;
        } else if topk_experts[a] < params.num_experts {
            topk_weights[a] = bitcast<f32>(params.nan_bits);
        }
    }
}
