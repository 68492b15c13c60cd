// weights_f16: expert weights stored as IEEE half floats, two to a u32. No entry point.
// unpack2x16float is core WGSL: no SHADER_F16 needed.

@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>; // [page experts, num_columns / 4, k4, 4 inputs, 4 columns]

alias Scales = u32;

fn load_scales(quad: u32, k: u32) -> Scales {
    return 0u;
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let block = quad * params.quad_stride + k * 2u;
    let low = weights[block];
    let high = weights[block + 1u];
    return mat4x4<f32>(
        vec4<f32>(unpack2x16float(low.x), unpack2x16float(low.y)),
        vec4<f32>(unpack2x16float(low.z), unpack2x16float(low.w)),
        vec4<f32>(unpack2x16float(high.x), unpack2x16float(high.y)),
        vec4<f32>(unpack2x16float(high.z), unpack2x16float(high.w)));
}
