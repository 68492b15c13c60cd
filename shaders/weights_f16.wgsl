// weights_f16: expert weights stored as IEEE half floats, two to a u32. No entry point.
// unpack2x16float is core WGSL: no SHADER_F16 needed.

// A quad: weights [k4, 4 inputs, 4 columns] f16.

const SCALED_K4: u32 = 65536u;

alias Scales = u32;

fn load_scales(quad: u32, k: u32) -> Scales {
    return 0u;
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let w = words8(quad * params.quad_stride / 2u + k);
    return mat4x4<f32>(
        vec4<f32>(unpack2x16float(w.low.x), unpack2x16float(w.low.y)),
        vec4<f32>(unpack2x16float(w.low.z), unpack2x16float(w.low.w)),
        vec4<f32>(unpack2x16float(w.high.x), unpack2x16float(w.high.y)),
        vec4<f32>(unpack2x16float(w.high.z), unpack2x16float(w.high.w)));
}
