// bias_experts: each expert has a bias for its projection. No entry point.

@group(0) @binding(6) var<storage, read> bias: array<vec4<f32>>; // [experts, bias_stride], packed as the weights' columns

fn add_bias(expert: u32, column: u32, sums: vec4<f32>) -> vec4<f32> {
    return sums + bias[(expert * params.bias_stride + params.slice_column + column) / 4u];
}
