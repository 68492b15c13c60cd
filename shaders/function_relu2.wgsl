// function_relu2: max(v, 0)^2. No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    let positive = max(v, vec2<f32>(0.0));
    return positive * positive;
}
