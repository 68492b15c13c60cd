// input_64: input rows whose stride is a multiple of four, read 64 bits at a time (see words_64). No entry point.

@group(0) @binding(2) var<storage, read> x: array<vec2<u64>>; // [rows, stride / 4]

// Elements 4*k .. 4*k+3 of input row `row`; `stride` in elements.
fn load_input4(row: u32, stride: u32, k: u32) -> vec4<f32> {
    let pairs = x[row * (stride / 4u) + k];
    let even = vec2<u32>(pairs);
    let odd = vec2<u32>(pairs >> vec2<u32>(32u));
    return bitcast<vec4<f32>>(vec4<u32>(even.x, odd.x, even.y, odd.y));
}
