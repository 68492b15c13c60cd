// activation_gpt_oss: gate * sigmoid(alpha gate) * (up + 1) of clamped projections (gpt-oss). No entry point. CPU twin: Activation::apply in src/model/activation.rs.

fn activate(gate: vec2<f32>, up: vec2<f32>) -> vec2<f32> {
    let limit = vec2<f32>(params.limit);
    let g = min(gate, limit);
    let sigmoid = vec2<f32>(1.0) / (vec2<f32>(1.0) + exp(min(-params.alpha * g, vec2<f32>(80.0))));
    return g * sigmoid * (clamp(up, -limit, limit) + vec2<f32>(1.0));
}
