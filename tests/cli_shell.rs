//! What every command has in common: completions, man pages, quiet and verbose, where words go.

#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;

use command::{assert_code, json, stderr, stdout, text};
use std::process::Output;

fn wgmoe(args: &[&str]) -> Output {
    command::wgmoe(args).output().expect("the binary should start")
}

/// The names of all subcommands, as `--help` lists them.
fn subcommands() -> Vec<String> {
    let help = stdout(&wgmoe(&["--help"]));
    let list = help.split("Commands:\n").nth(1).expect("there are commands");
    // A description that is wrapped goes on further to the right.
    let lines = list.lines().take_while(|line| !line.is_empty()).filter_map(|line| line.strip_prefix("  "));
    let names = lines.filter(|line| !line.starts_with(' ')).filter_map(|line| line.split_whitespace().next());
    names.filter(|name| *name != "help").map(str::to_owned).collect()
}

#[test]
fn every_subcommand_is_completed_and_has_a_page_and_examples() {
    let names = subcommands();
    assert!(names.len() >= 12, "{names:?}");
    for shell in ["bash", "zsh", "fish"] {
        let script = wgmoe(&["completions", shell]);
        assert!(script.status.success() && script.stderr.is_empty());
        let script = stdout(&script);
        for name in &names {
            assert!(script.contains(name.as_str()), "{shell} does not know {name}");
        }
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path().join("man1");
    let made = wgmoe(&["man", text(&folder)]);
    assert_code(&made, 0);
    for name in &names {
        let page = std::fs::read_to_string(folder.join(format!("wgmoe-{name}.1"))).expect("a page for each");
        assert!(page.contains(".TH"), "{name}");
        let help = wgmoe(&[name, "--help"]);
        assert_code(&help, 0);
        let help = stdout(&help);
        assert!(help.contains("Examples:\n"), "{name} --help has no examples:\n{help}");
        assert!(help.contains(&format!("  wgmoe {name}")) && help.contains("--json"), "{help}");
    }
}

#[test]
fn a_file_is_no_folder_for_pages() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let refused = wgmoe(&["man", text(file.path())]);
    assert_code(&refused, 2);
    assert!(stderr(&refused).contains("expected a folder"), "{}", stderr(&refused));
}

#[test]
fn quiet_says_nothing_and_verbose_says_more() {
    let bench = |more: &[&str]| {
        let layer = ["--hidden", "64", "--intermediate", "32", "--experts", "4", "--top-k", "2", "--tokens", "2"];
        let mut args = vec!["bench", "--device", "cpu", "--runs", "2"];
        args.extend(layer);
        args.extend(more);
        wgmoe(&args)
    };
    let quiet = bench(&["--quiet"]);
    assert!(quiet.status.success());
    assert_eq!((stdout(&quiet), stderr(&quiet)), (String::new(), String::new()));
    assert_eq!(json(&bench(&["--quiet", "--json", "-"]))["rows"].as_array().map(Vec::len), Some(1));
    // What the library did and how long it took, on standard error.
    let verbose = bench(&["--verbose"]);
    assert!(verbose.status.success() && !verbose.stdout.is_empty());
    let spans = stderr(&verbose);
    assert!(spans.contains("load") && spans.contains("forward"), "{spans}");
    assert_eq!(bench(&["--quiet", "--verbose"]).status.code(), Some(2));
    // Errors are said in any case.
    let error = wgmoe(&["bench", "--quiet", "--device", "no-such-device"]);
    assert_eq!(error.status.code(), Some(2));
    assert!(stderr(&error).contains("no-such-device"));
}

#[test]
fn colours_stay_out_of_files() {
    let coloured = |output: &Output| stdout(output).contains('\u{1b}') || stderr(output).contains('\u{1b}');
    assert!(!coloured(&wgmoe(&["--help"])) && !coloured(&wgmoe(&["info"])) && !coloured(&wgmoe(&["no-such-command"])));
}
