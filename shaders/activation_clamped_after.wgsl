// activation_clamped_after: f(gate) and up clamped, then multiplied (Step-3). No entry point. CPU twin: Activation::apply in src/model/activation.rs.

fn activate(gate: vec2<f32>, up: vec2<f32>) -> vec2<f32> {
    let limit = vec2<f32>(params.limit);
    return min(function_of(gate), limit) * clamp(up, -limit, limit);
}
