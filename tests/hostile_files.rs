//! Files made to break a reader, one table of all: each is refused by a typed error that names the file, says what is
//! wrong in few words that cannot steer a terminal, and comes before memory is taken by an unchecked number. What a
//! fuzzer finds becomes a line here.

#[path = "support/gguf.rs"]
mod gguf_file;
mod support;

use gguf_file::{F16, Gguf, Meta, Q4_K, Q8_0, string};
use serde_json::{Value, json};
use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use wgmoe::bench::Results;
use wgmoe::forecast::DeviceFacts;
use wgmoe::golden::GoldenCase;
use wgmoe::tune::Identity;
use wgmoe::{Checkpoint, Context, Error, Family, Trace, Tuning};

// ---- what memory a reader takes

/// The system's allocator, which counts the bytes that are taken and the most that ever were.
struct Counting;

static TAKEN: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn take(bytes: usize) {
    let taken = TAKEN.fetch_add(bytes, Ordering::Relaxed) + bytes;
    MOST.fetch_max(taken, Ordering::Relaxed);
}

// SAFETY: every call is the system allocator's, with the arguments that it was made with.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What `work` returns, and the most bytes that it held at a time. Only one test of this file may run at a time.
fn measured<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = TAKEN.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let result = work();
    (result, MOST.load(Ordering::Relaxed).saturating_sub(before))
}

// ---- readers

/// Who reads a file, each through what a program would call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Reader {
    Safetensors,
    Index,
    Config,
    Gguf,
    Family,
    Tuning,
    Results,
    Trace,
    Golden,
    Device,
    DeviceToml,
}

impl Reader {
    fn file_name(self) -> &'static str {
        match self {
            Reader::Safetensors => "model.safetensors",
            Reader::Index => "model.safetensors.index.json",
            Reader::Config => "config.json",
            Reader::Gguf => "model.gguf",
            Reader::Family => "family.toml",
            Reader::Tuning => "tuning.json",
            Reader::Results => "results.json",
            Reader::Trace => "trace.json",
            Reader::Golden => "case.safetensors",
            Reader::Device => "device.json",
            Reader::DeviceToml => "device.toml",
        }
    }

    /// Writes `bytes`, and what a sound file would have beside it, and reads.
    fn read(self, folder: &Path, bytes: &[u8], context: &Context) -> Result<(), Error> {
        let path = folder.join(self.file_name());
        let beside: &[(&str, Vec<u8>)] = match self {
            Reader::Safetensors | Reader::Golden => &[("config.json", config())],
            Reader::Index => &[("config.json", config()), ("a.safetensors", sound_model().bytes())],
            Reader::Config => &[("model.safetensors", sound_model().bytes())],
            _ => &[],
        };
        for (name, content) in beside.iter().map(|(name, content)| (*name, content.as_slice())) {
            std::fs::write(folder.join(name), content).expect("the folder is writable");
        }
        std::fs::write(&path, bytes).expect("the folder is writable");
        let layer = |path: &Path| Checkpoint::open(path)?.load_layer(None, 0).map(drop);
        match self {
            Reader::Safetensors | Reader::Gguf => layer(&path),
            Reader::Index | Reader::Config => layer(folder),
            Reader::Family => Family::from_file(&path).map(drop),
            Reader::Tuning => Tuning::load(&path, context).map(drop),
            Reader::Results => Results::load(&path).map(drop),
            Reader::Trace => Trace::read(&path).map(drop),
            Reader::Golden => GoldenCase::read(&path, None).map(drop),
            Reader::Device | Reader::DeviceToml => DeviceFacts::read(&path).map(drop),
        }
    }
}

// ---- sound files, and ways to damage them

const PREFIX: &str = "model.layers.0.mlp.";

fn config() -> Vec<u8> {
    sound_config().to_string().into_bytes()
}

fn sound_config() -> Value {
    json!({"model_type": "qwen3_moe", "hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 2,
        "num_experts_per_tok": 1, "norm_topk_prob": true, "hidden_act": "silu"})
}

/// A safetensors file, before it is written.
#[derive(Clone)]
struct Model {
    metadata: Option<Value>,
    /// Names, and what the header says of them.
    entries: Vec<(String, Value)>,
    data: Vec<u8>,
}

impl Model {
    fn tensor(&mut self, name: &str, dtype: &str, shape: &[usize], data: &[u8]) {
        let start = self.data.len();
        self.data.extend(data);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, self.data.len()]});
        self.entries.push((name.to_owned(), entry));
    }

    fn f32(&mut self, name: &str, shape: &[usize]) {
        let count = shape.iter().product();
        let bytes: Vec<u8> = (0..count).flat_map(|n: usize| ((n % 13) as f32 / 8.0 - 0.75).to_le_bytes()).collect();
        self.tensor(name, "F32", shape, &bytes);
    }

    fn entry(&mut self, name: &str) -> &mut Value {
        let found = self.entries.iter_mut().find(|(known, _)| known.ends_with(name));
        &mut found.unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    fn bytes(&self) -> Vec<u8> {
        let metadata = self.metadata.iter().map(|metadata| format!("\"__metadata__\":{metadata}"));
        let entries = self.entries.iter().map(|(name, entry)| format!("{}:{entry}", json!(name)));
        file(&format!("{{{}}}", metadata.chain(entries).collect::<Vec<_>>().join(",")), &self.data)
    }
}

/// A file with this header.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn sound_model() -> Model {
    let mut model = Model { metadata: None, entries: Vec::new(), data: Vec::new() };
    model.f32(&format!("{PREFIX}gate.weight"), &[2, 8]);
    for e in 0..2 {
        for (name, shape) in [("gate_proj", [4, 8]), ("up_proj", [4, 8]), ("down_proj", [8, 4])] {
            model.f32(&format!("{PREFIX}experts.{e}.{name}.weight"), &shape);
        }
    }
    model
}

fn model(change: impl FnOnce(&mut Model)) -> Vec<u8> {
    let mut model = sound_model();
    change(&mut model);
    model.bytes()
}

fn golden(change: impl FnOnce(&mut Model)) -> Vec<u8> {
    let mut model = sound_model();
    model.f32("io.hidden_states", &[3, 8]);
    model.f32("io.output", &[3, 8]);
    let experts: Vec<u8> = [0i64, 1, 0].iter().flat_map(|e| e.to_le_bytes()).collect();
    model.tensor("io.topk_indices", "I64", &[3, 1], &experts);
    model.f32("io.topk_weights", &[3, 1]);
    change(&mut model);
    model.bytes()
}

fn gguf(change: impl FnOnce(&mut Gguf)) -> Vec<u8> {
    let mut file = Gguf::new("qwen3moe").with(
        "qwen3moe",
        &[
            ("embedding_length", Meta::U32(32)),
            ("expert_feed_forward_length", Meta::u32s(&[32])),
            ("expert_count", Meta::U32(2)),
            ("expert_used_count", Meta::U16(1)),
        ],
    );
    file.f32("blk.0.ffn_gate_inp.weight", &[2, 32], &[0.25; 64]);
    for name in ["gate", "up", "down"] {
        let data = gguf_file::random_blocks(Q8_0, 2 * 32 * 32, || 7);
        file.tensor(&format!("blk.0.ffn_{name}_exps.weight"), Q8_0, &[2, 32, 32], data);
    }
    change(&mut file);
    file.bytes()
}

fn changed(mut value: Value, change: impl FnOnce(&mut Value)) -> Vec<u8> {
    change(&mut value);
    value.to_string().into_bytes()
}

fn without(value: Value, pointer: &str, key: &str) -> Vec<u8> {
    changed(value, |value| {
        let removed = value.pointer_mut(pointer).and_then(Value::as_object_mut).and_then(|object| object.remove(key));
        assert!(removed.is_some(), "{pointer}/{key} is there");
    })
}

fn with(value: Value, pointer: &str, new: Value) -> Vec<u8> {
    changed(value, |value| *value.pointer_mut(pointer).unwrap_or_else(|| panic!("{pointer} is there")) = new)
}

fn sound_index() -> Value {
    let names = sound_model().entries.into_iter().map(|(name, _)| (name, json!("a.safetensors")));
    json!({"metadata": {"total_size": 1}, "weight_map": names.collect::<serde_json::Map<_, _>>()})
}

const FAMILY: &str = r#"name = "acme"

[detect]
model_type = ["acme_moe"]

[sizes]
hidden_size = { from = "hidden_size" }
intermediate_size = { from = "width" }
num_experts = { from = "num_experts" }
top_k = 2

[routing]
scores = "softmax"
renormalize = true

[experts]
activation = { from = "hidden_act", default = "silu" }

[tensors.hub]
prefix = "model.layers.{layer}."
router = "gate.weight"
gate_proj = "experts.{expert}.w1.weight"
up_proj = "experts.{expert}.w3.weight"
down_proj = "experts.{expert}.w2.weight"
"#;

fn family(from: &str, to: &str) -> Vec<u8> {
    assert!(FAMILY.contains(from), "{from}");
    FAMILY.replace(from, to).into_bytes()
}

fn sound_tuning(context: &Context) -> Value {
    json!({
        "schema": wgmoe::tune::SCHEMA, "device": Identity::of(context.device()), "date": "2026-11-25",
        "entries": [{
            "shape": {"few_tokens": false, "rows_per_expert": 32, "hidden_size": 64, "intermediate_size": 64},
            "weights": "f16", "layer": "a layer", "tokens": [100],
            "chosen": {"choice": {"kind": "tiled", "tile_m": 64, "tile_n": 32}, "median_s": 0.001, "runs": 7},
            "default": {"choice": {"kind": "tiled", "tile_m": 32, "tile_n": 64}, "median_s": 0.002, "runs": 7},
            "runner_up": null, "candidates": 2, "tried": 2,
        }],
    })
}

fn sound_results() -> Value {
    serde_json::from_str(include_str!("results/schema-1.json")).expect("a result file")
}

fn sound_trace() -> Value {
    json!({"schema": 1, "source": "a test", "labels": ["a", "b"], "layers": [
        {"layer": 3, "num_experts": 4, "top_k": 2, "experts": [[0, 1], [3, -1]], "weights": [[0.5, 0.5], [1.0, 0.0]]},
        {"layer": 4, "num_experts": 4, "top_k": 2, "experts": [[2, 1], [3, 0]]},
    ]})
}

fn sound_device() -> Value {
    let facts = DeviceFacts::built_in("rtx-4070").expect("it is built in");
    serde_json::to_value(facts).expect("JSON")
}

const DEVICE_TOML: &str = r#"schema = 1
name = "a device"
[limits]
max_storage_binding = 134217728
max_buffer = 268435456
max_workgroups_per_dimension = 65535
max_invocations = 256
max_workgroup_storage = 16384
max_storage_buffers = 8
int64 = false
software = false
"#;

/// What every reader has to accept: else the cases were refused for another reason than theirs.
fn sound(context: &Context) -> Vec<(Reader, Vec<u8>)> {
    let text = |value: Value| value.to_string().into_bytes();
    vec![
        (Reader::Safetensors, model(|_| ())),
        (Reader::Index, text(sound_index())),
        (Reader::Config, config()),
        (Reader::Gguf, gguf(|_| ())),
        (Reader::Family, FAMILY.into()),
        (Reader::Tuning, text(sound_tuning(context))),
        (Reader::Results, text(sound_results())),
        (Reader::Trace, text(sound_trace())),
        (Reader::Golden, golden(|_| ())),
        (Reader::Device, text(sound_device())),
        (Reader::DeviceToml, DEVICE_TOML.into()),
    ]
}

// ---- the table

/// A file, who reads it, and words that the error has.
struct Case(&'static str, Reader, Vec<u8>, &'static str);

fn cases(context: &Context) -> Vec<Case> {
    let mut cases = Vec::new();
    for (reader, list) in [
        (Reader::Safetensors, safetensors()),
        (Reader::Safetensors, layers()),
        (Reader::Index, indices()),
        (Reader::Config, configurations()),
        (Reader::Gguf, gguf_files()),
        (Reader::Family, families()),
        (Reader::Tuning, tunings(context)),
        (Reader::Results, results()),
        (Reader::Trace, traces()),
        (Reader::Golden, golden_files()),
        (Reader::Device, devices()),
        (Reader::DeviceToml, device_tomls()),
    ] {
        cases.extend(list.into_iter().map(|(name, bytes, words)| Case(name, reader, bytes, words)));
    }
    cases
}

type Cases = Vec<(&'static str, Vec<u8>, &'static str)>;

/// Headers that are none.
fn safetensors() -> Cases {
    let f32_at = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let one = f32_at("[1]", 0, 4);
    let named = |name: &str| file(&format!(r#"{{"{name}":{one}}}"#), &[0; 4]);
    let only = |entry: &str, data: usize| file(&format!(r#"{{"a":{entry}}}"#), &vec![0; data]);
    let length = |n: u64| [&n.to_le_bytes()[..], b"{}"].concat();
    let many = |count: usize, entry: &dyn Fn(usize) -> String| {
        file(&format!("{{{}}}", (0..count).map(entry).collect::<Vec<_>>().join(",")), &[])
    };
    // What safetensors 0.8 panics on where overflow is checked.
    let enormous = {
        let size = (1u64 << 61) - 1;
        let entry = |n: u64, bytes: u64| {
            let start = n * size;
            format!(r#""{n}":{{"dtype":"U8","shape":[{bytes}],"data_offsets":[{start},{}]}}"#, start + bytes)
        };
        let mut entries: Vec<String> = (0..8).map(|n| entry(n, size)).collect();
        entries.push(entry(8, 7));
        file(&format!("{{{}}}", entries.join(",")), &[])
    };
    let small_enormous = {
        let size = 1u64 << 40;
        let entry = |n: u64| {
            let [start, end] = [n, n + 1].map(|n| n * size);
            format!(r#""{n}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
        };
        file(&format!("{{{}}}", (0..8).map(entry).collect::<Vec<_>>().join(",")), &[])
    };
    vec![
        ("empty", Vec::new(), "8-byte header length"),
        ("seven bytes", vec![0; 7], "8-byte header length"),
        ("a length and no header", length(3), "claims 3 bytes"),
        ("a length of 16 MiB and one", length((16 << 20) + 1), "at most 16777216"),
        ("a length of 2^63", length(1 << 63), "claims 9223372036854775808 bytes"),
        ("a length of 2^64 - 1", length(u64::MAX), "claims 18446744073709551615 bytes"),
        ("a length that overflows with itself", length(u64::MAX - 7), "claims 18446744073709551608 bytes"),
        ("no JSON", file("hello", &[]), "not usable"),
        ("a header of zero bytes", file("", &[]), "not usable"),
        ("not UTF-8", [&5u64.to_le_bytes()[..], b"{\"\xff\":"].concat(), "not usable"),
        ("a byte order mark", file("\u{feff}{}", &[]), "not usable"),
        ("NUL bytes", file("\0\0\0\0", &[]), "not usable"),
        ("lists in lists", file(&"[".repeat(100_000), &[]), "not usable"),
        ("objects in objects", file(&r#"{"a":"#.repeat(100_000), &[]), "not usable"),
        ("depth in an unknown field", only(&format!(r#"{{"x":{}"#, "[".repeat(100_000)), 0), "not usable"),
        ("a list", file("[]", &[]), "expected a JSON object of tensors"),
        ("a number", file("1", &[]), "expected a JSON object of tensors"),
        ("two objects", file("{}{}", &[]), "trailing characters"),
        ("a tensor twice", file(&format!(r#"{{"a":{one},"a":{one}}}"#), &[0; 4]), "tensor \"a\" appears twice"),
        (
            "a tensor twice, as another type",
            file(&format!(r#"{{"a":{one},"a":{}}}"#, one.replace("F32", "I32")), &[0; 4]),
            "tensor \"a\" appears twice",
        ),
        ("a tensor twice, once escaped", file(&format!(r#"{{"a":{one},"\u0061":{one}}}"#), &[0; 4]), "appears twice"),
        ("metadata twice", file(r#"{"__metadata__":{},"__metadata__":{}}"#, &[]), "__metadata__ appears twice"),
        ("a metadata key twice", file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, &[]), "\"k\" appears twice"),
        ("metadata that is a number", file(r#"{"__metadata__":{"k":1}}"#, &[]), "expected a string"),
        ("metadata that is a list", file(r#"{"__metadata__":[]}"#, &[]), "expected a JSON object"),
        (
            "65,537 metadata keys",
            file(
                &format!(
                    r#"{{"__metadata__":{{{}}}}}"#,
                    (0..65_537).map(|n| format!(r#""{n}":"""#)).collect::<Vec<_>>().join(",")
                ),
                &[],
            ),
            "more than 65536 entries",
        ),
        ("no tensor but null", only("null", 0), "not usable"),
        ("no type", only(r#"{"shape":[1],"data_offsets":[0,4]}"#, 4), "missing field `dtype`"),
        ("no shape", only(r#"{"dtype":"F32","data_offsets":[0,4]}"#, 4), "missing field `shape`"),
        ("no offsets", only(r#"{"dtype":"F32","shape":[1]}"#, 4), "missing field `data_offsets`"),
        (
            "a shape twice",
            only(r#"{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}"#, 4),
            "duplicate field",
        ),
        ("an unknown type", only(&one.replace("F32", "F33"), 4), "unknown type \"F33\""),
        ("a type in small letters", only(&one.replace("F32", "f32"), 4), "unknown type \"f32\""),
        ("a type that is a number", only(&one.replace("\"F32\"", "32"), 4), "expected a string"),
        ("a type of a megabyte", only(&one.replace("F32", &"F".repeat(1 << 20)), 4), "unknown type \"FFFF"),
        ("a type that steers", only(&one.replace("F32", r"\u001b[2J"), 4), "unknown type"),
        ("a negative axis", only(&f32_at("[-1]", 0, 4), 4), "not usable"),
        ("half an axis", only(&f32_at("[1.5]", 0, 4), 4), "not usable"),
        ("an axis of 2^64", only(&f32_at("[18446744073709551616]", 0, 4), 4), "not usable"),
        ("an axis of 2^64 - 1", only(&f32_at("[18446744073709551615]", 0, 4), 4), "more than can be addressed"),
        (
            "axes whose product overflows",
            only(&f32_at("[4294967296,4294967296]", 0, 4), 4),
            "more than can be addressed",
        ),
        ("zero by 2^64 - 1", only(&f32_at("[0,18446744073709551615]", 0, 0), 0), "more than can be addressed"),
        ("nine axes", only(&f32_at("[1,1,1,1,1,1,1,1,1]", 0, 4), 4), "9 dimensions, at most 8"),
        ("200,000 axes", only(&f32_at(&format!("[{}1]", "1,".repeat(199_999)), 0, 4), 4), "200000 dimensions"),
        ("eight million axes", only(&f32_at(&format!("[{}1]", "1,".repeat(8_000_000)), 0, 4), 4), "8000001 dimensions"),
        ("a shape that is a number", only(&f32_at("1", 0, 4), 4), "expected a list of sizes"),
        (
            "a text of 15 MiB for a shape",
            only(&f32_at(&format!("\"{}\"", "\\u200b".repeat(15 << 17)), 0, 4), 4),
            "left out",
        ),
        ("offsets in reverse", only(&f32_at("[1]", 4, 0), 4), "lies at 4..0, expected 0..4"),
        ("one offset", only(r#"{"dtype":"F32","shape":[1],"data_offsets":[0]}"#, 4), "not usable"),
        ("three offsets", only(r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}"#, 4), "not usable"),
        ("a negative offset", only(r#"{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}"#, 4), "not usable"),
        ("an end of 2^64 - 1", only(&f32_at("[1]", 0, u64::MAX), 4), "expected 0..4"),
        ("data that start late", only(&f32_at("[1]", 4, 8), 8), "lies at 4..8, expected 0..4"),
        ("a gap", file(&format!(r#"{{"a":{one},"b":{}}}"#, f32_at("[1]", 8, 12)), &[0; 12]), "expected 4..8"),
        ("an overlap", file(&format!(r#"{{"a":{one},"b":{}}}"#, f32_at("[1]", 2, 6)), &[0; 6]), "expected 4..8"),
        ("two tensors in one place", file(&format!(r#"{{"a":{one},"b":{one}}}"#), &[0; 4]), "expected 4..8"),
        ("less room than the shape needs", only(&f32_at("[2]", 0, 4), 4), "8 bytes"),
        ("more room than the shape needs", only(&f32_at("[1]", 0, 8), 8), "4 bytes"),
        ("a terabyte that is not there", only(&f32_at("[274877906944]", 0, 1 << 40), 4), "cut off"),
        ("cut off by a byte", only(&one, 3), "cut off"),
        ("a byte too much", only(&one, 5), "followed by something else"),
        ("nine tensors of 2^64 bytes", enormous, "more than can be addressed"),
        ("eight tensors of 2^43 bytes", small_enormous, "cut off"),
        ("half a byte", only(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#, 1), "whole bytes"),
        ("an empty name", named(""), "printable"),
        ("a name of 257 bytes", named(&"n".repeat(257)), "257 bytes"),
        ("a name of a megabyte", named(&"n".repeat(1 << 20)), "1048576 bytes"),
        ("a name with NUL", named(r"a\u0000b"), "printable"),
        ("a name that steers", named(r"\u001b[31m"), "printable"),
        ("a name of two lines", named(r"a\nb"), "printable"),
        ("a name with a C1 control", named(r"\u009b2J"), "printable"),
        ("half a surrogate", named(r"\ud800"), "not usable"),
        ("65,537 tensors", many(65_537, &|n| format!(r#""{n}":{}"#, f32_at("[0]", 0, 0))), "more than 65536 tensors"),
    ]
}

/// Sound headers with a layer that is none.
fn layers() -> Cases {
    let metadata = |key: &str, value: &str| model(|m| m.metadata = Some(json!({ key: value })));
    let first = |bytes: [u8; 4]| model(|m| m.data[..4].copy_from_slice(&bytes));
    vec![
        (
            "a router of another shape",
            model(|m| m.entry("gate.weight")["shape"] = json!([8, 2])),
            "expected shape [2, 8]",
        ),
        ("a router in a row", model(|m| m.entry("gate.weight")["shape"] = json!([16])), "expected shape [2, 8]"),
        ("a router of integers", model(|m| m.entry("gate.weight")["dtype"] = json!("I32")), "type I32"),
        ("an expert of another shape", model(|m| m.entry("1.up_proj.weight")["shape"] = json!([2, 16])), "[4, 8]"),
        ("an expert is missing", model(|m| drop(m.entries.remove(6))), "followed by something else"),
        ("an expert of another name", model(|m| m.entries[6].0.push('x')), "no tensor"),
        ("one tensor more", model(|m| m.f32(&format!("{PREFIX}bias"), &[1])), "bias"),
        ("NaN", first(f32::NAN.to_le_bytes()), "NaN at element 0"),
        ("infinity", first(f32::INFINITY.to_le_bytes()), "inf at element 0"),
        (
            "fp8 whose scales have axes that overflow",
            model(|m| {
                *m.entry("0.gate_proj.weight") = json!({"dtype": "F8_E4M3", "shape": [4, 8], "data_offsets": [64, 96]});
                let end = m.data.len();
                m.tensor("pad", "U8", &[0], &[]);
                let huge = json!({"dtype": "F32", "shape": [0, 1u64 << 40, 1u64 << 40], "data_offsets": [end, end]});
                m.entries.push((format!("{PREFIX}experts.0.gate_proj.weight_scale_inv"), huge));
                m.tensor("pad2", "U8", &[96], &[0; 96]);
                // The three quarters that fp8 does not need belong to another tensor.
                m.entries.push(("rest".to_owned(), json!({"dtype": "U8", "shape": [96], "data_offsets": [96, 192]})));
            }),
            "one scale for each 128 x 128",
        ),
        ("a prefix that steers", metadata("prefix", "\u{1b}[31m"), "printable"),
        ("a prefix of 300 bytes", metadata("prefix", &"p".repeat(300)), "300 bytes"),
        ("a prefix of nothing there", metadata("prefix", "elsewhere."), "no tensor"),
        (
            "a layer of another number",
            model(|m| m.metadata = Some(json!({"prefix": PREFIX, "layer_idx": "x"}))),
            "layer",
        ),
        ("a layout that nobody knows", metadata("layout", "diagonal"), "diagonal"),
        ("a layout of a megabyte", metadata("layout", &"d".repeat(1 << 20)), "left out"),
        ("formats that are no JSON", metadata("packed_weights", "{"), "packed_weights"),
        ("an unknown format", metadata("packed_weights", r#"{"a":"f17"}"#), "f17"),
        ("a format twice", metadata("packed_weights", r#"{"a":"f16","a":"f16"}"#), "appears twice"),
        (
            "packed rows of another size",
            metadata("packed_weights", &json!({format!("{PREFIX}experts.0.up_proj.weight"): "fp8"}).to_string()),
            "experts.0.up_proj",
        ),
        ("a configuration that is no JSON", metadata("config", "{"), "not JSON"),
        ("a configuration of depth", metadata("config", &"[".repeat(100_000)), "recursion limit"),
        ("a configuration of 4 MiB and more", metadata("config", &" ".repeat((4 << 20) + 1)), "at most 4194304"),
    ]
}

fn indices() -> Cases {
    let shard = |name: &str| {
        changed(sound_index(), |index| {
            index["weight_map"].as_object_mut().expect("an object").insert("x".to_owned(), json!(name));
        })
    };
    let map = |text: &str| format!(r#"{{"weight_map":{text}}}"#).into_bytes();
    let many = |count: usize| {
        let entries: Vec<String> = (0..count).map(|n| format!(r#""{n}":"a""#)).collect();
        map(&format!("{{{}}}", entries.join(",")))
    };
    const ELSEWHERE: &str = "not the name of a file in the same folder";
    vec![
        ("empty", Vec::new(), "not a usable checkpoint index"),
        ("no JSON", b"weight_map".to_vec(), "not a usable checkpoint index"),
        ("no map", b"{}".to_vec(), "missing field `weight_map`"),
        ("a list", b"[]".to_vec(), "not a usable checkpoint index"),
        ("a map that is a list", map("[]"), "expected a JSON object of file names"),
        ("a map twice", br#"{"weight_map":{},"weight_map":{}}"#.to_vec(), "duplicate field"),
        ("a shard that is a number", map(r#"{"a":1}"#), "expected a string"),
        ("a shard that is an object", map(r#"{"a":{}}"#), "expected a string"),
        ("a tensor twice", map(r#"{"a":"x","a":"x"}"#), "\"a\" appears twice"),
        ("a tensor twice, in two shards", map(r#"{"a":"x","a":"y"}"#), "\"a\" appears twice"),
        ("a tensor's name that steers", map(r#"{"\u001b[2J":"x"}"#), "printable"),
        ("a tensor's name of 257 bytes", map(&format!(r#"{{"{}":"x"}}"#, "n".repeat(257))), "257 bytes"),
        ("an empty tensor's name", map(r#"{"":"x"}"#), "printable"),
        ("a shard above", shard("../a.safetensors"), ELSEWHERE),
        ("a shard below", shard("b/a.safetensors"), ELSEWHERE),
        ("a shard of the system", shard("/etc/hostname"), ELSEWHERE),
        ("the folder itself", shard("."), ELSEWHERE),
        ("the folder above", shard(".."), ELSEWHERE),
        ("a shard without a name", shard(""), ELSEWHERE),
        ("a shard of another system", shard("b\\a"), ELSEWHERE),
        ("a shard on a drive", shard("C:a"), ELSEWHERE),
        ("a shard with NUL", shard("a\0b"), ELSEWHERE),
        ("a shard that steers", shard("\u{1b}[31m"), ELSEWHERE),
        ("a shard of a megabyte", shard(&"s".repeat(1 << 20)), ELSEWHERE),
        ("a shard that ends in a slash", shard("a/"), ELSEWHERE),
        ("depth", map(&"{\"a\":".repeat(100_000)), "not a usable checkpoint index"),
        ("a million tensors and more", many((1 << 20) + 1), "more than 1048576 tensors"),
        ("300,000 tensors of elsewhere", many(300_000), "no MoE block"),
        ("half", sound_index().to_string().into_bytes()[..90].to_vec(), "EOF"),
        (
            "a router in a shard that has none",
            with(sound_index(), "/weight_map/model.layers.0.mlp.gate.weight", json!("none.safetensors")),
            "none.safetensors",
        ),
        (
            "a router that its shard does not have",
            changed(sound_index(), |index| index["weight_map"]["model.layers.0.mlp.bias"] = json!("a.safetensors")),
            "bias",
        ),
    ]
}

fn configurations() -> Cases {
    let key = |key: &str, value: Value| {
        changed(sound_config(), |config| {
            config[key] = value;
        })
    };
    let raw = |key: &str, text: &str| {
        let text = sound_config().to_string().replacen('{', &format!("{{\"{key}\":{text},"), 1);
        text.into_bytes()
    };
    vec![
        ("empty", Vec::new(), "not JSON"),
        ("half", b"{\"a\":".to_vec(), "not JSON"),
        ("a list", b"[]".to_vec(), "not a JSON object"),
        ("null", b"null".to_vec(), "not a JSON object"),
        ("not UTF-8", b"{\"\xff\":1}".to_vec(), "not JSON"),
        ("nothing", b"{}".to_vec(), "no model_type"),
        ("depth", raw("x", &"[".repeat(100_000)), "recursion limit"),
        ("depth within", raw("text_config", &r#"{"text_config":"#.repeat(100_000)), "recursion limit"),
        ("200,000 values", raw("x", &format!("[{}0]", "[0],".repeat(100_000))), "values, at most 131072"),
        ("200,000 objects", raw("x", &format!("[{}0]", "{\"a\":0},".repeat(100_000))), "values, at most 131072"),
        ("4 MiB and a byte", [config(), vec![b' '; 4 << 20]].concat(), "more than 4194304 bytes"),
        ("a number beyond any", raw("x", "1e999"), "not JSON"),
        ("NaN without a key", b"{NaN}".to_vec(), "not JSON"),
        ("a model_type that is a number", key("model_type", json!(1)), "no model_type"),
        ("an unknown model_type", key("model_type", json!("gpt2")), "model_type \"gpt2\""),
        ("a model_type of a megabyte", key("model_type", json!("m".repeat(1 << 20))), "left out"),
        ("a model_type that steers", key("model_type", json!("\u{1b}[31m\u{9b}2J")), "model_type"),
        ("no hidden_size", without(sound_config(), "", "hidden_size"), "lacks \"hidden_size\""),
        ("a hidden_size of null", key("hidden_size", Value::Null), "lacks \"hidden_size\""),
        ("a hidden_size of zero", key("hidden_size", json!(0)), "hidden_size is 0"),
        ("a negative hidden_size", key("hidden_size", json!(-8)), "hidden_size"),
        ("a hidden_size in words", key("hidden_size", json!("eight")), "hidden_size"),
        ("a hidden_size of half a number", key("hidden_size", json!(8.5)), "hidden_size"),
        ("a hidden_size of 2^32", key("hidden_size", json!(1u64 << 32)), "hidden_size"),
        ("a hidden_size of 2^64 - 1", key("hidden_size", json!(u64::MAX)), "hidden_size"),
        ("a hidden_size of 1e300", key("hidden_size", json!(1e300)), "hidden_size"),
        ("a hidden_size that is a list", key("hidden_size", json!([8])), "is a list"),
        ("a hidden_size that is an object", key("hidden_size", json!({"a": 1})), "hidden_size"),
        ("a hidden_size that is a text of a megabyte", key("hidden_size", json!("8".repeat(1 << 20))), "left out"),
        ("a hidden_size that no tensor has", key("hidden_size", json!(1 << 17)), "131072"),
        ("no experts", key("num_experts", json!(0)), "num_experts"),
        ("more experts than any layer", key("num_experts", json!(1025)), "num_experts"),
        ("2^31 experts", key("num_experts", json!(1u64 << 31)), "num_experts"),
        ("more experts than there are", key("num_experts", json!(1024)), "experts.2.gate_proj"),
        ("fewer experts than there are", key("num_experts", json!(1)), "experts.1."),
        ("no choice", key("num_experts_per_tok", json!(0)), "top_k"),
        ("more choices than experts", key("num_experts_per_tok", json!(3)), "top_k"),
        ("an unknown activation", key("hidden_act", json!("sine")), "sine"),
        ("an activation that is a list", key("hidden_act", json!(["silu"])), "is a list"),
        ("renormalisation in words", key("norm_topk_prob", json!("perhaps")), "norm_topk_prob"),
    ]
}

fn gguf_files() -> Cases {
    let list = |kind: u32, count: u64, rest: &[u8]| {
        Meta::Raw(9, [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat())
    };
    let length = |bytes: u64| Meta::Raw(8, bytes.to_le_bytes().to_vec());
    let whole = gguf(|_| ());
    let nested = |depth: usize| {
        let mut inner = [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat();
        for _ in 1..depth {
            inner = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &inner].concat();
        }
        Meta::Raw(9, inner)
    };
    vec![
        ("empty", Vec::new(), "the first word"),
        ("another word", gguf(|f| f.magic = *b"GGML"), "a GGUF file with"),
        ("big-endian", gguf(|f| f.magic = *b"FUGG"), "big-endian"),
        ("version 0", gguf(|f| f.version = 0), "GGUF version 0"),
        ("version 2^32 - 1", gguf(|f| f.version = u32::MAX), "GGUF version 4294967295"),
        ("2^64 - 1 tensors", gguf(|f| f.num_tensors = Some(u64::MAX)), "at most 65536"),
        ("60,000 tensors", gguf(|f| f.num_tensors = Some(60_000)), "but only"),
        ("2^63 keys", gguf(|f| f.num_keys = Some(1 << 63)), "at most 65536"),
        ("60,000 keys", gguf(|f| f.num_keys = Some(60_000)), "but only"),
        ("a key too many", gguf(|f| f.num_keys = Some(6)), "cut off"),
        ("an empty key", gguf(|f| f.key("", Meta::U32(0))), "0 bytes"),
        ("a key that steers", gguf(|f| f.key("\u{1b}[31m", Meta::U32(0))), "printable"),
        ("a key of 2,000 bytes", gguf(|f| f.key(&"k".repeat(2000), Meta::U32(0))), "2000 bytes"),
        ("a key twice", gguf(|f| f.key("qwen3moe.expert_count", Meta::U32(2))), "appears twice"),
        ("a key of no text", gguf(|f| f.metadata.push((b"\xff".to_vec(), Meta::U32(0)))), "not UTF-8"),
        ("an unknown type of value", gguf(|f| f.key("a", Meta::Raw(13, vec![0; 8]))), "unknown type 13"),
        ("a truth of 2", gguf(|f| f.key("a", Meta::Raw(7, vec![2]))), "truth value of 2"),
        ("a text of 2^64 - 1 bytes", gguf(|f| f.key("a", length(u64::MAX))), "takes 18446744073709551615 bytes"),
        ("a text of 2^40 bytes", gguf(|f| f.key("a", length(1 << 40))), "takes 1099511627776 bytes"),
        ("a list of 2^63", gguf(|f| f.key("a", list(4, 1 << 63, &[]))), "9223372036854775808 entries"),
        ("a list of 60 million", gguf(|f| f.key("a", list(0, 60_000_000, &[]))), "but only"),
        ("lists of 2^64 - 1 lists", gguf(|f| f.key("a", list(9, u64::MAX, &[]))), "18446744073709551615 entries"),
        ("depth", gguf(|f| f.key("a", nested(1000))), "more than 4 deep"),
        ("an alignment of zero", gguf(|f| f.key("general.alignment", Meta::U32(0))), "general.alignment is 0"),
        ("an alignment of 3", gguf(|f| f.key("general.alignment", Meta::U32(3))), "general.alignment is 3"),
        ("an alignment of 2^63", gguf(|f| f.key("general.alignment", Meta::U64(1 << 63))), "general.alignment"),
        ("a tensor without a name", gguf(|f| f.tensors[0].name.clear()), "a tensor's name"),
        ("a tensor that steers", gguf(|f| f.tensors[0].name = b"\x1b[2J".to_vec()), "printable"),
        ("a tensor twice", gguf(|f| f.tensors[1].name = f.tensors[2].name.clone()), "appears twice"),
        ("five axes", gguf(|f| f.tensors[0].shape = vec![1; 5]), "5 dimensions"),
        ("an axis of zero", gguf(|f| f.tensors[1].shape[1] = 0), "axis 1 is empty"),
        ("an axis of 2^41", gguf(|f| f.tensors[0].shape = vec![1 << 41, 1]), "more than can be addressed"),
        ("axes that overflow", gguf(|f| f.tensors[1].shape = vec![1 << 40, 1 << 40, 32]), "more than can be addressed"),
        ("half a block", gguf(|f| f.tensors[1].shape = vec![2, 32, 31]), "packs 32"),
        ("a block of another type", gguf(|f| f.tensors[1].kind = Q4_K), "packs 256"),
        ("larger than its place", gguf(|f| f.tensors[1].shape[0] = 3), "inside tensor"),
        ("smaller than its place", gguf(|f| f.tensors[1].shape[0] = 1), "after tensor"),
        ("unaligned", gguf(|f| f.tensors[1].offset = Some(257)), "no multiple of 32"),
        ("two in one place", gguf(|f| f.tensors[1].offset = Some(0)), "inside tensor"),
        ("beyond the file", gguf(|f| f.tensors[3].offset = Some(1 << 40)), "cut off"),
        ("beyond any file", gguf(|f| f.tensors[3].offset = Some(u64::MAX - 31)), "more than any file has"),
        ("an unknown type of tensor", gguf(|f| f.tensors[3].kind = 12_345), "12345"),
        ("cut off in the header", whole[..100].to_vec(), "cut off"),
        ("cut off in the data", whole[..whole.len() - 64].to_vec(), "cut off"),
        ("something behind it", [&whole[..], &[0; 64]].concat(), "followed by something else"),
        ("a part of many", gguf(|f| f.key("split.count", Meta::U32(65_535))), "split.no"),
        ("no architecture", gguf(|f| f.remove("general.architecture")), "general.architecture"),
        ("an unknown architecture", gguf(|f| f.set("general.architecture", Meta::text("\u{1b}[2J"))), "architecture"),
        ("experts by the million", gguf(|f| f.set("qwen3moe.expert_count", Meta::U32(1 << 20))), "num_experts"),
        ("experts that are a list", gguf(|f| f.set("qwen3moe.expert_count", Meta::u32s(&[2]))), "list"),
        ("no width", gguf(|f| f.remove("qwen3moe.embedding_length")), "embedding_length"),
        ("a width that is NaN", gguf(|f| f.set("qwen3moe.embedding_length", Meta::F32(f32::NAN))), "NaN"),
        ("a router of f16 blocks", gguf(|f| f.tensors[0].kind = F16), "after tensor"),
        (
            "4,000 texts of a kilobyte",
            gguf(|f| (0..4000).for_each(|n| f.key(&n.to_string(), Meta::Raw(8, string(&[b'\xff'; 1000]))))),
            "not UTF-8",
        ),
    ]
}

fn families() -> Cases {
    let line = |extra: &str| [FAMILY.as_bytes(), extra.as_bytes()].concat();
    let dotted = |count: usize| line(&format!("\n[x]\n{}a = 1\n", "a.".repeat(count)));
    vec![
        ("empty", Vec::new(), "missing field"),
        ("not UTF-8", b"name = \"\xff\"".to_vec(), "not UTF-8"),
        ("no TOML", b"{\"name\": 1}".to_vec(), "line 1"),
        ("256 KiB and a byte", [FAMILY.as_bytes(), &vec![b' '; 256 << 10]].concat(), "more than 262144 bytes"),
        ("no name", family("name = \"acme\"", ""), "missing field `name`"),
        ("a name that is a number", family("\"acme\"", "1"), "line 1"),
        ("a name twice", family("name = \"acme\"", "name = \"a\"\nname = \"b\""), "line 2"),
        ("no sizes", family("[sizes]", "[size]"), "unknown field `size`"),
        ("an unknown key", line("\n[more]\na = 1\n"), "unknown field `more`"),
        ("an unknown key that steers", line("\n[\"\\u001b[31m\"]\na = 1\n"), "unknown field"),
        ("an unknown key of a kilobyte", line(&format!("\n[{}]\na = 1\n", "k".repeat(9000))), "left out"),
        ("lists in lists", line(&format!("\nx = {}", "[".repeat(100_000))), "line"),
        ("tables in tables", line(&format!("\nx = {}", "{a=".repeat(50_000))), "line"),
        ("keys within keys", dotted(100), "recursion limit"),
        ("100,000 keys within keys", dotted(100_000), "recursion limit"),
        ("a header of 100,000 keys", line(&format!("\n[{}a]\n", "a.".repeat(100_000))), "recursion limit"),
        ("60,000 tables", line(&"[[x]]\n".repeat(40_000)), "unknown field `x`"),
        ("top_k of a negative number", family("top_k = 2", "top_k = -2"), "line"),
        ("top_k of 2^40", family("top_k = 2", "top_k = 1099511627776"), "line"),
        ("top_k in words", family("top_k = 2", "top_k = \"two\""), "line"),
        ("top_k of NaN", family("top_k = 2", "top_k = nan"), "line"),
        ("top_k by two rules", family("top_k = 2", "top_k = { from = \"k\", value = 2 }"), "exactly one of"),
        ("top_k by no rule", family("top_k = 2", "top_k = {}"), "exactly one of"),
        ("top_k from no key", family("top_k = 2", "top_k = { from = [] }"), "the list is empty"),
        ("top_k from an empty key", family("top_k = 2", "top_k = { from = \"\" }"), "is not a key"),
        ("top_k from half an index", family("top_k = 2", "top_k = { from = \"k[\" }"), "is not a key"),
        (
            "top_k from an index of 2^64",
            family("top_k = 2", "top_k = { from = \"k[18446744073709551616]\" }"),
            "is not a key",
        ),
        (
            "top_k of an if without else",
            family("top_k = 2", "top_k = { if_layer_below = 1, then = 2 }"),
            "then and else",
        ),
        ("arithmetic with a text", family("top_k = 2", "top_k = { value = \"2\", times = 2 }"), "not a number"),
        ("unknown scores", family("\"softmax\"", "\"hardmax\""), "unknown variant `hardmax`"),
        ("no layout", family("[tensors.hub]", "[tensor.hub]"), "tensor"),
        ("an unknown tensor", family("router =", "routers ="), "unknown field `routers`"),
        ("no router", family("router = \"gate.weight\"", ""), "must name router"),
        ("a prefix with another brace", family("{layer}.", "{layer}{x}."), "no other braces"),
        ("a name without an end of its brace", family("experts.{expert}.w1", "experts.{expert.w1"), "no other braces"),
        ("half", FAMILY.as_bytes()[..300].to_vec(), "line"),
    ]
}

fn tunings(context: &Context) -> Cases {
    let sound = || sound_tuning(context);
    vec![
        ("empty", Vec::new(), "damaged"),
        ("a list", b"[]".to_vec(), "damaged"),
        ("depth", b"[".repeat(100_000), "damaged"),
        (
            "a megabyte and more",
            [sound().to_string().into_bytes(), vec![b' '; 1 << 20]].concat(),
            "more than 1048576 bytes",
        ),
        ("no schema", without(sound(), "", "schema"), "missing field `schema`"),
        ("another schema", with(sound(), "/schema", json!(7)), "the schema is 7"),
        ("a schema of 2^40", with(sound(), "/schema", json!(1u64 << 40)), "damaged"),
        ("no device", without(sound(), "", "device"), "missing field `device`"),
        ("another device", with(sound(), "/device/name", json!("\u{1b}[31m")), "the adapter is"),
        ("a date that steers", with(sound(), "/date", json!("\u{1b}[2J2026")), "the date is"),
        ("entries that are an object", with(sound(), "/entries", json!({})), "damaged"),
        ("an entry that is null", with(sound(), "/entries", json!([null])), "damaged"),
        ("a field more", changed(sound(), |v| v["more"] = json!(1)), "unknown field"),
        ("a tile of zero", with(sound(), "/entries/0/chosen/choice/tile_m", json!(0)), "not possible here"),
        (
            "tiles of 2^32 - 4",
            with(
                sound(),
                "/entries/0/chosen/choice",
                json!({"kind": "tiled", "tile_m": u32::MAX - 3, "tile_n": u32::MAX - 3}),
            ),
            "not possible here",
        ),
        (
            "a class of 2^32 - 1 rows",
            with(sound(), "/entries/0/shape/rows_per_expert", json!(u32::MAX)),
            "power of two",
        ),
        ("no time", with(sound(), "/entries/0/chosen/median_s", json!(0)), "above zero"),
        ("one class twice", changed(sound(), |v| v["entries"] = json!([v["entries"][0], v["entries"][0]])), "2 for 1"),
        ("a text of half a megabyte", with(sound(), "/entries/0/weights", json!("f".repeat(1 << 19))), "damaged"),
    ]
}

fn results() -> Cases {
    let row = |key: &str, value: Value| with(sound_results(), &format!("/rows/0/{key}"), value);
    let text = sound_results().to_string();
    vec![
        ("empty", Vec::new(), "the file is no JSON"),
        ("half", text.as_bytes()[..200].to_vec(), "the file is no JSON"),
        ("a list", b"[]".to_vec(), "its schema is missing"),
        ("a number", b"1".to_vec(), "its schema is missing"),
        ("not UTF-8", b"{\"\xff\":1}".to_vec(), "the file is no JSON"),
        ("depth", b"[".repeat(100_000), "the file is no JSON"),
        ("16 MiB and more", [text.clone().into_bytes(), vec![b' '; 16 << 20]].concat(), "more than 16777216 bytes"),
        ("no schema", without(sound_results(), "", "schema"), "its schema is missing"),
        ("schema 0", with(sound_results(), "/schema", json!(0)), "its schema is 0"),
        ("schema 3", with(sound_results(), "/schema", json!(3)), "its schema is 3"),
        ("schema -1", with(sound_results(), "/schema", json!(-1)), "its schema is -1"),
        ("schema 1.5", with(sound_results(), "/schema", json!(1.5)), "its schema is 1.5"),
        ("schema 2^64", text.replacen("\"schema\":1", "\"schema\":18446744073709551616", 1).into(), "its schema is"),
        ("a schema of lists", with(sound_results(), "/schema", json!(vec![vec![0]; 1 << 20])), "its schema is [[0],"),
        ("a schema twice", text.replacen('{', "{\"schema\":1,", 1).into_bytes(), "its "),
        ("no device", without(sound_results(), "", "device"), "missing field `device`"),
        ("a device in words", with(sound_results(), "/device", json!("\u{1b}[2J")), "its content is"),
        ("no rows", without(sound_results(), "", "rows"), "missing field `rows`"),
        ("rows that are an object", with(sound_results(), "/rows", json!({})), "its content is"),
        ("a row that is null", with(sound_results(), "/rows/0", Value::Null), "its content is"),
        ("tokens in words", row("tokens", json!("five")), "five"),
        ("2^40 tokens", row("tokens", json!(1u64 << 40)), "its content is"),
        ("an unknown format", row("weights", json!("f17")), "f17"),
        ("a format of a megabyte", row("weights", json!("f".repeat(1 << 20))), "left out"),
        ("no time", row("median_s", json!(0.0)), "expected above 0"),
        ("a negative time", row("median_s", json!(-1.0)), "is -1"),
        (
            "a time beyond any",
            text.replacen("\"median_s\":0.0", "\"median_s\":1e999,\"x\":0.0", 1).into(),
            "number out of range",
        ),
    ]
}

fn traces() -> Cases {
    let layer = |key: &str, value: Value| with(sound_trace(), &format!("/layers/0/{key}"), value);
    let text = sound_trace().to_string();
    let raw = |experts: &str| {
        format!(r#"{{"schema":1,"source":"","layers":[{{"layer":0,"num_experts":4,"top_k":2,"experts":{experts}}}]}}"#)
            .into_bytes()
    };
    vec![
        ("empty", Vec::new(), "damaged"),
        ("half", text.as_bytes()[..text.len() / 2].to_vec(), "damaged"),
        ("something behind it", format!("{text} x").into_bytes(), "damaged"),
        ("not UTF-8", b"{\"\xff\":1}".to_vec(), "damaged"),
        ("depth", b"[".repeat(100_000), "damaged"),
        ("depth of experts", raw(&"[".repeat(100_000)), "damaged"),
        ("another schema", with(sound_trace(), "/schema", json!(2)), "the schema is 2, expected 1"),
        ("a field more", changed(sound_trace(), |v| v["more"] = json!(1)), "unknown field"),
        ("no layers", with(sound_trace(), "/layers", json!([])), "the number of layers with tokens is 0"),
        ("a layer twice", with(sound_trace(), "/layers/1/layer", json!(3)), "there twice"),
        (
            "5,000 layers",
            with(sound_trace(), "/layers", json!(vec![sound_trace()["layers"][0].clone(); 5000])),
            "more than 4096",
        ),
        ("labels of another number", with(sound_trace(), "/labels", json!(["a"])), "the number of labels is 1"),
        ("labels that are numbers", with(sound_trace(), "/labels", json!([1, 2])), "damaged"),
        (
            "two million labels and more",
            format!(r#"{{"schema":1,"source":"","labels":[{}""],"layers":[]}}"#, "\"\",".repeat(1 << 21)).into(),
            "more than 2097152 entries",
        ),
        ("no experts", layer("num_experts", json!(0)), "num_experts of layer 3 is 0"),
        ("2^32 - 1 experts", layer("num_experts", json!(u32::MAX)), "num_experts of layer 3 is 4294967295"),
        ("no choice", layer("top_k", json!(0)), "which is top_k"),
        ("2^32 - 1 choices", layer("top_k", json!(u32::MAX)), "which is top_k"),
        (
            "an expert beyond the last",
            layer("experts", json!([[0, 4], [3, -1]])),
            "an expert of token 0 of layer 3 is 4",
        ),
        ("an expert of -2", layer("experts", json!([[0, 1], [3, -2]])), "token 1 of layer 3 is -2"),
        ("an expert of 2^31", layer("experts", json!([[0, 1u64 << 31], [3, -1]])), "damaged"),
        ("an expert of i32's least", layer("experts", json!([[0, i32::MIN], [3, -1]])), "is -2147483648"),
        ("an expert twice", layer("experts", json!([[1, 1], [3, -1]])), "1 twice"),
        ("half an expert", layer("experts", json!([[0, 0.5], [3, -1]])), "damaged"),
        ("rows of two widths", layer("experts", json!([[0, 1], [3]])), "token 1 of layer 3 is 1, expected 2"),
        ("rows without anything", raw("[[],[]]"), "token 0 of layer 0 is 0, expected 2"),
        ("no rows but numbers", layer("experts", json!([0, 1, 3, -1])), "damaged"),
        ("a row of a million", raw(&format!("[[{}0]]", "0,".repeat(1 << 20))), "more than 1024 experts"),
        (
            "a million rows of one",
            raw(&format!("[{}[0]]", "[0],".repeat(1 << 20))),
            "token 0 of layer 0 is 1, expected 2",
        ),
        (
            "a million rows of two and one of three",
            raw(&format!("[{}[0,1,2]]", "[0,1],".repeat(1 << 20))),
            "token 1048576 of layer 0 is 3",
        ),
        ("weights of another shape", layer("weights", json!([[0.5], [1.0]])), "the number of weights of token 0"),
        ("weights of fewer tokens", layer("weights", json!([[0.5, 0.5]])), "the weights of layer 3 is 2"),
        ("a weight beyond f32", layer("weights", json!([[0.5, 1e99], [1.0, 0.0]])), "a weight of token 0"),
        ("a source that is a list", with(sound_trace(), "/source", json!([])), "damaged"),
    ]
}

fn golden_files() -> Cases {
    let entry = |name: &'static str, key: &'static str, value: Value| golden(move |m| m.entry(name)[key] = value);
    let experts = |values: [i64; 3]| {
        golden(|m| {
            let start = m.entry("io.topk_indices")["data_offsets"][0].as_u64().expect("a number") as usize;
            m.data[start..start + 24].copy_from_slice(&values.map(i64::to_le_bytes).concat());
        })
    };
    vec![
        ("no input", model(|_| ()), "no tensor \"io.hidden_states\""),
        ("an input of another width", entry("io.hidden_states", "shape", json!([8, 3])), "hidden_size = 8"),
        ("an input without axes", entry("io.hidden_states", "shape", json!([])), "expected"),
        ("an input of integers", entry("io.hidden_states", "dtype", json!("I32")), "type I32"),
        ("an output of another shape", entry("io.output", "shape", json!([8, 3])), "expected shape [3, 8]"),
        ("choices of another shape", entry("io.topk_indices", "shape", json!([1, 3])), "expected shape [3, 1]"),
        ("choices that are floats", entry("io.topk_indices", "dtype", json!("F64")), "I32 or I64"),
        ("a choice beyond the last", experts([0, 2, 0]), "element 1 is 2"),
        ("a choice of -2", experts([0, 0, -2]), "element 2 is -2"),
        ("a choice of i64's least", experts([i64::MIN, 0, 0]), "element 0 is"),
        ("weights of another shape", entry("io.topk_weights", "shape", json!([3])), "expected shape [3, 1]"),
        ("ids of another number", golden(|m| m.tensor("io.input_ids", "I64", &[1], &[0; 8])), "3 ids"),
        ("an id below zero", golden(|m| m.tensor("io.input_ids", "I64", &[3], &[255; 24])), "not -1"),
        ("two losses", golden(|m| m.f32("aux.router_z_loss", &[2])), "one number"),
        ("a loss of no numbers", golden(|m| m.f32("aux.load_balancing_loss", &[0])), "one number"),
        (
            "a layer's number in words",
            golden(|m| m.metadata = Some(json!({"layer_idx": "\u{1b}[31m"}))),
            "metadata layer_idx",
        ),
        ("a layer beyond u32", golden(|m| m.metadata = Some(json!({"layer_idx": "4294967296"}))), "metadata layer_idx"),
        (
            "NaN in the input",
            golden(|m| {
                let start = m.entry("io.hidden_states")["data_offsets"][0].as_u64().expect("a number") as usize;
                m.data[start..start + 4].copy_from_slice(&f32::NAN.to_le_bytes());
            }),
            "NaN at element 0",
        ),
    ]
}

fn devices() -> Cases {
    let sound = sound_device;
    vec![
        ("empty", Vec::new(), "damaged"),
        ("a list", b"[1]".to_vec(), "damaged"),
        ("depth", b"[".repeat(100_000), "damaged"),
        ("not UTF-8", b"{\"\xff\":1}".to_vec(), "no text"),
        ("a megabyte and more", [sound().to_string().into_bytes(), vec![b' '; 1 << 20]].concat(), "more than 1048576"),
        ("another schema", with(sound(), "/schema", json!(9)), "schema 9"),
        ("a field more", changed(sound(), |v| v["\u{1b}[31m"] = json!(1)), "unknown field"),
        ("a rate of zero", with(sound(), "/rates/memory", json!(0.0)), "rates.memory is 0"),
        ("a negative rate", with(sound(), "/rates/gflops", json!(-1.0)), "rates.gflops is -1"),
        ("a dispatch of an hour", with(sound(), "/dispatch_s", json!(3600.0)), "dispatch_s"),
        ("limits in words", with(sound(), "/limits/max_buffer", json!("all")), "damaged"),
        ("a limit below zero", with(sound(), "/limits/max_buffer", json!(-1)), "damaged"),
        ("half a megabyte of words", with(sound(), "/limits/max_buffer", json!("b".repeat(1 << 19))), "left out"),
    ]
}

fn device_tomls() -> Cases {
    let text = |from: &str, to: &str| DEVICE_TOML.replace(from, to).into_bytes();
    vec![
        ("empty", Vec::new(), "damaged"),
        ("another schema", text("schema = 1", "schema = 2"), "schema 2"),
        ("half a number", text("268435456", "0.5"), "damaged"),
        ("100,000 keys within keys", format!("{}a = 1\n{DEVICE_TOML}", "a.".repeat(100_000)).into(), "damaged"),
        ("a key that steers", format!("\"\\u001b[31m\" = 1\n{DEVICE_TOML}").into(), "damaged"),
    ]
}

// ---- the tests

/// The GPU's context; where there is none the cases of tunings are left out, which only a device can read.
fn devices_and_cases() -> (Option<Context>, Context, Vec<Case>) {
    let gpu = support::gpu_context();
    let context = gpu.clone().unwrap_or_else(Context::cpu);
    let cases = cases(&context);
    (gpu, context, cases)
}

/// One test, as memory is counted for the whole process.
#[test]
fn every_file_is_refused_for_its_reason_and_takes_little_memory() {
    let (gpu, context, cases) = devices_and_cases();
    let readable = |reader: Reader| reader != Reader::Tuning || gpu.is_some();
    let mut wrong = Vec::new();
    let mut sound_readers = BTreeSet::new();
    for (reader, bytes) in sound(&context).into_iter().filter(|(reader, _)| readable(*reader)) {
        let folder = tempfile::tempdir().expect("a folder");
        if let Err(error) = reader.read(folder.path(), &bytes, &context) {
            wrong.push(format!("the sound one of {reader:?} is refused: {error}"));
        }
        sound_readers.insert(reader);
    }
    let mut most: BTreeMap<Reader, (usize, &str)> = BTreeMap::new();
    for Case(name, reader, bytes, words) in cases.iter().filter(|case| readable(case.1)) {
        assert!(sound_readers.contains(reader), "{reader:?} has a sound file");
        let folder = tempfile::tempdir().expect("a folder");
        let (result, taken) = measured(|| reader.read(folder.path(), bytes, &context));
        let allowed = (64 << 20) + 2 * bytes.len();
        if taken > allowed {
            wrong.push(format!("{reader:?}, {name}: {taken} bytes for a file of {}", bytes.len()));
        }
        let worst = most.entry(*reader).or_default();
        *worst = (*worst).max((taken, name));
        let Err(error) = result else {
            wrong.push(format!("{reader:?}, {name}: accepted"));
            continue;
        };
        let message = error.to_string();
        if !message.contains(words) {
            wrong.push(format!("{reader:?}, {name}: {words:?} is not in: {}", &message[..message.len().min(600)]));
        }
        let printable = message.chars().all(|c| c == '\n' || !c.is_control());
        if message.len() > 8000 || !printable {
            wrong.push(format!("{reader:?}, {name}: {} bytes, printable: {printable}", message.len()));
        }
        let root = folder.path().to_string_lossy();
        let names_file = message.contains(&*root) || matches!(error, Error::InvalidConfig { .. });
        if !names_file && !words.starts_with("model_type") && !message.starts_with("model_type") {
            wrong.push(format!("{reader:?}, {name}: no file is named: {message}"));
        }
    }
    for (reader, (bytes, name)) in most {
        println!("{reader:?}: at most {:.1} MiB, by {name:?}", bytes as f64 / f64::from(1 << 20));
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
    let (kept, taken) = measured(|| vec![0u8; 1 << 20]);
    assert!(taken >= kept.len() && taken < 3 * kept.len(), "memory is counted: {taken}");
    println!("{} hostile files", cases.len());

    // What a tuning is refused for where there is no device that it could be of.
    let folder = tempfile::tempdir().expect("a folder");
    let refused = Reader::Tuning.read(folder.path(), b"{}", &Context::cpu());
    assert!(matches!(refused, Err(Error::Unsupported { .. })), "{refused:?}");

    assert!(cases.len() >= 120, "{} cases", cases.len());
    let distinct: BTreeSet<(Reader, &[u8])> = cases.iter().map(|case| (case.1, case.2.as_slice())).collect();
    assert_eq!(distinct.len(), cases.len(), "no file is there twice");
    let names: BTreeSet<(Reader, &str)> = cases.iter().map(|case| (case.1, case.0)).collect();
    assert_eq!(names.len(), cases.len(), "no name is there twice");
}
