// weights_q6_k: expert weights of GGUF's Q6_K: d * scale * (code - 32), with a whole scale for each 16 inputs and an f16
// d for each 256. No entry point.

// A quad: lower four bits [k4, 4 inputs, 4 columns] u4, upper two [k4, 4 inputs, 4 columns] u2, d [k4 / 64, 4 columns] f16,
// scales [k4 / 4, 4 columns] i8.

const SCALED_K4: u32 = 4u;

alias Scales = vec4<f32>;

fn load_scales(quad: u32, k: u32) -> Scales {
    let d = 4u * quad * params.quad_stride + 3u * params.k4;
    let scale = signed_bytes(word(d + 2u * (params.k4 / 64u) + k / SCALED_K4));
    let halves = words2(d / 2u + k / 64u);
    return vec4<f32>(unpack2x16float(halves.x), unpack2x16float(halves.y)) * scale * PER_NIBBLE_UNIT;
}

// Four columns of one input, from the lower half of a word and the lowest byte of another.
fn code(low: u32, high: u32) -> vec4<f32> {
    // Two bits for each column, to where they are in the column's unit.
    let upper = (vec4<u32>(high) << vec4<u32>(4u, 6u, 8u, 10u)) & vec4<u32>(0x30u, 0x300u, 0x3000u, 0x30000u);
    let lower = vec4<u32>(low) & vec4<u32>(0xfu, 0xf0u, 0xf00u, 0xf000u);
    return vec4<f32>(lower | upper) - 32.0 * NIBBLE_UNITS;
}

fn decode(low: vec2<u32>, high: u32, scales: Scales) -> mat4x4<f32> {
    return mat4x4<f32>(
        scales * code(low.x, high),
        scales * code(low.x >> 16u, high >> 8u),
        scales * code(low.y, high >> 16u),
        scales * code(low.y >> 16u, high >> 24u));
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let start = 4u * quad * params.quad_stride;
    return decode(words2(start / 2u + k), word(start + 2u * params.k4 + k), scales);
}

// Four blocks, read at once.
struct Codes { low: Words8, high: vec4<u32> }

fn load_codes(quad: u32, k: u32) -> Codes {
    let start = quad * params.quad_stride;
    return Codes(words8(start / 2u + k / 4u), words4(start + (2u * params.k4 + k) / 4u));
}

fn decode_codes(codes: Codes, i: u32, scales: Scales) -> mat4x4<f32> {
    let pair = select(codes.low.low, codes.low.high, i > 1u);
    return decode(select(pair.xy, pair.zw, i % 2u == 1u), codes.high[i], scales);
}
