//! What is fuzzed: every reader of files that come from elsewhere, through what a program calls, and the plan. Each
//! target takes any bytes, and panics if a promise is broken; an error is an answer.

pub mod noop;
#[path = "../../tests/support/plan_checks.rs"]
mod plan_checks;
pub mod readers;
mod shapes;

use wgmoe::Context;

/// One thing that is fuzzed.
pub struct Target {
    /// Also the folder of its corpus.
    pub name: &'static str,
    /// Reads `data`; tunings are read for the context's device.
    pub run: fn(data: &[u8], context: &Context),
}

/// All of them.
pub const TARGETS: [Target; 11] = [
    Target { name: "safetensors", run: readers::safetensors },
    Target { name: "index", run: readers::index },
    Target { name: "gguf", run: readers::gguf },
    Target { name: "config", run: readers::config },
    Target { name: "family", run: readers::family },
    Target { name: "tuning", run: readers::tuning },
    Target { name: "results", run: readers::results },
    Target { name: "trace", run: readers::trace },
    Target { name: "golden", run: readers::golden },
    Target { name: "device", run: readers::device_facts },
    Target { name: "plan", run: shapes::plan },
];
