// scores: how logits become scores. No entry point. CPU twin: scores in src/reference/router.rs.

const SOFTMAX: u32 = 0u;
const SOFTMAX_SELECTED: u32 = 1u; // the caller makes max the largest chosen logit, and divides by the sum of these
const SIGMOID: u32 = 2u;
const SQRT_SOFTPLUS: u32 = 3u;
const RAW: u32 = 4u;

override SCORES: u32 = SOFTMAX;

fn score(logit: f32, row: Row) -> f32 {
    if SCORES == SOFTMAX { return weight_of(logit, row.max) / row.total; }
    if SCORES == SOFTMAX_SELECTED { return weight_of(logit, row.max); }
    if SCORES == RAW { return logit; }
    return score_alone(logit);
}

// Scores that look at one logit only.
fn score_alone(logit: f32) -> f32 {
    if is_neg_infinity(logit) { return 0.0; }
    // Far below 0, softplus is exp, whose root is a number where it no longer is.
    if SCORES == SQRT_SOFTPLUS { return select(sqrt(softplus(logit)), exp(0.5 * logit), logit < -20.0); }
    return sigmoid(logit);
}

fn sigmoid(v: f32) -> f32 {
    // As in times_sigmoid.wgsl.
    let half = exp(-0.5 * abs(v));
    let kept = 1.0 / (1.0 + half * half);
    return select(kept * half * half, kept, v >= 0.0);
}

// ln(1 + exp(v))
fn softplus(v: f32) -> f32 {
    let small = exp(max(-abs(v), -80.0));
    // ln(1 + s) by its series where 1 + s would lose the digits of s
    let series = small * (1.0 - small * (0.5 - small * (0.33333334 - small * 0.25)));
    return max(v, 0.0) + select(log(1.0 + small), series, small < 0.02);
}
