// e2m1: four-bit floats, 1 sign bit, 2 exponent bits, 1 fraction bit. No entry point.

// Twice the values of four columns of one input, from the lower half of a word: whole numbers, looked up in a word.
fn twice_e2m1(w: u32) -> vec4<f32> {
    let shifted = vec4<u32>(w << 2u, w >> 2u, w >> 6u, w >> 10u) & vec4<u32>(28u);
    let magnitude = vec4<f32>((vec4<u32>(0xc8643210u) >> shifted) & vec4<u32>(15u));
    let sign = vec4<u32>(w << 28u, w << 24u, w << 20u, w << 16u) & vec4<u32>(0x80000000u);
    return bitcast<vec4<f32>>(bitcast<vec4<u32>>(magnitude) | sign);
}
