// weights_int8: expert weights stored as bytes, (code - zero) * scale; groups of inputs share scale and zero.
// No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u8, scales [groups, 4 columns] f32, zeros [groups, 4 columns] u8 if there are any.

override SCALED_K4: u32 = 8;    // blocks of 4 inputs in a group
override STORED_ZEROS: u32 = 0; // 0: the code of zero is 128 everywhere

struct Scales { scale: vec4<f32>, zero: vec4<f32> }

fn load_scales(quad: u32, k: u32) -> Scales {
    let start = quad * params.quad_stride + params.k4;
    let group = k / SCALED_K4;
    var zero = vec4<f32>(128.0);
    if STORED_ZEROS != 0u {
        zero = vec4<f32>(unpack4xU8(word(4u * (start + params.k4 / SCALED_K4) + group)));
    }
    return Scales(bitcast<vec4<f32>>(words4(start + group)), zero);
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let codes = words4(quad * params.quad_stride + k);
    return mat4x4<f32>(
        (vec4<f32>(unpack4xU8(codes.x)) - scales.zero) * scales.scale,
        (vec4<f32>(unpack4xU8(codes.y)) - scales.zero) * scales.scale,
        (vec4<f32>(unpack4xU8(codes.z)) - scales.zero) * scales.scale,
        (vec4<f32>(unpack4xU8(codes.w)) - scales.zero) * scales.scale);
}
