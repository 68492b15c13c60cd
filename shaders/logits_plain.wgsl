// logits_plain: a logit is the dot product and a bias. No entry point.

fn finish_logit(sum: f32, e: u32) -> f32 {
    return sum + router_vectors[e];
}
