//! What every command has in common: completions, man pages, quiet and verbose, where words go.

#![cfg(feature = "cli")]

use std::process::{Command, Output};

fn wgmoe(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_wgmoe")).args(args).output().expect("the binary was built")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the command writes UTF-8")
}

/// The names of all subcommands, as `--help` lists them.
fn subcommands() -> Vec<String> {
    let help = text(&wgmoe(&["--help"]).stdout);
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
        let script = text(&script.stdout);
        for name in &names {
            assert!(script.contains(name.as_str()), "{shell} does not know {name}");
        }
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let folder = folder.path().join("man1");
    let made = wgmoe(&["man", folder.to_str().expect("UTF-8")]);
    assert!(made.status.success(), "{}", text(&made.stderr));
    for name in &names {
        let page = std::fs::read_to_string(folder.join(format!("wgmoe-{name}.1"))).expect("a page for each");
        assert!(page.contains(".TH"), "{name}");
        let help = text(&wgmoe(&[name, "--help"]).stdout);
        assert!(help.contains("Examples:\n"), "{name} --help has no examples:\n{help}");
    }
}

#[test]
fn a_file_is_no_folder_for_pages() {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    let refused = wgmoe(&["man", file.path().to_str().expect("UTF-8")]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(text(&refused.stderr).contains("expected a folder"), "{}", text(&refused.stderr));
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
    assert_eq!((text(&quiet.stdout), text(&quiet.stderr)), (String::new(), String::new()));
    let json = bench(&["--quiet", "--json", "-"]);
    let json: serde_json::Value = serde_json::from_slice(&json.stdout).expect("nothing but JSON");
    assert_eq!(json["rows"].as_array().map(Vec::len), Some(1));
    // What the library did and how long it took, on standard error.
    let verbose = bench(&["--verbose"]);
    assert!(verbose.status.success() && !verbose.stdout.is_empty());
    let spans = text(&verbose.stderr);
    assert!(spans.contains("load") && spans.contains("forward"), "{spans}");
    assert_eq!(bench(&["--quiet", "--verbose"]).status.code(), Some(2));
    // Errors are said in any case.
    let error = wgmoe(&["bench", "--quiet", "--device", "no-such-device"]);
    assert_eq!(error.status.code(), Some(2));
    assert!(text(&error.stderr).contains("no-such-device"));
}

#[test]
fn colours_stay_out_of_files() {
    let coloured = |output: &Output| text(&output.stdout).contains('\u{1b}') || text(&output.stderr).contains('\u{1b}');
    assert!(!coloured(&wgmoe(&["--help"])) && !coloured(&wgmoe(&["info"])) && !coloured(&wgmoe(&["no-such-command"])));
}
