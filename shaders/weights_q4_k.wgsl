// weights_q4_k: expert weights of GGUF's Q4_K: d * scale * code - dmin * least, with whole scale and least for each 32
// inputs, f16 d and dmin for each 256. No entry point.

// A quad: codes [k4, 4 inputs, 4 columns] u4, d and then dmin [k4 / 64, 4 columns] f16, scales and then least
// [k4 / 8, 4 columns] u8.

const SCALED_K4: u32 = 8u;

struct Scales { scale: vec4<f32>, least: vec4<f32> }

fn halves(w: vec2<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(w.x), unpack2x16float(w.y));
}

fn load_scales(quad: u32, k: u32) -> Scales {
    let d = 2u * quad * params.quad_stride + params.k4;
    let blocks = params.k4 / 64u;
    let scales = 2u * (d + 2u * blocks);
    let group = k / SCALED_K4;
    let scale = vec4<f32>(unpack4xU8(word(scales + group)));
    let least = vec4<f32>(unpack4xU8(word(scales + 8u * blocks + group)));
    let block = d + k / 64u;
    return Scales(halves(words2(block)) * scale * PER_NIBBLE_UNIT, halves(words2(block + blocks)) * least);
}

fn decode(codes: vec2<u32>, scales: Scales) -> mat4x4<f32> {
    return mat4x4<f32>(
        scales.scale * nibbles(codes.x) - scales.least,
        scales.scale * nibbles(codes.x >> 16u) - scales.least,
        scales.scale * nibbles(codes.y) - scales.least,
        scales.scale * nibbles(codes.y >> 16u) - scales.least);
}
