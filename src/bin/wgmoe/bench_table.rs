//! What `wgmoe bench` prints.

use comfy_table::{CellAlignment, Table, TableComponent, presets::UTF8_HORIZONTAL_ONLY};
use std::time::Duration;
use wgmoe::Roofline;
use wgmoe::bench::results::{Failure, FirstResult, Row, StageResult, YardstickResult};
use wgmoe::bench::{Interval, RouterTime};

/// A table of numbers: one line each, the first column to the left.
pub fn plain_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_preset(UTF8_HORIZONTAL_ONLY).set_header(header.to_vec());
    table.remove_style(TableComponent::HorizontalLines).remove_style(TableComponent::MiddleIntersections);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// The device's peaks in one line.
pub fn roofline(roofline: &Roofline) -> String {
    let rate = |&(bytes, rate): &(u64, f64)| format!("{} within {} MiB", number(rate), bytes >> 20);
    let rates = roofline.bandwidths.iter().map(rate).collect::<Vec<_>>().join(", ");
    format!("roofline: {} GFLOP/s; GB/s: {rates} ({})", number(roofline.gflops), roofline.how)
}

/// One layer: a row for each batch, what the first result took, then where the time goes, then `more`, then what failed.
pub fn layer(title: &str, rows: &[Row], failures: &[Failure], first: Option<&FirstResult>, more: &str) -> String {
    let mut text = format!("\n{title}\n");
    if !rows.is_empty() {
        text.push_str(&format!("{}\n", batches(rows)));
        if rows.iter().any(drifted) {
            text.push_str("~ the machine was faster or slower than usual during some of these rounds\n");
        }
    }
    if let Some(first) = first {
        text.push_str(&format!("{}\n", first_result(first)));
    }
    if rows.iter().any(|row| row.residency.is_some()) {
        // What a stage takes depends on who was there before it.
        text.push_str(&format!("\nexperts that were brought in, by pass\n{}\n", residency(rows)));
    } else if !rows.is_empty() {
        text.push_str(&format!("\nwhere the time goes\n{}\n", stages(rows)));
    }
    text.push_str(more);
    for failure in failures {
        let tokens = failure.tokens.map(|tokens| format!("{tokens} tokens: ")).unwrap_or_default();
        text.push_str(&format!("FAILED  {tokens}{}\n", failure.reason));
    }
    text
}

fn drifted(row: &Row) -> bool {
    row.timing.as_ref().is_some_and(|timing| timing.drifted)
}

/// The yardstick in one line.
pub fn yardstick(yardstick: &YardstickResult) -> String {
    let YardstickResult { median_s, fast_s, slow_s, times, .. } = yardstick;
    format!(
        "yardstick: {}, most runs {} ({} runs of a fixed piece of work in between, by which `wgmoe compare` compares)",
        seconds(*median_s),
        range(Interval { low: *fast_s, high: *slow_s }),
        times.len(),
    )
}

/// Both ends, with one unit where they share it.
pub fn range(interval: Interval) -> String {
    let [low, high] = [interval.low, interval.high].map(seconds);
    match (low.split_once(' '), high.split_once(' ')) {
        (Some((number, low_unit)), Some((_, high_unit))) if low_unit == high_unit => format!("{number}..{high}"),
        _ => format!("{low}..{high}"),
    }
}

/// Cold with its parts, then warm.
fn first_result(first: &FirstResult) -> String {
    let warm = first.warm_s().map(|warm| format!(", {} warm", seconds(warm))).unwrap_or_default();
    format!(
        "first result: {} cold (device {}, weights {}, kernels and first pass {}){warm}",
        seconds(first.cold_s()),
        seconds(first.device_s),
        seconds(first.cold.load_s),
        seconds(first.cold.first_pass_s),
    )
}

/// The router alone.
pub fn routers(times: &[RouterTime]) -> String {
    let mut table = plain_table(&[
        "router",
        "experts",
        "tokens",
        "time",
        "selection",
        "reading logits",
        "x reading",
        "selection x",
    ]);
    for time in times {
        let ratio = |s: f64| format!("{:.0}", s / time.read_s);
        table.add_row([
            time.routing.clone(),
            time.num_experts.to_string(),
            time.tokens.to_string(),
            seconds(time.router_s),
            time.selection_s.map_or("-".to_owned(), seconds),
            seconds(time.read_s),
            ratio(time.router_s),
            time.selection_s.map_or("-".to_owned(), ratio),
        ]);
    }
    format!("\nthe router alone: 1024 inputs, top 8; times beside that of reading the logits once\n{table}\n")
}

fn batches(rows: &[Row]) -> Table {
    let dense = rows.iter().any(|row| row.dense_ratio.is_some());
    let mut header = vec![
        "tokens",
        "time",
        "95 % within",
        "outliers",
        "GFLOP/s",
        "GB/s",
        "of read",
        "of roofline",
        "dispatches",
        "readbacks",
        "error",
    ];
    if dense {
        header.push("x dense");
    }
    let mut table = plain_table(&header);
    for row in rows {
        let mut cells = vec![
            row.tokens.to_string(),
            format!("{}{}", seconds(row.median_s), if drifted(row) { " ~" } else { "" }),
            row.timing.as_ref().map_or("-".to_owned(), |timing| range(timing.interval_s)),
            row.timing
                .as_ref()
                .map_or("-".to_owned(), |timing| format!("{} of {}", timing.outliers, timing.rounds.len())),
            number(row.gflops),
            number(row.gbytes_per_s),
            row.read_fraction.map_or("-".to_owned(), percent),
            row.roofline_fraction.map_or("-".to_owned(), percent),
            row.dispatches.to_string(),
            row.readbacks.to_string(),
            format!("{:.0e}", row.max_rel_error),
        ];
        if dense {
            cells.push(row.dense_ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.2}")));
        }
        table.add_row(cells);
    }
    table
}

/// What a memory budget cost.
fn residency(rows: &[Row]) -> Table {
    let mut table = plain_table(&["tokens", "on the device", "needed", "hit rate", "copied MB", "rounds"]);
    for (row, residency) in rows.iter().filter_map(|row| Some((row, row.residency?))) {
        let needed = (residency.hits + residency.misses) as f64 / residency.passes.max(1) as f64;
        table.add_row([
            row.tokens.to_string(),
            format!("{} of {}", residency.places, row.num_experts),
            number(needed),
            percent(residency.hit_rate),
            number(residency.uploaded_bytes_per_pass / 1e6),
            number(residency.rounds_per_pass),
        ]);
    }
    table
}

/// A column for each stage: its time and its share of all stages' time.
fn stages(rows: &[Row]) -> String {
    let timed = |row: &&Row| row.stages.iter().any(|stage| stage.median_s.is_some());
    let rows: Vec<&Row> = rows.iter().filter(timed).collect();
    // Small batches skip stages: the order is that of a row that has most.
    let Some(longest) = rows.iter().max_by_key(|row| row.stages.len()) else {
        return "this device cannot time single stages".to_owned();
    };
    let mut names: Vec<&str> = longest.stages.iter().map(|stage| stage.name.as_str()).collect();
    for stage in rows.iter().flat_map(|row| &row.stages) {
        if !names.contains(&stage.name.as_str()) {
            names.push(&stage.name);
        }
    }
    let header: Vec<&str> = std::iter::once("tokens").chain(names.iter().copied()).collect();
    let mut table = plain_table(&header);
    for row in rows {
        let whole: f64 = row.stages.iter().filter_map(|stage| stage.median_s).sum();
        let cell = |name: &&str| {
            let stage = row.stages.iter().find(|stage| stage.name == *name);
            stage.and_then(|stage| stage_cell(stage, whole)).unwrap_or_else(|| "-".to_owned())
        };
        table.add_row(std::iter::once(row.tokens.to_string()).chain(names.iter().map(cell)));
    }
    table.to_string()
}

/// What each stage moves, and the share of the stages around the experts.
pub fn stage_bytes(rows: &[Row]) -> String {
    let mut table = plain_table(&[
        "tokens",
        "stage",
        "dispatches",
        "least MB",
        "requested MB",
        "x least",
        "time",
        "GB/s of least",
        "of its ceiling",
    ]);
    let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let megabytes = |bytes: u64| number(bytes as f64 / 1e6);
    for row in rows {
        for stage in &row.stages {
            let least = stage.least_bytes.unwrap_or(stage.bytes);
            table.add_row([
                row.tokens.to_string(),
                stage.name.clone(),
                or_dash(stage.dispatches.map(|n| n.to_string())),
                megabytes(least),
                or_dash(stage.requested_bytes.map(megabytes)),
                or_dash(stage.requested_bytes.map(|bytes| number(bytes as f64 / least as f64))),
                or_dash(stage.median_s.map(seconds)),
                or_dash(stage.median_s.map(|time| number(least as f64 / time / 1e9))),
                or_dash(stage.roofline_fraction.map(percent)),
            ]);
        }
    }
    let share = |row: &Row| Some(format!("{} at {}", percent(around(row)?), row.tokens));
    let shares = rows.iter().filter_map(share).collect::<Vec<_>>().join(", ");
    let shares = if shares.is_empty() { "not timed".to_owned() } else { format!("{shares} tokens") };
    format!(
        "\nwhat each stage moves\n{table}\nshare of logits, router, permute and combine in the stages' time: {shares}\n"
    )
}

/// The share of all stages' time that is not spent in experts.
fn around(row: &Row) -> Option<f64> {
    let time = |counts: fn(&str) -> bool| {
        row.stages.iter().filter(|stage| counts(&stage.name)).filter_map(|stage| stage.median_s).reduce(|a, b| a + b)
    };
    Some(time(|name| ["logits", "router", "permute", "combine"].contains(&name))? / time(|_| true)?)
}

fn stage_cell(stage: &StageResult, whole: f64) -> Option<String> {
    let time = stage.median_s?;
    let mut cell = format!("{}  {:>4}", seconds(time), percent(if whole > 0.0 { time / whole } else { 0.0 }));
    // The rate of whatever there is more of: decoding is about bytes, prefill about arithmetic.
    if time > 0.0 {
        let (amount, unit) = if stage.flops > stage.bytes { (stage.flops, "GFLOP/s") } else { (stage.bytes, "GB/s") };
        cell.push_str(&format!("\n{} {unit}", number(amount as f64 / time / 1e9)));
    }
    Some(cell)
}

/// Seconds, or minutes and seconds.
pub fn duration(duration: Duration) -> String {
    match duration.as_secs_f64().ceil() as u64 {
        seconds if seconds < 120 => format!("{seconds} s"),
        seconds => format!("{} min {} s", seconds / 60, seconds % 60),
    }
}

/// Three significant digits and a unit that fits.
pub fn seconds(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s >= 1.0 => (s, "s"),
        s if s >= 1e-3 => (s * 1e3, "ms"),
        s => (s * 1e6, "µs"),
    };
    format!("{} {unit}", number(value))
}

/// Three significant digits.
pub fn number(value: f64) -> String {
    match value.abs() {
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.9995 || v == 0.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Two significant digits.
pub fn percent(fraction: f64) -> String {
    let percent = fraction * 100.0;
    if percent >= 9.95 { format!("{percent:.0} %") } else { format!("{percent:.1} %") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use wgmoe::bench::results::FirstPasses;

    #[test]
    fn a_first_result_is_one_line_with_its_parts() {
        let cold = FirstPasses { load_s: 0.6, first_pass_s: 1.2, kernels: 6, second_pass_s: 0.01 };
        let warm = Some(FirstPasses { load_s: 0.6, first_pass_s: 0.015, kernels: 6, second_pass_s: 0.01 });
        let first = FirstResult { layer: String::new(), tokens: 1, device_s: 0.1, cold, warm };
        let cold = "first result: 1.90 s cold (device 100 ms, weights 600 ms, kernels and first pass 1.20 s)";
        assert_eq!(first_result(&first), format!("{cold}, 615 ms warm"));
        assert_eq!(first_result(&FirstResult { warm: None, ..first }), cold);
    }

    #[test]
    fn durations_have_whole_seconds() {
        assert_eq!(duration(Duration::from_millis(71_200)), "72 s");
        assert_eq!(duration(Duration::from_secs(421)), "7 min 1 s");
    }

    #[test]
    fn ranges_say_their_unit_once() {
        assert_eq!(range(Interval { low: 0.0011, high: 0.0023 }), "1.10..2.30 ms");
        assert_eq!(range(Interval { low: 0.9, high: 1.5 }), "900 ms..1.50 s");
    }

    #[test]
    fn numbers_keep_three_digits_and_their_unit() {
        assert_eq!(seconds(1.23456), "1.23 s");
        assert_eq!(seconds(0.012_345), "12.3 ms");
        assert_eq!(seconds(0.000_123_4), "123 µs");
        assert_eq!(number(99.96), "100");
        assert_eq!(number(0.0), "0.00");
        assert_eq!(number(0.01234), "0.012");
        assert_eq!(percent(0.0912), "9.1 %");
        assert_eq!(percent(0.912), "91 %");
    }
}
