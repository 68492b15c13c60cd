// function_gelu_quick: v / (1 + exp(-1.702 v)). No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    return v / (vec2<f32>(1.0) + exp(min(-1.702 * v, vec2<f32>(80.0))));
}
