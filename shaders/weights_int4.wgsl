// weights_int4: expert weights stored as four bits, (code - zero) * scale; groups of inputs share scale and zero.
// No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, scales [groups, 4 columns] f32, zeros [groups, 4 columns] u8 if there are any.

override SCALED_K4: u32 = 8;    // blocks of 4 inputs in a group
override STORED_ZEROS: u32 = 0; // 0: the code of zero is 8 everywhere

struct Scales { scale: vec4<f32>, zero: vec4<f32> }

fn load_scales(quad: u32, k: u32) -> Scales {
    let start = 2u * quad * params.quad_stride + params.k4;
    let group = k / SCALED_K4;
    var zero = vec4<f32>(8.0);
    if STORED_ZEROS != 0u {
        zero = vec4<f32>(unpack4xU8(word(2u * (start + 2u * (params.k4 / SCALED_K4)) + group)));
    }
    let scale = bitcast<vec4<f32>>(words4(start / 2u + group));
    return Scales(scale * PER_NIBBLE_UNIT, zero * NIBBLE_UNITS);
}

fn decode(codes: vec2<u32>, scales: Scales) -> mat4x4<f32> {
    return nibble_block(codes, scales.zero, scales.scale);
}
