//! Results as they are written to disk. Field names are a promise: other programs read them.

use crate::DeviceInfo;
use crate::atomic_file::write_atomically;
use crate::bench::router::RouterTime;
use crate::error::{Error, Result};
use crate::model::formats::WeightFormat;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the format. Fields may be added without a new version; none changes its meaning.
pub const SCHEMA: u32 = 1;

/// Everything that one `wgmoe bench` found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`]
    pub schema: u32,
    /// Version of this crate.
    pub wgmoe_version: String,
    /// What it ran on.
    pub device: DeviceResult,
    /// The device's measured peaks; absent if measuring them failed.
    pub roofline: Option<RooflineResult>,
    /// One for each layer and batch size whose result was right.
    pub rows: Vec<Row>,
    /// Batch sizes without a row, and why.
    pub failures: Vec<Failure>,
    /// How long each layer took to its first result.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub first_results: Vec<FirstResult>,
    /// The router alone, if it was asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routers: Vec<RouterTime>,
    /// The file of the tuning that was used, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tuning: Option<String>,
}

/// The device.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceResult {
    /// As the driver calls it.
    pub name: String,
    /// Vulkan, Metal, ...
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// discrete, integrated, virtual, software, cpu-engine or other.
    pub kind: String,
}

impl From<&DeviceInfo> for DeviceResult {
    fn from(device: &DeviceInfo) -> Self {
        let DeviceInfo { name, backend, driver, kind, .. } = device.clone();
        DeviceResult { name, backend, driver, kind }
    }
}

/// Peaks measured in the same run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RooflineResult {
    /// Arithmetic, f32.
    pub gflops: f64,
    /// Memory.
    pub gbytes_per_s: f64,
    /// (bytes, 10^9 bytes per second) of buffers of growing size: caches first, then memory.
    pub bandwidths: Vec<(u64, f64)>,
    /// How they were measured.
    pub how: String,
}

/// One layer at one batch size.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Name of the preset, with what was changed about it; absent for sizes of the user's own.
    pub preset: Option<String>,
    /// Width of a token.
    pub hidden_size: u32,
    /// Inner width of one expert.
    pub intermediate_size: u32,
    /// Experts in the layer.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// Storage of the expert weights.
    pub weights: WeightFormat,
    /// Tokens of the batch.
    pub tokens: u32,
    /// Wall time of a whole forward pass, router included, from submit to completion, on resident weights and input.
    pub median_s: f64,
    /// The fastest run's time.
    pub min_s: f64,
    /// The slowest run's time.
    pub max_s: f64,
    /// Timed runs.
    pub runs: usize,
    /// Exponent of the Zipf distribution over experts.
    pub skew: f64,
    /// The grouped matmul that was asked for: the name of a variant, or auto; tuned where a tuning chose it then.
    pub matmul: String,
    /// `2 * tokens * top_k * 3 * hidden_size * intermediate_size + 2 * tokens * hidden_size * num_experts`, by the
    /// median time.
    pub gflops: f64,
    /// Bytes that no implementation could avoid moving, by the median time.
    pub gbytes_per_s: f64,
    /// `gbytes_per_s` by the rate of plain reads from a buffer of as many bytes, or, with fresh tokens, of as many as all
    /// experts have; absent without a roofline.
    #[serde(default)]
    pub read_fraction: Option<f64>,
    /// `gflops` by what the measured peaks allow at best; absent without a roofline.
    pub roofline_fraction: Option<f64>,
    /// Time by the time of a dense matmul with as many FLOPs; absent where none was measured.
    pub dense_ratio: Option<f64>,
    /// Experts that got at least one token.
    pub active_experts: u32,
    /// Tokens of the busiest expert by the mean over all experts.
    pub imbalance: f64,
    /// Dispatches of one pass.
    pub dispatches: u32,
    /// Copies from the device to the host within one pass.
    pub readbacks: u32,
    /// `max|y - y_ref| / max|y_ref|`
    pub max_rel_error: f64,
    /// Tokens that the reference computed too.
    pub tokens_checked: usize,
    /// Each timed pass had tokens of its own, so that experts came from memory, and not from caches.
    #[serde(default)]
    pub fresh_tokens: bool,
    /// Where not all experts are on the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residency: Option<ResidencyResult>,
    /// Where the time goes.
    pub stages: Vec<StageResult>,
}

/// From nothing to the first result of one layer. Seconds, each measured once.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstResult {
    /// The layer, in words.
    pub layer: String,
    /// Tokens of the passes.
    pub tokens: u32,
    /// Finding and opening the device. The first layer pays for it; the number is the same in all.
    pub device_s: f64,
    /// No kernel is compiled in this process yet. What the driver keeps on disk from earlier runs is still there.
    pub cold: FirstPasses,
    /// The same layer loaded again on the same device, whose kernels are compiled. Absent where loading takes too long to
    /// be done twice.
    pub warm: Option<FirstPasses>,
}

impl FirstResult {
    /// Device, weights, first pass.
    pub fn cold_s(&self) -> f64 {
        self.device_s + self.cold.to_first_result_s()
    }

    /// Weights, first pass: the device is open.
    pub fn warm_s(&self) -> Option<f64> {
        self.warm.map(|warm| warm.to_first_result_s())
    }
}

/// What a layer takes before it runs at its usual speed.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FirstPasses {
    /// Packing the weights and handing them to the device.
    pub load_s: f64,
    /// The first forward, from host slice to host slice: scratch buffers, kernels that are not compiled yet, the pass.
    pub first_pass_s: f64,
    /// Kernels that it compiled; 0 on the CPU engine.
    pub kernels: u32,
    /// The same again: what remains.
    pub second_pass_s: f64,
}

impl FirstPasses {
    /// Weights and first pass.
    pub fn to_first_result_s(&self) -> f64 {
        self.load_s + self.first_pass_s
    }
}

/// Experts that were brought in during the timed passes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResidencyResult {
    /// Experts that are on the device at a time.
    pub places: u32,
    /// Of those, how many never leave.
    pub pinned: u32,
    /// Bytes of one.
    pub expert_bytes: u64,
    /// Times that a pass needed an expert that was there.
    pub hits: u64,
    /// Times that it was not.
    pub misses: u64,
    /// Hits per needed expert.
    pub hit_rate: f64,
    /// Passes that these are of: the timed ones, and one before them.
    pub passes: u64,
    /// Bytes copied to the device, mean.
    pub uploaded_bytes_per_pass: f64,
    /// Rounds of the experts' products, mean.
    pub rounds_per_pass: f64,
}

/// One stage of the pass.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StageResult {
    /// Name of the stage.
    pub name: String,
    /// Its time; absent where the device has no way to tell.
    pub median_s: Option<f64>,
    /// Arithmetic of the stage, as planned.
    pub flops: u64,
    /// Least bytes that the stage moves, as planned: the weights of as many experts as the batch can reach.
    pub bytes: u64,
    /// Its dispatches; absent for the CPU engine, as are requested bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatches: Option<u32>,
    /// As `bytes`, with the experts that got a token in the timed pass.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub least_bytes: Option<u64>,
    /// Bytes that the workgroups of its dispatches read and write in that pass: what one of them touches counts once,
    /// what several touch counts for each ([`crate::plan::requests`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requested_bytes: Option<u64>,
    /// The time that the measured peaks allow for `flops` and `least_bytes`, whichever takes longer, by `median_s`. The
    /// peaks are those of the row's `roofline_fraction`. Above 1 where the bytes were still in a cache.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub roofline_fraction: Option<f64>,
}

/// A batch size without a result.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The layer, in words.
    pub layer: String,
    /// Tokens of the batch; absent if the layer itself could not be made.
    pub tokens: Option<u32>,
    /// What went wrong.
    pub reason: String,
}

/// Writes `json` to `path` so that a reader finds the old file or the new one, never half of either.
pub fn write_json(path: &Path, json: &impl Serialize) -> Result<()> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut text = serde_json::to_vec_pretty(json).map_err(|error| io(error.into()))?;
    text.push(b'\n');
    write_atomically(path, &text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let text = |text: &str| text.to_owned();
        let stage = StageResult {
            name: text("router"),
            median_s: None,
            flops: 1,
            bytes: 2,
            dispatches: Some(1),
            least_bytes: Some(2),
            requested_bytes: Some(3),
            roofline_fraction: None,
        };
        let row = Row {
            preset: None,
            hidden_size: 1,
            intermediate_size: 2,
            num_experts: 3,
            top_k: 1,
            weights: WeightFormat::F16,
            tokens: 5,
            median_s: 0.25,
            min_s: 0.125,
            max_s: 0.5,
            runs: 7,
            skew: 0.0,
            matmul: text("auto"),
            gflops: 1.5,
            gbytes_per_s: 2.5,
            read_fraction: None,
            roofline_fraction: Some(0.1),
            dense_ratio: None,
            active_experts: 2,
            imbalance: 1.5,
            dispatches: 6,
            readbacks: 0,
            max_rel_error: 1e-7,
            tokens_checked: 5,
            fresh_tokens: false,
            residency: None,
            stages: vec![stage],
        };
        let device = DeviceResult { name: text("d"), backend: text("b"), driver: text("v"), kind: text("software") };
        Results {
            schema: SCHEMA,
            wgmoe_version: text("0.0.0"),
            device,
            roofline: None,
            rows: vec![row],
            failures: Vec::new(),
            first_results: vec![FirstResult {
                layer: text("l"),
                tokens: 5,
                device_s: 0.25,
                cold: FirstPasses { load_s: 1.0, first_pass_s: 2.0, kernels: 6, second_pass_s: 0.5 },
                warm: None,
            }],
            routers: Vec::new(),
            tuning: None,
        }
    }

    #[test]
    fn results_survive_a_file_and_leave_no_other_behind() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("results.json");
        for _ in 0..2 {
            write_json(&path, &results()).expect("writable");
        }
        let text = std::fs::read_to_string(&path).expect("written");
        assert_eq!(serde_json::from_str::<Results>(&text).expect("valid"), results());
        assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1);
    }

    #[test]
    fn the_promised_fields_are_there() {
        let json = serde_json::to_value(results()).expect("serialises");
        assert_eq!(json["schema"], 1);
        assert_eq!(json["rows"][0]["weights"], "f16");
        for field in ["name", "backend", "driver", "kind"] {
            assert!(json["device"][field].is_string(), "{field}");
        }
        for field in "hidden_size intermediate_size num_experts top_k tokens median_s min_s gflops gbytes_per_s \
                      roofline_fraction dispatches readbacks max_rel_error"
            .split_whitespace()
        {
            assert!(json["rows"][0][field].is_number(), "{field}");
        }
        for field in ["name", "median_s", "flops", "bytes"] {
            assert!(json["rows"][0]["stages"][0].get(field).is_some(), "{field}");
        }
    }

    #[test]
    fn files_of_earlier_versions_can_be_read() {
        let mut json = serde_json::to_value(results()).expect("serialises");
        let fields = json.as_object_mut().expect("an object");
        assert!(fields.remove("first_results").is_some());
        let stage = json["rows"][0]["stages"][0].as_object_mut().expect("an object");
        for field in ["dispatches", "least_bytes", "requested_bytes"] {
            assert!(stage.remove(field).is_some(), "{field}");
        }
        let read: Results = serde_json::from_value(json).expect("the new fields have defaults");
        let mut expected = Results { first_results: Vec::new(), ..results() };
        let stage = &mut expected.rows[0].stages[0];
        (stage.dispatches, stage.least_bytes, stage.requested_bytes) = (None, None, None);
        assert_eq!(read, expected);
    }

    #[test]
    fn what_a_first_result_takes_is_the_sum_of_its_parts() {
        let cold = &results().first_results[0];
        assert_eq!((cold.cold_s(), cold.warm_s()), (3.25, None));
        let passes = FirstPasses { load_s: 1.0, first_pass_s: 0.5, kernels: 6, second_pass_s: 0.25 };
        let both = FirstResult { warm: Some(passes), ..cold.clone() };
        assert_eq!((both.cold_s(), both.warm_s()), (3.25, Some(1.5)));
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error_with_its_name() {
        let path = Path::new("no-such-folder/results.json");
        let error = write_json(path, &results()).expect_err("no such folder");
        assert!(error.to_string().contains("no-such-folder"), "{error}");
    }
}
