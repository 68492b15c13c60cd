// logits_scaled: a logit has a factor, and a soft cap if that is not 0. No entry point.

fn finish_logit(sum: f32, e: u32) -> f32 {
    let logit = (sum + router_vectors[e]) * params.logit_scale;
    if params.logit_softcap == 0.0 { return logit; }
    // tanh of a large number is 1, but some drivers make NaN of it
    return params.logit_softcap * tanh(clamp(logit / params.logit_softcap, -15.0, 15.0));
}
