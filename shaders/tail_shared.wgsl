// tail_shared: shared experts are added, all with weight 1. No entry point.

@group(0) @binding(7) var<storage, read> shared_out: array<vec4<f32>>; // [num_shared, num_tokens, out_stride]

fn finish(token: u32, column: u32, routed: vec4<f32>) -> vec4<f32> {
    var sum = params.routed_scale * routed;
    for (var s = 0u; s < params.num_shared; s++) {
        let row = s * params.num_tokens + token;
        sum = fma(vec4<f32>(params.shared_scale), shared_out[(row * params.out_stride + column) / 4u], sum);
    }
    return sum;
}
