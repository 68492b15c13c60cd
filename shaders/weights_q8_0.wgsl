// weights_q8_0: expert weights of GGUF's Q8_0: code * d, with an f16 d for each 32 inputs. No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] i8, d [k4 / 8, 4 columns] f16.

const SCALED_K4: u32 = 8u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let d = words2(2u * (quad * params.quad_stride + params.k4) + k / SCALED_K4);
    return vec4<f32>(unpack2x16float(d.x), unpack2x16float(d.y));
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let codes = words4(quad * params.quad_stride + k);
    return mat4x4<f32>(
        signed_bytes(codes.x) * scales,
        signed_bytes(codes.y) * scales,
        signed_bytes(codes.z) * scales,
        signed_bytes(codes.w) * scales);
}
