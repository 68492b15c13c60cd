// input_scalar: input rows of any stride, read one element at a time; zeros past the row's end. No entry point.

@group(0) @binding(2) var<storage, read> x: array<f32>; // [rows, stride]

fn load_input(row: u32, stride: u32, i: u32) -> f32 {
    // The clamp keeps the address inside the row; the select drops what it reads there.
    return select(0.0, x[row * stride + min(i, stride - 1u)], i < stride);
}

// Elements 4*k .. 4*k+3 of input row `row`; `stride` in elements.
fn load_input4(row: u32, stride: u32, k: u32) -> vec4<f32> {
    return vec4<f32>(
        load_input(row, stride, 4u * k), load_input(row, stride, 4u * k + 1u),
        load_input(row, stride, 4u * k + 2u), load_input(row, stride, 4u * k + 3u));
}
