//! `wgmoe inspect` from outside, on the embedded CPU engine: what it says of golden layers is compared with numbers that
//! this file computes itself, in plain loops, from the tensors of the golden file. Nothing of the library's is used but
//! reading them.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;

use command::{assert_code, json, stderr, stdout, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::Output;
use wgmoe::model::checkpoint::{read_integers, read_tensor};
use wgmoe::{Error, Trace};

/// Golden layers whose tensors lie there one by one, as f32: file, prefix, names of gate, up and down, and the tensor that
/// choices are ranked with beside the scores.
const LAYERS: [(&str, &str, [&str; 3], Option<&str>); 3] = [
    ("mixtral__t33_h48_i32_e8k2_skew_hub", "model.layers.0.block_sparse_moe", ["w1", "w3", "w2"], None),
    ("qwen3_moe__t13_h56_i24_e8k3_nonorm_hub", "model.layers.0.mlp", ["gate_proj", "up_proj", "down_proj"], None),
    (
        "deepseek_v3__t13_h56_i24_e8k3_negbias_hub",
        "model.layers.0.mlp",
        ["gate_proj", "up_proj", "down_proj"],
        Some("gate.e_score_correction_bias"),
    ),
];
/// f32 arithmetic in another order.
const TOLERANCE: f64 = 2e-5;

fn wgmoe(args: &[&str]) -> Output {
    command::wgmoe(args).env("WGMOE_ADAPTER", "cpu").output().expect("the binary should start")
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).with_extension("safetensors")
}

fn input(file: &Path) -> String {
    format!("{}:io.hidden_states", text(file))
}

/// A golden layer's tensors in f64, and its choices, best first.
struct Layer {
    hidden: usize,
    tokens: usize,
    top_k: usize,
    experts: usize,
    x: Vec<f64>,
    /// `[tokens][top_k]` (expert, weight)
    choices: Vec<Vec<(usize, f64)>>,
    /// `[experts]` gate, up, down
    weights: Vec<[Vec<f64>; 3]>,
    /// Sum of the routed experts, as the other implementation has it.
    routed: Vec<f64>,
    output: Vec<f64>,
}

fn read_layer((name, prefix, names, bias): (&str, &str, [&str; 3], Option<&str>)) -> Layer {
    let file = golden(name);
    let tensor = |name: &str| -> (Vec<f64>, Vec<usize>) {
        let (values, shape) = read_tensor(&file, Some(name)).unwrap_or_else(|error| panic!("{error}"));
        (values.into_iter().map(f64::from).collect(), shape)
    };
    let (logits, shape) = tensor("io.router_logits");
    let (tokens, experts) = (shape[0], shape[1]);
    let indices = read_integers(&file, Some("io.topk_indices")).expect("it is there");
    let (weights, shape) = tensor("io.topk_weights");
    let top_k = shape[1];
    let bias = bias.map(|bias| tensor(&format!("{prefix}.{bias}")).0);
    // Logits rank as their scores do, unless something is added to these.
    let rank = |t: usize, e: usize| match &bias {
        Some(bias) => 1.0 / (1.0 + (-logits[t * experts + e]).exp()) + bias[e],
        None => logits[t * experts + e],
    };
    let mut choices = Vec::new();
    for t in 0..tokens {
        let mut of_token: Vec<(usize, f64)> =
            (t * top_k..(t + 1) * top_k).map(|a| (indices[a] as usize, weights[a])).collect();
        of_token.sort_by(|a, b| rank(t, b.0).total_cmp(&rank(t, a.0)));
        choices.push(of_token);
    }
    let matrix = |e: usize, name: &str| tensor(&format!("{prefix}.experts.{e}.{name}.weight")).0;
    let (x, _) = tensor("io.hidden_states");
    Layer {
        hidden: x.len() / tokens,
        tokens,
        top_k,
        experts,
        x,
        choices,
        weights: (0..experts).map(|e| names.map(|name| matrix(e, name))).collect(),
        routed: tensor("io.experts_output").0,
        output: tensor("io.output").0,
    }
}

impl Layer {
    /// What expert `e` makes of token `t`: `down (silu(gate x) * (up x))`.
    fn expert(&self, e: usize, t: usize) -> Vec<f64> {
        let x = &self.x[t * self.hidden..(t + 1) * self.hidden];
        let [gate, up, down] = &self.weights[e];
        let times = |matrix: &[f64], v: &[f64]| -> Vec<f64> {
            let mut out = Vec::new();
            for row in matrix.chunks(v.len()) {
                let mut sum = 0.0;
                for (a, b) in row.iter().zip(v) {
                    sum += a * b;
                }
                out.push(sum);
            }
            out
        };
        let mut inner = times(up, x);
        for (up, gate) in inner.iter_mut().zip(times(gate, x)) {
            *up *= gate / (1.0 + (-gate).exp());
        }
        times(down, &inner)
    }

    fn load(&self) -> Vec<f64> {
        let mut load = vec![0.0; self.experts];
        for &(e, _) in self.choices.iter().flatten() {
            load[e] += 1.0;
        }
        load
    }
}

fn length(v: &[f64]) -> f64 {
    let mut sum = 0.0;
    for v in v {
        sum += v * v;
    }
    sum.sqrt()
}

fn entropy(parts: &[f64]) -> f64 {
    let all: f64 = parts.iter().sum();
    let mut bits = 0.0;
    for part in parts.iter().filter(|part| **part > 0.0) {
        bits -= part / all * (part / all).log2();
    }
    bits
}

/// The numbers of a JSON array, or of an array of arrays, or a single one.
fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        value => vec![value.as_f64().unwrap_or(f64::NAN)],
    }
}

/// Each number is within the tolerance of what it should be, relative to the largest.
fn close(found: &Value, expected: &[f64]) -> Result<(), String> {
    let found = numbers(found);
    if found.len() != expected.len() {
        return Err(format!("{} numbers, expected {}", found.len(), expected.len()));
    }
    let scale = expected.iter().fold(1e-12f64, |most, v| most.max(v.abs()));
    for (n, (found, expected)) in found.iter().zip(expected).enumerate() {
        let is_close = (found - expected).abs() <= TOLERANCE * scale;
        if !is_close {
            return Err(format!("number {n} is {found}, expected {expected}"));
        }
    }
    Ok(())
}

#[test]
fn comparing_can_fail() {
    let three = serde_json::json!([1.0, [2.0, 3.0]]);
    assert_eq!(close(&three, &[1.0, 2.0, 3.0]), Ok(()));
    assert!(close(&three, &[1.0, 2.0, 3.001]).is_err());
    assert!(close(&three, &[1.0, 2.0]).is_err());
    assert!(close(&three, &[1.0, 2.0, f64::NAN]).is_err());
    assert!(close(&serde_json::json!([1.0, null, 3.0]), &[1.0, 2.0, 3.0]).is_err());
    assert!(close(&Value::Null, &[0.0]).is_err());
}

#[test]
fn golden_layers_are_what_plain_loops_find() {
    for of_layer in LAYERS {
        let layer = read_layer(of_layer);
        let file = golden(of_layer.0);
        let output = wgmoe(&["inspect", text(&file), "--input", &input(&file), "--capacity", "1.5", "--json", "-"]);
        assert_code(&output, 0);
        let inspection = json(&output);
        let found = &inspection["layers"][0];
        let check = |what: &str, found: &Value, expected: &[f64]| {
            close(found, expected).unwrap_or_else(|error| panic!("{}: {what}: {error}", of_layer.0));
        };
        assert_eq!(
            (inspection["schema"].as_u64(), inspection["num_tokens"].as_u64()),
            (Some(1), Some(layer.tokens as u64))
        );
        check_choices(&layer, found, &check);
        check_load(&layer, found, &check);
        check_capacity(&layer, &found["capacity"], &check);
        check_contributions(&layer, &found["contributions"], &check);
        check_similarity(&layer, &found["similarity"], &check);
    }
}

type Check<'a> = &'a dyn Fn(&str, &Value, &[f64]);

fn check_choices(layer: &Layer, found: &Value, check: Check) {
    let all = || layer.choices.iter().flatten();
    check("experts", &found["experts"], &all().map(|&(e, _)| e as f64).collect::<Vec<_>>());
    check("expert_weights", &found["expert_weights"], &all().map(|&(_, w)| w).collect::<Vec<_>>());
    let entropies: Vec<f64> =
        layer.choices.iter().map(|c| entropy(&c.iter().map(|&(_, w)| w).collect::<Vec<_>>())).collect();
    check("token_entropy", &found["token_entropy"], &entropies);
    let mean = entropies.iter().sum::<f64>() / layer.tokens as f64;
    check("entropy.mean", &found["entropy"]["mean"], &[mean]);
    for rank in 0..layer.top_k {
        let mut weights: Vec<f64> = layer.choices.iter().map(|c| c[rank].1).collect();
        weights.sort_by(f64::total_cmp);
        let by_rank = &found["weights_by_rank"][rank];
        check("mean weight", &by_rank["mean"], &[weights.iter().sum::<f64>() / layer.tokens as f64]);
        let ends = [weights[0], weights[layer.tokens - 1]];
        check("least and most", &serde_json::json!([by_rank["min"], by_rank["max"]]), &ends);
        // The middle one of an odd number.
        assert_eq!(layer.tokens % 2, 1);
        check("median", &by_rank["median"], &[weights[layer.tokens / 2]]);
        assert_eq!(numbers(&by_rank["histogram"]).iter().sum::<f64>(), layer.tokens as f64);
    }
    for e in 0..layer.experts {
        let mut tokens: Vec<(f64, usize)> = Vec::new();
        for (t, choices) in layer.choices.iter().enumerate() {
            tokens.extend(choices.iter().filter(|(expert, _)| *expert == e).map(|&(_, w)| (w, t)));
        }
        tokens.sort_by(|a, b| b.0.total_cmp(&a.0));
        let tokens: Vec<f64> = tokens.into_iter().map(|(_, t)| t as f64).collect();
        check("tokens_of_expert", &found["tokens_of_expert"][e], &tokens);
    }
    let mut together = vec![0.0; layer.experts * layer.experts];
    for choices in &layer.choices {
        for (a, _) in choices {
            for (b, _) in choices {
                together[a * layer.experts + b] += 1.0;
            }
        }
    }
    check("coactivation", &found["coactivation"], &together);
}

fn check_load(layer: &Layer, found: &Value, check: Check) {
    let load = layer.load();
    let found = &found["load"];
    let mean = (layer.tokens * layer.top_k) as f64 / layer.experts as f64;
    let most = load.iter().copied().fold(0.0, f64::max);
    let variance = load.iter().map(|n| (n - mean) * (n - mean)).sum::<f64>() / layer.experts as f64;
    check("tokens_per_expert", &found["tokens_per_expert"], &load);
    check("mean", &found["mean"], &[mean]);
    check("max_over_mean", &found["max_over_mean"], &[most / mean]);
    check("coefficient_of_variation", &found["coefficient_of_variation"], &[variance.sqrt() / mean]);
    check("entropy", &found["entropy"], &[entropy(&load)]);
    check("max_entropy", &found["max_entropy"], &[(layer.experts as f64).log2()]);
    let experts = |wanted: &dyn Fn(f64) -> bool| {
        (0..layer.experts).filter(|&e| wanted(load[e])).map(|e| e as f64).collect::<Vec<_>>()
    };
    check("dead", &found["dead"], &experts(&|n| n == 0.0));
    let mut hot = numbers(&found["hot"]);
    hot.sort_by(f64::total_cmp);
    assert_eq!(hot, experts(&|n| n > 0.0 && n >= 2.0 * mean));
}

fn check_capacity(layer: &Layer, found: &Value, check: Check) {
    let load = layer.load();
    let mean = (layer.tokens * layer.top_k) as f64 / layer.experts as f64;
    let capacity = (1.5 * mean).ceil();
    let dropped: Vec<f64> = load.iter().map(|n| (n - capacity).max(0.0)).collect();
    let sum: f64 = dropped.iter().sum();
    check("capacity", &found["capacity"], &[capacity]);
    check("dropped_per_expert", &found["dropped_per_expert"], &dropped);
    check("dropped", &found["dropped"], &[sum]);
    check("share", &found["share"], &[sum / (layer.tokens * layer.top_k) as f64]);
    let mut left = vec![capacity; layer.experts];
    let mut without = 0.0;
    for choices in &layer.choices {
        let mut kept = false;
        for &(e, _) in choices {
            kept |= left[e] > 0.0;
            left[e] -= 1.0;
        }
        without += if kept { 0.0 } else { 1.0 };
    }
    check("tokens_without_expert", &found["tokens_without_expert"], &[without]);
    let most = load.iter().copied().fold(0.0, f64::max);
    check("factor_without_drops", &found["factor_without_drops"], &[most / mean]);
}

fn check_contributions(layer: &Layer, found: &Value, check: Check) {
    let (mut squares, mut along) = (vec![0.0; layer.experts], vec![0.0; layer.experts]);
    let mut all = 0.0;
    for (t, choices) in layer.choices.iter().enumerate() {
        let added: Vec<Vec<f64>> =
            choices.iter().map(|&(e, w)| layer.expert(e, t).into_iter().map(|v| v * w).collect()).collect();
        // The other implementation's own sum.
        let sum = &layer.routed[t * layer.hidden..(t + 1) * layer.hidden];
        all += length(sum).powi(2);
        for (&(e, _), added) in choices.iter().zip(&added) {
            squares[e] += length(added).powi(2);
            for (v, s) in added.iter().zip(sum) {
                along[e] += v * s;
            }
        }
    }
    check("norm", &found["norm"], &squares.iter().map(|s: &f64| s.sqrt()).collect::<Vec<_>>());
    check("share", &found["share"], &along.iter().map(|a| a / all).collect::<Vec<_>>());
    check("routed_norm", &found["routed_norm"], &[all.sqrt()]);
    check("output_norm", &found["output_norm"], &[length(&layer.output)]);
    check("shares add up", &serde_json::json!(numbers(&found["share"]).iter().sum::<f64>()), &[1.0]);
}

fn check_similarity(layer: &Layer, found: &Value, check: Check) {
    let vectors: Vec<Vec<f64>> = layer.weights.iter().map(|matrices| matrices.concat()).collect();
    let mut cosines = Vec::new();
    for a in &vectors {
        for b in &vectors {
            let mut dot = 0.0;
            for (a, b) in a.iter().zip(b) {
                dot += a * b;
            }
            cosines.push(dot / (length(a) * length(b)));
        }
    }
    check("cosine", &found["cosine"], &cosines);
    let beside: f64 = cosines.iter().sum::<f64>() - layer.experts as f64;
    let pairs = (layer.experts * (layer.experts - 1)) as f64;
    // Close to the scale of cosines, not to that of their mean.
    check("mean", &serde_json::json!([1.0, found["mean"]]), &[1.0, beside / pairs]);
    let pair = numbers(&found["most_alike"]);
    let most = (0..cosines.len()).filter(|n| n / layer.experts != n % layer.experts).map(|n| cosines[n]);
    let of_pair = cosines[pair[0] as usize * layer.experts + pair[1] as usize];
    assert!(pair[0] != pair[1] && (of_pair - most.fold(-1.0, f64::max)).abs() < TOLERANCE);
    assert_eq!(found["weights_compared"], found["weights_of_expert"]);
}

#[test]
fn people_see_loads_texts_and_definitions() {
    let folder = tempfile::tempdir().expect("a folder");
    let labels = folder.path().join("labels.txt");
    std::fs::write(&labels, (0..33).map(|t| format!("word{}\n", t % 5)).collect::<String>()).expect("written");
    let file = golden(LAYERS[0].0);
    let arguments = ["inspect", text(&file), "--input", &input(&file), "--labels", text(&labels)];
    let output = wgmoe(&[&arguments[..], &["--capacity", "1.25", "--similarity-rows", "8"]].concat());
    assert_code(&output, 0);
    let words = stdout(&output);
    for word in [
        "8 experts, top-2",
        "hot: 3",
        "coefficient of variation",
        "word",
        " x",
        "capacity ",
        "dead: ",
        "similarity",
        "a sample of",
        "█",
    ] {
        assert!(words.contains(word), "{word} is missing:\n{words}");
    }
    // But for paths, however long they are.
    let fits = |line: &str| line.chars().count() <= 120 || line.contains(text(&file));
    assert!(words.lines().all(fits), "{words}");
    assert!(!words.contains('\u{1b}'), "no colours, as nobody sees them: {words}");
}

#[test]
fn a_saved_trace_is_the_routing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("trace.json");
    let file = golden(LAYERS[1].0);
    let output = wgmoe(&["inspect", text(&file), "--input", &input(&file), "--save-trace", text(&path), "--json", "-"]);
    assert_code(&output, 0);
    assert!(stderr(&output).contains("trace saved"), "{}", stderr(&output));
    let trace = Trace::read(&path).expect("it was just written");
    let found = &json(&output)["layers"][0];
    let [layer] = &trace.layers[..] else { panic!("{trace:?}") };
    assert_eq!((layer.layer, layer.num_experts, layer.top_k, trace.num_tokens()), (0, 8, 3, 13));
    let experts: Vec<f64> = layer.experts.iter().map(|&e| f64::from(e)).collect();
    assert_eq!(close(&found["experts"], &experts), Ok(()));
    let weights: Vec<f64> = layer.weights.iter().flatten().map(|&w| f64::from(w)).collect();
    assert_eq!(close(&found["expert_weights"], &weights), Ok(()));
    let damaged = std::fs::read_to_string(&path).expect("there").replace("\"num_experts\":8", "\"num_experts\":2");
    std::fs::write(&path, damaged).expect("written");
    assert!(matches!(Trace::read(&path), Err(Error::BadTrace { .. })));
}

#[test]
fn all_layers_are_rows_of_a_map() {
    let file = golden(LAYERS[2].0);
    let output = wgmoe(&["inspect", text(&file), "--input", &input(&file), "--all-layers", "--capacity", "1"]);
    assert_code(&output, 0);
    let words = stdout(&output);
    assert!(words.contains("deepseek_v3"), "{words}");
}

#[test]
fn arguments_that_cannot_be_used_are_named() {
    let file = golden(LAYERS[0].0);
    let x = input(&file);
    let folder = tempfile::tempdir().expect("a folder");
    let labels = folder.path().join("labels.txt");
    std::fs::write(&labels, "one\ntwo\n").expect("written");
    let table: &[(&[&str], i32, &str)] = &[
        (&["no-such-file", "--input", &x], 2, "no-such-file"),
        (&[text(&file), "--input", "no-such-input"], 2, "no-such-input"),
        (&[text(&file), "--input", &x, "--labels", "no-such-labels"], 2, "no-such-labels"),
        (&[text(&file), "--input", &x, "--labels", text(&labels)], 2, "2 texts, expected one for each of 33 tokens"),
        (&[text(&file), "--input", &x, "--capacity", "0"], 2, "1.25"),
        (&[text(&file), "--input", &x, "--save-trace", "no-such-folder/t.json"], 2, "no-such-folder"),
        (&[text(&file), "--input", &x, "--layer", "7"], 1, "layer"),
        (&[text(&file), "--input", &x, "--layer", "0", "--all-layers"], 2, "--all-layers"),
    ];
    for (arguments, code, named) in table {
        let output = wgmoe(&[&["inspect"], *arguments].concat());
        assert_code(&output, *code);
        assert!(stderr(&output).contains(named), "{arguments:?} should name {named:?}:\n{}", stderr(&output));
        assert!(!stderr(&output).contains("panicked"));
    }
}
