//! Results side by side: what differs by more than the noise.
//!
//! On one machine times are compared in yardsticks ([`crate::bench::yardstick`]), so that a machine that was slower all
//! along, or shared with others, does not count as a slower layer: by the run's usual yardstick, which many measurements make
//! sure, and only in rounds during which the machine was faster or slower than usual by that round's own, which is one
//! measurement. Different machines are compared by the clock.

use crate::bench::results::{DeviceResult, Results, Round, Row};
use crate::bench::stats::{self, Interval};
use crate::model::formats::WeightFormat;
use serde::{Deserialize, Serialize};

/// How sure to be that none of the rows of a comparison differs by chance: each row's share of what is left is what
/// Bonferroni's inequality allows.
const CERTAINTY: f64 = 0.95;
/// What two runs of one build differ by for reasons that last as long as a run, such as where its buffers lie, which
/// rounds of one run cannot show.
pub const RUN_TO_RUN: f64 = 0.04;

/// A round whose yardstick is off the run's usual one by more than this factor was on a machine of another speed.
const OTHER_SPEED: f64 = 1.3;

/// One file's rows by those of another.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    /// Whose times are the denominators.
    pub base: DeviceResult,
    /// Whose are compared with them.
    pub other: DeviceResult,
    /// Times are in yardsticks: both are of one machine.
    pub in_yardsticks: bool,
    /// The machine's speed in the other run by that in the base's, by the yardstick; absent where they differ.
    pub machine: Option<f64>,
    /// Rows that both have.
    pub rows: Vec<Pair>,
    /// The geometric mean of their ratios, which is surer than each of them; absent where a file does not say how its
    /// times scattered.
    pub overall: Option<Overall>,
    /// Rows that only the base has, in words.
    pub only_in_base: Vec<String>,
    /// Rows that only the other has.
    pub only_in_other: Vec<String>,
}

/// A row that both have.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pair {
    /// The layer.
    pub layer: String,
    /// Storage of the expert weights.
    pub weights: WeightFormat,
    /// Tokens of the batch.
    pub tokens: u32,
    /// Exponent of the Zipf distribution over experts.
    pub skew: f64,
    /// Median time of the base, in seconds.
    pub base_s: f64,
    /// Of the other.
    pub other_s: f64,
    /// The other's time by the base's, above 1 where it is slower; in yardsticks where the comparison is.
    pub ratio: f64,
    /// Where that lies with the certainty that the whole comparison has, noise between runs included. Absent where a file
    /// does not say how its times scattered.
    pub interval: Option<Interval>,
    /// What follows.
    pub verdict: Difference,
}

/// All rows together.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Overall {
    /// Mean ratio.
    pub ratio: f64,
    /// Where it lies, noise between runs included.
    pub interval: Interval,
    /// What follows.
    pub verdict: Difference,
}

/// Whether a difference is more than noise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Difference {
    /// It is not.
    None,
    /// The other takes longer.
    Slower,
    /// The other takes less time.
    Faster,
    /// A file does not say how its times scattered.
    Unknown,
}

impl Pair {
    /// The other is slower by more than this fraction, and by more than the noise.
    pub fn is_slower_by(&self, fraction: f64) -> bool {
        self.verdict == Difference::Slower && self.ratio > 1.0 + fraction
    }
}

/// Compares each row of `other` with the row of `base` of the same layer, weights, tokens and routing.
pub fn compare(base: &Results, other: &Results) -> Comparison {
    let in_yardsticks = is_one_machine(base, other);
    let usual = |run: &Results| run.yardstick.as_ref().map(|yardstick| yardstick.median_s).filter(|_| in_yardsticks);
    let partner = |row: &Row, results: &'_ Results| results.rows.iter().position(|other| is_same_case(row, other));
    let pairs: Vec<(&Row, &Row)> =
        base.rows.iter().filter_map(|row| Some((row, &other.rows[partner(row, other)?]))).collect();
    let certainty = 1.0 - (1.0 - CERTAINTY) / (pairs.len() + 1) as f64;
    let times: Vec<(Vec<f64>, Vec<f64>)> =
        pairs.iter().map(|(row, another)| (times(another, usual(other)), times(row, usual(base)))).collect();
    let alone = |rows: &[Row], others: &Results| {
        rows.iter().filter(|row| partner(row, others).is_none()).map(Row::title).collect()
    };
    Comparison {
        base: base.device.clone(),
        other: other.device.clone(),
        in_yardsticks,
        machine: usual(base).zip(usual(other)).map(|(base, other)| base / other),
        rows: pairs.iter().zip(&times).map(|((base, other), times)| pair(base, other, times, certainty)).collect(),
        overall: overall(&times, certainty),
        only_in_base: alone(&base.rows, other),
        only_in_other: alone(&other.rows, base),
    }
}

/// The yardstick did the same work on the same device and processor.
fn is_one_machine(base: &Results, other: &Results) -> bool {
    let work = |results: &Results| results.yardstick.as_ref().map(|yardstick| yardstick.what.clone());
    let cpu = |results: &Results| results.facts.as_ref().map(|facts| (facts.cpu.clone(), facts.cores));
    base.device == other.device && cpu(base) == cpu(other) && work(base).is_some() && work(base) == work(other)
}

fn is_same_case(a: &Row, b: &Row) -> bool {
    let sizes = |row: &Row| [row.hidden_size, row.intermediate_size, row.num_experts, row.top_k, row.tokens];
    let places = |row: &Row| row.residency.map(|residency| (residency.places, residency.pinned));
    (&a.preset, sizes(a), a.weights, a.fresh_tokens) == (&b.preset, sizes(b), b.weights, b.fresh_tokens)
        && (a.skew, &a.trace, places(a)) == (b.skew, &b.trace, places(b))
}

/// Of each round: in yardsticks, where there is a usual one, or in seconds.
fn times(row: &Row, usual: Option<f64>) -> Vec<f64> {
    let rounds = row.timing.as_ref().map_or(&[][..], |timing| &timing.rounds);
    let is_usual = |own: f64, usual: f64| (usual / OTHER_SPEED..=usual * OTHER_SPEED).contains(&own);
    let time = |round: &Round| match usual {
        None => round.seconds,
        Some(usual) if is_usual(round.yardstick_s, usual) => round.seconds / usual,
        Some(_) => round.in_yardsticks(),
    };
    rounds.iter().map(time).collect()
}

/// `times`: those of `other`, and of `base`.
fn pair(base: &Row, other: &Row, times: &(Vec<f64>, Vec<f64>), certainty: f64) -> Pair {
    let interval = noise(std::slice::from_ref(times), certainty);
    let ratio = match interval {
        Some(_) => stats::median_of(&times.0) / stats::median_of(&times.1),
        None => other.median_s / base.median_s,
    };
    Pair {
        layer: base.layer(),
        weights: base.weights,
        tokens: base.tokens,
        skew: base.skew,
        base_s: base.median_s,
        other_s: other.median_s,
        ratio,
        interval,
        verdict: interval.map_or(Difference::Unknown, verdict),
    }
}

fn overall(times: &[(Vec<f64>, Vec<f64>)], certainty: f64) -> Option<Overall> {
    let interval = noise(times, certainty)?;
    let logs = times.iter().map(|(other, base)| (stats::median_of(other) / stats::median_of(base)).ln());
    Some(Overall { ratio: (logs.sum::<f64>() / times.len() as f64).exp(), interval, verdict: verdict(interval) })
}

fn verdict(interval: Interval) -> Difference {
    match interval {
        Interval { low, .. } if low > 1.0 => Difference::Slower,
        Interval { high, .. } if high < 1.0 => Difference::Faster,
        _ => Difference::None,
    }
}

/// Where the mean ratio of these lies, widened by what differs from run to run.
fn noise(times: &[(Vec<f64>, Vec<f64>)], certainty: f64) -> Option<Interval> {
    let slices: Vec<(&[f64], &[f64])> = times.iter().map(|(other, base)| (&other[..], &base[..])).collect();
    let interval = Interval::of_ratios(&slices, certainty)?;
    let factor = 1.0 + RUN_TO_RUN;
    Some(Interval { low: interval.low / factor, high: interval.high * factor })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::Facts;
    use crate::bench::results::tests::results;
    use crate::bench::results::{Timing, YardstickResult};

    /// One row of `slowness` yardsticks, give or take a few percent, on a machine of this speed.
    fn run(slowness: f64, speed: f64) -> Results {
        let mut results = results();
        let yardstick_s = 0.01 / speed;
        // From -0.03 to 0.03, in no order.
        let scatter = |n: usize| ((n * 7 % 13) as f64 - 6.0) / 200.0;
        let rounds = (0..13).map(|n| Round { seconds: slowness * yardstick_s * (1.0 + scatter(n)), yardstick_s });
        results.rows[0].timing = Timing::of(rounds.collect());
        results.rows[0].median_s = slowness * yardstick_s;
        let [median_s, fast_s, slow_s] = [yardstick_s; 3];
        results.yardstick =
            Some(YardstickResult { what: "work".to_owned(), median_s, fast_s, slow_s, times: vec![(0.0, median_s)] });
        results.facts = Some(Facts { cpu: Some("a cpu".to_owned()), ..Facts::default() });
        results
    }

    fn only_pair(base: &Results, other: &Results) -> Pair {
        let comparison = compare(base, other);
        assert_eq!((comparison.rows.len(), comparison.only_in_base.len()), (1, 0), "{comparison:?}");
        comparison.rows[0].clone()
    }

    #[test]
    fn a_machine_of_half_the_speed_is_no_slower_layer() {
        let (base, other) = (run(5.0, 1.0), run(5.0, 0.5));
        let pair = only_pair(&base, &other);
        assert_eq!((pair.verdict, pair.other_s / pair.base_s), (Difference::None, 2.0));
        assert!((pair.ratio - 1.0).abs() < 1e-9 && pair.interval.is_some_and(|i| i.contains(1.0)), "{pair:?}");
        assert_eq!(compare(&base, &other).machine, Some(0.5));
        // Somewhere else, only the clock counts.
        let mut elsewhere = other;
        elsewhere.device.name = "another".to_owned();
        let comparison = compare(&base, &elsewhere);
        assert_eq!((comparison.in_yardsticks, comparison.machine), (false, None));
        assert_eq!(comparison.rows[0].verdict, Difference::Slower);
        assert!((comparison.rows[0].ratio - 2.0).abs() < 1e-9);
    }

    #[test]
    fn a_machine_that_changes_its_speed_in_between_is_no_slower_layer() {
        // Twice as slow during most of the rounds, but not during most of the run.
        let mut other = run(5.0, 1.0);
        let timing = other.rows[0].timing.as_mut().expect("it is there");
        timing.rounds.iter_mut().take(9).for_each(|round| {
            round.seconds *= 2.0;
            round.yardstick_s *= 2.0;
        });
        assert_eq!(only_pair(&run(5.0, 1.0), &other).verdict, Difference::None);
        // A yardstick that scatters by itself does not matter, nor hide anything.
        let noisy = |slowness: f64| {
            let mut run = run(slowness, 1.0);
            let timing = run.rows[0].timing.as_mut().expect("it is there");
            timing.rounds.iter_mut().enumerate().for_each(|(n, round)| round.yardstick_s *= [0.8, 1.0, 1.25][n % 3]);
            run
        };
        assert_eq!(only_pair(&noisy(5.0), &noisy(5.0)).verdict, Difference::None);
        assert_eq!(only_pair(&noisy(5.0), &noisy(5.75)).verdict, Difference::Slower);
    }

    #[test]
    fn fifteen_percent_are_found_either_way_and_three_are_noise() {
        let (base, slower) = (run(5.0, 1.0), run(5.75, 1.3));
        assert_eq!(only_pair(&base, &slower).verdict, Difference::Slower);
        assert_eq!(only_pair(&slower, &base).verdict, Difference::Faster);
        assert_eq!(only_pair(&base, &run(5.15, 1.0)).verdict, Difference::None);
        let pair = only_pair(&base, &slower);
        assert!(pair.is_slower_by(0.1) && !pair.is_slower_by(0.2) && !only_pair(&slower, &base).is_slower_by(0.0));
    }

    #[test]
    fn all_rows_together_find_what_each_alone_is_too_noisy_for() {
        let with_rows = |slowness: f64| {
            let mut run = run(slowness, 1.0);
            let timing = run.rows[0].timing.as_mut().expect("it is there");
            for (n, round) in timing.rounds.iter_mut().enumerate() {
                round.seconds *= 1.0 + ((n * 5 % 13) as f64 - 6.0) / 24.0;
            }
            run.rows = (1..=12).map(|tokens| Row { tokens, ..run.rows[0].clone() }).collect();
            run
        };
        let comparison = compare(&with_rows(5.0), &with_rows(5.75));
        assert!(comparison.rows.iter().all(|pair| pair.verdict == Difference::None), "{comparison:?}");
        let overall = comparison.overall.expect("there are rounds");
        assert!(overall.verdict == Difference::Slower && (overall.ratio - 1.15).abs() < 1e-9, "{overall:?}");
        let same = compare(&with_rows(5.0), &with_rows(5.0)).overall.expect("there are rounds");
        assert_eq!(same.verdict, Difference::None);
    }

    #[test]
    fn a_difference_within_the_noise_never_counts_as_slower() {
        let mut noisy = run(5.0, 1.0);
        let timing = noisy.rows[0].timing.as_mut().expect("it is there");
        for (n, round) in timing.rounds.iter_mut().enumerate() {
            round.seconds *= if n % 2 == 0 { 0.6 } else { 1.6 };
        }
        let pair = only_pair(&noisy, &run(5.75, 1.0));
        assert_eq!(pair.verdict, Difference::None);
        assert!(!Pair { ratio: 1.15, ..pair }.is_slower_by(0.1));
    }

    #[test]
    fn without_rounds_nobody_knows() {
        let mut old = run(5.0, 1.0);
        old.rows[0].timing = None;
        let pair = only_pair(&old, &run(10.0, 1.0));
        assert_eq!((pair.verdict, pair.interval, pair.ratio), (Difference::Unknown, None, 2.0));
        assert_eq!(compare(&old, &old).overall, None);
        assert!(!pair.is_slower_by(0.1));
    }

    #[test]
    fn rows_without_a_partner_are_named() {
        let (mut base, mut other) = (run(5.0, 1.0), run(5.0, 1.0));
        base.rows[0].tokens = 7;
        other.rows[0].skew = 1.5;
        let comparison = compare(&base, &other);
        assert!(comparison.rows.is_empty());
        assert!(comparison.only_in_base[0].ends_with("f16, 7 tokens"), "{comparison:?}");
        assert!(comparison.only_in_other[0].ends_with("f16, skew 1.5, 5 tokens"), "{comparison:?}");
    }
}
