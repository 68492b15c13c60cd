// weights_int4: expert weights stored as four bits, (code - zero) * scale; groups of inputs share scale and zero.
// No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, scales [groups, 4 columns] f32, zeros [groups, 4 columns] u8 if there are any.
@group(0) @binding(1) var<storage, read> weights: array<vec2<u32>>; // [page experts, num_columns / 4, 2 * quad_stride]

override SCALED_K4: u32 = 8;    // blocks of 4 inputs in a group
override STORED_ZEROS: u32 = 0; // 0: the code of zero is 8 everywhere

struct Scales { scale: vec4<f32>, zero: vec4<f32> }

fn load_scales(quad: u32, k: u32) -> Scales {
    let start = 2u * quad * params.quad_stride + params.k4;
    let group = k / SCALED_K4;
    var zero = vec4<f32>(8.0);
    if STORED_ZEROS != 0u {
        zero = vec4<f32>(unpack4xU8(weights[start + 2u * (params.k4 / SCALED_K4) + group / 2u][group % 2u]));
    }
    let scale = vec4<u32>(weights[start + 2u * group], weights[start + 2u * group + 1u]);
    return Scales(bitcast<vec4<f32>>(scale), zero);
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let codes = weights[2u * quad * params.quad_stride + k];
    return mat4x4<f32>(
        (nibbles(codes.x) - scales.zero) * scales.scale,
        (nibbles(codes.x >> 16u) - scales.zero) * scales.scale,
        (nibbles(codes.y) - scales.zero) * scales.scale,
        (nibbles(codes.y >> 16u) - scales.zero) * scales.scale);
}
