//! Readers. They take paths, so each input becomes a file.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use wgmoe::bench::{Results, compare};
use wgmoe::forecast::DeviceFacts;
use wgmoe::golden::GoldenCase;
use wgmoe::{Checkpoint, Context, Error, Family, Trace, Tuning};

/// A folder of this process's own, below the temporary folder; `scripts/fuzz.sh` makes that one in memory.
pub fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("wgmoe-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("the folder can be made");
        folder
    })
}

/// The folder, with `data` under `name`.
fn file(name: &str, data: &[u8]) -> PathBuf {
    let path = folder().join(name);
    std::fs::write(&path, data).expect("the folder is writable");
    path
}

/// What an error promises: few words, which cannot steer a terminal.
fn check<T>(result: Result<T, Error>) -> Option<T> {
    result
        .map_err(|error| {
            let message = error.to_string();
            assert!(message.len() < 8000, "a message of {} bytes", message.len());
            assert!(message.chars().all(|c| c == '\n' || !c.is_control()), "{message:?}");
        })
        .ok()
}

/// All that a program can ask of a checkpoint.
fn ask(path: &Path, family: Option<&Family>) {
    let Some(checkpoint) = check(Checkpoint::open(path)) else { return };
    let layers = check(checkpoint.layers(family)).unwrap_or_default();
    for layer in layers.into_iter().chain([0]).take(3) {
        if let Some(loaded) = check(checkpoint.load_layer(family, layer)) {
            assert!(loaded.weights.router.iter().all(|weight| weight.is_finite()));
        }
    }
}

/// `data` is a header, a NUL byte and the tensors' bytes; if it starts with one, the rest is a file as it is. Either way
/// a mutation of the header does not also have to guess its length.
fn tensor_file(data: &[u8]) -> Vec<u8> {
    if let [0, whole @ ..] = data {
        return whole.to_vec();
    }
    let end = data.iter().position(|&byte| byte == 0).unwrap_or(data.len());
    let tensors = data.get(end + 1..).unwrap_or_default();
    [&(end as u64).to_le_bytes()[..], &data[..end], tensors].concat()
}

/// A family that needs little: layers of two experts, hidden size 4, intermediate size 4.
fn small() -> &'static Family {
    static FAMILY: OnceLock<Family> = OnceLock::new();
    FAMILY.get_or_init(|| Family::from_toml(Path::new("small"), SMALL).expect("it is sound"))
}

const SMALL: &str = r#"
name = "small"
[detect]
model_type = ["s"]
[sizes]
hidden_size = 4
intermediate_size = 4
num_experts = 2
top_k = 1
[routing]
scores = "softmax"
renormalize = true
[experts]
activation = "silu"
[tensors.hub]
prefix = ["l{layer}.", ""]
router = "r"
gate_proj = "g{expert}"
up_proj = "u{expert}"
down_proj = "d{expert}"
"#;

/// A header and its tensors.
pub fn safetensors(data: &[u8], _: &Context) {
    let path = file("model.safetensors", &tensor_file(data));
    file("config.json", br#"{"model_type":"s"}"#);
    ask(&path, Some(small()));
    ask(&path, None);
}

/// An index, beside a shard.
pub fn index(data: &[u8], _: &Context) {
    let header = br#"{"r":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    file("a", &tensor_file(&[&header[..], &[0; 9]].concat()));
    file("config.json", br#"{"model_type":"s"}"#);
    ask(&file("model.safetensors.index.json", data), Some(small()));
}

/// A GGUF file; the magic and the version need no guessing.
pub fn gguf(data: &[u8], _: &Context) {
    let bytes = [b"GGUF\x03\0\0\0", data].concat();
    ask(&file("model.gguf", &bytes), None);
}

/// A configuration, for each family that it can be of.
pub fn config(data: &[u8], _: &Context) {
    let Some((&first, json)) = data.split_first() else { return };
    let families = Family::builtin();
    let family = &families[usize::from(first) % families.len()];
    if let Some(layer) = check(family.layer_config(Path::new("config.json"), json, u32::from(first >> 6))) {
        assert!(layer.top_k() <= layer.num_experts());
    }
}

/// A family's description, and what it makes of a configuration.
pub fn family(data: &[u8], _: &Context) {
    let Some(family) = check(Family::from_file(&file("family.toml", data))) else { return };
    let _ = (family.summary(), family.layout_names());
    check(family.layer_config(Path::new("config.json"), br#"{"a":1,"b":[2,3],"c":{"d":"silu"}}"#, 1));
}

/// A tuning, of the device.
pub fn tuning(data: &[u8], context: &Context) {
    if let Some(tuning) = check(Tuning::load(&file("tuning.json", data), context)) {
        assert!(tuning.entries().iter().all(|entry| entry.chosen.median_s > 0.0));
    }
}

/// Results, and what they are compared with: themselves.
pub fn results(data: &[u8], _: &Context) {
    if let Some(results) = check(Results::load(&file("results.json", data))) {
        let _ = compare::compare(&results, &results);
    }
}

/// A trace; one that is read can be written, and is the same.
pub fn trace(data: &[u8], _: &Context) {
    let path = file("trace.json", data);
    if let Some(trace) = check(Trace::read(&path)) {
        trace.write(&path).expect("what was read can be written");
        assert_eq!(Trace::read(&path).expect("what was written can be read"), trace);
    }
}

/// A golden case.
pub fn golden(data: &[u8], _: &Context) {
    file("config.json", br#"{"model_type":"s"}"#);
    let path = file("case.safetensors", &tensor_file(data));
    if let Some(case) = check(GoldenCase::read(&path, Some(small()))) {
        assert_eq!(case.x.len(), case.num_tokens * case.config.hidden_size() as usize);
        let _ = (case.smallest_gap(), case.batch());
    }
}

/// Facts of a device, as JSON or, after a `#`, as TOML.
pub fn device_facts(data: &[u8], _: &Context) {
    let name = if data.starts_with(b"#") { "device.toml" } else { "device.json" };
    if let Some(facts) = check(DeviceFacts::read(&file(name, data))) {
        let _ = facts.profile(true).check_floor();
    }
}
