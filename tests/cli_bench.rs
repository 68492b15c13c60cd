//! `wgmoe bench` and `wgmoe compare` from outside: suites, traces, the files they write and read. On the embedded CPU
//! engine, so that it runs anywhere.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;

use command::{assert_code, json, stderr, stdout, text};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use wgmoe::bench::Results;

/// Sizes that any machine times in an instant.
const TINY: [&str; 12] =
    ["--hidden", "64", "--intermediate", "24", "--experts", "8", "--top-k", "2", "--runs", "9", "--tokens", "1,70"];

fn command(args: &[&str]) -> Command {
    let mut command = command::wgmoe(args);
    command.env("WGMOE_ADAPTER", "cpu");
    command
}

fn wgmoe(args: &[&str]) -> Output {
    command(args).output().expect("the binary should start")
}

/// Results of a tiny run, in a file.
fn results(folder: &Path) -> PathBuf {
    let path = folder.join("results.json");
    assert_code(&wgmoe(&[&["bench", "--json", text(&path)], &TINY[..]].concat()), 0);
    path
}

/// The same as a machine would have measured them that is steady within 2 %, where the layer takes `factor` times as long.
fn steady(path: &Path, factor: f64) -> PathBuf {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).expect("written")).expect("JSON");
    for row in json["rows"].as_array_mut().expect("rows") {
        for (index, round) in row["timing"]["rounds"].as_array_mut().expect("rounds").iter_mut().enumerate() {
            round["seconds"] = (1e-3 * factor * (1.0 + 0.01 * (index % 3) as f64)).into();
            round["yardstick_s"] = 1e-3.into();
        }
    }
    let path = path.with_extension(format!("{factor}.json"));
    std::fs::write(&path, json.to_string()).expect("writable");
    path
}

#[test]
fn rows_are_also_written_as_csv_and_markdown() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let [csv, markdown] = ["rows.csv", "rows.md"].map(|name| folder.path().join(name));
    let args = ["bench", "--csv", text(&csv), "--markdown", text(&markdown)];
    let output = wgmoe(&[&args, &TINY[..]].concat());
    assert_code(&output, 0);
    assert!(stdout(&output).contains(text(&csv)) && stdout(&output).contains("yardstick: "));
    let rows = std::fs::read_to_string(&csv).expect("written");
    assert_eq!(rows.lines().count(), 3);
    assert!(rows.starts_with("device,driver,preset,hidden_size,") && rows.contains(",64,24,8,2,f16,0,70,"), "{rows}");
    let table = std::fs::read_to_string(&markdown).expect("written");
    assert_eq!(table.lines().filter(|line| line.starts_with('|')).count(), 4, "{table}");
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 2, "nothing else is left behind");

    // On standard output it is alone.
    let output = wgmoe(&[&["bench", "--csv", "-"], &TINY[..]].concat());
    assert_code(&output, 0);
    assert!(stdout(&output).starts_with("device,driver,") && stdout(&output).lines().count() == 3);
    assert!(stderr(&output).contains("of roofline"));
    let both = wgmoe(&[&["bench", "--csv", "-", "--json", "-"], &TINY[..]].concat());
    assert_code(&both, 2);
    assert!(stderr(&both).contains("--json has standard output already"), "{}", stderr(&both));
}

#[test]
fn results_say_how_they_were_measured() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let results = Results::load(&results(folder.path())).expect("just written");
    let facts = results.facts.expect("the system says something");
    assert!(facts.began.ends_with('Z') && facts.cores.is_some_and(|cores| cores > 0), "{facts:?}");
    let yardstick = results.yardstick.expect("it ran all along");
    assert!(yardstick.fast_s <= yardstick.median_s && yardstick.median_s <= yardstick.slow_s, "{yardstick:?}");
    // Before and after each of nine rounds of two rows.
    assert!(yardstick.times.len() >= 2 * 2 * 9, "{}", yardstick.times.len());
    for row in &results.rows {
        let timing = row.timing.as_ref().expect("it was timed");
        assert_eq!(timing.rounds.len(), 9);
        assert!(
            timing.interval_s.contains(row.median_s) && timing.interval_in_yardsticks.contains(timing.in_yardsticks)
        );
    }
}

#[test]
fn compare_finds_what_is_slower_and_fails_only_when_asked() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let measured = results(folder.path());
    let [base, same, slower, faster] = [1.0, 1.01, 1.25, 0.8].map(|factor| steady(&measured, factor));
    let compare = |others: &[&Path], more: &[&str]| {
        let paths: Vec<&str> = others.iter().map(|path| text(path)).collect();
        wgmoe(&[&["compare", text(&base), "--json", "-"], &paths[..], more].concat())
    };
    let verdicts = |output: &Output| {
        let verdict = |pair: &Value| pair["verdict"].as_str().expect("a word").to_owned();
        let rows = |comparison: &Value| comparison["rows"].as_array().expect("rows").iter().map(verdict).collect();
        json(output).as_array().expect("comparisons").iter().map(rows).collect::<Vec<Vec<String>>>()
    };
    let output = compare(&[&same, &slower, &faster], &[]);
    assert_code(&output, 0);
    assert_eq!(verdicts(&output), [["none"; 2], ["slower"; 2], ["faster"; 2]]);
    assert!(stderr(&output).contains("2 rows: 2 slower, 0 faster by more than the noise"), "{}", stderr(&output));
    assert_code(&compare(&[&slower], &["--fail-over", "10%"]), 1);
    for others in [&same, &faster] {
        assert_code(&compare(&[others], &["--fail-over", "10"]), 0);
    }
    assert_code(&compare(&[&slower], &["--fail-over", "30%"]), 0);
}

#[test]
fn compare_refuses_what_it_cannot_compare() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let base = results(folder.path());
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/results/schema-1.json");
    let output = wgmoe(&["compare", text(&base), text(&old)]);
    assert_code(&output, 0);
    let words = stdout(&output);
    for word in ["not one machine", "llvmpipe", "only in the base: ", "only in ", "0 rows: "] {
        assert!(words.contains(word), "{word} is missing:\n{words}");
    }
    let damaged = folder.path().join("damaged.json");
    std::fs::write(&damaged, "{\"schema\": 2, \"rows\": [").expect("writable");
    let output = wgmoe(&["compare", text(&base), text(&damaged)]);
    assert_code(&output, 1);
    assert!(stderr(&output).contains("damaged.json: the file is no JSON"), "{}", stderr(&output));
    for (args, named) in [
        (vec!["compare", text(&base)], "FILE"),
        (vec!["compare", text(&base), "no-such-file"], "no-such-file"),
        (vec!["compare", text(&base), text(&base)], "another file"),
        (vec!["compare", text(&base), text(&old), "--fail-over", "much"], "10%"),
        (vec!["bench", "--suite", "huge"], "quick, standard, full"),
        (vec!["bench", "--suite", "quick", "--preset", "small"], "--preset"),
        (vec!["bench", "--trace", "no-such-trace:3"], "no-such-trace"),
        (vec!["bench", "--csv", "no-such-folder/rows.csv"], "no-such-folder"),
    ] {
        let output = wgmoe(&args);
        assert_code(&output, 2);
        assert!(stderr(&output).contains(named), "{args:?} should name {named}:\n{}", stderr(&output));
    }
}

#[test]
fn recorded_choices_are_replayed() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("trace.json");
    let layer = |layer, experts: &str| {
        format!("{{\"layer\": {layer}, \"num_experts\": 8, \"top_k\": 2, \"experts\": {experts}}}")
    };
    let layers = [layer(3, "[[5, 0], [5, 7]]"), layer(4, "[[1, -1], [2, 3]]")].join(", ");
    std::fs::write(&path, format!("{{\"schema\": 1, \"source\": \"a test\", \"layers\": [{layers}]}}"))
        .expect("writable");
    let sizes = ["--hidden", "64", "--intermediate", "24", "--runs", "2", "--tokens", "1,70", "--json", "-"];
    let bench = |trace: &str, more: &[&str]| wgmoe(&[&["bench", "--trace", trace], &sizes[..], more].concat());
    let output = bench(&format!("{}:3", text(&path)), &[]);
    assert_code(&output, 0);
    let report = json(&output);
    for (row, active) in report["rows"].as_array().expect("rows").iter().zip([2, 3]) {
        assert_eq!((&row["trace"], &row["active_experts"]), (&"trace.json:3".into(), &active.into()), "{row}");
        assert_eq!((&row["num_experts"], &row["top_k"]), (&8.into(), &2.into()));
    }
    // Every token has expert 5, half of all assignments.
    assert_eq!(report["rows"][1]["imbalance"], 4.0);

    for (trace, more, code, named) in [
        (text(&path).to_owned(), &[][..], 2, "3, 4"),
        (format!("{}:5", text(&path)), &[], 2, "3, 4"),
        (format!("{}:3", text(&path)), &["--experts", "9"], 2, "9 experts, top-2"),
        (format!("{}:4", text(&path)), &[], 1, "[1, -1]"),
    ] {
        let output = bench(&trace, more);
        assert_code(&output, code);
        assert!(stderr(&output).contains(named), "{named} is missing:\n{}", stderr(&output));
    }
}

#[cfg(unix)]
#[test]
fn a_suite_says_how_long_it_takes_and_keeps_what_it_has_when_interrupted() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("results.json");
    let mut child = command(&["bench", "--suite", "quick", "--json", text(&path)])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the binary should start");
    let mut lines = BufReader::new(child.stdout.take().expect("it is piped")).lines().map_while(Result::ok);
    let suite = lines.find(|line| line.starts_with("suite quick: ")).expect("it says what it will do");
    assert!(suite.contains("3 layers, 7 rows, about ") && suite.contains(" s by this device's roofline"), "{suite}");
    // The first layer's table: there are results, and more to come.
    lines.find(|line| line.starts_with("small: ")).expect("the first layer is done");
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().is_ok_and(|status| status.success()));
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().expect("it ends").code(), Some(130), "{rest:?}");
    assert!(rest.iter().any(|line| line.starts_with("interrupted: ")), "{rest:?}");
    let results = Results::load(&path).expect("written");
    assert!(results.interrupted && (3..7).contains(&results.rows.len()), "{} rows", results.rows.len());
}
