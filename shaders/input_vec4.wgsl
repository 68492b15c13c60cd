// input_vec4: input rows whose stride is a multiple of four, read four at a time. No entry point.

@group(0) @binding(2) var<storage, read> x: array<vec4<f32>>; // [rows, stride]

// Elements 4*k .. 4*k+3 of input row `row`; `stride` in elements.
fn load_input4(row: u32, stride: u32, k: u32) -> vec4<f32> {
    return x[row * (stride / 4u) + k];
}
