// tail_shared_gated: shared experts are added, each with the weight that the router gave it. No entry point.

@group(0) @binding(7) var<storage, read> shared_out:     array<vec4<f32>>; // [num_shared, num_tokens, out_stride]
@group(0) @binding(8) var<storage, read> shared_weights: array<f32>;       // [num_tokens, num_shared]

fn finish(token: u32, column: u32, routed: vec4<f32>) -> vec4<f32> {
    var sum = params.routed_scale * routed;
    for (var s = 0u; s < params.num_shared; s++) {
        let row = s * params.num_tokens + token;
        let weight = params.shared_scale * shared_weights[token * params.num_shared + s];
        sum = fma(vec4<f32>(weight), shared_out[(row * params.out_stride + column) / 4u], sum);
    }
    return sum;
}
