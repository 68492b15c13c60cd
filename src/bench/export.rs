//! Results as tables for other programs: CSV for spreadsheets, Markdown for people.

use crate::bench::results::{Results, Row};
use crate::bench::stats::Interval;
use std::fmt::Write as _;

/// A column of the CSV file: its name, and its cell in a row.
type Column = (&'static str, fn(&Results, &Row) -> String);

/// Names are those of the JSON's fields. Whoever reads them relies on them.
const COLUMNS: &[Column] = &[
    ("device", |results, _| results.device.name.clone()),
    ("driver", |results, _| results.device.driver.clone()),
    ("preset", |_, row| row.preset.clone().unwrap_or_default()),
    ("hidden_size", |_, row| row.hidden_size.to_string()),
    ("intermediate_size", |_, row| row.intermediate_size.to_string()),
    ("num_experts", |_, row| row.num_experts.to_string()),
    ("top_k", |_, row| row.top_k.to_string()),
    ("weights", |_, row| row.weights.name()),
    ("skew", |_, row| row.skew.to_string()),
    ("tokens", |_, row| row.tokens.to_string()),
    ("median_s", |_, row| row.median_s.to_string()),
    ("interval_low_s", |_, row| optional(interval(row).map(|interval| interval.low))),
    ("interval_high_s", |_, row| optional(interval(row).map(|interval| interval.high))),
    ("in_yardsticks", |_, row| optional(row.timing.as_ref().map(|timing| timing.in_yardsticks))),
    ("min_s", |_, row| row.min_s.to_string()),
    ("max_s", |_, row| row.max_s.to_string()),
    ("runs", |_, row| row.runs.to_string()),
    ("rounds", |_, row| optional(row.timing.as_ref().map(|timing| timing.rounds.len()))),
    ("outliers", |_, row| optional(row.timing.as_ref().map(|timing| timing.outliers))),
    ("drifted", |_, row| optional(row.timing.as_ref().map(|timing| timing.drifted))),
    ("gflops", |_, row| row.gflops.to_string()),
    ("gbytes_per_s", |_, row| row.gbytes_per_s.to_string()),
    ("roofline_fraction", |_, row| optional(row.roofline_fraction)),
    ("max_rel_error", |_, row| row.max_rel_error.to_string()),
];

/// A line for each row that was found right, after one of names. RFC 4180, with line feeds alone.
pub fn csv(results: &Results) -> String {
    let mut text = COLUMNS.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(",");
    for row in &results.rows {
        let cells: Vec<String> = COLUMNS.iter().map(|(_, cell)| quoted(&cell(results, row))).collect();
        text.push('\n');
        text.push_str(&cells.join(","));
    }
    text.push('\n');
    text
}

/// The rows as a table, with what they were measured on in front of it, and what failed after it.
pub fn markdown(results: &Results) -> String {
    let device = &results.device;
    let mut text =
        format!("**{}** ({}, {}), wgmoe {}", device.name, device.backend, device.driver, results.wgmoe_version);
    if let Some(facts) = &results.facts {
        let cpu = facts.cpu.as_ref().map(|cpu| format!(", {cpu}")).unwrap_or_default();
        let _ = write!(text, ", {}{cpu}, {}", facts.os, facts.began);
    }
    text.push_str("\n\n| layer | tokens | time | 95 % within | GFLOP/s | GB/s | of roofline | error |\n");
    text.push_str("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n");
    for row in &results.rows {
        let range =
            interval(row).map_or("-".to_owned(), |i| format!("{} to {}", milliseconds(i.low), milliseconds(i.high)));
        let _ = writeln!(
            text,
            "| {} | {} | {} ms | {range} | {:.3} | {:.3} | {} | {:.0e} |",
            escaped(&row.layer()),
            row.tokens,
            milliseconds(row.median_s),
            row.gflops,
            row.gbytes_per_s,
            row.roofline_fraction.map_or("-".to_owned(), |fraction| format!("{:.0} %", fraction * 100.0)),
            row.max_rel_error,
        );
    }
    for failure in &results.failures {
        let tokens = failure.tokens.map(|tokens| format!(", {tokens} tokens")).unwrap_or_default();
        let _ = writeln!(text, "\nFailed: {}{tokens}: {}", failure.layer, failure.reason);
    }
    if results.interrupted {
        text.push_str("\nThe run was interrupted.\n");
    }
    text
}

fn interval(row: &Row) -> Option<Interval> {
    row.timing.as_ref().map(|timing| timing.interval_s)
}

fn optional(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}

/// In quotes where a reader would otherwise split it.
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.to_owned() }
}

/// A cell of a Markdown table.
fn escaped(cell: &str) -> String {
    cell.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// Three significant digits, at least.
fn milliseconds(seconds: f64) -> String {
    let ms = seconds * 1e3;
    if ms >= 100.0 {
        format!("{ms:.0}")
    } else if ms >= 10.0 {
        format!("{ms:.1}")
    } else {
        format!("{ms:.3}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::tests::results;

    #[test]
    fn csv_has_a_cell_for_each_column_whatever_names_hold() {
        let mut results = results();
        results.rows[0].preset = Some("a, \"b\"".to_owned());
        results.rows.push(Row { timing: None, ..results.rows[0].clone() });
        let text = csv(&results);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert!(lines[1].contains("\"a, \"\"b\"\"\",1,2,3,1,f16,0,5,0.25,"), "{text}");
        // The comma in the quotes is the only one that separates nothing.
        assert_eq!(lines[1].matches(',').count(), lines[0].matches(',').count() + 1);
        assert!(lines[2].contains(",0.25,,,,"), "nothing where nothing is known: {text}");
    }

    #[test]
    fn markdown_is_a_table_with_what_failed_after_it() {
        let mut results = results();
        results.rows[0].preset = Some("a|b".to_owned());
        let whole = markdown(&results);
        let table: Vec<&str> = whole.lines().filter(|line| line.starts_with('|')).collect();
        assert_eq!(table.len(), 3, "{whole}");
        assert!(table.iter().all(|line| line.replace("\\|", "").matches('|').count() == 9), "{whole}");
        assert!(table[2].contains("| 5 | 250 ms | 250 to 250 |"), "{whole}");
        results.interrupted = true;
        assert!(markdown(&results).ends_with("interrupted.\n") && !whole.contains("interrupted"));
    }
}
