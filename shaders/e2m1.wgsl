// e2m1: four-bit floats, 1 sign bit, 2 exponent bits, 1 fraction bit. No entry point.

// Twice the values of four columns of one input, from the lower half of a word: whole numbers, looked up in a word.
fn twice_e2m1(w: u32) -> vec4<f32> {
    let shifted = vec4<u32>(w << 2u, w >> 2u, w >> 6u, w >> 10u) & vec4<u32>(28u);
    let magnitude = vec4<f32>((vec4<u32>(0xc8643210u) >> shifted) & vec4<u32>(15u));
    let sign = vec4<u32>(w << 28u, w << 24u, w << 20u, w << 16u) & vec4<u32>(0x80000000u);
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(magnitude) | sign);
}

// A block of 4 inputs x 4 columns.
fn e2m1_block(codes: vec2<u32>, scales: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        0.5 * twice_e2m1(codes.x) * scales,
        0.5 * twice_e2m1(codes.x >> 16u) * scales,
        0.5 * twice_e2m1(codes.y) * scales,
        0.5 * twice_e2m1(codes.y >> 16u) * scales);
}
