//! Who is the fastest? A race in rounds, in which each candidate is timed once: whatever disturbs the machine disturbs
//! all of them. Who cannot win any more leaves, so that time goes to those that are close.
//!
//! Knows neither devices nor clocks, so that it is tested without both.

use crate::bench::Summary;
use crate::error::Result;

/// A result within this factor of the best is a tie, which the default wins: it is what other layers of the same kind
/// run, and noise should not change it.
const TIE: f64 = 1.02;
/// Most rounds: the median of more is no better.
const MOST_ROUNDS: usize = 25;
/// From this round on, who was never within `FAR` of the best median leaves.
const FAR_AFTER: usize = 3;
const FAR: f64 = 1.5;
/// From this round on, who was never as fast as the best median leaves.
const NEVER_AFTER: usize = 5;
/// A checked pass that took this much longer than the fastest timed one need not be timed, ...
const HOPELESS: f64 = 4.0;
/// ... if it took long enough, in seconds, that moving data to and fro is not what took it.
const LONG: f64 = 0.05;

/// What candidates compete in.
pub(crate) trait Contest<C> {
    /// Runs `candidate` and compares its result with the reference: what is wrong with it, or the seconds that it took,
    /// which may be more than a timed run takes.
    fn check(&mut self, candidate: C) -> Result<Result<f64, String>>;
    /// Seconds of one run of a candidate that was found right.
    fn time(&mut self, candidate: C) -> Result<f64>;
    /// Share of the time that has been used.
    fn used(&self) -> f64;
    /// A round begins, with that many candidates.
    fn round(&mut self, _round: usize, _racing: usize) {}
}

/// A candidate's time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Time<C> {
    pub(crate) candidate: C,
    pub(crate) median_s: f64,
    pub(crate) runs: usize,
}

/// How a race ended.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Finish<C> {
    /// Whom to choose; `None` if nobody was right.
    pub(crate) winner: Option<Time<C>>,
    /// The first candidate.
    pub(crate) default: Option<Time<C>>,
    /// The best of the others.
    pub(crate) runner_up: Option<Time<C>>,
    /// Who was found wrong, and why. They were never timed.
    pub(crate) wrong: Vec<(C, String)>,
    /// Candidates that were checked.
    pub(crate) checked: usize,
}

struct Runner<C> {
    candidate: C,
    seconds: Vec<f64>,
    racing: bool,
}

impl<C: Copy + PartialEq> Runner<C> {
    fn fastest(&self) -> f64 {
        self.seconds.iter().copied().fold(f64::INFINITY, f64::min)
    }

    fn time(&self) -> Option<Time<C>> {
        let summary = Summary::of(&self.seconds)?;
        Some(Time { candidate: self.candidate, median_s: summary.median_s, runs: summary.runs })
    }

    fn median(&self) -> f64 {
        self.time().map_or(f64::INFINITY, |time| time.median_s)
    }
}

/// The race. The first of `candidates` is the default. Half of the time at most goes to checks; candidates for which
/// there was none are left out.
pub(crate) fn race<C: Copy + PartialEq>(candidates: &[C], contest: &mut impl Contest<C>) -> Result<Finish<C>> {
    let mut runners: Vec<Runner<C>> = Vec::new();
    let mut wrong = Vec::new();
    let mut checked = 0;
    for &candidate in candidates {
        let fastest = runners.iter().map(Runner::fastest).fold(f64::INFINITY, f64::min);
        if fastest.is_finite() && contest.used() > 0.5 {
            break;
        }
        checked += 1;
        match contest.check(candidate)? {
            Err(reason) => wrong.push((candidate, reason)),
            Ok(seconds) => {
                let racing = seconds < LONG || seconds < HOPELESS * fastest;
                let seconds = if racing { vec![contest.time(candidate)?] } else { Vec::new() };
                runners.push(Runner { candidate, seconds, racing });
            }
        }
    }
    for round in 2..=MOST_ROUNDS {
        let racing = runners.iter().filter(|runner| runner.racing).count();
        if racing < 2 || contest.used() >= 1.0 {
            break;
        }
        contest.round(round, racing);
        for runner in runners.iter_mut().filter(|runner| runner.racing) {
            runner.seconds.push(contest.time(runner.candidate)?);
        }
        drop_out(&mut runners, round);
    }
    Ok(finish(candidates, &runners, wrong, checked))
}

/// Takes out who cannot win any more. Whoever has the best median stays: nobody's fastest run is above its own median.
fn drop_out<C: Copy + PartialEq>(runners: &mut [Runner<C>], round: usize) {
    let best = runners.iter().filter(|runner| runner.racing).map(Runner::median).fold(f64::INFINITY, f64::min);
    for runner in runners.iter_mut().filter(|runner| runner.racing) {
        let is_far = round >= FAR_AFTER && runner.fastest() > FAR * best;
        let never = round >= NEVER_AFTER && runner.fastest() > best;
        runner.racing = !(is_far || never);
    }
}

fn finish<C: Copy + PartialEq>(
    candidates: &[C],
    runners: &[Runner<C>],
    wrong: Vec<(C, String)>,
    checked: usize,
) -> Finish<C> {
    let best_of = |keep: &dyn Fn(&&Runner<C>) -> bool| {
        let times = runners.iter().filter(keep).filter_map(Runner::time);
        times.min_by(|a, b| a.median_s.total_cmp(&b.median_s))
    };
    let is_default = |runner: &&Runner<C>| Some(&runner.candidate) == candidates.first();
    let default = best_of(&is_default);
    // Who left early was slower all along, but may have a lower median of fewer runs.
    let best = best_of(&|runner| runner.racing);
    let seconds_of = |time: &Time<C>| {
        let runner = runners.iter().find(|runner| runner.candidate == time.candidate);
        runner.map_or(&[][..], |runner| &runner.seconds)
    };
    let winner = match (best, default) {
        (Some(best), Some(default)) => {
            // A median of few runs says little. So the fastest run counts, too, of the rounds in which both ran.
            let rounds = default.runs.min(best.runs);
            let fastest = |time| seconds_of(time)[..rounds].iter().copied().fold(f64::INFINITY, f64::min);
            let is_better = default.median_s > TIE * best.median_s && fastest(&default) > fastest(&best);
            Some(if is_better { best } else { default })
        }
        (best, _) => best,
    };
    let runner_up = best_of(&|runner| winner.is_none_or(|winner| winner.candidate != runner.candidate));
    Finish { winner, default, runner_up, wrong, checked }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::collections::HashMap;

    /// Candidates are letters with fixed times; the clock is the sum of what they took.
    struct Fake {
        seconds: HashMap<char, Vec<f64>>,
        wrong: Vec<char>,
        runs: HashMap<char, usize>,
        order: String,
        checks: String,
        clock: f64,
        budget: f64,
    }

    impl Fake {
        fn new(seconds: &[(char, &[f64])]) -> Self {
            let seconds = seconds.iter().map(|&(c, s)| (c, s.to_vec())).collect();
            let (order, checks) = (String::new(), String::new());
            Fake { seconds, wrong: vec![], runs: HashMap::new(), order, checks, clock: 0.0, budget: 1e9 }
        }

        fn race(&mut self, candidates: &str) -> Finish<char> {
            race(&candidates.chars().collect::<Vec<_>>(), self).expect("nothing fails")
        }
    }

    impl Contest<char> for Fake {
        fn check(&mut self, candidate: char) -> Result<Result<f64, String>> {
            self.checks.push(candidate);
            let seconds = self.seconds[&candidate][0];
            self.clock += seconds;
            let wrong = self.wrong.contains(&candidate);
            Ok(if wrong { Err("off by one".to_owned()) } else { Ok(seconds) })
        }

        fn time(&mut self, candidate: char) -> Result<f64> {
            let run = self.runs.entry(candidate).or_default();
            let seconds = self.seconds[&candidate][*run % self.seconds[&candidate].len()];
            *run += 1;
            self.order.push(candidate);
            self.clock += seconds;
            Ok(seconds)
        }

        fn used(&self) -> f64 {
            self.clock / self.budget
        }
    }

    #[test]
    fn the_fastest_wins_and_the_next_is_named() {
        let mut fake = Fake::new(&[('a', &[1.2]), ('b', &[1.0]), ('c', &[1.1])]);
        let finish = fake.race("abc");
        let times = [finish.winner, finish.runner_up, finish.default].map(|t| t.map(|t| (t.candidate, t.median_s)));
        assert_eq!(times, [Some(('b', 1.0)), Some(('c', 1.1)), Some(('a', 1.2))]);
        assert_eq!((finish.checked, finish.wrong.len()), (3, 0));
    }

    #[test]
    fn a_wrong_candidate_is_never_timed_nor_chosen_even_if_it_is_the_fastest() {
        for wrong in ['a', 'b', 'c'] {
            let mut fake = Fake::new(&[('a', &[1.2]), ('b', &[1.2]), ('c', &[1.2])]);
            fake.seconds.insert(wrong, vec![0.001]);
            fake.wrong.push(wrong);
            let finish = fake.race("abc");
            assert_eq!(finish.wrong, [(wrong, "off by one".to_owned())]);
            assert!(!fake.order.contains(wrong) && fake.checks == "abc");
            let others = [finish.winner, finish.runner_up, finish.default];
            assert!(others.iter().flatten().all(|time| time.candidate != wrong), "{finish:?}");
            assert!(finish.winner.is_some() && finish.default.is_none() == (wrong == 'a'));
        }
        let mut fake = Fake::new(&[('a', &[1.0]), ('b', &[1.0])]);
        fake.wrong = vec!['a', 'b'];
        let finish = fake.race("ab");
        assert_eq!((finish.winner, finish.wrong.len(), fake.order.len()), (None, 2, 0));
    }

    #[test]
    fn a_tie_goes_to_the_default_and_a_gain_does_not() {
        assert_eq!(Fake::new(&[('a', &[1.019]), ('b', &[1.0])]).race("ab").winner.map(|t| t.candidate), Some('a'));
        assert_eq!(Fake::new(&[('a', &[1.03]), ('b', &[1.0])]).race("ab").winner.map(|t| t.candidate), Some('b'));
        assert_eq!(Fake::new(&[('a', &[1.0]), ('b', &[1.0])]).race("ab").winner.map(|t| t.candidate), Some('a'));
    }

    #[test]
    fn rounds_are_interleaved() {
        let mut fake = Fake::new(&[('a', &[1.0]), ('b', &[1.0])]);
        fake.race("ab");
        assert_eq!(fake.order, "ab".repeat(MOST_ROUNDS));
    }

    #[test]
    fn who_cannot_win_leaves_early() {
        // The pass that was checked says enough of d.
        let mut fake = Fake::new(&[('a', &[1.0]), ('b', &[1.6]), ('c', &[1.1]), ('d', &[4.1])]);
        let finish = fake.race("abcd");
        let runs = |c| fake.runs.get(&c).copied().unwrap_or(0);
        assert_eq!([runs('d'), runs('b'), runs('c')], [0, FAR_AFTER, NEVER_AFTER]);
        assert_eq!(runs('a'), NEVER_AFTER, "one is left, so nothing is timed any more");
        assert_eq!((finish.winner.map(|t| t.candidate), finish.checked), (Some('a'), 4));
        // What takes no time may be waiting for something else.
        let mut fake = Fake::new(&[('a', &[0.001]), ('b', &[0.01, 0.0005])]);
        assert_eq!(fake.race("ab").checked, 2);
        assert!(fake.runs[&'b'] > 1);
    }

    #[test]
    fn one_slow_run_does_not_decide() {
        let mut fake = Fake::new(&[('a', &[2.0]), ('b', &[1.0, 9.0, 1.0, 1.0, 1.0])]);
        assert_eq!(fake.race("ab").winner.map(|t| (t.candidate, t.median_s)), Some(('b', 1.0)));
    }

    #[test]
    fn noise_does_not_beat_the_default() {
        // Whatever else ran at the time: alone, a is no slower than b.
        let mut fake = Fake::new(&[('a', &[1.0, 2.0, 2.0]), ('b', &[1.1])]);
        assert_eq!(fake.race("ab").winner.map(|t| t.candidate), Some('a'));
        let mut fake = Fake::new(&[('a', &[1.2, 2.0, 2.0]), ('b', &[1.1])]);
        assert_eq!(fake.race("ab").winner.map(|t| t.candidate), Some('b'));
    }

    #[test]
    fn time_runs_out_with_a_winner() {
        // Half of the time is gone with the default's check and run: the others are not tried.
        let mut fake = Fake::new(&[('a', &[1.0]), ('b', &[0.5]), ('c', &[0.5])]);
        fake.budget = 3.0;
        let finish = fake.race("abc");
        assert_eq!((finish.checked, finish.winner.map(|t| t.candidate), finish.runner_up), (1, Some('a'), None));
        // A budget in the middle of the race ends it after the round.
        let mut fake = Fake::new(&[('a', &[1.0]), ('b', &[0.99])]);
        fake.budget = 7.9;
        let finish = fake.race("ab");
        assert!((7.9..9.9).contains(&fake.clock), "{}", fake.clock);
        assert!(finish.winner.is_some_and(|time| time.runs == 3));
        // With none at all there is still the default.
        fake.budget = 0.0;
        assert_eq!(fake.race("ab").winner.map(|t| t.candidate), Some('a'));
    }

    #[test]
    fn an_error_of_the_device_ends_the_race() {
        struct Broken;
        impl Contest<char> for Broken {
            fn check(&mut self, _: char) -> Result<Result<f64, String>> {
                Err(Error::DeviceLost { message: "gone".to_owned() })
            }
            fn time(&mut self, _: char) -> Result<f64> {
                Ok(0.0)
            }
            fn used(&self) -> f64 {
                0.0
            }
        }
        assert!(matches!(race(&['a'], &mut Broken), Err(Error::DeviceLost { .. })));
        let nobody = race::<char>(&[], &mut Broken).expect("nothing was run");
        assert_eq!((nobody.winner, nobody.checked), (None, 0));
    }
}
