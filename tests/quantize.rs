//! Checkpoints whose experts are converted to another format: nothing but the experts changes, and they as the format
//! says.

mod support;

use safetensors::{Dtype, tensor::TensorView};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use support::{assert_close, formats, gpu_context};
use wgmoe::model::quantize::{QuantizedTensor, quantize};
use wgmoe::{Batch, Checkpoint, Context, Error, LayerOptions, LoadedLayer, MoeLayer, WeightFormat, reference};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn load(path: &Path) -> LoadedLayer {
    let checkpoint = Checkpoint::open(path).unwrap_or_else(|error| panic!("{error}"));
    let layers = checkpoint.layers(None).unwrap_or_else(|error| panic!("{error}"));
    checkpoint.load_layer(None, layers[0]).unwrap_or_else(|error| panic!("{error}"))
}

fn convert(from: &Path, to: WeightFormat, output: &Path) -> wgmoe::Result<Vec<QuantizedTensor>> {
    let checkpoint = Checkpoint::open(from)?;
    let layers = checkpoint.layers(None)?;
    let (mut last, mut all) = (0, 0);
    let result = quantize(&checkpoint, None, &layers, to, output, &mut |done, total| {
        assert!(done >= last && done <= total, "{done} of {total} after {last}");
        (last, all) = (done, total);
    });
    assert!(result.is_err() || last == all && all > 0, "progress ends at {last} of {all}");
    result
}

/// One of each way in which layers are stored: tensors of each expert and of all, fused and interleaved, transposed,
/// biases, shared experts and their gates, latent projections, norms, tables; floats, fp8 and MXFP4.
const FILES: [&str; 12] = [
    "mixtral__t7_h72_i40_e8k2_bf16_hub.safetensors",
    "mixtral__t17_h48_i32_e8k2_grad_module.safetensors",
    "deepseek_v3__t9_h192_i160_e8k2_fp8_hub.safetensors",
    "gpt_oss__t7_h64_i96_e8k4_mxfp4_hub.safetensors",
    "gpt_oss__t33_h64_i48_e8k4_module.safetensors",
    "llama4__t33_h64_i48_e8k1_module.safetensors",
    "nemotron_h__t33_h64_i48_e8k3_latent_hub.safetensors",
    "inkling__t33_h64_i48_e8k3_module.safetensors",
    "longcat_flash__t33_h64_i48_e8k3_hub.safetensors",
    "qwen2_moe__t1_h40_i24_e8k2_hub.safetensors",
    "deepseek_v4__t13_h56_i24_e8k3_hash_module.safetensors",
    "nllb_moe__t32_h48_i40_e4k2_drop_hub.safetensors",
];

#[test]
fn only_experts_change_and_they_as_the_format_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().join("converted.safetensors");
    let (mut cases, mut fused_differ) = (0, 0);
    for name in FILES {
        let original = load(&golden(name));
        let possible = formats(&original.config);
        for &format in &possible {
            convert(&golden(name), format, &output).unwrap_or_else(|error| panic!("{name} to {format}: {error}"));
            let converted = load(&output);
            assert_eq!(converted.config, original.config, "{name} to {format}");
            let expected = original.weights.rounded(&original.config, format).expect("the format holds them");
            // Gate and up in one tensor share what a whole matrix, or rows of it, share.
            let shares = matches!(format, WeightFormat::Nvfp4 | WeightFormat::Fp8);
            let (a, b) = (&converted.weights, &expected);
            let differ = a.gate_proj != b.gate_proj || a.up_proj != b.up_proj;
            let fused = name.contains("_module") || name.contains("gpt_oss");
            assert!(!differ || shares && fused, "{name} to {format}: first projections");
            if !differ {
                assert!(converted.weights == expected, "{name} to {format}: weights differ");
            }
            fused_differ += usize::from(differ);
            assert_eq!((&converted.family, &converted.layout), (&original.family, &original.layout));
            cases += 1;
        }
        assert!(possible.len() >= 4, "{name}: {possible:?}");
        let impossible = WeightFormat::ALL.iter().find(|format| !possible.contains(format));
        if let Some(&format) = impossible {
            let error = convert(&golden(name), format, &output).expect_err("rows are no whole blocks").to_string();
            assert!(error.contains(name) && error.contains("a multiple of"), "{error}");
        }
    }
    assert!(cases > 60 && fused_differ * 5 < cases, "{cases} cases, {fused_differ} of fused tensors");
}

/// Kept as they are on the device, whatever the format.
#[test]
fn a_device_reads_what_was_written() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().join("converted.safetensors");
    let name = "deepseek_v3__t9_h192_i160_e8k2_fp8_hub.safetensors";
    let original = load(&golden(name));
    let h = original.config.hidden_size() as usize;
    let x: Vec<f32> = (0..9 * h).map(|n| (n * 7919 % 1009) as f32 / 504.5 - 1.0).collect();
    for context in [gpu_context(), Some(Context::cpu())].into_iter().flatten() {
        for format in formats(&original.config) {
            convert(&golden(name), format, &output).expect("it can be converted");
            let checkpoint = Checkpoint::open(&output).expect("it was written");
            let mut source = checkpoint.layer(None, 0).expect("its only layer");
            let layer = MoeLayer::load(&context, &mut source, &LayerOptions::default(), |_, _| {})
                .unwrap_or_else(|error| panic!("{format} on {}: {error}", context.device().name));
            assert_eq!(layer.formats(), format.into());
            let expected = original.weights.rounded(&original.config, format).expect("the format holds them");
            let expected = reference::moe_forward(&original.config, &expected, Batch::from(&x[..])).y;
            let largest = expected.iter().fold(0f64, |most, v| most.max(v.abs()));
            let y = layer.forward(&x).expect("the pass runs");
            assert_close(&format!("{format} on {}", context.device().name), &y, &expected, |_| 1e-5 * largest);
        }
    }
}

#[test]
fn errors_are_those_of_the_weights() {
    let folder = tempfile::tempdir().expect("a folder");
    let output = folder.path().join("converted.safetensors");
    let name = "mixtral__t17_h48_i32_e8k2_grad_module.safetensors";
    let original = load(&golden(name));
    for format in ["f32", "f16", "bf16", "int4:g16", "int8:g16:zp"].map(|name| name.parse().expect("a name")) {
        let report = convert(&golden(name), format, &output).expect("it can be converted");
        let rounded = original.weights.rounded(&original.config, format).expect("the format holds them");
        let errors = |before: &[&[f32]], after: &[&[f32]]| {
            let (before, after) = (before.concat(), after.concat());
            let pairs = || before.iter().zip(&after).map(|(&b, &a)| (f64::from(b), f64::from(a)));
            let rms = |of: &dyn Fn((f64, f64)) -> f64| pairs().map(|pair| of(pair).powi(2)).sum::<f64>().sqrt();
            let most = |of: &dyn Fn((f64, f64)) -> f64| pairs().map(|pair| of(pair).abs()).fold(0.0, f64::max);
            (rms(&|(b, a)| a - b) / rms(&|(b, _)| b), most(&|(b, a)| a - b) / most(&|(b, _)| b))
        };
        let of = |w: &wgmoe::MoeWeights| (w.gate_proj.clone(), w.up_proj.clone(), w.down_proj.clone());
        let ((g, u, d), (rg, ru, rd)) = (of(&original.weights), of(&rounded));
        let expected = [errors(&[&g, &u], &[&rg, &ru]), errors(&[&d], &[&rd])];
        assert_eq!(report.len(), 2, "{report:?}");
        for (tensor, (rms, most)) in report.iter().zip(expected) {
            assert!((tensor.rms_error - rms).abs() <= 1e-9 * rms, "{tensor:?}: {rms}");
            assert!((tensor.max_error - most).abs() <= 1e-9 * most, "{tensor:?}: {most}");
            assert_eq!((tensor.from, tensor.to), (WeightFormat::F32, format));
            assert_eq!(format == WeightFormat::F32, tensor.rms_error == 0.0 && tensor.max_error == 0.0, "{tensor:?}");
        }
        let values = (g.len() + u.len() + d.len()) as u64;
        assert_eq!(report.iter().map(|tensor| tensor.bytes_before).sum::<u64>(), 4 * values);
    }
}

/// A small model of three layers, the second of which is dense.
fn model(folder: &Path) -> PathBuf {
    model_with(folder, "")
}

/// As above, with a NaN in one tensor.
fn model_with(folder: &Path, broken: &str) -> PathBuf {
    let (h, i, e) = (32, 32, 4);
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |name: String, shape: Vec<usize>| {
        let count: usize = shape.iter().product();
        let seed = tensors.len() + 1;
        let bytes = (0..count).flat_map(|n| (((n * 31 + seed * 17) % 113) as f32 / 64.0 - 0.8).to_le_bytes());
        let mut bytes: Vec<u8> = bytes.collect();
        if name == broken {
            bytes[20..24].copy_from_slice(&f32::NAN.to_le_bytes());
        }
        tensors.push((name, shape, bytes));
    };
    add("model.embed_tokens.weight".to_owned(), vec![7, h]);
    for layer in [0, 1, 2] {
        let at = format!("model.layers.{layer}.");
        add(format!("{at}self_attn.q_proj.weight"), vec![h, h]);
        if layer == 1 {
            add(format!("{at}mlp.gate_proj.weight"), vec![i, h]);
            continue;
        }
        add(format!("{at}mlp.gate.weight"), vec![e, h]);
        for expert in 0..e {
            add(format!("{at}mlp.experts.{expert}.gate_proj.weight"), vec![i, h]);
            add(format!("{at}mlp.experts.{expert}.up_proj.weight"), vec![i, h]);
            add(format!("{at}mlp.experts.{expert}.down_proj.weight"), vec![h, i]);
        }
    }
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("sizes fit"))
    });
    let content = safetensors::serialize(views, None::<HashMap<String, String>>).expect("it can be written");
    let path = folder.join("model.safetensors");
    std::fs::write(&path, content).expect("it can be written");
    let config = r#"{"model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 32, "num_experts": 4,
        "num_experts_per_tok": 2, "norm_topk_prob": true, "hidden_act": "silu"}"#;
    std::fs::write(folder.join("config.json"), config).expect("it can be written");
    path
}

#[test]
fn layers_with_experts_are_found_and_the_rest_is_left_out() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = model(folder.path());
    let checkpoint = Checkpoint::open(folder.path()).expect("it is sound");
    assert_eq!(checkpoint.layers(None).expect("two have experts"), [0, 2]);
    let output = folder.path().join("converted.safetensors");
    let report = quantize(&checkpoint, None, &[0, 2], WeightFormat::INT4, &output, &mut |_, _| {}).expect("it works");
    assert_eq!(report.len(), 6, "three for each layer: {report:?}");
    assert_eq!(report[0].name, "model.layers.0.mlp.experts.{expert}.gate_proj.weight");
    let converted = Checkpoint::open(&output).expect("it was written");
    assert_eq!(converted.layers(None).expect("both are there"), [0, 2]);
    for layer in [0, 2] {
        let original = checkpoint.load_layer(None, layer).expect("it is sound");
        let expected = original.weights.rounded(&original.config, WeightFormat::INT4).expect("it holds them");
        assert!(converted.load_layer(None, layer).expect("it is sound").weights == expected, "layer {layer}");
    }
    assert!(converted.tensor_names().all(|name| !name.contains("attn") && !name.contains("embed")));
    // Once more from there: what is packed is decoded, and encoded again.
    let again = folder.path().join("again.safetensors");
    quantize(&converted, None, &[2], WeightFormat::F32, &again, &mut |_, _| {}).expect("it works");
    let again = Checkpoint::open(&again).expect("it was written").load_layer(None, 2).expect("it is sound");
    assert!(again.weights == converted.load_layer(None, 2).expect("it is sound").weights);

    let before = std::fs::read(&path).expect("it is there");
    let error = quantize(&checkpoint, None, &[0], WeightFormat::INT4, &path, &mut |_, _| {}).expect_err("its source");
    assert!(matches!(&error, Error::InvalidConfig { field: "output", .. }), "{error}");
    assert!(std::fs::read(&path).expect("it is there") == before, "the source was touched");
    let error =
        quantize(&checkpoint, None, &[1], WeightFormat::INT4, &output, &mut |_, _| {}).expect_err("it is dense");
    assert!(matches!(&error, Error::MissingTensor { .. }), "{error}");
    // A file that was there stays as it was.
    assert_eq!(Checkpoint::open(&output).expect("it is there").layers(None).expect("as before"), [0, 2]);
}

#[test]
fn weights_that_are_no_numbers_are_refused_and_leave_no_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let broken = "model.layers.2.mlp.experts.3.down_proj.weight";
    model_with(folder.path(), broken);
    let checkpoint = Checkpoint::open(folder.path()).expect("its header is sound");
    let output = folder.path().join("converted.safetensors");
    let error = quantize(&checkpoint, None, &[2], WeightFormat::INT4, &output, &mut |_, _| {}).expect_err("a NaN");
    let Error::NonFinite { tensor, index: 5, .. } = &error else { panic!("{error}") };
    assert!(tensor.contains(broken) && tensor.contains(folder.path().to_str().expect("UTF-8")), "{error}");
    let mut names: Vec<_> =
        std::fs::read_dir(folder.path()).expect("it is there").flatten().map(|f| f.file_name()).collect();
    names.sort();
    assert_eq!(names, ["config.json", "model.safetensors"]);
}

/// What the metadata of a converted file claims is not believed.
#[test]
fn packed_tensors_that_are_not_what_they_should_be_are_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    model(folder.path());
    let output = folder.path().join("converted.safetensors");
    convert(folder.path(), WeightFormat::INT4, &output).expect("it works");
    let bytes = std::fs::read(&output).expect("it was written");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header = String::from_utf8(bytes[8..8 + length].to_vec()).expect("JSON");
    let with_header = |header: &str| {
        let changed = folder.path().join("changed.safetensors");
        let mut content = (header.len() as u64).to_le_bytes().to_vec();
        content.extend(header.as_bytes());
        content.extend(&bytes[8 + length..]);
        std::fs::write(&changed, content).expect("it can be written");
        Checkpoint::open(&changed).and_then(|checkpoint| checkpoint.load_layer(None, 0)).err().map(|e| e.to_string())
    };
    assert_eq!(with_header(&header), None);
    for (from, to, expected) in [
        ("\\\":\\\"int4\\\"", "\\\":\\\"int5\\\"", "int5"),
        ("\\\":\\\"int4\\\"", "\\\":\\\"int8\\\"", "shape"),
        ("\\\":\\\"int4\\\"", "\\\":\\\"q4_k\\\"", "256"),
        ("\\\":\\\"int4\\\"", "\\\":4", "packed_weights"),
        ("packed_weights\":\"{", "packed_weights\":\"[", "packed_weights"),
        ("\"U8\",\"shape\":[1,32,20]", "\"I8\",\"shape\":[1,20,32]", "shape"),
    ] {
        assert!(header.contains(from), "{from} in {header}");
        let error = with_header(&header.replacen(from, to, 1)).unwrap_or_else(|| panic!("{to} was accepted"));
        assert!(error.contains(expected) && error.contains("changed.safetensors"), "{to}: {error}");
    }
}
