// function_gelu_tanh: v * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 v^3))) / 2. No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    // (1 + tanh(u)) / 2 = sigmoid(2 u). Past |v| = 100 nothing changes any more, and cubes stay finite.
    let c = clamp(v, vec2<f32>(-100.0), vec2<f32>(100.0));
    return times_sigmoid(v, 1.5957691 * (c + 0.044715 * c * c * c));
}
