// activation_gated: f(gate) * up. No entry point. CPU twin: Activation::apply in src/model/activation.rs.

fn activate(gate: vec2<f32>, up: vec2<f32>) -> vec2<f32> {
    return function_of(gate) * up;
}
