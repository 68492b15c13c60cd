// function_relu: max(v, 0). No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    return max(v, vec2<f32>(0.0));
}
