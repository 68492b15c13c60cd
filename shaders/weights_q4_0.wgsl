// weights_q4_0: expert weights of GGUF's Q4_0: (code - 8) * d, with an f16 d for each 32 inputs. No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, d [k4 / 8, 4 columns] f16.
@group(0) @binding(1) var<storage, read> weights: array<vec2<u32>>; // [page experts, num_columns / 4, 2 * quad_stride]

const SCALED_K4: u32 = 8u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let d = weights[2u * quad * params.quad_stride + params.k4 + k / SCALED_K4];
    return vec4<f32>(unpack2x16float(d.x), unpack2x16float(d.y));
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let codes = weights[2u * quad * params.quad_stride + k];
    return mat4x4<f32>(
        (nibbles(codes.x) - 8.0) * scales,
        (nibbles(codes.x >> 16u) - 8.0) * scales,
        (nibbles(codes.y) - 8.0) * scales,
        (nibbles(codes.y >> 16u) - 8.0) * scales);
}
