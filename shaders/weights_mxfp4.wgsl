// weights_mxfp4: expert weights stored as E2M1, with an exponent of two for each 32 inputs (OCP MX 1.0). No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, exponents [k4 / 8, 4 columns] u8.

const SCALED_K4: u32 = 8u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let group = k / SCALED_K4;
    let exponents = unpack4xU8(word(2u * (2u * quad * params.quad_stride + params.k4) + group));
    // The least exponent, 2^-127, is no normal f32.
    let bits = select(exponents << vec4<u32>(23u), vec4<u32>(0x400000u), exponents == vec4<u32>(0u));
    return bitcast<vec4<f32>>(bits);
}

fn decode(codes: vec2<u32>, scales: Scales) -> mat4x4<f32> {
    return e2m1_block(codes, scales);
}
