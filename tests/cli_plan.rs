//! `wgmoe plan` from outside: devices by their data sheets or files, and the embedded CPU engine, measured.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;

use command::{assert_code, json, stderr, stdout, text};
use serde_json::Value;
use std::process::Output;

fn plan(args: &[&str]) -> Output {
    command::wgmoe(&[&["plan"], args].concat()).env_remove("WGMOE_ADAPTER").output().expect("the binary should start")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

#[test]
fn a_layer_that_fits_has_bytes_stages_and_a_time() {
    let output = plan(&[
        "--preset",
        "qwen3-30b-a3b",
        "--device",
        "rtx-4070",
        "--tokens",
        "1,512",
        "--weights",
        "int4",
        "--json",
        "-",
    ]);
    assert_code(&output, 0);
    let report = json(&output);
    let [one, many] = &report["batches"].as_array().expect("batches")[..] else { panic!("{report}") };
    for batch in [one, many] {
        assert_eq!(batch["fit"]["fits"], true);
        let batch = &batch["forecast"];
        // 3 x 2048 x 768 weights of 128 experts in half a byte and a scale of four bytes for each 32.
        let weights = 3.0 * 2048.0 * 768.0 * 128.0 * (0.5 + 4.0 / 32.0);
        assert!(number(&batch["bytes"]["weights"]) >= weights && number(&batch["bytes"]["weights"]) < 1.01 * weights);
        let stages = batch["stages"].as_array().expect("stages");
        let sum: f64 = stages.iter().map(|stage| number(&stage["seconds"])).sum();
        assert!((number(&batch["seconds"]) / sum - 1.0).abs() < 1e-9, "{batch}");
        let dispatches: f64 = stages.iter().map(|stage| number(&stage["dispatches"])).sum();
        assert_eq!(number(&batch["dispatches"]), dispatches);
        let listed: f64 = batch["allocations"].as_array().expect("a list").iter().map(|a| number(&a["bytes"])).sum();
        let bytes = &batch["bytes"];
        assert_eq!(listed, number(&bytes["weights"]) + number(&bytes["scratch"]) + number(&bytes["input_output"]));
    }
    assert!(number(&many["forecast"]["seconds"]) > number(&one["forecast"]["seconds"]));
    assert!(stderr(&output).contains("predicted"), "{}", stderr(&output));
}

#[test]
fn a_layer_that_does_not_fit_is_exit_code_1_with_ways_out_that_work() {
    let arguments = ["--preset", "deepseek-v3", "--device", "rtx-4070", "--tokens", "16"];
    let output = plan(&arguments);
    assert_code(&output, 1);
    let words = stdout(&output);
    let line = |start: &str| {
        let line = words.lines().find_map(|line| line.trim().strip_prefix(start));
        line.unwrap_or_else(|| panic!("no {start:?}:\n{words}")).to_owned()
    };
    let format = line("would fit with --weights ");
    let memory = line("would fit with --gpu-memory ");
    let before_colon = |text: &str| text.rsplit_once(": ").expect("a colon").0.to_owned();
    for (option, value) in [("--weights", before_colon(&format)), ("--gpu-memory", before_colon(&memory))] {
        assert_code(&plan(&[&arguments[..], &[option, &value]].concat()), 0);
    }
    assert!(words.contains("DOES NOT FIT"), "{words}");
}

#[test]
fn this_device_is_measured_and_saved_for_others() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("device.json");
    let sizes = ["--hidden", "64", "--intermediate", "32", "--experts", "8", "--top-k", "2", "--tokens", "3"];
    let output = plan(&[&sizes[..], &["--device", "cpu", "--save-device", text(&file)]].concat());
    assert_code(&output, 0);
    assert!(stdout(&output).contains("facts of the device saved"), "{}", stdout(&output));
    let elsewhere = plan(&[&sizes[..], &["--device", text(&file), "--json", "-"]].concat());
    assert_code(&elsewhere, 0);
    let report = json(&elsewhere);
    let batch = &report["batches"][0]["forecast"];
    assert!(number(&batch["seconds"]) > 0.0 && batch["dispatches"] == 0, "{batch}");
    let stages: Vec<&str> =
        batch["stages"].as_array().expect("stages").iter().filter_map(|s| s["stage"].as_str()).collect();
    assert_eq!(stages, ["router", "permute", "gate_up", "down", "combine"]);
}

#[test]
fn arguments_that_cannot_be_used_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let damaged = folder.path().join("device.json");
    std::fs::write(&damaged, "{}").expect("written");
    for (arguments, code, named) in [
        (&["--device", "no-such-file.json"][..], 2, "no-such-file.json"),
        (&["--device", text(&damaged)], 1, "--save-device"),
        (&["--device", "rtx-4070", "--tokens", "0"], 2, "--tokens"),
        (&["--device", "rtx-4070", "--preset", "gpt-99"], 2, "mixtral-8x7b"),
        (&["--device", "rtx-4070", "--weights", "int4", "--hidden", "100"], 2, "a multiple of 32"),
        (&["--device", "rtx-4070", "--gpu-memory", "lots"], 2, "4GiB"),
        (&["--device", "rtx-4070", "--save-device", "no-such-folder/x"], 2, "no-such-folder"),
    ] {
        let output = plan(arguments);
        assert_code(&output, code);
        assert!(stderr(&output).contains(named), "{arguments:?} should name {named:?}:\n{}", stderr(&output));
    }
}
