// codes_each: blocks of weights that fill a read of their own, read where they are used. No entry point.

// Where four blocks are: a quad and the first of them.
alias Codes = vec2<u32>;

fn load_codes(quad: u32, k: u32) -> Codes {
    return vec2<u32>(quad, k);
}

fn decode_codes(codes: Codes, i: u32, scales: Scales) -> mat4x4<f32> {
    return load_weights4x4(codes.x, codes.y + i, scales);
}
