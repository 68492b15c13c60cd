// function_gelu_quick: v / (1 + exp(-1.702 v)). No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    return times_sigmoid(v, 1.702 * v);
}
