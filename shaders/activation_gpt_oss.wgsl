// activation_gpt_oss: gate * sigmoid(alpha gate) * (up + 1) of clamped projections (gpt-oss). No entry point. CPU twin: Activation::apply in src/model/activation.rs.

fn activate(gate: vec2<f32>, up: vec2<f32>) -> vec2<f32> {
    let limit = vec2<f32>(params.limit);
    let g = min(gate, limit);
    return times_sigmoid(g, params.alpha * g) * (clamp(up, -limit, limit) + vec2<f32>(1.0));
}
