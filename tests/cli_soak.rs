//! `wgmoe soak`: memory stays where it was, and a leak is found, on the device that WGMOE_ADAPTER names, or the best.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
#[allow(dead_code, reason = "no path is an argument here")]
mod command;

use command::{assert_code, json, stderr};
use serde_json::Value;

fn soak(device: Option<&str>, args: &[&str]) -> (i32, Value, String) {
    let mut command = command::wgmoe(&[&["soak", "--json", "-"], args].concat());
    if let Some(device) = device {
        command.env("WGMOE_ADAPTER", device);
    }
    let output = command.output().expect("the binary should start");
    let code = output.status.code().expect("it ends by itself");
    assert!(code < 2, "{}", stderr(&output));
    assert_code(&output, code);
    (code, json(&output), stderr(&output))
}

#[test]
fn passes_leave_nothing_on_the_device() {
    let (_, report, words) = soak(None, &["--forwards", "1000"]);
    assert_eq!((&report["forwards"], &report["wrong"]), (&1000.into(), &0.into()), "{words}");
    assert!(report["layers"].as_u64().is_some_and(|layers| layers >= 40), "{words}");
    // So few passes do not tell what a process of this size grows by; what is on the device is counted exactly.
    assert_eq!(report["device_growth"], 0.0, "{words}");
    let samples = report["samples"].as_array().expect("samples");
    assert!(samples.len() == 20 && samples.iter().all(|s| s["device_bytes"] == samples[19]["device_bytes"]), "{words}");
    assert!(words.contains("passes on") && words.contains("device:  "), "{words}");
}

#[test]
fn layers_that_are_kept_are_found() {
    for device in [None, Some("cpu")] {
        let (code, report, words) = soak(device, &["--forwards", "6000", "--keep-layers", "--threads", "1"]);
        let grown = |field: &str| report[field].as_f64().is_some_and(|growth| growth > 0.01);
        // The CPU engine's device is the process.
        let found = if device.is_none() { "device_growth" } else { "process_growth" };
        assert!(code == 1 && grown(found) && report["passed"] == false, "{words}");
    }
}
