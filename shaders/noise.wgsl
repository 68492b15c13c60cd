// noise: random numbers that are a function of (key, token, index). No entry point. CPU twin: src/model/noise.rs.

// One round of a permuted congruential generator (O'Neill 2014) used as a hash (Jarzynski and Olano 2020).
fn hash(v: u32) -> u32 {
    let state = v * 747796405u + 2891336453u;
    let word = ((state >> ((state >> 28u) + 4u)) ^ state) * 277803737u;
    return (word >> 22u) ^ word;
}

// Uniform in (0, 1), never 0 or 1.
fn uniform_noise(key: u32, token: u32, index: u32) -> f32 {
    return (f32(hash(index ^ hash(token ^ key)) >> 9u) + 0.5) / 8388608.0;
}

// Standard normal (Box and Muller 1958), from the uniforms 2 * index and 2 * index + 1.
fn normal_noise(key: u32, token: u32, index: u32) -> f32 {
    let u = uniform_noise(key, token, 2u * index);
    let v = uniform_noise(key, token, 2u * index + 1u);
    return sqrt(-2.0 * log(u)) * cos(6.2831853 * v);
}
