//! `wgmoe tune` and what comes of it, from outside, on the adapter that the other tests run on.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;
mod support;

use command::{assert_code, json, stderr, stdout, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;
use support::gpu_context;

/// Sizes that any machine measures in an instant.
const TINY: [&str; 8] = ["--hidden", "64", "--intermediate", "32", "--experts", "8", "--top-k", "2"];

/// A folder of its own stands for the user's cache, as far as the system takes it from the environment.
fn wgmoe(args: &[&str], cache: &Path, tuning: Option<&Path>) -> Output {
    let mut command = command::wgmoe(args);
    command.env("XDG_CACHE_HOME", cache).env_remove("WGMOE_TUNING");
    if let Some(tuning) = tuning {
        command.env("WGMOE_TUNING", tuning);
    }
    command.output().expect("the binary should start")
}

/// A tuning of the tiny layer at 40 tokens.
fn tune(folder: &Path) -> PathBuf {
    let file = folder.join("tuning.json");
    let args = ["tune", "--tokens", "40", "--weights", "f16", "--budget", "20", "--output", text(&file)];
    let output = wgmoe(&[&args[..], &TINY].concat(), folder, None);
    assert_code(&output, 0);
    let words = stdout(&output);
    for word in ["chosen", "table's choice", "gain", "1 choices stored in", text(&file)] {
        assert!(words.contains(word), "{word} is missing:\n{words}");
    }
    file
}

fn bench(folder: &Path, more: &[&str], variable: Option<&Path>) -> Output {
    let args = ["bench", "--tokens", "1,40", "--runs", "2", "--json", "-"];
    wgmoe(&[&args[..], &TINY, more].concat(), folder, variable)
}

/// A golden case as a checkpoint.
fn run(folder: &Path, more: &[&str], variable: Option<&Path>) -> Output {
    let case = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/mixtral__t7_h72_i40_e8k2_hub.safetensors");
    let (input, y) = (format!("{}:io.hidden_states", text(&case)), folder.join("y.safetensors"));
    let args = ["run", text(&case), "--input", &input, "--output", text(&y), "--json", "-"];
    wgmoe(&[&args[..], more].concat(), folder, variable)
}

fn matmuls(output: &Output) -> Vec<String> {
    let report = json(output);
    let rows = report["rows"].as_array().expect("rows");
    rows.iter().map(|row| row["matmul"].as_str().expect("a name").to_owned()).collect()
}

#[test]
fn tune_measures_and_stores_and_bench_and_run_use_it() {
    if gpu_context().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = tune(folder.path());
    let stored: Value = serde_json::from_slice(&std::fs::read(&file).expect("stored")).expect("JSON");
    let entry = &stored["entries"][0];
    assert_eq!((&stored["schema"], &entry["weights"], &entry["tokens"][0]), (&1.into(), &"f16".into(), &40.into()));
    assert!(entry["chosen"]["choice"]["kind"].is_string() && entry["default"]["median_s"].is_f64(), "{entry}");

    let option = bench(folder.path(), &["--tuning", text(&file)], None);
    assert_code(&option, 0);
    assert_eq!(matmuls(&option), ["auto", "tuned"]);
    assert_eq!(json(&option)["tuning"], text(&file));
    assert!(stderr(&option).contains("tuning: 1 choices of"), "{}", stderr(&option));

    let variable = bench(folder.path(), &[], Some(&file));
    assert_eq!(matmuls(&variable), ["auto", "tuned"]);
    // The option goes before the variable, and a variant before both.
    for more in [&["--tuning", "none"][..], &["--matmul", "tiled"]] {
        let output = bench(folder.path(), more, Some(&file));
        assert_code(&output, 0);
        assert!(!matmuls(&output).contains(&"tuned".to_owned()) && json(&output)["tuning"].is_null());
        assert!(!stderr(&output).contains("tuning:"), "{}", stderr(&output));
    }
    let none = bench(folder.path(), &[], Some(Path::new("none")));
    assert_eq!(matmuls(&none), ["auto", "auto"]);

    let run = run(folder.path(), &[], Some(&file));
    assert_code(&run, 0);
    assert_eq!(json(&run)["tuning"], text(&file));

    // Other classes are added, the same one is replaced.
    let args = ["tune", "--tokens", "1,40", "--weights", "f16", "--budget", "20", "--output", text(&file)];
    let again = wgmoe(&[&args[..], &TINY].concat(), folder.path(), None);
    assert_code(&again, 0);
    assert!(stdout(&again).contains("which has 2 now"), "{}", stdout(&again));
    let names = std::fs::read_dir(folder.path()).expect("a folder").flatten().map(|entry| entry.file_name());
    assert!(names.into_iter().all(|name| !name.to_string_lossy().ends_with(".tmp")), "no leftovers");
}

#[cfg(target_os = "linux")]
#[test]
fn the_cache_folder_is_used_where_nothing_else_is_said() {
    let Some(context) = gpu_context() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let index = |output: &Output| {
        let adapters = json(output)["adapters"].as_array().expect("adapters").clone();
        let name = &context.device().name;
        adapters.into_iter().find(|adapter| adapter["name"] == name.as_str()).expect("it is listed")
    };
    let before = index(&wgmoe(&["info", "--device", "auto", "--json", "-"], folder.path(), None));
    let path = PathBuf::from(before["tuning"].as_str().expect("there is a cache folder"));
    assert!(before["is_tuned"] == false && path.starts_with(folder.path()) && !path.exists(), "{before}");
    let args = ["tune", "--tokens", "40", "--weights", "f16", "--budget", "20"];
    let dry = wgmoe(&[&args[..], &TINY, &["--dry-run"]].concat(), folder.path(), None);
    assert_code(&dry, 0);
    assert!(stdout(&dry).contains("choices to try") && stdout(&dry).contains(text(&path)), "{}", stdout(&dry));
    assert!(!path.exists(), "a dry run writes nothing");

    assert_code(&wgmoe(&[&args[..], &TINY].concat(), folder.path(), None), 0);
    assert!(path.exists());
    let after = wgmoe(&["info", "--device", "auto"], folder.path(), None);
    assert!(
        stdout(&after).contains(text(&path)) && !stdout(&after).contains("would store it in"),
        "{}",
        stdout(&after)
    );
    assert_eq!(matmuls(&bench(folder.path(), &[], None)), ["auto", "tuned"]);

    // A file of an older driver is there, and said to be of no use.
    let text = std::fs::read_to_string(&path).expect("stored").replace("\"driver\": \"", "\"driver\": \"old ");
    std::fs::write(&path, text).expect("writable");
    let old = bench(folder.path(), &[], None);
    assert_code(&old, 0);
    assert_eq!(matmuls(&old), ["auto", "auto"]);
    assert!(stderr(&old).contains("tuning ignored") && stderr(&old).contains("the driver is"), "{}", stderr(&old));
    // Tuning again replaces it.
    assert_code(&wgmoe(&[&args[..], &TINY].concat(), folder.path(), None), 0);
    assert_eq!(matmuls(&bench(folder.path(), &[], None)), ["auto", "tuned"]);
}

#[test]
fn a_damaged_tuning_is_reported_and_the_work_goes_on() {
    if gpu_context().is_none() {
        return;
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("damaged.json");
    let is_reported = |output: &Output| {
        assert_code(output, 0);
        assert!(json(output)["tuning"].is_null());
        let words = stderr(output);
        for word in ["warning: tuning ignored", "damaged.json", "expected", "`wgmoe tune`"] {
            assert!(words.contains(word), "{word} is missing:\n{words}");
        }
    };
    for content in ["", "{", "{\"schema\": 99}", "\u{0}"] {
        std::fs::write(&file, content).expect("writable");
        is_reported(&run(folder.path(), &[], Some(&file)));
        is_reported(&run(folder.path(), &["--tuning", text(&file)], None));
    }
    let output = bench(folder.path(), &[], Some(&file));
    is_reported(&output);
    assert_eq!(matmuls(&output), ["auto", "auto"]);
    // A variable may be stale; an option is what the user just typed.
    let nowhere = folder.path().join("nowhere.json");
    let stale = run(folder.path(), &[], Some(&nowhere));
    assert_code(&stale, 0);
    assert!(stderr(&stale).contains("nowhere.json"), "{}", stderr(&stale));
    for refused in [bench, run] {
        assert_code(&refused(folder.path(), &["--tuning", text(&nowhere)], None), 2);
    }
}

#[test]
fn the_cpu_engine_says_that_there_is_nothing_to_tune() {
    let folder = tempfile::tempdir().expect("a folder");
    for more in [&[][..], &["--dry-run"]] {
        let output = wgmoe(&[&["tune", "--device", "cpu"], more].concat(), folder.path(), None);
        assert_code(&output, 1);
        assert!(stderr(&output).contains("one kernel"), "{}", stderr(&output));
    }
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 0, "nothing is stored");
}
