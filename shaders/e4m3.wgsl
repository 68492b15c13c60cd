// e4m3: eight-bit floats, 1 sign bit, 4 exponent bits, 3 fraction bits. No entry point.

// Four of them. A normal one is an f32 with another exponent bias; without exponent, the fraction counts 1/512.
fn e4m3(w: u32) -> vec4<f32> {
    let bits = unpack4xU8(w);
    let magnitude = bits & vec4<u32>(127u);
    let normal = bitcast<vec4<f32>>((magnitude << vec4<u32>(20u)) + vec4<u32>(0x3c000000u));
    let value = select(normal, vec4<f32>(magnitude) * 0.001953125, magnitude < vec4<u32>(8u));
    return select(value, -value, bits > vec4<u32>(127u));
}
