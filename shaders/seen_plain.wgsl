// seen_plain: the router sees its input as it is. No entry point.

fn seen_input4(token: u32, stride: u32, k: u32) -> vec4<f32> {
    return load_input4(token, stride, k);
}
