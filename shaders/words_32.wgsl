// words_32: weights read 32 bits at a time. No entry point.

@group(0) @binding(1) var<storage, read> weights: array<vec4<u32>>; // [page experts, num_columns / 4, quad_stride]

struct Words8 { low: vec4<u32>, high: vec4<u32> }

// The i-th word of 4 bytes, and the i-th 8, 16 and 32 bytes.
fn word(i: u32) -> u32 {
    return weights[i / 4u][i % 4u];
}

fn words2(i: u32) -> vec2<u32> {
    let first = 2u * (i % 2u);
    return vec2<u32>(weights[i / 2u][first], weights[i / 2u][first + 1u]);
}

fn words4(i: u32) -> vec4<u32> {
    return weights[i];
}

fn words8(i: u32) -> Words8 {
    return Words8(weights[2u * i], weights[2u * i + 1u]);
}
