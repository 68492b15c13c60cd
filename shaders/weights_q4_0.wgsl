// weights_q4_0: expert weights of GGUF's Q4_0: (code - 8) * d, with an f16 d for each 32 inputs. No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, d [k4 / 8, 4 columns] f16.

const SCALED_K4: u32 = 8u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let d = words2(2u * quad * params.quad_stride + params.k4 + k / SCALED_K4);
    return vec4<f32>(unpack2x16float(d.x), unpack2x16float(d.y)) * PER_NIBBLE_UNIT;
}

fn decode(codes: vec2<u32>, scales: Scales) -> mat4x4<f32> {
    return nibble_block(codes, 8.0 * NIBBLE_UNITS, scales);
}
