//! What a forecast knows of a device: limits, memory, rates, and, where it was measured, how long stages took there. A
//! file that `wgmoe plan --save-device` writes on one machine and `--device` reads on another.

use crate::atomic_file::write_atomically;
use crate::error::{Error, Result};
use crate::model::formats::WeightFormat;
use crate::plan::DeviceProfile;
use crate::plan::predict::Rates;
use crate::small_file;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Version of the format.
pub const SCHEMA: u32 = 1;
/// Stages of every format at every batch size are a tenth of this.
const MAX_BYTES: u64 = 1 << 20;

/// A device, in numbers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceFacts {
    /// Version of the format.
    pub schema: u32,
    /// For people.
    pub name: String,
    /// The embedded CPU engine, which has no limits but memory.
    #[serde(default)]
    pub cpu_engine: bool,
    /// Bytes that a layer can take; absent: nobody knows, as no graphics interface tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// All its limits.
    pub limits: DeviceProfile,
    /// Its rates by data sheet or measurement; absent: there is no time to predict.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rates: Option<Rates>,
    /// (bytes, GB/s) of buffers of growing size, where that was measured: small ones stay in caches.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bandwidths: Vec<(u64, f64)>,
    /// Seconds of one dispatch that does nothing.
    #[serde(default)]
    pub dispatch_s: f64,
    /// Seconds of a pass for each of its dispatches, beside those of its stages. Negative where stages can only be timed
    /// one by one and are faster together.
    #[serde(default)]
    pub between_s: f64,
    /// Stages that were timed there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured: Vec<MeasuredStage>,
}

/// One stage of one pass, as it was timed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MeasuredStage {
    /// Its name.
    pub stage: String,
    /// How expert weights were stored.
    pub weights: WeightFormat,
    /// The grouped matmul's variant.
    pub matmul: String,
    /// Tokens of the pass.
    pub tokens: u32,
    /// Mean rows of the experts that had any.
    pub rows: f64,
    /// What it computed.
    pub flops: u64,
    /// What it had to move.
    pub bytes: u64,
    /// Dispatches.
    pub dispatches: u32,
    /// How long it took.
    pub seconds: f64,
}

/// Name, memory, whether it has a subgroup size, rates: those of public data sheets, or from widths and clocks where they say
/// no more. Workgroup memory is taken to give 128 bytes a clock to each core, compute unit or multiprocessor. What a dispatch
/// costs is a guess.
const CLASSES: [(&str, &str, Option<u64>, Rates); 3] = [
    // 96 execution units of 8 lanes at 1.3 GHz, LPDDR4X; 6 subslices
    (
        "xe-lp",
        "integrated (Xe-LP, 96 EU)",
        None,
        Rates { gflops: 2000.0, memory: 60.0, cache: 330.0, workgroup_memory: 1000.0 },
    ),
    // 10 cores of 128 lanes at 1.4 GHz
    (
        "apple-m2",
        "Apple M2, 10 cores",
        None,
        Rates { gflops: 3600.0, memory: 100.0, cache: 700.0, workgroup_memory: 1800.0 },
    ),
    // 46 multiprocessors of 128 lanes at 2.5 GHz
    (
        "rtx-4070",
        "discrete (RTX 4070)",
        Some(12 << 30),
        Rates { gflops: 29_000.0, memory: 504.0, cache: 2500.0, workgroup_memory: 14_700.0 },
    ),
];
/// A device that offers what WebGPU guarantees, and of which nothing else is known.
const FLOOR: &str = "webgpu-defaults";
/// A dispatch of a GPU, about.
const GUESSED_DISPATCH_S: f64 = 5e-6;
/// Largest binding of most GPUs' drivers.
const USUAL_BINDING: u64 = (1 << 31) - 4;

impl DeviceFacts {
    /// Names that [`DeviceFacts::built_in`] knows.
    pub fn names() -> Vec<&'static str> {
        std::iter::once(FLOOR).chain(CLASSES.iter().map(|class| class.0)).collect()
    }

    /// The device of that name, by its data sheet.
    pub fn built_in(name: &str) -> Option<Self> {
        let floor = Self {
            schema: SCHEMA,
            name: "a device with WebGPU's default limits".to_owned(),
            cpu_engine: false,
            memory_bytes: None,
            limits: DeviceProfile::webgpu_floor(),
            rates: None,
            bandwidths: Vec::new(),
            dispatch_s: 0.0,
            between_s: 0.0,
            measured: Vec::new(),
        };
        if name == FLOOR {
            return Some(floor);
        }
        let &(_, name, memory_bytes, rates) = CLASSES.iter().find(|class| class.0 == name)?;
        let limits =
            DeviceProfile { max_storage_binding: USUAL_BINDING, max_buffer: USUAL_BINDING, ..floor.limits.clone() };
        let name = name.to_owned();
        Some(Self { name, memory_bytes, limits, rates: Some(rates), dispatch_s: GUESSED_DISPATCH_S, ..floor })
    }

    /// Reads and checks a file, JSON or TOML.
    ///
    /// # Errors
    /// [`Error::BadFile`] for a file that is damaged, too large, of another schema, or whose numbers are none; [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let bad = |message: String| Error::BadFile { path: path.to_owned(), message };
        let bytes = small_file::read(path, MAX_BYTES)
            .map_err(|reason| reason.bad_file(path, MAX_BYTES, "facts of a device"))?;
        let text = String::from_utf8(bytes).map_err(|error| bad(format!("no text ({error})")))?;
        let is_toml = path.extension().is_some_and(|extension| extension == "toml");
        let parsed = match is_toml {
            true => toml::from_str(&text).map_err(|error| error.to_string()),
            false => serde_json::from_str::<Self>(&text).map_err(|error| error.to_string()),
        };
        let facts = parsed
            .map_err(|error| bad(format!("damaged ({error}), expected what `wgmoe plan --save-device` writes")))?;
        facts.check().map_err(bad)?;
        Ok(facts)
    }

    /// Writes them as JSON, complete or not at all.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::Io { path: path.to_owned(), source: e.into() })?;
        text.push(b'\n');
        write_atomically(path, &text)
    }

    fn check(&self) -> Result<(), String> {
        if self.schema != SCHEMA {
            return Err(format!("schema {}, expected {SCHEMA}", self.schema));
        }
        let rate = |what: &str, value: f64| match value.is_finite() && value > 0.0 {
            true => Ok(()),
            false => Err(format!("{what} is {value}, expected a number above 0")),
        };
        if let Some(rates) = &self.rates {
            rate("rates.gflops", rates.gflops)?;
            rate("rates.memory", rates.memory)?;
            rate("rates.cache", rates.cache)?;
            rate("rates.workgroup_memory", rates.workgroup_memory)?;
        }
        self.bandwidths.iter().try_for_each(|&(_, gbytes)| rate("a bandwidth", gbytes))?;
        for (what, value) in [("dispatch_s", self.dispatch_s), ("between_s", self.between_s)] {
            if !(-1.0..=1.0).contains(&value) {
                return Err(format!("{what} is {value}, expected seconds of a dispatch"));
            }
        }
        for stage in &self.measured {
            rate(&format!("rows of {}", stage.stage), stage.rows)?;
            rate(&format!("seconds of {}", stage.stage), stage.seconds)?;
            rate(&format!("tokens of {}", stage.stage), stage.tokens.into())?;
        }
        Ok(())
    }

    /// The limits that a device of this kind is opened with for a layer: WebGPU's, unless `all` are needed.
    pub fn profile(&self, all: bool) -> DeviceProfile {
        let floor = DeviceProfile::webgpu_floor();
        match (self.cpu_engine, all) {
            (true, _) => DeviceProfile { max_storage_binding: u64::MAX, ..floor },
            (false, true) => self.limits.clone(),
            (false, false) => DeviceProfile {
                subgroup_size: self.limits.subgroup_size,
                int64: self.limits.int64,
                software: self.limits.software,
                ..floor
            },
        }
    }

    /// GB/s of reads from about `bytes` bytes.
    pub(super) fn bandwidth(&self, bytes: f64) -> Option<f64> {
        let fits = self.bandwidths.iter().rev().find(|&&(size, _)| size as f64 <= bytes);
        fits.or(self.bandwidths.first()).map(|&(_, rate)| rate).or(self.rates.map(|rates| rates.memory))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_back_and_damaged_ones_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("device.json");
        for name in DeviceFacts::names() {
            let facts = DeviceFacts::built_in(name).expect("it is a name of one");
            facts.write(&path).expect("it can be written");
            assert_eq!(DeviceFacts::read(&path).expect("it was just written"), facts);
        }
        let text = std::fs::read_to_string(&path).expect("it is there");
        for (from, to, named) in [
            ("\"schema\": 1", "\"schema\": 2", "schema 2"),
            ("\"gflops\": 29000.0", "\"gflops\": -1.0", "gflops is -1"),
            ("\"limits\"", "\"limit\"", "damaged"),
            ("{", "", "damaged"),
        ] {
            assert!(text.contains(from), "{text}");
            std::fs::write(&path, text.replacen(from, to, 1)).expect("it can be written");
            let error = DeviceFacts::read(&path).expect_err(named).to_string();
            assert!(error.contains(named) && error.contains("device.json"), "{error}");
        }
        assert!(DeviceFacts::read(folder.path()).is_err());
        assert_eq!(DeviceFacts::built_in("no such device"), None);
    }

    #[test]
    fn facts_can_be_written_by_hand() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("device.toml");
        let toml = "schema = 1\nname = \"mine\"\nmemory_bytes = 8000000000\ndispatch_s = 1e-5\n\
            [limits]\nmax_storage_binding = 134217728\nmax_buffer = 268435456\nmax_workgroups_per_dimension = 65535\n\
            max_invocations = 256\nmax_workgroup_storage = 16384\nmax_storage_buffers = 8\nint64 = false\nsoftware = false\n\
            [rates]\ngflops = 1000.0\nmemory = 50.0\ncache = 200.0\nworkgroup_memory = 500.0\n";
        std::fs::write(&path, toml).expect("it can be written");
        let facts = DeviceFacts::read(&path).expect("it is valid");
        assert_eq!((facts.memory_bytes, facts.limits), (Some(8_000_000_000), DeviceProfile::webgpu_floor()));
    }
}
