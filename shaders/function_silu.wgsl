// function_silu: v / (1 + exp(-v)). No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    // exp(80) is still finite, and silu(-80) is below the smallest f32 that matters.
    return v / (vec2<f32>(1.0) + exp(min(-v, vec2<f32>(80.0))));
}
