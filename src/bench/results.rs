//! Results as they are written to disk. Field names are a promise: other programs read them.

use crate::atomic_file::write_atomically;
use crate::bench::facts::Facts;
use crate::bench::router::RouterTime;
use crate::bench::stats::{self, Interval};
use crate::error::{Error, Result, brief};
use crate::model::formats::WeightFormat;
use crate::small_file::{self, Unreadable};
use crate::{DeviceInfo, Roofline};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::fmt::Write as _;
use std::path::Path;

/// Version of the format. Fields may be added without a new version; none changes its meaning.
///
/// 2 added how times were taken ([`Timing`]), the yardstick and the machine's facts. Files of version 1 can be read.
/// `docs/results-schema.json` describes the format for other programs.
pub const SCHEMA: u32 = 2;
/// A bench of every preset in every format is a tenth of this.
const MAX_BYTES: u64 = 16 << 20;
const RESULTS: &str = "results of `wgmoe bench --json`";

/// Everything that one `wgmoe bench` found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// [`SCHEMA`]
    pub schema: u32,
    /// Version of this crate.
    pub wgmoe_version: String,
    /// What it ran on.
    pub device: DeviceResult,
    /// The machine and the moment; absent in files of schema 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub facts: Option<Facts>,
    /// How fast the machine was all along; absent in files of schema 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub yardstick: Option<YardstickResult>,
    /// Somebody stopped the run: not everything that was asked for is here.
    #[serde(default)]
    pub interrupted: bool,
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

impl From<Roofline> for RooflineResult {
    fn from(roofline: Roofline) -> Self {
        let Roofline { gflops, gbytes_per_s, bandwidths, how } = roofline;
        RooflineResult { gflops, gbytes_per_s, bandwidths, how }
    }
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
    /// Tokens chose as recorded ones did: the trace's file and layer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trace: Option<String>,
    /// Wall time of a whole forward pass, router included, from submit to completion, on resident weights and input: the
    /// median of rounds, each the median of its passes.
    pub median_s: f64,
    /// The fastest run's time.
    pub min_s: f64,
    /// The slowest run's time.
    pub max_s: f64,
    /// Timed runs.
    pub runs: usize,
    /// How sure the median is, and what it was made of; absent in files of schema 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timing: Option<Timing>,
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

impl Row {
    /// The layer in a few words, weights and routing included.
    pub fn layer(&self) -> String {
        let sizes = format!(
            "hidden {}, intermediate {}, {} experts, top-{}",
            self.hidden_size, self.intermediate_size, self.num_experts, self.top_k
        );
        let mut text = format!("{}, {}", self.preset.as_ref().unwrap_or(&sizes), self.weights.name());
        if self.skew > 0.0 {
            let _ = write!(text, ", skew {}", self.skew);
        }
        if let Some(trace) = &self.trace {
            let _ = write!(text, ", as in {trace}");
        }
        text
    }

    /// As [`Row::layer`], and the tokens.
    pub fn title(&self) -> String {
        format!("{}, {} tokens", self.layer(), self.tokens)
    }
}

/// How a row was timed: in rounds, each between two runs of the yardstick, with the other batch sizes' rounds in
/// between.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Timing {
    /// Where the median is, with 95 % certainty, by a bootstrap over the rounds.
    pub interval_s: Interval,
    /// The median of the rounds' times by those of their yardsticks: what is comparable between runs.
    pub in_yardsticks: f64,
    /// Where that is, with 95 % certainty.
    pub interval_in_yardsticks: Interval,
    /// The rounds, in order.
    pub rounds: Vec<Round>,
    /// Rounds whose time is more than five median absolute deviations from the median.
    pub outliers: usize,
    /// The yardstick shows that the machine was faster or slower than usual during some of the rounds.
    pub drifted: bool,
    /// Passes before the first timed one.
    pub warm_up_passes: usize,
    /// The last of those were no longer getting faster.
    pub settled: bool,
}

/// One round of a row.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// The median of its passes.
    pub seconds: f64,
    /// The mean of the yardstick's times before and after.
    pub yardstick_s: f64,
}

impl Round {
    /// Time in yardsticks.
    pub fn in_yardsticks(&self) -> f64 {
        self.seconds / self.yardstick_s
    }
}

impl Timing {
    /// What `rounds` say; `None` if there are none.
    pub fn of(rounds: Vec<Round>) -> Option<Timing> {
        let seconds: Vec<f64> = rounds.iter().map(|round| round.seconds).collect();
        let relative: Vec<f64> = rounds.iter().map(Round::in_yardsticks).collect();
        Some(Timing {
            interval_s: Interval::of_median(&seconds)?,
            in_yardsticks: stats::median_of(&relative),
            interval_in_yardsticks: Interval::of_median(&relative)?,
            outliers: stats::outliers(&seconds),
            rounds,
            drifted: false,
            warm_up_passes: 0,
            settled: true,
        })
    }
}

/// A fixed piece of work that was repeated all along: times that differ are the machine's doing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct YardstickResult {
    /// The work. Only files that agree in it can be compared by it.
    pub what: String,
    /// Its usual time.
    pub median_s: f64,
    /// One run in ten was faster than this.
    pub fast_s: f64,
    /// One run in ten was slower than this.
    pub slow_s: f64,
    /// (seconds since the first, seconds taken) of each run.
    pub times: Vec<(f64, f64)>,
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

impl Results {
    /// Reads a file that `wgmoe bench --json` wrote: of this schema, or of an earlier one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::BadResults`] for a file that is damaged, of a newer schema, or something else altogether.
    pub fn load(path: &Path) -> Result<Results> {
        let bad = |what: &str, found: String, expected: String| bad(path, what, found, expected);
        let bytes = small_file::read(path, MAX_BYTES).map_err(|reason| match reason {
            Unreadable::NotPlain => bad("it", "no regular file".to_owned(), RESULTS.to_owned()),
            Unreadable::TooLarge => bad("its size", format!("more than {MAX_BYTES} bytes"), RESULTS.to_owned()),
            Unreadable::Io(source) => Error::Io { path: path.to_owned(), source },
        })?;
        Results::parse(path, &bytes)
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Results> {
        let bad = |what: &str, found: String, expected: String| bad(path, what, found, expected);
        if let Err(error) = serde_json::from_slice::<&RawValue>(bytes) {
            return Err(bad("the file", format!("no JSON: {error}"), RESULTS.to_owned()));
        }
        // JSON without an object of one schema has none.
        let head: Head = serde_json::from_slice(bytes).unwrap_or_default();
        let found = head.schema.map_or("missing", RawValue::get);
        match found.parse() {
            Ok(1..=SCHEMA) => {}
            Ok(_) => return Err(bad("its schema", found.into(), format!("1 to {SCHEMA}; a newer wgmoe may read it"))),
            Err(_) => return Err(bad("its schema", brief(found), format!("a number from 1 to {SCHEMA}"))),
        }
        let results: Results = serde_json::from_slice(bytes)
            .map_err(|error| bad("its content", brief(error), "the fields of its schema".to_owned()))?;
        for row in &results.rows {
            let rounds = row.timing.iter().flat_map(|timing| &timing.rounds);
            let mut times = rounds.flat_map(|round| [round.seconds, round.yardstick_s]).chain([row.median_s]);
            if let Some(time) = times.find(|time| !(time.is_finite() && *time > 0.0)) {
                return Err(bad(&format!("a time of {}", row.title()), time.to_string(), "above 0".to_owned()));
            }
        }
        Ok(results)
    }
}

/// What is looked at first: files of another schema may have other fields.
#[derive(Default, Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    schema: Option<&'a RawValue>,
}

fn bad(path: &Path, what: &str, found: String, expected: String) -> Error {
    Error::BadResults { path: path.to_owned(), what: what.to_owned(), found, expected }
}

/// Writes `text` to `path` so that a reader finds the old file or the new one, never half of either.
pub fn write_text(path: &Path, text: &str) -> Result<()> {
    write_atomically(path, text.as_bytes())
}

/// Writes `json` to `path` so that a reader finds the old file or the new one, never half of either.
pub fn write_json(path: &Path, json: &impl Serialize) -> Result<()> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut text = serde_json::to_vec_pretty(json).map_err(|error| io(error.into()))?;
    text.push(b'\n');
    write_atomically(path, &text)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::Value;

    pub(crate) fn results() -> Results {
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
            trace: None,
            median_s: 0.25,
            min_s: 0.125,
            max_s: 0.5,
            runs: 7,
            timing: Timing::of(vec![Round { seconds: 0.25, yardstick_s: 0.125 }]),
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
            facts: None,
            yardstick: None,
            interrupted: false,
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
        assert_eq!(json["schema"], SCHEMA);
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

    #[test]
    fn files_that_are_no_results_are_errors_with_what_was_found_and_expected() {
        let whole = serde_json::to_value(results()).expect("serialises");
        let with = |pointer: &str, value: Value| {
            let mut json = whole.clone();
            *json.pointer_mut(pointer).expect(pointer) = value;
            json.to_string()
        };
        let mut unnumbered = whole.clone();
        unnumbered.as_object_mut().expect("an object").remove("schema");
        let half = whole.to_string()[..200].to_owned();
        let newer = SCHEMA + 1;
        for (text, words) in [
            (half, vec!["the file is no JSON", "EOF", "wgmoe bench --json"]),
            (with("/schema", newer.into()), vec!["its schema is 3", "expected 1 to 2", "newer wgmoe"]),
            (with("/schema", 0.into()), vec!["its schema is 0"]),
            (with("/schema", "two".into()), vec!["its schema is \"two\""]),
            (unnumbered.to_string(), vec!["its schema is missing"]),
            ("[]".to_owned(), vec!["its schema is missing"]),
            ("[1, 2]".to_owned(), vec!["its schema is missing"]),
            (with("/rows/0/tokens", "five".into()), vec!["its content", "five"]),
            (with("/rows/0/median_s", 0.0.into()), vec!["a time of", "5 tokens is 0, expected above 0"]),
            (with("/rows/0/timing/rounds/0/yardstick_s", (-1.0).into()), vec!["is -1, expected above 0"]),
        ] {
            let error = Results::parse(Path::new("r.json"), text.as_bytes()).expect_err(&text);
            assert!(matches!(error, Error::BadResults { .. }));
            let message = error.to_string();
            assert!(message.starts_with("r.json: "), "{message}");
            for word in words {
                assert!(message.contains(word), "{word} is missing: {message}");
            }
        }
        assert_eq!(Results::parse(Path::new("r.json"), whole.to_string().as_bytes()).expect("whole"), results());
        assert!(matches!(Results::load(Path::new("no-such-file")), Err(Error::Io { .. })));
    }
}
