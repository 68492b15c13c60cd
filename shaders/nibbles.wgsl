// nibbles: the four-bit numbers of several formats. No entry point.

// Four columns of one input, from the lower half of a word.
fn nibbles(w: u32) -> vec4<f32> {
    return vec4<f32>((vec4<u32>(w) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u));
}
