//! What is said about repeated timings.

use crate::bench::workload::mix;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Resamples of a bootstrap: the ends of a 95 % interval are then the 50th of 2,000 from either side.
const RESAMPLES: usize = 2000;
/// Median absolute deviations from the median beyond which a timing is an outlier. Of a normal distribution, whose
/// standard deviation is 1.4826 of them, that leaves out one in 2,000.
const OUTLIER_MADS: f64 = 5.0;
/// Timings that are compared with as many before them.
const TREND_WINDOW: usize = 3;
/// Medians of neighbouring windows within this factor of each other are no trend.
const TREND: f64 = 1.05;

/// Two ends, between which a value lies with some certainty.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The lower end.
    pub low: f64,
    /// The upper end.
    pub high: f64,
}

impl Interval {
    /// The interval of 95 % certainty for the median of `values`; `None` if there are none.
    ///
    /// The percentile bootstrap (Efron 1979, "Bootstrap methods: another look at the jackknife"): the median of as many
    /// values drawn with replacement, over and over, and of those medians the middle 95 %. It assumes no distribution,
    /// and the seed is fixed, so that the same values always give the same interval.
    pub fn of_median(values: &[f64]) -> Option<Interval> {
        (!values.is_empty()).then(|| Interval::of_statistic(0.95, |random| random.median(values)))
    }

    /// Of the geometric mean of ratios of two medians, as [`Interval::of_median`], with values drawn from all: pairs of
    /// numerators and denominators. `None` if there are no pairs, or one has no values.
    pub fn of_ratios(pairs: &[(&[f64], &[f64])], certainty: f64) -> Option<Interval> {
        let is_possible = pairs.iter().all(|(above, below)| !above.is_empty() && !below.is_empty());
        (is_possible && !pairs.is_empty()).then(|| {
            Interval::of_statistic(certainty, |random| {
                let logs = pairs.iter().map(|(above, below)| (random.median(above) / random.median(below)).ln());
                (logs.sum::<f64>() / pairs.len() as f64).exp()
            })
        })
    }

    fn of_statistic(certainty: f64, mut draw: impl FnMut(&mut Random) -> f64) -> Interval {
        let mut random = Random(0x5EED);
        let mut found: Vec<f64> = (0..RESAMPLES).map(|_| draw(&mut random)).collect();
        found.sort_by(f64::total_cmp);
        let outside = ((1.0 - certainty) / 2.0 * RESAMPLES as f64) as usize;
        Interval { low: found[outside], high: found[RESAMPLES - 1 - outside] }
    }

    /// Some value is in both.
    pub fn overlaps(&self, other: &Interval) -> bool {
        self.low <= other.high && other.low <= self.high
    }

    /// It is in here.
    pub fn contains(&self, value: f64) -> bool {
        (self.low..=self.high).contains(&value)
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014), as the workloads' numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, len: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = mix(self.0);
        // The upper half of the product is uniform up to one part in 2^64 / len.
        ((u128::from(z) * len as u128) >> 64) as usize
    }

    /// The median of as many values drawn with replacement.
    fn median(&mut self, values: &[f64]) -> f64 {
        median_of(&values.iter().map(|_| values[self.below(values.len())]).collect::<Vec<f64>>())
    }
}

/// How many of `values` are further than five median absolute deviations from their median.
pub fn outliers(values: &[f64]) -> usize {
    let middle = median_of(values);
    let deviations: Vec<f64> = values.iter().map(|value| (value - middle).abs()).collect();
    let reach = OUTLIER_MADS * median_of(&deviations);
    deviations.iter().filter(|&&deviation| deviation > reach).count()
}

/// The last few timings are as fast as the few before them: there is nothing left to warm up.
pub fn has_settled(seconds: &[f64]) -> bool {
    let Some(start) = seconds.len().checked_sub(2 * TREND_WINDOW) else { return false };
    let [before, last] = [0, TREND_WINDOW].map(|from| median_of(&seconds[start + from..][..TREND_WINDOW]));
    last < before * TREND && before < last * TREND
}

/// The value below which this share of `values` lies; NaN if there are none.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let sorted = sorted(values);
    let at = (share * sorted.len().saturating_sub(1) as f64).round() as usize;
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// The middle of `values`, in any order; NaN if there are none.
pub fn median_of(values: &[f64]) -> f64 {
    if values.is_empty() { f64::NAN } else { median(&sorted(values)) }
}

fn sorted(values: &[f64]) -> Vec<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted
}

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
        let sorted = sorted(seconds);
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
    fn the_interval_holds_the_median_and_narrows_with_more_values() {
        // Evenly spread from 1 to 2, in no order.
        let values = |len: usize| (0..len).map(|n| 1.0 + (n * 37 % len) as f64 / len as f64).collect::<Vec<f64>>();
        let [few, many] = [11, 1001].map(|len| Interval::of_median(&values(len)).expect("there are values"));
        for interval in [few, many] {
            assert!(interval.contains(1.5) && !interval.contains(1.0), "{interval:?}");
        }
        // The median of n uniform values has a standard deviation of 1 / (2 sqrt(n)), and 95 % are within 1.96 of it.
        let expected = 2.0 * 1.96 * 0.5 / 1001f64.sqrt();
        assert!(((many.high - many.low) / expected - 1.0).abs() < 0.25, "{many:?}, expected a width of {expected}");
        assert!(few.high - few.low > 3.0 * (many.high - many.low));
        assert_eq!(Interval::of_median(&values(11)), Some(few), "the seed is fixed");
        assert_eq!(Interval::of_median(&[]), None);
        assert_eq!(Interval::of_median(&[2.0]), Some(Interval { low: 2.0, high: 2.0 }));
    }

    #[test]
    fn a_ratio_is_less_certain_than_its_parts_and_more_certainty_is_wider() {
        let values: Vec<f64> = (0..41).map(|n| 10.0 + f64::from(n % 7)).collect();
        let slower: Vec<f64> = values.iter().map(|value| value * 1.5).collect();
        let [narrow, wide] =
            [0.5, 0.99].map(|c| Interval::of_ratios(&[(&slower, &values)], c).expect("there are values"));
        assert!(wide.low < narrow.low && narrow.high < wide.high && wide.contains(1.5), "{narrow:?} {wide:?}");
        assert!(wide.low > 1.0, "{wide:?}");
        // Two ratios that are one another's inverse have a mean of 1.
        let both = [(&slower[..], &values[..]), (&values, &slower)];
        assert!(Interval::of_ratios(&both, 0.95).is_some_and(|mean| mean.contains(1.0) && mean.high < 1.2));
        assert_eq!(Interval::of_ratios(&[(&slower, &[])], 0.95), None);
        assert_eq!(Interval::of_ratios(&[], 0.95), None);
    }

    #[test]
    fn intervals_overlap_or_do_not() {
        let of = |low, high| Interval { low, high };
        assert!(of(1.0, 2.0).overlaps(&of(2.0, 3.0)) && of(1.0, 4.0).overlaps(&of(2.0, 3.0)));
        assert!(!of(1.0, 2.0).overlaps(&of(2.1, 3.0)) && !of(2.1, 3.0).overlaps(&of(1.0, 2.0)));
    }

    #[test]
    fn outliers_are_far_from_the_rest() {
        assert_eq!(outliers(&[1.0, 1.1, 0.9, 1.05, 0.95, 9.0]), 1);
        assert_eq!(outliers(&[1.0, 1.1, 0.9, 1.05, 0.95]), 0);
        assert_eq!(outliers(&[]), 0);
    }

    #[test]
    fn what_still_gets_faster_has_not_settled() {
        assert!(!has_settled(&[1.0; 5]), "too few to know");
        assert!(has_settled(&[9.0, 1.0, 1.02, 1.0, 0.99, 1.01, 1.0]));
        assert!(!has_settled(&[2.0, 1.8, 1.6, 1.4, 1.2, 1.0]));
        assert!(!has_settled(&[1.0, 1.0, 1.0, 1.2, 1.2, 1.2]), "slower is a trend, too");
    }

    #[test]
    fn quantiles_are_values() {
        let values = [5.0, 1.0, 3.0, 2.0, 4.0];
        assert_eq!([0.0, 0.5, 1.0].map(|share| quantile(&values, share)), [1.0, 3.0, 5.0]);
        assert!(quantile(&[], 0.5).is_nan() && median_of(&[]).is_nan());
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
