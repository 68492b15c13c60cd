// signed_bytes: four whole numbers of eight bits. No entry point.
// By shifts, because software drivers compute unpack4xI8 with several selects for each byte.

fn signed_bytes(w: u32) -> vec4<f32> {
    return vec4<f32>(bitcast<vec4<i32>>(vec4<u32>(w) << vec4<u32>(24u, 16u, 8u, 0u)) >> vec4<u32>(24u));
}
