// words_64: weights read 64 bits at a time, for drivers on which a load costs by its elements and not by its bytes:
// llvmpipe loops over the lanes for every load. u64 is naga's, not WGSL's: native only, behind SHADER_INT64. No entry point.

@group(0) @binding(1) var<storage, read> weights: array<vec4<u64>>; // [page experts, num_columns / 4, quad_stride / 2]

struct Words8 { low: vec4<u32>, high: vec4<u32> }

// The i-th word of 4 bytes, and the i-th 8, 16 and 32 bytes.
fn word(i: u32) -> u32 {
    let pair = words2(i / 2u);
    return select(pair.x, pair.y, i % 2u == 1u);
}

fn words2(i: u32) -> vec2<u32> {
    let w = weights[i / 4u][i % 4u];
    return vec2<u32>(u32(w), u32(w >> 32u));
}

// A load of all 32 bytes costs less than two loads of eight.
fn words4(i: u32) -> vec4<u32> {
    let w = words8(i / 2u);
    return select(w.low, w.high, i % 2u == 1u);
}

fn words8(i: u32) -> Words8 {
    let w = weights[i];
    let even = vec4<u32>(w);
    let odd = vec4<u32>(w >> vec4<u32>(32u));
    return Words8(vec4<u32>(even.x, odd.x, even.y, odd.y), vec4<u32>(even.z, odd.z, even.w, odd.w));
}
