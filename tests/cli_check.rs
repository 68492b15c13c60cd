//! `wgmoe check` of a device from outside: its parts, what they count, and how a case is run again. On the embedded CPU
//! engine, so that it runs anywhere.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;

use command::{assert_code, json, stderr, stdout, text};
use serde_json::Value;
use std::path::Path;
use std::process::Output;

fn check(args: &[&str]) -> Output {
    let args = [&["check"], args].concat();
    command::wgmoe(&args).env("WGMOE_ADAPTER", "cpu").output().expect("the binary should start")
}

fn of_kind<'a>(report: &'a Value, kind: &str) -> &'a Value {
    let total = &report["kinds"][kind];
    assert!(total.is_object(), "{kind} is missing: {}", report["kinds"]);
    total
}

#[test]
fn each_part_runs_alone_and_says_how_much_it_checked() {
    let parts: [(&[&str], &str, u64); 4] = [
        (&["--cases", "40"], "case", 40),
        (&["--exact"], "exact", 500),
        (&["--rows", "3000"], "rows", 3000),
        (&["--determinism", "--runs", "20"], "determinism", 20 + 200),
    ];
    for (args, kind, at_least) in parts {
        let output = check(&[args, &["--json", "-"]].concat());
        assert_code(&output, 0);
        let report = json(&output);
        assert_eq!(report["kinds"].as_object().map(serde_json::Map::len), Some(1), "{}", report["kinds"]);
        let total = of_kind(&report, kind);
        assert!(total["count"].as_u64().is_some_and(|count| count >= at_least), "{kind}: {total}");
        assert!(total["failed"] == 0 && total["seconds"].as_f64().is_some_and(|s| s > 0.0), "{kind}: {total}");
        let cases = report["cases"].as_array().expect("cases");
        assert_eq!(total["checks"].as_u64(), Some(cases.len() as u64));
        assert!(cases.iter().all(|case| case["kind"] == kind && case["status"] == "pass"));
        assert!(stderr(&output).contains(kind), "{}", stderr(&output));
    }
}

#[test]
fn without_a_part_a_device_has_kernels_layers_and_rows_checked() {
    let output = check(&["--json", "-"]);
    assert_code(&output, 0);
    let report = json(&output);
    let kinds: Vec<&String> = report["kinds"].as_object().expect("kinds").keys().collect();
    assert_eq!(kinds, ["kernel", "layer", "rows"]);
    assert!(of_kind(&report, "rows")["count"].as_u64().is_some_and(|count| count >= 10_000));
}

#[test]
fn a_case_is_the_same_alone() {
    let several = json(&check(&["--cases", "9", "--seed", "5", "--json", "-"]));
    let alone = json(&check(&["--case", "8", "--seed", "5", "--json", "-"]));
    assert_eq!(several["cases"][8]["case"], serde_json::json!({"seed": 5, "index": 8}));
    assert_eq!(several["cases"][8], alone["cases"][0]);
    let other = json(&check(&["--case", "8", "--seed", "6", "--json", "-"]));
    assert_ne!(other["cases"][0]["shape"], alone["cases"][0]["shape"]);
}

#[test]
fn parts_and_files_do_not_mix() {
    let file = text(Path::new("Cargo.toml"));
    for args in [
        &["--cases", "0"][..],
        &["--cases", "3", "--case", "1"],
        &["--cases", "3", file],
        &["--exact", file],
        &["--rows", "0"],
        &["--runs", "10"],
        &["--determinism", "--runs", "1"],
    ] {
        let output = check(args);
        assert_code(&output, 2);
        assert!(stdout(&output).is_empty() && stderr(&output).contains("error"), "{args:?}: {}", stderr(&output));
    }
}
