// tail_bias: a bias is added. No entry point.

@group(0) @binding(7) var<storage, read> output_bias: array<vec4<f32>>; // [out_stride]

fn finish(token: u32, column: u32, routed: vec4<f32>) -> vec4<f32> {
    return fma(vec4<f32>(params.routed_scale), routed, output_bias[column / 4u]);
}
