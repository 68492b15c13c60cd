//! One axis of a chart: what it covers, where its ticks are and what they say.

use super::text::{clean, compact};
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use std::ops::Range;

/// Room between the outermost values and the ends of a logarithmic axis, as a part of its length.
const MARGIN: f64 = 0.06;

/// From values to positions, which grow evenly along the axis.
#[derive(Clone, Debug)]
pub struct Axis {
    /// What the values are, with their unit.
    pub title: String,
    is_log: bool,
    /// Positions of both ends.
    ends: (f64, f64),
    /// Positions and labels.
    ticks: Vec<(f64, String)>,
    /// Lines across the chart at the ticks.
    pub has_grid: bool,
}

impl Axis {
    /// Powers of ten are evenly apart. Covers all of `values` that are above zero.
    pub fn log(title: &str, values: impl IntoIterator<Item = f64>) -> Axis {
        let values: Vec<f64> = values.into_iter().filter(|v| v.is_finite() && *v > 0.0).map(f64::log10).collect();
        let low = values.iter().copied().reduce(f64::min).unwrap_or(0.0);
        let high = values.iter().copied().reduce(f64::max).unwrap_or(1.0);
        // One value alone still needs an axis around it.
        let margin = ((high - low) * MARGIN).max(0.12);
        let ends = (low - margin, high + margin);
        let ticks = log_ticks(ends).into_iter().map(|(position, value)| (position, compact(value))).collect();
        Axis { title: clean(title), is_log: true, ends, ticks, has_grid: true }
    }

    /// From `low` to `high`.
    pub fn linear(title: &str, low: f64, high: f64) -> Axis {
        let (low, high) = if low.is_finite() && high.is_finite() && high > low { (low, high) } else { (0.0, 1.0) };
        let step = round_step((high - low) / 5.0);
        let first = (low / step).ceil() as i64;
        let last = (high / step + 1e-9).floor() as i64;
        let ticks = (first..=last).map(|n| (n as f64 * step, compact(n as f64 * step))).collect();
        Axis { title: clean(title), is_log: false, ends: (low, high), ticks, has_grid: true }
    }

    /// One place for each label, the first at the start; empty labels have a place and no words.
    pub fn places(title: &str, labels: impl IntoIterator<Item = String>) -> Axis {
        let labels = labels.into_iter().enumerate();
        let mut ticks: Vec<(f64, String)> = labels.map(|(n, label)| (n as f64, clean(&label))).collect();
        let ends = (-0.5, ticks.len().max(1) as f64 - 0.5);
        ticks.retain(|(_, label)| !label.is_empty());
        Axis { title: clean(title), is_log: false, ends, ticks, has_grid: false }
    }

    /// The same with its start where its end was: places from top to bottom.
    pub fn reversed(self) -> Axis {
        Axis { ends: (self.ends.1, self.ends.0), ..self }
    }

    /// The same without lines across the chart.
    pub fn without_grid(self) -> Axis {
        Axis { has_grid: false, ..self }
    }

    /// With these values as ticks, where they are within the axis.
    pub fn with_ticks(mut self, ticks: impl IntoIterator<Item = (f64, String)>) -> Axis {
        let (low, high) = (self.ends.0.min(self.ends.1), self.ends.0.max(self.ends.1));
        let ticks: Vec<(f64, String)> =
            ticks.into_iter().map(|(value, label)| (self.position(value), clean(&label))).collect();
        self.ticks = ticks.into_iter().filter(|(position, _)| (low..=high).contains(position)).collect();
        self
    }

    /// Those ticks only that `keep` wants.
    pub fn retain_ticks(mut self, mut keep: impl FnMut(f64, &str) -> bool) -> Axis {
        self.ticks.retain(|(position, label)| keep(*position, label));
        self
    }

    /// The same with other labels.
    pub fn map_labels(mut self, label: impl Fn(&str) -> String) -> Axis {
        self.ticks.iter_mut().for_each(|(_, text)| *text = label(text));
        self
    }

    pub fn ends(&self) -> (f64, f64) {
        self.ends
    }

    pub fn ticks(&self) -> &[(f64, String)] {
        &self.ticks
    }

    /// The ends as values.
    pub fn range(&self) -> (f64, f64) {
        let value = |position: f64| if self.is_log { 10f64.powf(position) } else { position };
        (value(self.ends.0), value(self.ends.1))
    }

    /// Where `value` is; at an end if it is beyond that.
    pub fn position(&self, value: f64) -> f64 {
        let position = if self.is_log { value.log10() } else { value };
        let (low, high) = (self.ends.0.min(self.ends.1), self.ends.0.max(self.ends.1));
        if position.is_nan() { low } else { position.clamp(low, high) }
    }
}

/// What the plotting crate asks an axis.
impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, position: &f64, (start, end): (i32, i32)) -> i32 {
        let (low, high) = self.ends;
        start + ((position - low) / (high - low) * f64::from(end - start)).round() as i32
    }

    /// Thick lines and labels are at the ticks; there are no thin lines.
    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|(position, _)| *position).collect()
    }

    fn range(&self) -> Range<f64> {
        self.ends.0..self.ends.1
    }
}

impl ValueFormatter<f64> for Axis {
    fn format(position: &f64) -> String {
        position.to_string()
    }

    fn format_ext(&self, position: &f64) -> String {
        self.ticks.iter().find(|(tick, _)| tick == position).map(|(_, label)| label.clone()).unwrap_or_default()
    }
}

/// (position, value) of the ticks: powers of ten where there are many, 1, 2 and 5 times those otherwise.
fn log_ticks((low, high): (f64, f64)) -> Vec<(f64, f64)> {
    let decades = high - low;
    let digits: &[f64] = if decades > 2.6 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let every = (decades / 8.0).ceil().max(1.0) as i64;
    let powers = (low.floor() as i64..=high.ceil() as i64).filter(|power| power % every == 0);
    let values = powers.flat_map(|power| digits.iter().map(move |digit| digit * 10f64.powi(power as i32)));
    let ticks: Vec<(f64, f64)> = values.map(|v| (v.log10(), v)).filter(|(at, _)| (low..=high).contains(at)).collect();
    // Within less than that, evenly spaced numbers are the rounder ones.
    if ticks.len() >= 2 { ticks } else { linear_values(10f64.powf(low), 10f64.powf(high)) }
}

fn linear_values(low: f64, high: f64) -> Vec<(f64, f64)> {
    let step = round_step((high - low) / 4.0);
    let range = (low / step).ceil() as i64..=(high / step).floor() as i64;
    range.map(|n| n as f64 * step).filter(|v| *v > 0.0).map(|v| (v.log10(), v)).collect()
}

/// The next of 1, 2 and 5 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let rounded = [1.0, 2.0, 5.0].into_iter().find(|digit| digit * power >= step * 0.999);
    rounded.unwrap_or(10.0) * power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks().iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn ticks_are_round_numbers_and_within_the_axis() {
        assert_eq!(labels(&Axis::log("", [1.0, 1000.0])), ["1", "10", "100", "1000"]);
        assert_eq!(labels(&Axis::log("", [1.0, 10.0])), ["1", "2", "5", "10"]);
        assert_eq!(labels(&Axis::log("", [3.0, 3.3])), ["3", "4"]);
        assert_eq!(labels(&Axis::linear("", 0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1"]);
        let axis = Axis::log("", [1e-300, 1e300]);
        assert!(labels(&axis).len() < 12, "{axis:?}");
    }

    #[test]
    fn values_without_a_position_are_at_an_end() {
        let axis = Axis::log("", [1.0, 10.0]);
        let (low, high) = axis.ends();
        assert_eq!([f64::NAN, -1.0, 0.0, 1e9].map(|value| axis.position(value)), [low, low, low, high]);
        for hostile in [Axis::log("", [f64::NAN, -1.0, f64::INFINITY]), Axis::linear("", f64::NAN, 0.0)] {
            let (low, high) = hostile.ends();
            assert!(high > low && !hostile.ticks().is_empty(), "{hostile:?}");
        }
    }

    #[test]
    fn places_have_room_around_them() {
        let axis = Axis::places("", ["a", "", "c"].map(str::to_owned)).reversed();
        assert_eq!((axis.ends(), labels(&axis)), ((2.5, -0.5), vec!["a", "c"]));
    }
}
