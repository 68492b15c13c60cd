//! Measuring a layer: workloads, the check that comes before any number, timing, and the results that are kept.
//!
//! This module knows layers, not kernels: everything it measures goes through [`MoeLayer`](crate::MoeLayer), on
//! whatever device the context opened. It prints nothing; the `wgmoe` binary does.
//!
//! A number is only ever reported together with the error of the very pass that was timed ([`verify`]), and beside
//! what the device could reach at best ([`cost`]).

pub mod compare;
pub mod cost;
pub mod export;
pub mod facts;
pub mod measure;
pub mod memory;
pub mod presets;
pub mod results;
pub mod roofline;
pub mod router;
pub mod stats;
pub mod suite;
pub mod verify;
pub mod workload;
pub mod yardstick;

pub use facts::Facts;
pub use measure::{Bench, Outcome, Progress};
pub use presets::Preset;
pub use results::{DeviceResult, FirstPasses, FirstResult, Results, RooflineResult, Round, Row, StageResult, Timing};
pub use router::RouterTime;
pub use stats::{Interval, Summary};
pub use suite::{Suite, SuiteJob, SuitePlan};
pub use verify::Verification;
pub use workload::Workload;
pub use yardstick::Yardstick;
