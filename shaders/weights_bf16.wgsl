// weights_bf16: expert weights stored as the upper halves of f32, two to a u32. No entry point.

// A quad: weights [k4, 4 inputs, 4 columns] bf16.

const SCALED_K4: u32 = 65536u;

alias Scales = u32;

fn load_scales(quad: u32, k: u32) -> Scales {
    return 0u;
}

// Four columns of one input.
fn widen(w: vec2<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(w.x << 16u, w.x & 0xffff0000u, w.y << 16u, w.y & 0xffff0000u));
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let w = words8(quad * params.quad_stride / 2u + k);
    return mat4x4<f32>(widen(w.low.xy), widen(w.low.zw), widen(w.high.xy), widen(w.high.zw));
}
