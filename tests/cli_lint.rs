//! `wgmoe lint` and `wgmoe shader --all` from outside.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;

use command::{assert_code, json, stderr, stdout, text};
use std::path::Path;
use std::process::Output;

fn wgmoe(args: &[&str]) -> Output {
    command::wgmoe(args).output().expect("the binary should start")
}

fn fixture(name: &str) -> String {
    text(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/uniformity").join(name)).to_owned()
}

#[test]
fn a_faulty_file_is_an_error_with_place_and_reason() {
    let faulty = fixture("faulty/after_return.wgsl");
    let output = wgmoe(&["lint", &faulty, &fixture("clean/tree_sum.wgsl")]);
    assert_code(&output, 1);
    let printed = stdout(&output);
    assert!(printed.contains(&format!("{faulty}:10:5: error[barrier]: storageBarrier")), "{printed}");
    assert!(printed.contains(&format!("{faulty}:7: some invocations may have left by this `return`")), "{printed}");
    assert!(printed.contains("2 sources: 1 error, 0 warnings"), "{printed}");
}

#[test]
fn clean_files_and_warnings_are_exit_code_0() {
    let output = wgmoe(&["lint", &fixture("clean/tree_sum.wgsl")]);
    assert_code(&output, 0);
    let output = wgmoe(&["lint", &fixture("faulty/subgroup_of_some.wgsl"), "--json", "-"]);
    assert_code(&output, 0);
    let document = json(&output);
    let finding = &document["sources"][0]["findings"][0];
    assert_eq!((&finding["rule"], &finding["line"]), (&"subgroup".into(), &7.into()), "{document}");
    assert!(stderr(&output).contains("warning[subgroup]"), "{}", stderr(&output));
}

#[test]
fn what_is_no_wgsl_is_an_error_and_what_is_no_file_unusable() {
    let output = wgmoe(&["lint", "Cargo.toml"]);
    assert_code(&output, 1);
    assert!(stdout(&output).contains("error: kernel Cargo.toml did not compile"), "{}", stdout(&output));
    assert_code(&wgmoe(&["lint", "no-such-file.wgsl"]), 2);
    assert_code(&wgmoe(&["shader", "--all", "--to", "msl"]), 2);
}

#[test]
fn all_kernels_are_written_with_a_list_of_them() {
    let folder = tempfile::tempdir().expect("a folder");
    let to = folder.path().join("new");
    let output = wgmoe(&["shader", "--all", "--to", "hlsl", "--output", text(&to)]);
    assert_code(&output, 0);
    let list = std::fs::read(to.join("kernels.json")).expect("the list");
    let list: serde_json::Value = serde_json::from_slice(&list).expect("it is JSON");
    let kernels = list["kernels"].as_array().expect("a list");
    assert_eq!(kernels.len(), wgmoe::kernels::all().len());
    for kernel in kernels {
        let file = kernel["file"].as_str().expect("a name");
        let text = std::fs::read_to_string(to.join(file)).expect("its file");
        let entry = kernel["entry_point"].as_str().expect("a name");
        assert!(text.contains(&format!("void {entry}(")), "{file} has no {entry}");
    }
}
