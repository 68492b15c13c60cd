// function_silu: v / (1 + exp(-v)). No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    return times_sigmoid(v, v);
}
