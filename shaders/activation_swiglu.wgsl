// activation_swiglu: silu(gate) * up. No entry point. CPU twin: Activation::apply in src/model/activation.rs.
// Every activation is one such file with the same function.

fn activate(gate: vec2<f32>, up: vec2<f32>) -> vec2<f32> {
    // exp(80) is still finite, and silu(-80) is below the smallest f32 that matters.
    return gate / (vec2<f32>(1.0) + exp(min(-gate, vec2<f32>(80.0)))) * up;
}
