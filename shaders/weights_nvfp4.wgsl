// weights_nvfp4: expert weights stored as E2M1, with an E4M3 scale for each 16 inputs and an f32 scale for each matrix.
// No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, matrix scales [4 columns] f32, scales [k4 / 4, 4 columns] u8.

const SCALED_K4: u32 = 4u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let start = 2u * quad * params.quad_stride + params.k4;
    let of_matrix = bitcast<vec4<f32>>(words4(start / 2u));
    let group = k / SCALED_K4;
    return e4m3(word(2u * (start + 2u) + group)) * of_matrix;
}

fn decode(codes: vec2<u32>, scales: Scales) -> mat4x4<f32> {
    return e2m1_block(codes, scales);
}
