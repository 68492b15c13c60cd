// activation_clamped: f(gate) * up of clamped projections (DeepSeek-V4). No entry point. CPU twin: Activation::apply in src/model/activation.rs.

fn activate(gate: vec2<f32>, up: vec2<f32>) -> vec2<f32> {
    let limit = vec2<f32>(params.limit);
    return function_of(min(gate, limit)) * clamp(up, -limit, limit);
}
