//! Checkpoints as quantisers publish them, read through the family's description: what is packed stays packed, with the
//! values that the publisher's own formula gives, and what does not fit is refused.

mod support;

use half::f16;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use support::{Values, assert_close, gpu_context};
use tempfile::TempDir;
use wgmoe::{Batch, Checkpoint, Context, Error, LayerOptions, MoeLayer, reference};

const H: usize = 64;
const I: usize = 32;
const E: usize = 3;

/// Type, shape and bytes, by name.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A matrix `[rows, inputs]` as a quantiser sees it: codes, and for each group of inputs a scale and a zero point.
struct Matrix {
    rows: usize,
    inputs: usize,
    group: usize,
    bits: u32,
    codes: Vec<u32>,
    scales: Vec<f16>,
    zeros: Vec<u32>,
}

impl Matrix {
    /// `asymmetric`: zero points from 1 to 14 (or 254), otherwise in the middle.
    fn new(v: &mut Values, [rows, inputs]: [usize; 2], group: usize, bits: u32, asymmetric: bool) -> Self {
        let groups = rows * inputs / group;
        let most = (1usize << bits) - 1;
        let codes = (0..rows * inputs).map(|_| v.below(most + 1) as u32).collect();
        let scales = (0..groups).map(|_| f16::from_f32((1 + v.below(20)) as f32 / 256.0 / most as f32)).collect();
        let middle = 1 << (bits - 1);
        let zero = |v: &mut Values| if asymmetric { 1 + v.below(most - 1) as u32 } else { middle };
        let zeros = (0..groups).map(|_| zero(v)).collect();
        Self { rows, inputs, group, bits, codes, scales, zeros }
    }

    fn group_of(&self, n: usize, k: usize) -> usize {
        n * (self.inputs / self.group) + k / self.group
    }

    /// `(code - zero) * scale`
    fn values(&self) -> Vec<f32> {
        let value = |at: usize| {
            let g = self.group_of(at / self.inputs, at % self.inputs);
            (self.codes[at] as f32 - self.zeros[g] as f32) * self.scales[g].to_f32()
        };
        (0..self.rows * self.inputs).map(value).collect()
    }

    /// `count` items in integers of 32 bits, item i of each from bit `bits * i` on.
    fn words(&self, count: usize, item: impl Fn(usize) -> u32) -> Vec<u8> {
        let per = 32 / self.bits as usize;
        let items: Vec<u32> = (0..count).map(item).collect();
        let word = |items: &[u32]| items.iter().rev().fold(0, |word, item| word << self.bits | item).to_le_bytes();
        items.chunks(per).flat_map(word).collect()
    }

    fn halves(values: impl Iterator<Item = f16>) -> Vec<u8> {
        values.flat_map(|v| v.to_le_bytes()).collect()
    }

    fn compressed(&self, base: &str, asymmetric: bool, tensors: &mut Tensors) {
        let (n, k, g, per) = (self.rows, self.inputs, self.inputs / self.group, 32 / self.bits as usize);
        let packed = self.words(n * k, |at| self.codes[at]);
        let mut add =
            |suffix: &str, dtype, shape, bytes| drop(tensors.insert(format!("{base}.{suffix}"), (dtype, shape, bytes)));
        add("weight_packed", Dtype::I32, vec![n, k / per], packed);
        add("weight_scale", Dtype::F16, vec![n, g], Self::halves(self.scales.iter().copied()));
        add("weight_shape", Dtype::I64, vec![2], [n as u64, k as u64].map(u64::to_le_bytes).concat());
        if asymmetric {
            // Along columns, for each group.
            let columns: Vec<Vec<u8>> = (0..g).map(|g0| self.words(n, |row| self.zeros[row * g + g0])).collect();
            let words =
                (0..n.div_ceil(per)).flat_map(|w| columns.iter().flat_map(move |c| c[4 * w..4 * w + 4].to_vec()));
            add("weight_zero_point", Dtype::I32, vec![n.div_ceil(per), g], words.collect());
        }
    }

    fn gptq(&self, base: &str, less: u32, tensors: &mut Tensors) {
        let (n, k, g, per) = (self.rows, self.inputs, self.inputs / self.group, 32 / self.bits as usize);
        let columns: Vec<Vec<u8>> = (0..n).map(|row| self.words(k, |at| self.codes[row * k + at])).collect();
        let words = (0..k / per).flat_map(|w| columns.iter().flat_map(move |c| c[4 * w..4 * w + 4].to_vec()));
        let zeros = (0..g).flat_map(|g0| self.words(n, |row| self.zeros[row * g + g0] - less));
        let scales = (0..g).flat_map(|g0| (0..n).map(move |row| self.scales[row * g + g0]));
        let index = (0..k).flat_map(|at| ((at / self.group) as u32).to_le_bytes());
        let mut add =
            |suffix: &str, dtype, shape, bytes| drop(tensors.insert(format!("{base}.{suffix}"), (dtype, shape, bytes)));
        add("qweight", Dtype::I32, vec![k / per, n], words.collect());
        add("qzeros", Dtype::I32, vec![g, n / per], zeros.collect());
        add("scales", Dtype::F16, vec![g, n], Self::halves(scales));
        add("g_idx", Dtype::I32, vec![k], index.collect());
    }

    fn awq(&self, base: &str, tensors: &mut Tensors) {
        let (n, k, g) = (self.rows, self.inputs, self.inputs / self.group);
        // Item i of an integer is this one of its eight columns.
        const COLUMNS: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];
        let column = |at: usize| at / 8 * 8 + COLUMNS[at % 8];
        let codes = (0..k).flat_map(|k0| self.words(n, |at| self.codes[column(at) * k + k0]));
        let zeros = (0..g).flat_map(|g0| self.words(n, |at| self.zeros[column(at) * g + g0]));
        let scales = (0..g).flat_map(|g0| (0..n).map(move |row| self.scales[row * g + g0]));
        let mut add =
            |suffix: &str, dtype, shape, bytes| drop(tensors.insert(format!("{base}.{suffix}"), (dtype, shape, bytes)));
        add("qweight", Dtype::I32, vec![k, n / 8], codes.collect());
        add("qzeros", Dtype::I32, vec![g, n / 8], zeros.collect());
        add("scales", Dtype::F16, vec![g, n], Self::halves(scales));
    }

    /// E2M1 codes; returns the values. `divides`: compressed-tensors, else ModelOpt.
    fn nvfp4(&self, base: &str, divides: bool, tensors: &mut Tensors) -> Vec<f32> {
        const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        let (n, k) = (self.rows, self.inputs);
        // Scales of 1 to 1.875 in E4M3: exponent 7, fraction from the code's lowest bits.
        let fraction = |g: usize| self.codes[16 * g] & 7;
        let scales: Vec<u8> = (0..n * k / 16).map(|g| 0x38 | fraction(g) as u8).collect();
        let of_matrix = 1.0 / 64.0;
        let mut add =
            |suffix: &str, dtype, shape, bytes| drop(tensors.insert(format!("{base}.{suffix}"), (dtype, shape, bytes)));
        let codes: Vec<u8> = self.codes.chunks_exact(2).map(|c| (c[0] | c[1] << 4) as u8).collect();
        let number = if divides { 1.0 / of_matrix } else { of_matrix };
        add(if divides { "weight_packed" } else { "weight" }, Dtype::U8, vec![n, k / 2], codes);
        add("weight_scale", Dtype::F8_E4M3, vec![n, k / 16], scales);
        let (name, shape) = if divides { ("weight_global_scale", vec![1]) } else { ("weight_scale_2", vec![]) };
        add(name, Dtype::F32, shape, f32::to_le_bytes(number).to_vec());
        add("input_scale", Dtype::F32, vec![1], 1f32.to_le_bytes().to_vec());
        let value = |(at, &code): (usize, &u32)| {
            let magnitude = MAGNITUDES[(code & 7) as usize] * (1.0 + fraction(at / 16) as f32 / 8.0) * of_matrix;
            if code & 8 == 0 { magnitude } else { -magnitude }
        };
        self.codes.iter().enumerate().map(value).collect()
    }
}

/// The ways in which the three matrices of each expert are stored, with what `config.json` says of them, and the format
/// that they stay in.
const WAYS: [(&str, &str, &str); 10] = [
    ("compressed", r#"{"quant_method": "compressed-tensors", "format": "pack-quantized"}"#, "int4:g16"),
    ("compressed 8", r#"{"quant_method": "compressed-tensors", "format": "pack-quantized"}"#, "int8"),
    ("compressed zeros", r#"{"quant_method": "compressed-tensors", "format": "pack-quantized"}"#, "int4:g16:zp"),
    ("gptq", r#"{"quant_method": "gptq", "sym": false}"#, "int4:zp"),
    ("gptq 8", r#"{"quant_method": "gptq", "sym": false}"#, "int8:g16:zp"),
    ("gptq v2", r#"{"quant_method": "gptq", "sym": false, "checkpoint_format": "gptq_v2"}"#, "int4:g16:zp"),
    ("gptq symmetric", r#"{"quant_method": "gptq", "sym": true}"#, "int4:g16"),
    ("awq", r#"{"quant_method": "awq", "version": "GEMM"}"#, "int4:zp"),
    ("nvfp4 compressed", r#"{"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}"#, "nvfp4"),
    ("nvfp4 modelopt", r#"{"quant_method": "modelopt", "quant_algo": "NVFP4"}"#, "nvfp4"),
];

struct Model {
    tensors: Tensors,
    config: Value,
    /// gate, up and down of all experts.
    values: [Vec<f32>; 3],
}

fn model(way: &str, quantization: &str) -> Model {
    let mut v = Values(way.len() as u64);
    let mut tensors = Tensors::new();
    let prefix = "model.layers.0.mlp.";
    let router: Vec<u8> = v.even(E * H).iter().flat_map(|v| v.to_le_bytes()).collect();
    tensors.insert(format!("{prefix}gate.weight"), (Dtype::F32, vec![E, H], router));
    let mut values = [Vec::new(), Vec::new(), Vec::new()];
    for e in 0..E {
        for (slot, (name, shape)) in
            [("gate_proj", [I, H]), ("up_proj", [I, H]), ("down_proj", [H, I])].into_iter().enumerate()
        {
            let base = format!("{prefix}experts.{e}.{name}");
            let mut matrix = |group, bits, asymmetric| Matrix::new(&mut v, shape, group, bits, asymmetric);
            let stored = match way {
                "compressed" => {
                    let m = matrix(16, 4, false);
                    m.compressed(&base, false, &mut tensors);
                    m.values()
                }
                "compressed 8" => {
                    let m = matrix(32, 8, false);
                    m.compressed(&base, false, &mut tensors);
                    m.values()
                }
                "compressed zeros" => {
                    let m = matrix(16, 4, true);
                    m.compressed(&base, true, &mut tensors);
                    m.values()
                }
                "gptq" | "gptq 8" | "gptq v2" | "gptq symmetric" => {
                    let bits = if way == "gptq 8" { 8 } else { 4 };
                    let m = matrix(if way == "gptq" { 32 } else { 16 }, bits, way != "gptq symmetric");
                    m.gptq(&base, u32::from(way != "gptq v2"), &mut tensors);
                    m.values()
                }
                "awq" => {
                    let m = matrix(32, 4, true);
                    m.awq(&base, &mut tensors);
                    m.values()
                }
                _ => matrix(16, 4, false).nvfp4(&base, way == "nvfp4 compressed", &mut tensors),
            };
            values[slot].extend(stored);
        }
    }
    let config = json!({
        "model_type": "qwen3_moe", "hidden_size": H, "moe_intermediate_size": I, "num_experts": E,
        "num_experts_per_tok": 2, "norm_topk_prob": true, "hidden_act": "silu",
        "quantization_config": serde_json::from_str::<Value>(quantization).expect("JSON"),
    });
    Model { tensors, config, values }
}

fn write(model: &Model) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let views = model.tensors.iter().map(|(name, (dtype, shape, bytes))| {
        (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap_or_else(|error| panic!("{name}: {error}")))
    });
    let content = safetensors::serialize(views, None::<HashMap<String, String>>).expect("it can be written");
    std::fs::write(folder.path().join("model.safetensors"), content).expect("it can be written");
    std::fs::write(folder.path().join("config.json"), model.config.to_string()).expect("it can be written");
    folder
}

#[test]
fn published_layouts_keep_their_codes_and_their_values() {
    let engines: Vec<Context> = [gpu_context(), Some(Context::cpu())].into_iter().flatten().collect();
    for (way, quantization, format) in WAYS {
        let model = model(way, quantization);
        let folder = write(&model);
        let checkpoint = Checkpoint::open(folder.path()).expect("it is sound");
        let loaded = checkpoint.load_layer(None, 0).unwrap_or_else(|error| panic!("{way}: {error}"));
        let found = [&loaded.weights.gate_proj, &loaded.weights.up_proj, &loaded.weights.down_proj];
        for (found, expected) in found.into_iter().zip(&model.values) {
            support::assert_same_bits(way, found, expected);
        }
        let x: Vec<f32> = Values(3).even(5 * H);
        let expected = reference::moe_forward(&loaded.config, &loaded.weights, Batch::from(&x[..])).y;
        let largest = expected.iter().fold(0f64, |most, v| most.max(v.abs()));
        for context in &engines {
            let name = format!("{way} on {}", context.device().name);
            let mut source = checkpoint.layer(None, 0).expect("it was read before");
            let layer = MoeLayer::load(context, &mut source, &LayerOptions::default(), |_, _| {})
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(layer.formats().name(), format, "{name}");
            let y = layer.forward(&x).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_close(&name, &y, &expected, |_| 1e-5 * largest);
        }
    }
}

/// One mistake in one tensor of the last expert read, and what the error has to name.
#[test]
fn layouts_that_do_not_fit_are_refused() {
    type Mistake = fn(&mut Model);
    fn tensor<'m>(model: &'m mut Model, end: &str) -> &'m mut (Dtype, Vec<usize>, Vec<u8>) {
        let name = format!("model.layers.0.mlp.experts.1.down_proj.{end}");
        model.tensors.get_mut(&name).unwrap_or_else(|| panic!("there is no {name}"))
    }
    fn cut(model: &mut Model, end: &str, axis: usize, to: usize) {
        let (dtype, shape, bytes) = tensor(model, end);
        shape[axis] = to;
        bytes.truncate(shape.iter().product::<usize>() * dtype.bitsize() / 8);
    }
    fn about(model: &mut Model, key: &str, value: Value) {
        model.config["quantization_config"][key] = value;
    }
    let mistakes: [(&str, &str, Mistake); 30] = [
        ("compressed", "codes have", |m| cut(m, "weight_packed", 0, 63)),
        ("compressed", "scales", |m| cut(m, "weight_scale", 0, 63)),
        ("compressed", "scales", |m| cut(m, "weight_scale", 0, 0)),
        ("compressed", "weight_shape", |m| tensor(m, "weight_shape").2[0] += 1),
        ("compressed", "weight_shape", |m| cut(m, "weight_shape", 0, 1)),
        ("compressed", "weight_packed", |m| tensor(m, "weight_packed").0 = Dtype::F32),
        ("compressed", "weight_scale", |m| tensor(m, "weight_scale").0 = Dtype::I16),
        ("compressed", "the scale at element 0", |m| {
            tensor(m, "weight_scale").2[..2].copy_from_slice(&f16::NAN.to_le_bytes())
        }),
        ("compressed", "finite scales", |m| {
            tensor(m, "weight_scale").2[..2].copy_from_slice(&f16::INFINITY.to_le_bytes())
        }),
        ("compressed zeros", "zero points have", |m| cut(m, "weight_zero_point", 0, 7)),
        ("compressed 8", "codes have", |m| cut(m, "weight_packed", 1, 7)),
        ("gptq", "qweight has shape", |m| cut(m, "qweight", 0, 3)),
        ("gptq", "qweight has shape", |m| cut(m, "qweight", 1, 63)),
        ("gptq", "scales", |m| cut(m, "scales", 1, 63)),
        ("gptq", "zero points have", |m| cut(m, "qzeros", 1, 7)),
        ("gptq", "group index", |m| cut(m, "g_idx", 0, 31)),
        ("gptq", "no activation reordering", |m| tensor(m, "g_idx").2[4] = 1),
        ("gptq", "gptq_v2", |m| tensor(m, "qzeros").2[0] |= 15),
        ("gptq", "sym is true", |m| about(m, "sym", json!(true))),
        ("gptq", "qzeros", |m| drop(m.tensors.remove("model.layers.0.mlp.experts.1.down_proj.qzeros"))),
        ("gptq", "no tensor", |m| drop(m.tensors.remove("model.layers.0.mlp.experts.1.down_proj.scales"))),
        ("awq", "gemm", |m| about(m, "version", json!("gemv"))),
        ("awq", "qzeros", |m| drop(m.tensors.remove("model.layers.0.mlp.experts.1.down_proj.qzeros"))),
        ("awq", "qweight has shape", |m| cut(m, "qweight", 1, 7)),
        ("awq", "scales", |m| cut(m, "scales", 0, 0)),
        ("nvfp4 compressed", "codes have", |m| cut(m, "weight_packed", 0, 63)),
        ("nvfp4 compressed", "weight_global_scale", |m| tensor(m, "weight_global_scale").2.fill(0xff)),
        ("nvfp4 modelopt", "is NaN", |m| tensor(m, "weight_scale").2[3] = 0x7f),
        ("nvfp4 modelopt", "weight_scale_2", |m| tensor(m, "weight_scale_2").2.copy_from_slice(&(-1f32).to_le_bytes())),
        ("nvfp4 modelopt", "pre_quant_scale", |m| {
            let name = "model.layers.0.mlp.experts.1.down_proj.pre_quant_scale".to_owned();
            m.tensors.insert(name, (Dtype::F32, vec![1], vec![0; 4]));
        }),
    ];
    for (way, expected, mistake) in mistakes {
        let (_, quantization, _) = WAYS.into_iter().find(|(name, ..)| *name == way).expect("a known way");
        let mut model = model(way, quantization);
        mistake(&mut model);
        let folder = write(&model);
        let error = Checkpoint::open(folder.path()).and_then(|checkpoint| checkpoint.load_layer(None, 0));
        let error = error.map(drop).err().unwrap_or_else(|| panic!("{way}, {expected}: it was accepted"));
        let text = error.to_string();
        assert!(text.contains(expected), "{way}: {text}");
        assert!(text.contains("_proj"), "{way}: {text}");
        assert!(!matches!(error, Error::Io { .. }), "{way}: {text}");
    }
}

/// Experts of different formats are refused as they are, and converted where one format is named.
#[test]
fn experts_of_several_formats_are_converted_or_refused() {
    let mut mixed = model("compressed", WAYS[0].1);
    let other = model("compressed 8", WAYS[1].1);
    let of_expert_1 = |name: &str| name.contains("experts.1.");
    mixed.tensors.retain(|name, _| !of_expert_1(name));
    mixed.tensors.extend(other.tensors.into_iter().filter(|(name, _)| of_expert_1(name)));
    let folder = write(&mixed);
    let checkpoint = Checkpoint::open(folder.path()).expect("it is sound");
    let context = Context::cpu();
    let load = |format: Option<&str>| {
        let mut source = checkpoint.layer(None, 0)?;
        if let Some(format) = format {
            source.convert_to(format.parse()?)?;
        }
        MoeLayer::load(&context, &mut source, &LayerOptions::default(), |_, _| {})
    };
    let error = load(None).err().expect("they differ").to_string();
    assert!(error.contains("expert 1") && error.contains("int8") && error.contains("--weights"), "{error}");
    let layer = load(Some("bf16")).expect("they are converted");
    assert_eq!(layer.formats().name(), "bf16");
}
