//! What the command printed and how it ended.

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The command with these arguments and nothing to read.
pub fn wgmoe(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_wgmoe"));
    command.args(args).stdin(Stdio::null());
    command
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

pub fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Fails with everything that was printed if the exit code is another.
#[track_caller]
pub fn assert_code(output: &Output, code: i32) {
    assert_eq!(output.status.code(), Some(code), "stdout:\n{}\nstderr:\n{}", stdout(output), stderr(output));
}

/// Standard output is one JSON document and nothing else.
#[track_caller]
pub fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}:\n{}", stdout(output)))
}
