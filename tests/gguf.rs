//! Layers from GGUF files: blocks mean what their publisher says, files and folders are what they should be, and a
//! device computes with blocks what the reference computes with their numbers. Families are in `gguf_families.rs`,
//! hostile files in `gguf_hostile.rs`.

#[path = "support/gguf.rs"]
mod gguf_file;
mod support;

use gguf_file::{BF16, F16, F32, Gguf, MXFP4, Meta, Q4_0, Q4_K, Q6_K, Q8_0, block, decode, random_blocks};
use std::fs;
use std::path::{Path, PathBuf};
use support::{Values, assert_close, assert_same_bits, gpu_context};
use tempfile::TempDir;
use wgmoe::model::checkpoint::read_tensor;
use wgmoe::reference::moe_forward;
use wgmoe::{Checkpoint, Context, Error, Family, LayerOptions, LoadedLayer, MoeLayer, WeightFormat};

const MATRIX_TYPES: [u32; 8] = [F32, F16, BF16, Q4_0, Q8_0, Q4_K, Q6_K, MXFP4];

fn save(folder: &TempDir, file: &Gguf) -> PathBuf {
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).expect("writable");
    path
}

fn load(file: &Gguf, layer: u32) -> Result<LoadedLayer, Error> {
    let folder = TempDir::new().expect("temporary folder");
    Checkpoint::open(&save(&folder, file))?.load_layer(None, layer)
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// Any bytes.
fn bytes_from(seed: u64) -> impl FnMut() -> u8 {
    let mut values = Values(seed);
    move || (values.next() >> 8) as u8
}

// ---- blocks ----

/// Layer 1 of a model with these types of `gate_up` and `down`, and the numbers in it.
fn mixtral([h, i, e]: [usize; 3], gate_up: u32, down: u32) -> (Gguf, [Vec<f32>; 4]) {
    let mut file = Gguf::new("llama").with(
        "llama",
        &[
            ("embedding_length", Meta::U32(h as u32)),
            ("feed_forward_length", Meta::U32(i as u32)),
            ("expert_count", Meta::U32(e as u32)),
            ("expert_used_count", Meta::U32(2)),
        ],
    );
    file.key("tokenizer.ggml.tokens", Meta::texts(&["<a>", "", "<b>"]));
    file.tensor("token_embd.weight", F16, &[3, h], vec![0; 3 * h * 2]);
    file.f32("blk.1.attn_norm.weight", &[h], &vec![1.0; h]);
    file.f32("blk.1.ffn_norm.weight", &[h], &vec![1.0; h]);
    let router: Vec<f32> = Values(3).even(e * h).into_iter().map(|v| v / (h as f32).sqrt()).collect();
    file.f32("blk.1.ffn_gate_inp.weight", &[e, h], &router);
    let mut numbers = [router, Vec::new(), Vec::new(), Vec::new()];
    for (n, (name, kind, shape)) in
        [("gate", gate_up, [e, i, h]), ("up", gate_up, [e, i, h]), ("down", down, [e, h, i])].into_iter().enumerate()
    {
        let data = random_blocks(kind, shape.iter().product(), bytes_from(n as u64 + u64::from(kind) * 10));
        numbers[n + 1] = decode(kind, &data);
        file.tensor(&format!("blk.1.ffn_{name}_exps.weight"), kind, &shape, data);
    }
    (file, numbers)
}

#[test]
fn every_type_decodes_to_the_bits_that_its_definition_gives() {
    for kind in MATRIX_TYPES {
        // Rows of one block and of several, of which the last are no multiple of what is turned at a time.
        let n = block(kind).0.max(8);
        for [h, i, e] in [[n, n, 2], [3 * n, 2 * n, 3]] {
            let (file, [router, gate, up, down]) = mixtral([h, i, e], kind, kind);
            let layer = load(&file, 1).unwrap_or_else(|error| panic!("type {kind}: {error}"));
            assert_eq!(
                (layer.family.as_str(), layer.layout.as_str(), layer.prefix.as_str()),
                ("mixtral", "gguf", "blk.1.")
            );
            assert_eq!(layer.model_type.as_deref(), Some("llama"));
            assert_same_bits("router", &layer.weights.router, &router);
            for (name, found, expected) in [
                ("gate", &layer.weights.gate_proj, &gate),
                ("up", &layer.weights.up_proj, &up),
                ("down", &layer.weights.down_proj, &down),
            ] {
                assert_same_bits(&format!("{name} of type {kind}"), found, expected);
            }
        }
    }
}

/// More rows than are turned at a time.
#[test]
fn large_experts_are_turned_in_pieces() {
    let (file, [_, gate, _, down]) = mixtral([512, 6144, 2], Q4_K, Q8_0);
    let layer = load(&file, 1).expect("sound");
    assert_same_bits("gate", &layer.weights.gate_proj, &gate);
    assert_same_bits("down", &layer.weights.down_proj, &down);
    assert_eq!(layer.stored_as, ["F32", "Q4_K", "Q8_0"]);
}

/// Five blocks of each type, and a hash of the numbers that the `gguf` Python package makes of them (FNV-1a of their
/// bytes, minus zero as zero).
#[test]
fn numbers_are_those_of_another_implementation() {
    for (kind, expected) in [
        (Q4_0, 0xed10_6c03_d85f_9c94_u64),
        (Q8_0, 0x4f98_317e_5205_73da),
        (Q4_K, 0x0ec7_2a69_109a_1066),
        (Q6_K, 0x63e0_c62e_a646_6141),
        (MXFP4, 0xd341_ad01_ad77_3df1),
    ] {
        let (numbers, size) = block(kind);
        let mut state = u64::from(kind);
        let mut byte = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        let mut data: Vec<u8> = (0..5 * size).map(|_| byte()).collect();
        let half = half::f16::from_f32(0.0123).to_le_bytes();
        for (block, exponent) in data.chunks_exact_mut(size).zip([0, 1, 2, 127, 250]) {
            match kind {
                Q4_K => block[..4].copy_from_slice(&[half, half].concat()),
                Q6_K => block[208..].copy_from_slice(&half),
                MXFP4 => block[0] = exponent,
                _ => block[..2].copy_from_slice(&half),
            }
        }
        let hash = |values: &[f32]| {
            let bytes = values.iter().flat_map(|v| (v + 0.0).to_le_bytes());
            bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
        };
        assert_eq!(hash(&decode(kind, &data)), expected, "the test's own decoder of type {kind}");
        // As the gate of one expert with one row.
        let row = 5 * numbers;
        let mut file = mixtral([row, 1, 1], F32, F32).0;
        file.set("llama.expert_used_count", Meta::U32(1));
        let tensor = file.tensors.iter_mut().find(|t| t.name.ends_with(b"ffn_gate_exps.weight")).expect("it is there");
        (tensor.kind, tensor.data) = (kind, data);
        let layer = load(&file, 1).expect("sound");
        assert_eq!(hash(&layer.weights.gate_proj), expected, "type {kind}");
    }
}

/// A file that the `gguf` Python package wrote, see `tests/golden/write_gguf.py`.
#[test]
fn a_file_of_another_writer_is_read() {
    let path = golden("gguf_py__mixtral_h32_i32_e4k2.gguf");
    let checkpoint = Checkpoint::open(&path).expect("sound");
    assert_eq!(checkpoint.tensor_names().count(), 11);
    let values = |count: usize, levels: &[f32], seed: usize| -> Vec<f32> {
        (0..count).map(|n| levels[if n % 32 == 0 { 0 } else { (n * 7 + seed) % levels.len() }]).collect()
    };
    let q4_0: Vec<f32> = (0..16u8).map(|q| (f32::from(q) - 8.0) * 0.25).collect();
    let q8_0: Vec<f32> = (0..255u8).map(|q| (127.0 - f32::from(q)) * 0.0078125).collect();
    let mxfp4 = [6.0, -4.0, 3.0, -2.0, 1.5, -1.0, 0.5, 0.0];
    let f16 = [0.5, -0.25, 1.0 + 1.0 / 1024.0];
    for (number, first, second, stored_as) in
        [(0, &q4_0[..], &q8_0[..], ["F32", "Q4_0", "Q8_0"]), (1, &mxfp4[..], &f16[..], ["F16", "F32", "MXFP4"])]
    {
        let layer = checkpoint.load_layer(None, number).expect("sound");
        assert_eq!(layer.stored_as, stored_as);
        assert_eq!((layer.config.num_experts(), layer.config.top_k()), (4, 2));
        assert_eq!(layer.weights.router, values(4 * 32, &[0.1, 0.2, -0.3], 1));
        assert_eq!(layer.weights.gate_proj, values(4 * 32 * 32, first, 2));
        assert_eq!(layer.weights.up_proj, values(4 * 32 * 32, first, 3));
        assert_eq!(layer.weights.down_proj, values(4 * 32 * 32, second, 4));
    }
}

// ---- devices ----

/// A layer with random blocks: `[name, type, shape]` of tensors in block 2.
fn random_layer(architecture: &str, keys: &[(&str, Meta)], tensors: &[(&str, u32, &[usize])]) -> Gguf {
    let mut file = Gguf::new(architecture).with(architecture, keys);
    for (n, (name, kind, shape)) in tensors.iter().enumerate() {
        let name = format!("blk.2.{name}");
        let count = shape.iter().product();
        if name.contains("_inp") || name.contains("bias") {
            file.f32(&name, shape, &Values(n as u64).even(count).into_iter().map(|v| v * 0.2).collect::<Vec<_>>());
        } else {
            file.tensor(&name, *kind, shape, random_blocks(*kind, count, bytes_from(n as u64 * 31 + u64::from(*kind))));
        }
    }
    file
}

fn format_of(kind: u32) -> WeightFormat {
    match kind {
        F32 => WeightFormat::F32,
        F16 => WeightFormat::F16,
        BF16 => WeightFormat::Bf16,
        Q4_0 => WeightFormat::Q4_0,
        Q8_0 => WeightFormat::Q8_0,
        Q4_K => WeightFormat::Q4K,
        Q6_K => WeightFormat::Q6K,
        _ => WeightFormat::Mxfp4,
    }
}

/// The layer as it is stored, on the GPU, against the reference on its numbers. `[gate_up, down]` are types.
fn assert_runs_as_stored(context: Option<&Context>, name: &str, file: &Gguf, [gate_up, down]: [u32; 2]) {
    let folder = TempDir::new().expect("temporary folder");
    let checkpoint = Checkpoint::open(&save(&folder, file)).expect("sound");
    let loaded = checkpoint.load_layer(None, 2).unwrap_or_else(|error| panic!("{name}: {error}"));
    let mut source = checkpoint.layer(None, 2).expect("sound");
    let formats = source.formats().expect("gate and up are alike");
    assert_eq!((formats.gate_up, formats.down), (format_of(gate_up), format_of(down)), "{name}");
    let Some(context) = context else { return };
    let layer = MoeLayer::load(context, &mut source, &LayerOptions::default(), |_, _| {})
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    for tokens in [1, 5, 40] {
        let x = Values(tokens as u64).even(tokens * loaded.config.hidden_size() as usize);
        let y = layer.forward(&x).expect("the pass runs");
        let expected = moe_forward(&loaded.config, &loaded.weights, &x[..]);
        let chosen: Vec<u32> = layer.routing().expect("read").topk_experts;
        assert_eq!(chosen, expected.router.topk_experts, "{name}");
        let largest = expected.y.iter().fold(0f64, |most, v| most.max(v.abs()));
        assert_close(name, &y, &expected.y, |_| 1e-5 * largest);
    }
}

#[test]
fn a_device_computes_with_blocks_what_the_reference_computes_with_their_numbers() {
    let context = gpu_context();
    let context = context.as_ref();
    let (h, i, e) = (256, 256, 8);
    let n = |n: usize| Meta::U32(n as u32);
    let sizes = [
        ("embedding_length", n(h)),
        ("feed_forward_length", n(i)),
        ("expert_feed_forward_length", n(i)),
        ("expert_count", n(e)),
        ("expert_used_count", n(3)),
    ];
    let matrices = |gate_up: u32, down: u32| {
        [
            ("ffn_gate_inp.weight", F32, &[8, 256][..]),
            ("ffn_gate_exps.weight", gate_up, &[8, 256, 256]),
            ("ffn_up_exps.weight", gate_up, &[8, 256, 256]),
            ("ffn_down_exps.weight", down, &[8, 256, 256]),
        ]
    };
    let mut pairs: Vec<[u32; 2]> = MATRIX_TYPES.iter().map(|&kind| [kind, kind]).collect();
    // As usual files have them.
    pairs.extend([[Q4_K, Q6_K], [Q4_0, Q8_0], [Q8_0, F16]]);
    for [gate_up, down] in pairs {
        let file = random_layer("qwen3moe", &sizes, &matrices(gate_up, down));
        assert_runs_as_stored(context, &format!("qwen3moe of types {gate_up} and {down}"), &file, [gate_up, down]);
    }
    let file = random_layer("llama", &sizes, &matrices(Q4_K, Q6_K));
    assert_runs_as_stored(context, "mixtral", &file, [Q4_K, Q6_K]);

    let shared = |kind| {
        [
            ("ffn_gate_shexp.weight", kind, &[256, 256][..]),
            ("ffn_up_shexp.weight", kind, &[256, 256]),
            ("ffn_down_shexp.weight", kind, &[256, 256]),
        ]
    };
    let groups = [
        ("expert_group_count", n(4)),
        ("expert_group_used_count", n(2)),
        ("expert_shared_count", n(1)),
        ("expert_weights_scale", Meta::F32(2.5)),
        ("leading_dense_block_count", n(1)),
    ];
    let keys = [&sizes[..], &groups].concat();
    let file = random_layer("deepseek2", &keys, &[&matrices(Q4_K, Q6_K)[..], &shared(Q8_0)].concat());
    assert_runs_as_stored(context, "DeepSeek-V2", &file, [Q4_K, Q6_K]);
    let v3 = [("expert_gating_func", n(2)), ("expert_weights_norm", Meta::Bool(true))];
    let bias = [("exp_probs_b.bias", F32, &[8][..])];
    let file = random_layer(
        "deepseek2",
        &[&keys[..], &v3].concat(),
        &[&matrices(Q4_0, Q8_0)[..], &shared(Q6_K), &bias].concat(),
    );
    assert_runs_as_stored(context, "DeepSeek-V3", &file, [Q4_0, Q8_0]);

    let biases = [
        ("ffn_gate_inp.bias", F32, &[8][..]),
        ("ffn_gate_exps.bias", F32, &[8, 256]),
        ("ffn_up_exps.bias", F32, &[8, 256]),
        ("ffn_down_exps.bias", F32, &[8, 256]),
    ];
    let file = random_layer("gpt-oss", &sizes, &[&matrices(MXFP4, MXFP4)[..], &biases].concat());
    assert_runs_as_stored(context, "gpt-oss", &file, [MXFP4, MXFP4]);
}

// ---- files and folders ----

#[test]
fn a_folder_has_one_model() {
    let folder = TempDir::new().expect("temporary folder");
    let (file, [_, gate, ..]) = mixtral([32, 32, 2], Q8_0, F16);
    fs::write(folder.path().join("any name.GGUF"), file.bytes()).expect("writable");
    // Not looked at.
    fs::write(folder.path().join("config.json"), "{\"model_type\": \"t5\"}").expect("writable");
    let checkpoint = Checkpoint::open(folder.path()).expect("sound");
    assert_eq!(checkpoint.load_layer(None, 1).expect("sound").weights.gate_proj, gate);
    assert_eq!(checkpoint.metadata("config"), None);
    fs::write(folder.path().join("mmproj.gguf"), file.bytes()).expect("writable");
    let message = Checkpoint::open(folder.path()).expect_err("which one?").to_string();
    assert!(message.contains("2 .gguf files"), "{message}");
    // Whatever it is called: the first word counts.
    fs::write(folder.path().join("model.safetensors"), file.bytes()).expect("writable");
    Checkpoint::open(folder.path()).expect("sound").load_layer(None, 1).expect("sound");
}

/// Tensors of a file over three parts, of which the first has the metadata only, as the first has in some files.
fn split(folder: &Path, file: &Gguf) -> Vec<(PathBuf, Gguf)> {
    let count = file.tensors.len();
    [(0, 0..0), (1, 0..count / 2), (2, count / 2..count)]
        .into_iter()
        .map(|(no, tensors)| {
            let mut part = if no == 0 { file.clone() } else { Gguf { metadata: Vec::new(), ..file.clone() } };
            part.tensors = file.tensors[tensors].to_vec();
            part.key("split.no", Meta::U16(no));
            part.key("split.count", Meta::U16(3));
            part.key("split.tensors.count", Meta::I32(count as i32));
            (folder.join(format!("m-{:05}-of-00003.gguf", no + 1)), part)
        })
        .collect()
}

#[test]
fn a_split_model_is_found_from_any_part() {
    let folder = TempDir::new().expect("temporary folder");
    let (file, [_, gate, _, down]) = mixtral([32, 64, 3], Q4_0, MXFP4);
    let parts = split(folder.path(), &file);
    let write = |parts: &[(PathBuf, Gguf)]| {
        parts.iter().for_each(|(path, part)| fs::write(path, part.bytes()).expect("writable"));
    };
    write(&parts);
    for path in [folder.path(), &parts[0].0, &parts[1].0, &parts[2].0] {
        let layer = Checkpoint::open(path).expect("sound").load_layer(None, 1).expect("sound");
        assert_eq!((&layer.weights.gate_proj, &layer.weights.down_proj), (&gate, &down));
    }
    let error = |path: &Path| match Checkpoint::open(path) {
        Err(error @ Error::BadFile { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    let changed = |n: usize, change: &dyn Fn(&mut Gguf)| {
        let mut changed = parts.clone();
        change(&mut changed[n].1);
        write(&changed);
        let message = error(&parts[0].0);
        write(&parts);
        message
    };
    for (n, change, expected) in [
        (
            1,
            Box::new(|part: &mut Gguf| part.set("split.no", Meta::U16(2))) as Box<dyn Fn(&mut Gguf)>,
            "say part 3 of 3",
        ),
        (2, Box::new(|part: &mut Gguf| part.set("split.count", Meta::U16(4))), "expected part 3 of 3"),
        (2, Box::new(|part: &mut Gguf| part.remove("split.no")), "part ? of 3"),
        (0, Box::new(|part: &mut Gguf| part.set("split.count", Meta::text("3"))), "\"3\", expected a number"),
        (0, Box::new(|part: &mut Gguf| part.set("split.count", Meta::U64(1 << 40))), "1099511627776"),
        (0, Box::new(|part: &mut Gguf| part.set("split.no", Meta::U16(3))), "say part 4 of 3"),
        (0, Box::new(|part: &mut Gguf| part.set("split.count", Meta::U16(7))), "-00001-of-00007.gguf"),
        (0, Box::new(|part: &mut Gguf| part.set("split.tensors.count", Meta::I32(9))), "expected 9"),
        (1, Box::new(|part: &mut Gguf| part.tensors[0].name = b"blk.1.ffn_up_exps.weight".to_vec()), "as well"),
        (1, Box::new(|part: &mut Gguf| part.version = 7), "version 7"),
    ] {
        let message = changed(n, &*change);
        assert!(message.contains(expected) && message.contains(".gguf"), "{expected}: {message}");
    }
    fs::remove_file(&parts[1].0).expect("removable");
    for path in [folder.path(), &parts[0].0, &parts[2].0] {
        let message = error(path);
        assert!(message.contains("part 2 of 3") && message.contains("m-00002-of-00003.gguf"), "{message}");
    }
    fs::remove_file(&parts[0].0).expect("removable");
    assert!(error(folder.path()).contains("part 1 of 3"));
}

#[test]
fn types_that_are_not_read_are_named_and_only_where_they_are_needed() {
    for (number, name, numbers, bytes) in
        [(13, "Q5_K", 256, 176), (23, "IQ4_XS", 256, 136), (40, "NVFP4", 64, 36), (20, "IQ4_NL", 32, 18)]
    {
        let mut file = mixtral([256, 256, 2], Q8_0, Q8_0).0;
        file.tensor("blk.0.other", number, &[2, 256], vec![7; 512 / numbers * bytes]);
        load(&file, 1).expect("it is in another layer");
        let tensor = file.tensors.iter_mut().find(|t| t.name.ends_with(b"ffn_up_exps.weight")).expect("it is there");
        (tensor.kind, tensor.data) = (number, vec![7; 2 * 256 * 256 / numbers * bytes]);
        let error = load(&file, 1).expect_err("of the layer");
        let message = error.to_string();
        assert!(matches!(error, Error::Unsupported { .. }), "{message}");
        for part in [name, "blk.1.ffn_up_exps.weight", "model.gguf", "F32, F16, Q4_0, Q8_0, Q4_K, Q6_K, BF16, MXFP4"] {
            assert!(message.contains(part), "{part}: {message}");
        }
    }
    // A type that is newer than this program: nobody knows where it ends, only where it starts.
    let mut file = mixtral([32, 32, 2], Q8_0, Q8_0).0;
    file.tensor("blk.0.other", 99, &[2, 256], vec![7; 100]);
    load(&file, 1).expect("it is in another layer");
    file.tensors.last_mut().expect("there").name = b"blk.1.ffn_gate_exps.scale".to_vec();
    let message = load(&file, 1).expect_err("of the layer").to_string();
    assert!(message.contains("ffn_gate_exps.scale"), "{message}");
}

#[test]
fn what_the_family_does_not_know_and_what_is_missing() {
    let error = |change: &dyn Fn(&mut Gguf)| {
        let mut file = mixtral([32, 32, 2], Q8_0, Q8_0).0;
        change(&mut file);
        load(&file, 1).expect_err("it must not load").to_string()
    };
    for (expected, change) in [
        (
            "ffn_gate_exps.bias",
            Box::new(|f: &mut Gguf| f.f32("blk.1.ffn_gate_exps.bias", &[2, 32], &[0.0; 64])) as Box<dyn Fn(&mut Gguf)>,
        ),
        (
            "no MoE block at layer 1",
            Box::new(|f: &mut Gguf| f.tensors.retain(|t| !t.name.ends_with(b"gate_inp.weight"))),
        ),
        ("ffn_down_exps.weight", Box::new(|f: &mut Gguf| f.tensors.retain(|t| !t.name.ends_with(b"down_exps.weight")))),
        (
            "lacks \"hidden_size\" (from \"llama.embedding_length\")",
            Box::new(|f: &mut Gguf| f.remove("llama.embedding_length")),
        ),
        (
            "\"num_local_experts\" (from \"llama.expert_count\")",
            Box::new(|f: &mut Gguf| f.set("llama.expert_count", Meta::text("2"))),
        ),
        ("expected u32", Box::new(|f: &mut Gguf| f.set("llama.expert_count", Meta::I32(-2)))),
        ("expected u32", Box::new(|f: &mut Gguf| f.set("llama.expert_used_count", Meta::F32(1.5)))),
        ("the number NaN", Box::new(|f: &mut Gguf| f.set("llama.feed_forward_length", Meta::F32(f32::NAN)))),
        ("num_experts is 2000000", Box::new(|f: &mut Gguf| f.set("llama.expert_count", Meta::U32(2_000_000)))),
        ("shape [3, 32]", Box::new(|f: &mut Gguf| f.set("llama.expert_count", Meta::U32(3)))),
        ("is it a model without experts", Box::new(|f: &mut Gguf| f.remove("llama.expert_count"))),
        ("architecture \"bert\"", Box::new(|f: &mut Gguf| f.set("general.architecture", Meta::text("bert")))),
        ("general.architecture", Box::new(|f: &mut Gguf| f.remove("general.architecture"))),
        ("general.architecture", Box::new(|f: &mut Gguf| f.set("general.architecture", Meta::U32(3)))),
        ("has 1 entries, none is 1", Box::new(|f: &mut Gguf| f.set("llama.expert_used_count", Meta::u32s(&[2])))),
        ("is a list", Box::new(|f: &mut Gguf| f.set("llama.embedding_length", Meta::u32s(&[32, 32])))),
        ("a list of 5000 entries", Box::new(|f: &mut Gguf| f.set("llama.expert_used_count", Meta::u32s(&[2; 5000])))),
        ("a text of 2000 bytes", Box::new(|f: &mut Gguf| f.set("llama.expert_count", Meta::text(&"9".repeat(2000))))),
    ] {
        let message = error(&*change);
        // Sizes out of range are those of a layer, wherever they come from.
        let names_it = message.contains("model.gguf") || expected.starts_with("num_experts is");
        assert!(message.contains(expected) && names_it, "{expected}: {message}");
    }
    // A number of each layer.
    let mut file = mixtral([32, 32, 2], Q8_0, Q8_0).0;
    file.set("llama.expert_used_count", Meta::u32s(&[0, 1]));
    assert_eq!(load(&file, 1).expect("sound").config.top_k(), 1);
}

#[test]
fn a_scale_that_is_no_number_is_found_in_its_expert() {
    let at = |kind: u32, block_of_expert_1: usize, change: &dyn Fn(&mut [u8])| {
        let mut file = mixtral([256, 256, 2], kind, kind).0;
        let tensor = file.tensors.iter_mut().find(|t| t.name.ends_with(b"down_exps.weight")).expect("there");
        let size = block(kind).1;
        let blocks = tensor.data.len() / size;
        change(&mut tensor.data[(blocks / 2 + block_of_expert_1) * size..][..size]);
        match load(&file, 1).expect_err("NaN") {
            Error::NonFinite { tensor, index, .. } if tensor.contains("blk.1.ffn_down_exps.weight") => index,
            other => panic!("type {kind}: {other}"),
        }
    };
    let nan = half::f16::NAN.to_le_bytes();
    let infinite = half::f16::INFINITY.to_le_bytes();
    assert_eq!(at(MXFP4, 3, &|b| b[0] = 255), 256 * 256 + 3 * 32, "no exponent");
    assert_eq!(at(MXFP4, 0, &|b| b[..2].copy_from_slice(&[254, 0x77])), 256 * 256, "6 * 2^127 is beyond f32");
    assert_eq!(at(Q4_0, 1, &|b| b[..2].copy_from_slice(&nan)), 256 * 256 + 32);
    assert_eq!(at(Q8_0, 2, &|b| b[..2].copy_from_slice(&nan)), 256 * 256 + 64);
    assert_eq!(at(Q4_K, 2, &|b| b[2..4].copy_from_slice(&nan)), 256 * 256 + 512);
    assert_eq!(at(Q6_K, 5, &|b| b[208..].copy_from_slice(&nan)), 256 * 256 + 5 * 256);
    assert_eq!(at(F16, 9, &|b| b.copy_from_slice(&infinite)), 256 * 256 + 9);
}

#[test]
fn single_tensors_are_read_unless_they_are_blocks() {
    let folder = TempDir::new().expect("temporary folder");
    let (file, [router, ..]) = mixtral([32, 64, 2], Q8_0, F16);
    let path = save(&folder, &file);
    let (values, shape) = read_tensor(&path, Some("blk.1.ffn_gate_inp.weight")).expect("F32");
    assert_eq!((values, shape), (router, vec![2, 32]));
    let (_, shape) = read_tensor(&path, Some("blk.1.ffn_down_exps.weight")).expect("F16");
    assert_eq!(shape, [2, 32, 64], "the reverse of what the file has");
    let error = read_tensor(&path, Some("blk.1.ffn_up_exps.weight")).expect_err("blocks");
    assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("Q8_0")), "{error}");
}

/// Layouts of GGUF files are for them, and no others.
#[test]
fn layouts_are_for_their_files() {
    let folder = TempDir::new().expect("temporary folder");
    let path = save(&folder, &mixtral([32, 32, 2], Q8_0, Q8_0).0);
    let checkpoint = Checkpoint::open(&path).expect("sound");
    let aria = Family::named("aria").expect("built in");
    let message = checkpoint.load_layer(Some(aria), 1).expect_err("it has no such section").to_string();
    assert!(message.contains("aria.toml has no section [gguf]"), "{message}");
    let mixtral = Family::named("mixtral").expect("built in");
    checkpoint.load_layer(Some(mixtral), 1).expect("named instead of detected");

    // The same tensors in a safetensors file.
    let data = [0u8; 4 * 2 * 4 * 4];
    let view = |shape: &[usize]| {
        let bytes = shape.iter().product::<usize>() * 4;
        safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), &data[..bytes]).expect("sound")
    };
    let tensors = [
        ("blk.0.ffn_gate_inp.weight", view(&[2, 4])),
        ("blk.0.ffn_gate_exps.weight", view(&[2, 4, 4])),
        ("blk.0.ffn_up_exps.weight", view(&[2, 4, 4])),
        ("blk.0.ffn_down_exps.weight", view(&[2, 4, 4])),
    ];
    let config = r#"{"model_type": "mixtral", "hidden_size": 4, "intermediate_size": 4, "num_local_experts": 2,
        "num_experts_per_tok": 1}"#;
    let metadata = |layout: &str| {
        let pairs = [("config", config), ("layout", layout)].into_iter().filter(|(_, value)| !value.is_empty());
        Some(pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    };
    let load = |layout: &str| {
        let bytes = safetensors::serialize(tensors.clone(), metadata(layout)).expect("serializable");
        let path = folder.path().join("m.safetensors");
        fs::write(&path, bytes).expect("writable");
        Checkpoint::open(&path).expect("sound").load_layer(None, 0)
    };
    let message = load("").expect_err("no layout of its own").to_string();
    assert!(message.contains("block_sparse_moe"), "{message}");
    // What was converted from a GGUF file says so in its metadata.
    assert_eq!(load("gguf").expect("it is named").layout, "gguf");
}
