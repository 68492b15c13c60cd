// weights_fp8: expert weights stored as E4M3, with an f32 scale for each 128 inputs of a column. No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u8, scales [ceil(k4 / 32), 4 columns] f32.

const SCALED_K4: u32 = 32u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    return bitcast<vec4<f32>>(words4(quad * params.quad_stride + params.k4 + k / SCALED_K4));
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let codes = words4(quad * params.quad_stride + k);
    return mat4x4<f32>(e4m3(codes.x) * scales, e4m3(codes.y) * scales, e4m3(codes.z) * scales, e4m3(codes.w) * scales);
}
