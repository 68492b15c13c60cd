//! What is said about repeated timings.

use std::time::Duration;

/// Order statistics of a set of timings, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    /// Timings taken.
    pub runs: usize,
    /// The fastest: the least disturbed by whatever else the machine did.
    pub min_s: f64,
    /// The middle one; the mean of the two middle ones where their number is even.
    pub median_s: f64,
    /// The slowest.
    pub max_s: f64,
}

impl Summary {
    /// `None` if there are no timings.
    pub fn of(seconds: &[f64]) -> Option<Summary> {
        let mut sorted = seconds.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min_s, &max_s) = (sorted.first()?, sorted.last()?);
        Some(Summary { runs: sorted.len(), min_s, median_s: median(&sorted), max_s })
    }
}

/// The middle of a sorted, non-empty slice.
fn median(sorted: &[f64]) -> f64 {
    let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    low + (high - low) / 2.0
}

/// How often to repeat something that took `once`: as often as fits `slice`, but at least `least` and at most `most`.
pub fn runs_within(slice: Duration, once: Duration, least: usize, most: usize) -> usize {
    // Faster than the clock resolves counts as one nanosecond, so that this never divides by zero.
    let fits = slice.as_nanos() / once.as_nanos().max(1);
    usize::try_from(fits).unwrap_or(usize::MAX).clamp(least, most.max(least))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_does_not_matter() {
        let summary = Summary::of(&[3.0, 1.0, 2.0]).expect("there are timings");
        assert_eq!(summary, Summary { runs: 3, min_s: 1.0, median_s: 2.0, max_s: 3.0 });
    }

    #[test]
    fn an_even_number_has_its_median_in_the_middle() {
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 8.0]).map(|s| s.median_s), Some(3.0));
        assert_eq!(Summary::of(&[5.0]).map(|s| s.median_s), Some(5.0));
    }

    #[test]
    fn no_timings_have_no_summary() {
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn repetitions_fill_the_slice_within_bounds() {
        let ms = Duration::from_millis;
        assert_eq!(runs_within(ms(1000), ms(100), 5, 200), 10);
        assert_eq!(runs_within(ms(1000), ms(900), 5, 200), 5);
        assert_eq!(runs_within(ms(1000), ms(1), 5, 200), 200);
        assert_eq!(runs_within(ms(1000), Duration::ZERO, 5, 200), 200);
    }
}
