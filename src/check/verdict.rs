//! Comparing what a device wrote with what it should have written.

use crate::gpu::harness::POISON;

/// Unit roundoff of f32.
pub(super) const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// Fewer elements than this say nothing about a mean.
const MANY: usize = 64;

/// Largest mean square of the errors, as a share of the mean square of the values: a fault that stays within the bound of
/// each element, but is everywhere, shows here.
pub(super) mod nmse {
    /// Sums of f32 products.
    pub const SUMS: f64 = 1e-10;
    /// Weights of choices.
    pub const WEIGHTS: f64 = 1e-11;
    /// Whole layers.
    pub const LAYER: f64 = 1e-9;
}

/// The result of one comparison.
pub(super) struct Verdict {
    pub max_rel_error: f64,
    pub reason: Option<String>,
}

impl Verdict {
    pub fn failed(reason: String) -> Self {
        Self { max_rel_error: f64::INFINITY, reason: Some(reason) }
    }

    /// Nothing to measure, and nothing wrong.
    pub fn right() -> Self {
        Self { max_rel_error: 0.0, reason: None }
    }
}

/// How far an f32 sum of `count` products may be from the exact one, when the products' magnitudes sum to `magnitude`.
pub(super) fn sum_bound(count: usize, magnitude: f64) -> f64 {
    4.0 * (count as f64).sqrt() * UNIT * magnitude
}

/// Element by element, then all of them by `most_nmse`; NaN, poison and a wrong length fail.
pub(super) fn compare(got: &[f32], want: &[f64], most_nmse: f64, bound: impl Fn(usize) -> f64) -> Verdict {
    if got.len() != want.len() {
        return Verdict::failed(format!("{} elements, expected {}", got.len(), want.len()));
    }
    let most = want.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    let mut worst = 0.0f64;
    let (mut errors, mut values) = (0.0, 0.0);
    let mut reason = None;
    for (at, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs();
        worst = worst.max(error);
        errors += error * error;
        values += w * w;
        // Written so that a NaN is not within any bound.
        let within = error <= bound(at);
        if !within && reason.is_none() {
            reason = Some(format!("element {at} {}, expected {w:e} within {:e}", shown(g), bound(at)));
        }
    }
    if reason.is_none() && want.len() >= MANY && errors > most_nmse * values {
        reason =
            Some(format!("the errors' mean square is {:e} of the values', expected {most_nmse:e}", errors / values));
    }
    let relative = if most > 0.0 { worst / most } else { worst };
    Verdict { max_rel_error: if reason.is_some() && relative.is_nan() { f64::INFINITY } else { relative }, reason }
}

/// Bit by bit: for values that f32 holds and arithmetic does not round.
pub(super) fn compare_bits(got: &[f32], want: &[f64]) -> Verdict {
    if got.len() != want.len() {
        return Verdict::failed(format!("{} elements, expected {}", got.len(), want.len()));
    }
    let differs = |&at: &usize| got[at].to_bits() != (want[at] as f32).to_bits();
    let differing = (0..got.len()).filter(differs).count();
    match (0..got.len()).find(differs) {
        None => Verdict::right(),
        Some(at) => Verdict::failed(format!(
            "{differing} of {} elements differ in their bits; element {at} {}, expected {:e}",
            got.len(),
            shown(got[at]),
            want[at]
        )),
    }
}

/// Word by word, for indices.
pub(super) fn compare_words(name: &str, got: &[u32], want: &[u32]) -> Option<String> {
    if got.len() != want.len() {
        return Some(format!("{name} has {} words, expected {}", got.len(), want.len()));
    }
    let at = got.iter().zip(want).position(|(g, w)| g != w)?;
    let what = if got[at] == POISON { "was never written".to_owned() } else { format!("is {}", got[at]) };
    Some(format!("{name}[{at}] {what}, expected {}", want[at]))
}

fn shown(value: f32) -> String {
    if value.to_bits() == POISON { "was never written".to_owned() } else { format!("is {value:e}") }
}

pub(super) fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&word| f32::from_bits(word)).collect()
}

pub(super) fn words(floats: &[f32]) -> &[u32] {
    bytemuck::cast_slice(floats)
}

pub(super) fn abs(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| v.abs()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparison_fails_where_it_must() {
        let want = [1.0, -2.0, 3.0];
        let passes = |got: &[f32]| compare(got, &want, nmse::SUMS, |_| 1e-6).reason.is_none();
        assert!(passes(&[1.0, -2.0, 3.0]));
        let poison = f32::from_bits(POISON);
        for wrong in [3.1, f32::NAN, f32::INFINITY, poison] {
            assert!(!passes(&[1.0, -2.0, wrong]) && !passes(&[wrong, -2.0, 3.0]), "{wrong}");
        }
        assert!(!passes(&[1.0, -2.0]));
    }

    #[test]
    fn errors_within_every_bound_still_show_in_their_mean() {
        let want = [1.0; MANY];
        let passes = |got: &[f32]| compare(got, &want[..got.len()], 1e-10, |_| 1e-3).reason.is_none();
        assert!(!passes(&[1.0001; MANY]));
        assert!(passes(&[1.0001; MANY - 1]) && passes(&[1.000_001; MANY]));
    }

    #[test]
    fn one_flipped_bit_is_a_difference() {
        let want = [1.0, 0.0, -7.0];
        assert!(compare_bits(&[1.0, 0.0, -7.0], &want).reason.is_none());
        let flipped = f32::from_bits(7f32.to_bits() ^ (1 << 31) ^ 1);
        for wrong in [[1.0, 0.0, flipped], [1.0, -0.0, -7.0], [f32::NAN, 0.0, -7.0]] {
            assert!(compare_bits(&wrong, &want).reason.is_some(), "{wrong:?}");
        }
        assert!(compare_bits(&[1.0], &want).reason.is_some());
    }

    #[test]
    fn one_other_word_is_a_difference() {
        assert!(compare_words("ids", &[1, 2], &[1, 2]).is_none());
        for wrong in [&[1, 3][..], &[2, 1], &[1], &[1, POISON]] {
            assert!(compare_words("ids", wrong, &[1, 2]).is_some_and(|reason| reason.contains("ids")), "{wrong:?}");
        }
    }
}
