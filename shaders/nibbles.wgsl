// nibbles: the four-bit numbers of several formats. No entry point.

// Four columns of one input, from the lower half of a word, each 16 to the power of its column times as large: what scales
// them undoes it for nothing, and a shift for each is saved.
fn nibbles(w: u32) -> vec4<f32> {
    return vec4<f32>(vec4<u32>(w) & vec4<u32>(0xfu, 0xf0u, 0xf00u, 0xf000u));
}

const NIBBLE_UNITS: vec4<f32> = vec4<f32>(1.0, 16.0, 256.0, 4096.0);
const PER_NIBBLE_UNIT: vec4<f32> = vec4<f32>(1.0, 0.0625, 0.00390625, 0.000244140625);

// A block of 4 inputs x 4 columns: (code - zero) * scale, both in these units. Powers of two: no digit is lost.
fn nibble_block(codes: vec2<u32>, zero: vec4<f32>, scale: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(
        (nibbles(codes.x) - zero) * scale,
        (nibbles(codes.x >> 16u) - zero) * scale,
        (nibbles(codes.y) - zero) * scale,
        (nibbles(codes.y >> 16u) - zero) * scale);
}
