//! Checkpoints as they are published, and files made to break a reader: each of those ends in a typed error.

use half::{bf16, f16};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use wgmoe::model::checkpoint::{read_tensor, write_tensor};
use wgmoe::{Checkpoint, Error, Family};

const H: usize = 6;
const I: usize = 4;
const E: usize = 3;

/// Name, type, shape and bytes.
type Tensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// Values that f16 and bf16 hold exactly and that differ from tensor to tensor.
fn values(name: &str, count: usize) -> Vec<f32> {
    let seed = name.bytes().map(usize::from).sum::<usize>();
    (0..count).map(|n| ((n * 7 + seed) % 61) as f32 / 32.0 - 1.0).collect()
}

fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> Tensor {
    let values = values(name, shape.iter().product());
    let bytes = match dtype {
        Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        Dtype::F64 => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&v| v.to_le_bytes()).collect(),
    };
    (name.to_owned(), dtype, shape.to_vec(), bytes)
}

/// The MoE block of one layer as qwen3_moe publishes it.
fn qwen_layer(layer: u32, dtype: Dtype) -> Vec<Tensor> {
    let prefix = format!("model.layers.{layer}.mlp.");
    let mut tensors = vec![tensor(&format!("{prefix}gate.weight"), dtype, &[E, H])];
    for e in 0..E {
        for (name, shape) in [("gate_proj", [I, H]), ("up_proj", [I, H]), ("down_proj", [H, I])] {
            tensors.push(tensor(&format!("{prefix}experts.{e}.{name}.weight"), dtype, &shape));
        }
    }
    tensors
}

fn save(path: &Path, tensors: &[Tensor], metadata: Option<HashMap<String, String>>) {
    let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("consistent tensor"))
    });
    fs::write(path, safetensors::serialize(views, metadata).expect("serializable")).expect("writable");
}

fn qwen_config() -> Value {
    json!({"model_type": "qwen3_moe", "hidden_size": H, "intermediate_size": 99, "moe_intermediate_size": I,
        "num_experts": E, "num_experts_per_tok": 2, "norm_topk_prob": true, "hidden_act": "silu"})
}

/// Two layers over two shards, cut in the middle of layer 1, and another tensor beside the blocks.
fn sharded(dtype: Dtype) -> TempDir {
    let folder = TempDir::new().expect("temporary folder");
    let mut tensors = qwen_layer(0, dtype);
    tensors.push(tensor("model.layers.1.self_attn.q_proj.weight", dtype, &[H, H]));
    tensors.extend(qwen_layer(1, dtype));
    let (first, second) = tensors.split_at(E * 3 + 5);
    let mut weight_map = serde_json::Map::new();
    for (name, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
        save(&folder.path().join(name), tensors, None);
        weight_map.extend(tensors.iter().map(|tensor| (tensor.0.clone(), json!(name))));
    }
    write_json(&index(&folder), &json!({"metadata": {"total_size": 1}, "weight_map": weight_map}));
    write_json(&folder.path().join("config.json"), &qwen_config());
    folder
}

/// One file with the layer 0 that `change` leaves.
fn single(change: impl FnOnce(&mut Vec<Tensor>)) -> TempDir {
    let folder = TempDir::new().expect("temporary folder");
    let mut tensors = qwen_layer(0, Dtype::F32);
    change(&mut tensors);
    save(&model(&folder), &tensors, None);
    write_json(&folder.path().join("config.json"), &qwen_config());
    folder
}

fn index(folder: &TempDir) -> PathBuf {
    folder.path().join("model.safetensors.index.json")
}

fn model(folder: &TempDir) -> PathBuf {
    folder.path().join("model.safetensors")
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, value.to_string()).expect("writable");
}

fn load_error(path: &Path, layer: u32) -> Error {
    Checkpoint::open(path).and_then(|checkpoint| checkpoint.load_layer(None, layer)).expect_err("this must not load")
}

/// A file with this header and as many zero bytes as given.
fn raw_file(header: &str, data_bytes: usize) -> TempDir {
    let folder = TempDir::new().expect("temporary folder");
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 0);
    fs::write(model(&folder), bytes).expect("writable");
    folder
}

#[track_caller]
fn assert_bad_file(header: &str, data_bytes: usize, expected: &str) {
    let folder = raw_file(header, data_bytes);
    let error = Checkpoint::open(&model(&folder)).expect_err("a hostile header");
    assert!(matches!(error, Error::BadFile { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains(expected) && message.contains("model.safetensors"), "{message}");
}

#[test]
fn a_layer_is_found_across_shards_in_every_float_type() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16, Dtype::F64] {
        let folder = sharded(dtype);
        for path in [folder.path().to_owned(), index(&folder)] {
            let checkpoint = Checkpoint::open(&path).expect("sound");
            let layer = checkpoint.load_layer(None, 1).expect("sound");
            assert_eq!((layer.family.as_str(), layer.layout.as_str()), ("qwen3_moe", "hub"));
            assert_eq!(layer.prefix, "model.layers.1.mlp.");
            assert_eq!(layer.stored_as, [dtype.to_string()]);
            assert_eq!((layer.config.intermediate_size(), layer.config.top_k()), (I as u32, 2));
            assert!(layer.config.routing().renormalize.is_some());
            assert_eq!(layer.weights.router, values("model.layers.1.mlp.gate.weight", E * H));
            let of = |projection| {
                let name = |e| format!("model.layers.1.mlp.experts.{e}.{projection}.weight");
                (0..E).flat_map(|e| values(&name(e), I * H)).collect::<Vec<f32>>()
            };
            assert_eq!(layer.weights.gate_proj, of("gate_proj"));
            assert_eq!(layer.weights.up_proj, of("up_proj"));
            assert_eq!(layer.weights.down_proj, of("down_proj"));
        }
    }
}

#[test]
fn only_the_shards_of_the_layer_need_to_be_there() {
    let folder = sharded(Dtype::BF16);
    fs::remove_file(folder.path().join("b.safetensors")).expect("removable");
    Checkpoint::open(folder.path()).expect("sound").load_layer(None, 0).expect("layer 0 is in shard a");
    let error = load_error(folder.path(), 1);
    assert!(matches!(&error, Error::Io { path, .. } if path.ends_with("b.safetensors")), "{error}");
}

#[test]
fn both_layouts_hold_the_same_layer() {
    let hub = single(|_| ());
    let expected = Checkpoint::open(hub.path()).expect("sound").load_layer(None, 0).expect("sound");
    let module = single(|tensors| {
        let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let weights = &expected.weights;
        let halves = weights.gate_proj.chunks(I * H).zip(weights.up_proj.chunks(I * H));
        let gate_up = halves.flat_map(|(gate, up)| [f32s(gate), f32s(up)].concat()).collect();
        let name = |name| format!("model.layers.0.mlp.experts.{name}");
        tensors.truncate(1);
        tensors.push((name("gate_up_proj"), Dtype::F32, vec![E, 2 * I, H], gate_up));
        tensors.push((name("down_proj"), Dtype::F32, vec![E, H, I], f32s(&weights.down_proj)));
    });
    let found = Checkpoint::open(module.path()).expect("sound").load_layer(None, 0).expect("sound");
    assert_eq!(found.layout, "module");
    assert_eq!((found.config, found.weights), (expected.config, expected.weights));
}

#[test]
fn a_missing_layer_and_a_missing_tensor_are_named() {
    let error = load_error(single(|_| ()).path(), 7);
    assert!(
        matches!(&error, Error::MissingTensor { tensor, hint, .. }
        if tensor == "model.layers.7.mlp.gate.weight" && hint.contains("10 tensor(s)")),
        "{error}"
    );
    let folder = single(|tensors| tensors.retain(|t| !t.0.contains("experts.2.up_proj")));
    let error = load_error(folder.path(), 0);
    assert!(
        matches!(&error, Error::MissingTensor { tensor, .. } if tensor == "model.layers.0.mlp.experts.2.up_proj.weight"),
        "{error}"
    );
}

#[test]
fn a_tensor_that_the_index_promises_must_be_in_its_shard() {
    let folder = sharded(Dtype::F32);
    save(&folder.path().join("b.safetensors"), &[], None);
    let error = load_error(folder.path(), 1);
    assert!(matches!(&error, Error::MissingTensor { path, .. } if path.ends_with("b.safetensors")), "{error}");
}

#[test]
fn a_misshapen_tensor_says_found_and_expected() {
    let folder = single(|tensors| tensors[3] = tensor(&tensors[3].0.clone(), Dtype::F32, &[H, I + 1]));
    let error = load_error(folder.path(), 0);
    assert!(
        matches!(&error, Error::BadTensor { tensor, found, expected, .. }
        if tensor.ends_with("experts.0.down_proj.weight") && found == "F32 [6, 5]" && expected == "shape [6, 4]"),
        "{error}"
    );
}

#[test]
fn types_that_are_not_read_are_unsupported() {
    let folder = single(|tensors| {
        let (name, _, shape, _) = tensors[1].clone();
        let bytes = vec![0; shape.iter().product()];
        tensors[1] = (name, Dtype::F8_E4M3, shape, bytes);
    });
    let error = load_error(folder.path(), 0);
    let message = error.to_string();
    assert!(matches!(error, Error::Unsupported { .. }), "{message}");
    for part in ["F8_E4M3", "experts.0.gate_proj.weight", "model.safetensors", "F32, F16, BF16 and F64"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn tensors_that_the_family_does_not_know_are_not_ignored() {
    let extra = "model.layers.0.mlp.shared_expert.up_proj.weight";
    let folder = single(|tensors| tensors.push(tensor(extra, Dtype::F32, &[I, H])));
    let error = load_error(folder.path(), 0);
    assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains(extra)), "{error}");
    // A configuration with fewer experts than the file has.
    let folder = single(|_| ());
    let mut config = qwen_config();
    config["num_experts"] = json!(2);
    write_json(&folder.path().join("config.json"), &config);
    assert!(matches!(load_error(folder.path(), 0), Error::Unsupported { .. }));
}

#[test]
fn nan_in_a_weight_is_found() {
    let folder = single(|tensors| tensors[2].3[8..12].copy_from_slice(&f32::NAN.to_le_bytes()));
    let error = load_error(folder.path(), 0);
    assert!(
        matches!(&error, Error::NonFinite { tensor, index: 2, .. } if tensor.contains("experts.0.up_proj")),
        "{error}"
    );
}

#[test]
fn a_file_that_is_cut_off_or_too_long_is_refused() {
    let folder = single(|_| ());
    let whole = fs::read(model(&folder)).expect("readable");
    for length in [0, 7, 8, 9, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(model(&folder), &whole[..length]).expect("writable");
        let error = load_error(folder.path(), 0);
        assert!(matches!(error, Error::BadFile { .. }), "{length} bytes: {error}");
    }
    fs::write(model(&folder), [&whole[..], b"x"].concat()).expect("writable");
    let message = load_error(folder.path(), 0).to_string();
    assert!(message.contains("followed by something else"), "{message}");
}

#[test]
fn hostile_headers_are_refused() {
    let f32_at = |shape: &str, start: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{start},{end}]}}"#)
    };
    let one = f32_at("[1]", 0, 4);
    assert_bad_file(&format!(r#"{{"a":{one},"a":{one}}}"#), 4, r#"tensor "a" appears twice"#);
    assert_bad_file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "__metadata__ appears twice");
    assert_bad_file(r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, r#""k" appears twice"#);
    assert_bad_file(&format!(r#"{{"a":{},"b":{one}}}"#, f32_at("[1]", 0, 4)), 8, "lies at 0..4, expected 4..8");
    assert_bad_file(&format!(r#"{{"a":{}}}"#, f32_at("[1]", 4, 8)), 8, "lies at 4..8, expected 0..4");
    assert_bad_file(&format!(r#"{{"a":{}}}"#, f32_at("[1]", 4, 0)), 8, "lies at 4..0");
    assert_bad_file(&format!(r#"{{"a":{}}}"#, f32_at("[2]", 0, 4)), 4, "8 bytes");
    assert_bad_file(
        &format!(r#"{{"a":{}}}"#, f32_at("[4294967296, 4294967296]", 0, 4)),
        4,
        "more than can be addressed",
    );
    assert_bad_file(
        &format!(r#"{{"a":{}}}"#, f32_at("[0, 18446744073709551615]", 0, 0)),
        0,
        "more than can be addressed",
    );
    assert_bad_file(&format!(r#"{{"a":{}}}"#, f32_at("[1099511627776]", 0, 4398046511104)), 4, "cut off");
    assert_bad_file(&format!(r#"{{"a":{}}}"#, f32_at("[1,1,1,1,1,1,1,1,1]", 0, 4)), 4, "9 dimensions");
    assert_bad_file(
        &one.replace("F32", "F33").replace('{', r#"{"a":{"#).replace('}', "}}"),
        4,
        r#"unknown type "F33""#,
    );
    assert_bad_file(r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#, 1, "whole bytes");
    assert_bad_file(r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "not usable");
    assert_bad_file(r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#, 4, "not usable");
    assert_bad_file(&format!(r#"{{"a\u0000b":{one}}}"#), 4, "printable");
    assert_bad_file(&format!(r#"{{"":{one}}}"#), 4, "printable");
    assert_bad_file(&format!(r#"{{"{}":{one}}}"#, "n".repeat(257)), 4, "257 bytes");
    assert_bad_file(&"[".repeat(1000), 0, "not usable");
    assert_bad_file(&format!(r#"{{"a":{}}}"#, r#"{"a":"#.repeat(1000)), 0, "not usable");
    assert_bad_file("\u{7f}not json", 0, "not usable");
}

#[test]
fn too_many_tensors_and_a_huge_header_are_refused() {
    let empty = r#"{"dtype":"F32","shape":[0],"data_offsets":[0,0]}"#;
    let many: Vec<String> = (0..65_537).map(|n| format!(r#""{n}":{empty}"#)).collect();
    assert_bad_file(&format!("{{{}}}", many[1..].join(",").replace("65536", "x")), 1, "followed by something else");
    assert_bad_file(&format!("{{{}}}", many.join(",")), 0, "more than 65536 tensors");

    let folder = TempDir::new().expect("temporary folder");
    for length in [1, (16 << 20) + 1, 1 << 40, u64::MAX, u64::MAX - 7] {
        fs::write(model(&folder), length.to_le_bytes()).expect("writable");
        let message = Checkpoint::open(&model(&folder)).expect_err("no such header").to_string();
        assert!(message.contains(&format!("claims {length} bytes")), "{message}");
    }
}

/// Every byte of a small file's header, one at a time, replaced by bytes that mean something in JSON.
#[test]
fn no_changed_byte_makes_the_reader_panic() {
    let folder = single(|tensors| tensors.truncate(3));
    let whole = fs::read(model(&folder)).expect("readable");
    let header_end = 8 + u64::from_le_bytes(whole[..8].try_into().expect("8 bytes")) as usize;
    for position in 0..header_end {
        for byte in *b"\xff\"9}" {
            let mut changed = whole.clone();
            changed[position] = byte;
            fs::write(model(&folder), changed).expect("writable");
            // Some changes are harmless, such as another name; what matters is that each ends in a Result.
            let _ = Checkpoint::open(folder.path()).and_then(|checkpoint| checkpoint.load_layer(None, 0));
        }
    }
}

#[test]
fn data_at_odd_offsets_is_read() {
    let header =
        r#"{"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"x":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}"#;
    let folder = raw_file(header, 9);
    assert_eq!(read_tensor(&model(&folder), Some("x")).expect("unaligned is fine"), (vec![0.0; 2], vec![2]));
}

#[test]
fn an_index_cannot_name_files_elsewhere() {
    let folder = sharded(Dtype::F32);
    for shard in ["../b.safetensors", "/etc/hostname", "sub/b.safetensors", "..", ".", "", "a\\b", "C:b", "a\u{0}b"] {
        write_json(&index(&folder), &json!({"weight_map": {"model.layers.0.mlp.gate.weight": shard}}));
        let error = load_error(folder.path(), 0);
        assert!(
            matches!(&error, Error::BadFile { message, .. } if message.contains("same folder")),
            "{shard:?}: {error}"
        );
    }
    for text in [
        "",
        "{}",
        "[]",
        r#"{"weight_map": {"a": 1}}"#,
        r#"{"weight_map": {"\u001b[2J": "x"}}"#,
        r#"{"weight_map": {"a": "x", "a": "y"}}"#,
    ] {
        fs::write(index(&folder), text).expect("writable");
        assert!(matches!(load_error(folder.path(), 0), Error::BadFile { .. }), "{text}");
    }
}

#[test]
fn configurations_that_are_absent_broken_or_of_another_model() {
    let folder = single(|_| ());
    let config = folder.path().join("config.json");
    for (text, expected) in [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no model_type"),
        (r#"{"model_type": "gpt2"}"#, "model_type \"gpt2\" is not supported"),
        (r#"{"model_type": "qwen3_moe"}"#, "lacks \"hidden_size\""),
    ] {
        fs::write(&config, text).expect("writable");
        let message = load_error(folder.path(), 0).to_string();
        assert!(message.contains(expected), "{message}");
    }
    fs::remove_file(&config).expect("removable");
    assert!(load_error(folder.path(), 0).to_string().contains("no configuration"));
    assert!(matches!(load_error(&folder.path().join("absent"), 0), Error::Io { .. }));
    fs::remove_file(model(&folder)).expect("removable");
    assert!(matches!(load_error(folder.path(), 0), Error::BadFile { .. }), "an empty folder");
}

#[test]
fn a_block_named_by_metadata_is_the_only_layer() {
    let folder = TempDir::new().expect("temporary folder");
    let path = folder.path().join("block.safetensors");
    let block = |layout: &str| {
        let pairs = [("config", qwen_config().to_string()), ("layout", layout.into()), ("layer_idx", "5".into())];
        let mut metadata: HashMap<String, String> = pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
        metadata.insert("prefix".to_owned(), "model.layers.0.mlp.".to_owned());
        save(&path, &qwen_layer(0, Dtype::F32), Some(metadata));
    };
    block("hub");
    let layer = Checkpoint::open(&path).expect("sound").load_layer(None, 5).expect("sound");
    assert_eq!(layer.prefix, "model.layers.0.mlp.");
    assert!(matches!(load_error(&path, 0), Error::InvalidConfig { field: "layer", .. }));
    block("module");
    assert!(matches!(load_error(&path, 5), Error::MissingTensor { .. }), "only the named layout is looked for");
    block("diagonal");
    assert!(matches!(load_error(&path, 5), Error::Unsupported { .. }));
}

/// The worked example of docs/families.md, with the file that it describes.
#[test]
fn a_users_family_works() {
    let docs = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/families.md")).expect("readable");
    let toml = docs.split("```toml\n").nth(1).and_then(|rest| rest.split("```").next()).expect("an example");
    let folder = TempDir::new().expect("temporary folder");
    let path = folder.path().join("acme.toml");
    fs::write(&path, toml).expect("writable");
    let family = Family::from_file(&path).expect("the documented example is valid");

    let mut tensors = vec![
        tensor("transformer.h.2.moe.router.weight", Dtype::F32, &[E, H]),
        tensor("transformer.h.2.moe.router.bias", Dtype::F32, &[E]),
        tensor("transformer.h.2.moe.w_down", Dtype::F32, &[E, H, I]),
    ];
    tensors.extend((0..E).map(|e| tensor(&format!("transformer.h.2.moe.w_in.{e}"), Dtype::F32, &[2 * I, H])));
    save(&model(&folder), &tensors, None);
    let config = json!({"model_type": "acme_moe", "d_model": H, "d_expert": I, "n_experts": E});
    write_json(&folder.path().join("config.json"), &config);

    let checkpoint = Checkpoint::open(folder.path()).expect("sound");
    let layer = checkpoint.load_layer(Some(&family), 2).expect("described");
    assert_eq!((layer.family.as_str(), layer.config.top_k()), ("acme", 2));
    assert_eq!(layer.weights.router_bias, Some(values("transformer.h.2.moe.router.bias", E)));
    let first = values("transformer.h.2.moe.w_in.0", 2 * I * H);
    assert_eq!((&layer.weights.gate_proj[..I * H], &layer.weights.up_proj[..I * H]), first.split_at(I * H));
    assert!(matches!(checkpoint.load_layer(None, 2), Err(Error::Unsupported { .. })), "not built in");

    let line = toml.lines().position(|line| line.starts_with("renormalize")).expect("in the example") + 1;
    fs::write(&path, toml.replace("renormalize", "renormalise")).expect("writable");
    let message = Family::from_file(&path).expect_err("a typing error").to_string();
    assert!(
        message.contains("acme.toml") && message.contains(&format!("line {line}: unknown field `renormalise`")),
        "{message}"
    );
    assert!(message.contains("`scores`"), "known keys are listed: {message}");
}

#[test]
fn tensors_are_written_whole_and_read_back() {
    let folder = TempDir::new().expect("temporary folder");
    let path = folder.path().join("y.safetensors");
    let y = values("y", 12);
    write_tensor(&path, "y", &[1.0; 3], &[3]).expect("writable");
    write_tensor(&path, "y", &y, &[2, H]).expect("an existing file is replaced");
    assert_eq!(read_tensor(&path, None).expect("one tensor"), (y.clone(), vec![2, H]));
    assert_eq!(read_tensor(&path, Some("y")).expect("by name"), (y.clone(), vec![2, H]));
    assert!(matches!(read_tensor(&path, Some("z")), Err(Error::MissingTensor { .. })));
    assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 1, "no temporary file stays behind");
    assert!(matches!(write_tensor(&path, "y", &y, &[5]), Err(Error::LengthMismatch { expected: 5, found: 12, .. })));
    assert!(matches!(write_tensor(&folder.path().join("no/y"), "y", &y, &[12]), Err(Error::Io { .. })));
    let several = single(|_| ());
    let message = read_tensor(&model(&several), None).expect_err("ambiguous").to_string();
    assert!(message.contains("10 tensor(s)"), "{message}");
}
