// activation_soft_capped: softly capped gate * sigmoid(gate) * softly capped up (SiTU). No entry point. CPU twin: Activation::apply in src/model/activation.rs.

fn activate(gate: vec2<f32>, up: vec2<f32>) -> vec2<f32> {
    // limit caps the gate, alpha the up projection
    return times_sigmoid(soft_cap(gate, params.limit), gate) * soft_cap(up, params.alpha);
}

// cap * tanh(v / cap). tanh of a large number is 1, but some drivers make NaN of it.
fn soft_cap(v: vec2<f32>, cap: f32) -> vec2<f32> {
    return cap * tanh(clamp(v / cap, vec2<f32>(-15.0), vec2<f32>(15.0)));
}
