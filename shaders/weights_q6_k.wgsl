// weights_q6_k: expert weights of GGUF's Q6_K: d * scale * (code - 32), with a whole scale for each 16 inputs and an f16
// d for each 256. No entry point.

// A quad: lower four bits [k4, 4 inputs, 4 columns] u4, upper two [k4, 4 inputs, 4 columns] u2, d [k4 / 64, 4 columns] f16,
// scales [k4 / 4, 4 columns] i8.
@group(0) @binding(1) var<storage, read> weights: array<u32>; // [page experts, num_columns / 4, 4 * quad_stride]

const SCALED_K4: u32 = 4u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let d = 4u * quad * params.quad_stride + 3u * params.k4;
    let block = d + 2u * (k / 64u);
    let scale = signed_bytes(weights[d + 2u * (params.k4 / 64u) + k / SCALED_K4]);
    return vec4<f32>(unpack2x16float(weights[block]), unpack2x16float(weights[block + 1u])) * scale;
}

// Four columns of one input, from the lower half of a word and the lowest byte of another.
fn code(low: u32, high: u32) -> vec4<f32> {
    let upper = (vec4<u32>(high) >> vec4<u32>(0u, 2u, 4u, 6u)) & vec4<u32>(3u);
    return nibbles(low) + 16.0 * vec4<f32>(upper) - 32.0;
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let start = 4u * quad * params.quad_stride;
    let low = vec2<u32>(weights[start + 2u * k], weights[start + 2u * k + 1u]);
    let high = weights[start + 2u * params.k4 + k];
    return mat4x4<f32>(
        scales * code(low.x, high),
        scales * code(low.x >> 16u, high >> 8u),
        scales * code(low.y, high >> 16u),
        scales * code(low.y >> 16u, high >> 24u));
}
