//! What a report says in words.

use super::run::{Report, Run};
use crate::bench_table::{number, percent, seconds};
use crate::html::Tile;
use wgmoe::bench::results::Row;

pub const LEAD: &str = "Mixture-of-Experts layers, timed after each result was checked against a reference in f64.";

pub const METHOD: &str = "Times are of whole forward passes, router included, from submit to completion, with weights and \
    input on the device; a row's time is the median of its runs, \
    and the interval around it holds the median with 95 % certainty. FLOPs and bytes are those that no implementation can \
    avoid: each active expert's weights once, each input and output once. The roofline's ceilings were measured on the same \
    device in the same run.";

pub fn title(report: &Report) -> String {
    match report.runs.as_slice() {
        [run] => format!("MoE on {}", run.results.device.name),
        runs => format!("MoE on {} devices", runs.len()),
    }
}

/// The numbers that people quote.
pub fn tiles(run: &Run) -> Vec<Tile> {
    let tile = |value: String, text: String| Tile { value, text };
    let rows = &run.results.rows;
    let best = |value: fn(&Row) -> f64| rows.iter().max_by(|a, b| value(a).total_cmp(&value(b)));
    let name = |row: &Row| row.preset.clone().unwrap_or_else(|| format!("{} experts", row.num_experts));
    let mut tiles = Vec::new();
    if let Some(row) = rows.iter().filter(|row| row.tokens == 1).min_by(|a, b| a.median_s.total_cmp(&b.median_s)) {
        tiles.push(tile(seconds(row.median_s), format!("for one token, {}", name(row))));
    }
    if let Some(row) = best(throughput) {
        tiles.push(tile(grouped(throughput(row)), format!("tokens/s at {} tokens, {}", row.tokens, name(row))));
    }
    if let Some(row) = best(|row| row.gflops) {
        tiles.push(tile(format!("{} GFLOP/s", number(row.gflops)), format!("at {} tokens, {}", row.tokens, name(row))));
    }
    if let Some(row) = best(|row| row.roofline_fraction.unwrap_or(0.0))
        && let Some(fraction) = row.roofline_fraction
    {
        tiles.push(tile(percent(fraction), format!("of the roofline at best, at {} tokens", row.tokens)));
    }
    tiles
}

/// A few sentences: what each device can do, what was reached, and how devices compare.
pub fn summary(report: &Report) -> Vec<String> {
    let mut sentences: Vec<String> = (0..report.runs.len()).map(|run| of_run(report, run)).collect();
    sentences.extend((1..report.runs.len()).filter_map(|run| versus_first(report, run)));
    sentences
}

fn of_run(report: &Report, number_of_run: usize) -> String {
    let run = &report.runs[number_of_run];
    let mut text = format!("{}: ", run.label);
    match &run.results.roofline {
        Some(roofline) => text.push_str(&format!(
            "{} GFLOP/s and {} GB/s from memory at best. ",
            number(roofline.gflops),
            number(roofline.gbytes_per_s)
        )),
        None => text.push_str("its peaks were not measured. "),
    }
    let rows = &run.results.rows;
    let error = rows.iter().map(|row| row.max_rel_error).fold(0.0, f64::max);
    match rows.len() {
        0 => text.push_str("No result."),
        1 => text.push_str(&format!("One result, right to {error:.0e}.")),
        n => text.push_str(&format!("{n} results, all right to {error:.0e} or better.")),
    }
    if let Some((layer, row)) = report.rows_of(number_of_run).max_by_key(|(_, row)| row.tokens) {
        let layer = &report.layers[layer].short;
        text.push_str(&format!(" {layer} at {} {}: {}", row.tokens, tokens(row.tokens), seconds(row.median_s)));
        if let Some(fraction) = row.roofline_fraction {
            text.push_str(&format!(", {} of what {} allows", percent(fraction), limit(run, row)));
        }
        text.push('.');
    }
    match run.results.failures.len() {
        0 => {}
        n => text.push_str(&format!(" {n} batch sizes have no result.")),
    }
    match rows.iter().filter(|row| row.timing.as_ref().is_some_and(|timing| timing.drifted)).count() {
        0 => {}
        n => text.push_str(&format!(" The machine changed its speed while {n} of them were timed.")),
    }
    if run.results.interrupted {
        text.push_str(" Somebody stopped the run before its end.");
    }
    text
}

/// What holds a row back at best, by the measured ceilings.
fn limit(run: &Run, row: &Row) -> &'static str {
    let ridge = run.results.roofline.as_ref().map_or(f64::NAN, |roofline| roofline.gflops / roofline.gbytes_per_s);
    if row.gflops / row.gbytes_per_s > ridge { "arithmetic" } else { "memory" }
}

/// How `run` compares with the first on all that both have.
fn versus_first(report: &Report, run: usize) -> Option<String> {
    let speeds: Vec<f64> =
        super::figures::pairs(report).iter().filter(|pair| pair.run == run).map(|pair| pair.speed).collect();
    if speeds.is_empty() {
        return None;
    }
    let mean = (speeds.iter().map(|speed| speed.ln()).sum::<f64>() / speeds.len() as f64).exp();
    let (other, first) = (&report.runs[run].label, &report.runs[0].label);
    let (fast, slow, ratio) = if mean < 1.0 { (first, other, 1.0 / mean) } else { (other, first, mean) };
    let cases =
        if speeds.len() == 1 { "one case".to_owned() } else { format!("{} cases, geometric mean", speeds.len()) };
    Some(format!("{fast} is {} times as fast as {slow} ({cases}).", number(ratio)))
}

pub fn tokens(count: u32) -> &'static str {
    if count == 1 { "token" } else { "tokens" }
}

/// Tokens for each second.
pub fn throughput(row: &Row) -> f64 {
    f64::from(row.tokens) / row.median_s
}

/// Three significant digits or more, with a space for each thousand.
pub fn grouped(value: f64) -> String {
    if value.abs() < 999.5 || value.abs() >= 1e15 || !value.is_finite() {
        return number(value);
    }
    let digits = format!("{value:.0}");
    let mut text = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n) % 3 == 0 {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_stand_apart() {
        assert_eq!(grouped(1234567.4), "1\u{202f}234\u{202f}567");
        assert_eq!([12.34, 999.4, f64::INFINITY].map(grouped), ["12.3", "999", "inf"]);
    }
}
