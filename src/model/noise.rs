//! Random numbers that are a function of (seed, token, index): the same on every device, in any order.
//! The same arithmetic is in `shaders/noise.wgsl`.

/// One round of a permuted congruential generator (O'Neill 2014) used as a hash (Jarzynski and Olano 2020).
fn hash(v: u32) -> u32 {
    let state = v.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
    let word = ((state >> ((state >> 28) + 4)) ^ state).wrapping_mul(277_803_737);
    (word >> 22) ^ word
}

/// What a pass with this seed starts from.
pub(crate) fn key(seed: u64) -> u32 {
    hash(seed as u32 ^ hash((seed >> 32) as u32))
}

fn bits(key: u32, token: u32, index: u32) -> u32 {
    hash(index ^ hash(token ^ key))
}

/// Uniform in (0, 1), never 0 or 1.
pub(crate) fn uniform(key: u32, token: u32, index: u32) -> f32 {
    ((bits(key, token, index) >> 9) as f32 + 0.5) / (1 << 23) as f32
}

/// Standard normal (Box and Muller 1958), from the uniforms 2 * index and 2 * index + 1.
pub(crate) fn normal(key: u32, token: u32, index: u32) -> f64 {
    let [u, v] = [0, 1].map(|part| f64::from(uniform(key, token, 2 * index + part)));
    (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_and_differ_by_every_argument() {
        let key = key(1 << 40 | 7);
        let mean = |f: &dyn Fn(u32) -> f64| (0..100_000).map(f).sum::<f64>() / 1e5;
        assert!((mean(&|n| f64::from(uniform(key, n / 100, n % 100))) - 0.5).abs() < 0.005);
        assert!(mean(&|n| normal(key, n / 100, n % 100)).abs() < 0.02);
        assert!((mean(&|n| normal(key, n / 100, n % 100).powi(2)) - 1.0).abs() < 0.03);
        let first = bits(key, 3, 5);
        assert!([bits(key, 5, 3), bits(key, 3, 6), bits(super::key(7), 3, 5)].iter().all(|&other| other != first));
    }
}
