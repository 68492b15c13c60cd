// weights_nvfp4: expert weights stored as E2M1, with an E4M3 scale for each 16 inputs and an f32 scale for each matrix.
// No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, matrix scales [4 columns] f32, scales [k4 / 4, 4 columns] u8.
@group(0) @binding(1) var<storage, read> weights: array<vec2<u32>>; // [page experts, num_columns / 4, 2 * quad_stride]

const SCALED_K4: u32 = 4u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let start = 2u * quad * params.quad_stride + params.k4;
    let of_matrix = bitcast<vec4<f32>>(vec4<u32>(weights[start], weights[start + 1u]));
    let group = k / SCALED_K4;
    return e4m3(weights[start + 2u + group / 2u][group % 2u]) * of_matrix;
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    return e2m1_block(weights[2u * quad * params.quad_stride + k], scales);
}
