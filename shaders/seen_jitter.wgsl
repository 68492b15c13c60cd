// seen_jitter: each input element that the router sees is multiplied by a number near 1 (Fedus et al. 2021).
// No entry point.

fn seen_input4(token: u32, stride: u32, k: u32) -> vec4<f32> {
    let first = 4u * k;
    let t = params.first_token + token;
    let key = params.noise_key;
    let random = vec4<f32>(
        uniform_noise(key, t, first), uniform_noise(key, t, first + 1u),
        uniform_noise(key, t, first + 2u), uniform_noise(key, t, first + 3u));
    return load_input4(token, stride, k) * (1.0 + params.jitter * (2.0 * random - 1.0));
}
