// times_sigmoid: v / (1 + exp(-t)). No entry point. CPU twin: sigmoid in src/model/activation.rs.

// Both factors of exp(t) = half * half are far from the smallest f32 until the product is, and exp overflows nowhere.
fn times_sigmoid(v: vec2<f32>, t: vec2<f32>) -> vec2<f32> {
    let half = exp(-0.5 * abs(t));
    let kept = v / (vec2<f32>(1.0) + half * half);
    return select(kept * half * half, kept, t >= vec2<f32>(0.0));
}
