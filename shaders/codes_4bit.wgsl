// codes_4bit: blocks of codes of four bits: 8 bytes each, so four of them are read at once where they are neighbours.
// No entry point.

alias Codes = Words8;

// Blocks k .. k+3 of column quad `quad`; k a multiple of 4.
fn load_codes(quad: u32, k: u32) -> Codes {
    return words8(quad * params.quad_stride / 2u + k / 4u);
}

// Block i of them; i is a constant where it is called.
fn decode_codes(codes: Codes, i: u32, scales: Scales) -> mat4x4<f32> {
    let pair = select(codes.low, codes.high, i > 1u);
    return decode(select(pair.xy, pair.zw, i % 2u == 1u), scales);
}

fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    return decode(words2(2u * quad * params.quad_stride + k), scales);
}
