//! Families from GGUF files: what llama.cpp's converter makes of a configuration leads to the same layer as the
//! configuration itself. The tables say what the converter writes for each architecture.

#[path = "support/gguf.rs"]
mod gguf_file;
mod support;

use gguf_file::{Gguf, I32, Meta};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use support::Values;
use tempfile::TempDir;
use wgmoe::model::quantize::quantize;
use wgmoe::{Checkpoint, Error, Family, LoadedLayer, MoeConfig, MoeWeights, WeightFormat};

fn load(file: &Gguf, layer: u32) -> Result<LoadedLayer, Error> {
    let folder = TempDir::new().expect("temporary folder");
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).expect("writable");
    Checkpoint::open(&path)?.load_layer(None, layer)
}

/// The same by way of a file that holds the layer's experts as f32.
fn convert(file: &Gguf, layer: u32) -> Result<LoadedLayer, Error> {
    let folder = TempDir::new().expect("temporary folder");
    let [path, converted] = ["model.gguf", "converted.safetensors"].map(|name| folder.path().join(name));
    fs::write(&path, file.bytes()).expect("writable");
    quantize(&Checkpoint::open(&path)?, None, &[layer], WeightFormat::F32, &converted, &mut |_, _| {})?;
    Checkpoint::open(&converted)?.load_layer(None, layer)
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A golden file of a family, and how its configuration becomes metadata: GGUF key, and key of config.json, or `=` and
/// a value. What the converter does for every architecture is in `converted`.
struct Case {
    golden: &'static str,
    architecture: &'static str,
    keys: &'static [(&'static str, &'static str)],
}

const fn case(golden: &'static str, architecture: &'static str, keys: &'static [(&'static str, &'static str)]) -> Case {
    Case { golden, architecture, keys }
}

const WIDTH: (&str, &str) = ("expert_feed_forward_length", "moe_intermediate_size");
const OWN_WIDTH: (&str, &str) = ("expert_feed_forward_length", "intermediate_size");
const SHARED_WIDTH: (&str, &str) = ("expert_shared_feed_forward_length", "shared_expert_intermediate_size");
const SCALE: (&str, &str) = ("expert_weights_scale", "routed_scaling_factor");
const NORM: (&str, &str) = ("expert_weights_norm", "norm_topk_prob");
const SHARED: (&str, &str) = ("expert_shared_count", "n_shared_experts");
const SHARED_NUM: (&str, &str) = ("expert_shared_count", "num_shared_experts");
const SIGMOID: (&str, &str) = ("expert_gating_func", "=2");
const SOFTMAX: (&str, &str) = ("expert_gating_func", "=1");

const CASES: &[Case] = &[
    case("mixtral__t7_h72_i40_e8k2_hub", "llama", &[]),
    case("mixtral__t7_h72_i40_e8k2_hub", "minimax-01", &[]),
    case("qwen2_moe__t1_h40_i24_e8k2_hub", "qwen2moe", &[WIDTH, SHARED_WIDTH]),
    case("qwen3_moe__t1_h40_i24_e8k4_hub", "qwen3moe", &[WIDTH]),
    case("qwen3_vl_moe__t13_h56_i24_e8k4_hub", "qwen3vlmoe", &[WIDTH]),
    case("qwen3_next__t1_h40_i24_e8k4_hub", "qwen3next", &[WIDTH, SHARED_WIDTH]),
    case("qwen3_5_moe__t13_h56_i24_e8k4_module", "qwen35moe", &[WIDTH, SHARED_WIDTH]),
    case("olmoe__t1_h40_i24_e8k8_hub", "olmoe", &[]),
    case("deepseek_v2__t1_h40_i24_e8k3_hub", "deepseek2", &[WIDTH, SCALE, SHARED]),
    case(
        "deepseek_v2__t1_h40_i24_e8k3_hub",
        "deepseek2",
        &[WIDTH, SCALE, SHARED, SOFTMAX, ("expert_weights_norm", "=false")],
    ),
    case("deepseek_v3__t13_h56_i24_e8k3_negbias_hub", "deepseek2", &[WIDTH, SCALE, NORM, SHARED, SIGMOID]),
    case("deepseek_v3__t13_h56_i24_e8k3_nonorm_nogroup_hub", "deepseek2", &[WIDTH, SCALE, SHARED, SIGMOID]),
    case(
        "deepseek_v3__t13_h56_i24_e8k3_negbias_hub",
        "deepseek2",
        &[WIDTH, SCALE, NORM, SHARED, ("vocab_size", "=154880")],
    ),
    case("deepseek_v3__t13_h56_i24_e8k3_negbias_hub", "glm-dsa", &[WIDTH, SCALE, NORM, SHARED, SIGMOID]),
    case("deepseek_v3__t13_h56_i24_e8k3_negbias_hub", "dots1", &[WIDTH, SCALE, NORM, SHARED, SIGMOID]),
    case("glm4v_moe__t13_h56_i24_e8k3_module", "glm4moe", &[WIDTH, SCALE, NORM, SHARED]),
    case("mistral4__t1_h40_i24_e8k3_module", "mistral4", &[WIDTH, SCALE, NORM, SHARED]),
    case(
        "deepseek_v4__t1_h40_i24_e8k3_hub",
        "deepseek4",
        &[
            WIDTH,
            SCALE,
            NORM,
            SHARED,
            ("expert_gating_func", "=4"),
            ("hash_layer_count", "=0"),
            ("swiglu_clamp_exp", "[swiglu_limit"),
            ("swiglu_clamp_shexp", "[swiglu_limit"),
        ],
    ),
    case(
        "deepseek_v4__t13_h56_i24_e8k3_hash_module",
        "deepseek4",
        &[
            WIDTH,
            SCALE,
            NORM,
            SHARED,
            ("expert_gating_func", "=4"),
            ("hash_layer_count", "=1"),
            ("swiglu_clamp_exp", "[swiglu_limit"),
        ],
    ),
    case("gpt_oss__t33_h64_i48_e8k4_module", "gpt-oss", &[OWN_WIDTH]),
    case("granitemoe__t1_h40_i24_e8k2_hub", "granitemoe", &[]),
    case(
        "granitemoeshared__t13_h56_i24_e8k4_hub",
        "granitemoe",
        &[("expert_shared_feed_forward_length", "shared_intermediate_size")],
    ),
    case(
        "granitemoehybrid__t13_h56_i24_e8k4_module",
        "granitehybrid",
        &[("expert_shared_feed_forward_length", "shared_intermediate_size")],
    ),
    case("phimoe__t1_h40_i24_e8k2_hub", "phimoe", &[]),
    case(
        "bailing_hybrid__t13_h56_i24_e8k2_hub",
        "bailingmoe2",
        &[
            WIDTH,
            SCALE,
            ("expert_weights_norm", "moe_renormalize"),
            ("expert_group_count", "num_expert_group"),
            SHARED_NUM,
            SIGMOID,
        ],
    ),
    case("llama4__t33_h64_i48_e8k1_module", "llama4", &[OWN_WIDTH]),
    case(
        "nemotron_h__t33_h64_i48_e8k3_latent_hub",
        "nemotron_h_moe",
        &[
            WIDTH,
            SCALE,
            NORM,
            SHARED,
            ("moe_latent_size", "moe_latent_size"),
            ("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"),
        ],
    ),
    case(
        "nemotron_h__t13_h56_i24_e8k3_nolatent_module",
        "nemotron_h_moe",
        &[WIDTH, SCALE, NORM, SHARED, ("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size")],
    ),
    case("gemma4__t33_h64_i48_e8k4_module", "gemma4", &[WIDTH]),
    case("cohere2_moe__t1_h40_i24_e8k3_hub", "cohere2moe", &[OWN_WIDTH, NORM, SHARED_NUM]),
    case("cohere2_moe__t13_h56_i24_e8k3_sigmoid_noshared_module", "cohere2moe", &[OWN_WIDTH, NORM]),
    case("kimi_linear__t13_h56_i24_e8k2_hub", "kimi-linear", &[WIDTH, SCALE, SHARED_NUM, SIGMOID]),
    case(
        "step3p7__t1_h40_i24_e8k3_module",
        "step35",
        &[
            WIDTH,
            ("expert_weights_scale", "moe_router_scaling_factor"),
            ("expert_weights_norm", "=true"),
            ("expert_shared_feed_forward_length", "share_expert_dim"),
            ("swiglu_clamp_exp", "swiglu_limits"),
            ("swiglu_clamp_shexp", "swiglu_limits_shared"),
        ],
    ),
    case(
        "hy_v3__t1_h40_i24_e8k3_hub",
        "hy_v3",
        &[
            WIDTH,
            ("expert_weights_norm", "=true"),
            ("expert_weights_scale", "router_scaling_factor"),
            ("expert_shared_feed_forward_length", "moe_intermediate_size"),
            SIGMOID,
        ],
    ),
    case(
        "hy_v4__t13_h56_i24_e8k3_hub",
        "hy_v4",
        &[WIDTH, SCALE, NORM, SHARED, SIGMOID, ("swiglu_clamp_exp", "[swiglu_limit")],
    ),
    case(
        "glm5_next__t33_h64_i48_e8k3_module",
        "glm5-next",
        &[WIDTH, SCALE, NORM, SHARED, ("swiglu_clamp_exp", "[swiglu_limit"), ("swiglu_clamp_shexp", "[swiglu_limit")],
    ),
];

/// The first of these keys of a configuration.
fn find<'a>(config: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    let inner = config.get("text_config").unwrap_or(config);
    keys.iter().find_map(|key| inner.get(key).or_else(|| config.get(key))).filter(|value| !value.is_null())
}

fn meta(value: &Value) -> Meta {
    match value {
        Value::Bool(v) => Meta::Bool(*v),
        Value::Number(v) if v.is_u64() => Meta::U32(v.as_u64().expect("a number") as u32),
        Value::Number(v) => Meta::F32(v.as_f64().expect("a number") as f32),
        Value::Array(values) => {
            Meta::f32s(&values.iter().map(|v| v.as_f64().unwrap_or(0.0) as f32).collect::<Vec<_>>())
        }
        other => panic!("{other} is nothing for metadata"),
    }
}

/// Metadata as llama.cpp's converter writes them.
fn converted(case: &Case, config: &Value) -> Gguf {
    let mut file = Gguf::new(case.architecture);
    let key = |key: &str| format!("{}.{key}", case.architecture);
    for (name, from) in [
        ("embedding_length", &["hidden_size"][..]),
        ("feed_forward_length", &["intermediate_size"]),
        ("expert_count", &["num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"]),
        ("expert_used_count", &["num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_top_k"]),
        ("expert_group_count", &["n_group"]),
        ("expert_group_used_count", &["topk_group"]),
        ("attention.layer_norm_rms_epsilon", &["rms_norm_eps"]),
    ] {
        if let Some(value) = find(config, from) {
            file.key(&key(name), meta(value));
        }
    }
    match find(config, &["expert_selection_fn", "scoring_func", "score_func"]).and_then(Value::as_str) {
        Some("softmax") => file.set(&key("expert_gating_func"), Meta::U32(1)),
        Some("sigmoid") => file.set(&key("expert_gating_func"), Meta::U32(2)),
        _ => {}
    }
    for (name, from) in case.keys {
        let value = match (from.strip_prefix('='), from.strip_prefix('[')) {
            (Some(literal), _) => meta(&serde_json::from_str(literal).expect("a value")),
            (_, Some(each)) => match find(config, &[each]) {
                Some(limit) => meta(&Value::Array(vec![limit.clone(); 4])),
                None => continue,
            },
            _ => match find(config, &[from]) {
                Some(value) => meta(value),
                None => continue,
            },
        };
        file.set(&key(name), value);
    }
    // Scales are floats whatever the configuration has.
    for (_, value) in file.metadata.iter_mut().filter(|(name, _)| name.ends_with(b"weights_scale")) {
        if let Meta::U32(whole) = value {
            *value = Meta::F32(*whole as f32);
        }
    }
    if let Some(rows) = find(config, &["vocab_size"]).and_then(Value::as_u64) {
        file.key("tokenizer.ggml.tokens", Meta::texts(&vec!["x"; rows as usize]));
    }
    file
}

/// Tensors of a layer as llama.cpp calls them.
fn add_tensors(file: &mut Gguf, layer: &LoadedLayer, number: u32, fused: bool) {
    let (c, w, x) = (&layer.config, &layer.weights, &layer.weights.extras);
    let size = |n: u32| n as usize;
    let [h, i, e, d] = [c.hidden_size(), c.intermediate_size(), c.num_experts(), c.expert_size()].map(size);
    let mut add = |name: &str, shape: &[usize], values: &[f32]| {
        if !values.is_empty() {
            file.f32(&format!("blk.{number}.{name}"), shape, values);
        }
    };
    let some = |values: &Option<Vec<f32>>| values.clone().unwrap_or_default();
    add("attn_q.weight", &[h, h], &vec![0.5; h * h]);
    add("ffn_gate_inp.weight", &[e, h], &w.router);
    add("ffn_gate_inp.bias", &[e], &some(&w.router_bias));
    add(if layer.family == "hy_v3" { "exp_probs_b" } else { "exp_probs_b.bias" }, &[e], &some(&x.selection_bias));
    if fused {
        let halves = w.gate_proj.chunks(i * d).zip(w.up_proj.chunks(i * d));
        add("ffn_gate_up_exps.weight", &[e, 2 * i, d], &halves.flat_map(|(g, u)| [g, u].concat()).collect::<Vec<_>>());
    } else {
        add("ffn_gate_exps.weight", &[e, i, d], &w.gate_proj);
        add("ffn_up_exps.weight", &[e, i, d], &w.up_proj);
    }
    add("ffn_down_exps.weight", &[e, d, i], &w.down_proj);
    add("ffn_gate_exps.bias", &[e, i], &some(&x.gate_bias));
    add("ffn_up_exps.bias", &[e, i], &some(&x.up_bias));
    add("ffn_down_exps.bias", &[e, d], &some(&x.down_bias));
    add("ffn_latent_down.weight", &[d, h], &some(&x.latent_in));
    add("ffn_latent_up.weight", &[h, d], &some(&x.latent_out));
    add("ffn_gate_inp.scale", &[h], &some(&x.router_norm));
    add("ffn_down_exps.scale", &[e], &some(&x.per_expert_scale));
    add("pre_ffw_norm_2.weight", &[h], &some(&x.expert_norm));
    add("post_ffw_norm_2.weight", &[h], &some(&x.routed_norm));
    if let Some(shared) = &c.extras().shared {
        let v = size(shared.intermediate_size);
        add("ffn_gate_shexp.weight", &[v, h], &x.shared_gate_proj);
        add("ffn_up_shexp.weight", &[v, h], &x.shared_up_proj);
        add("ffn_down_shexp.weight", &[h, v], &x.shared_down_proj);
        add("ffn_gate_inp_shexp.weight", &[h], &some(&x.shared_gate));
    }
    if let Some(table) = &x.token_table {
        let bytes = table.iter().flat_map(|id| id.to_le_bytes()).collect();
        let shape = [table.len() / size(c.top_k()), size(c.top_k())];
        file.tensor(&format!("blk.{number}.ffn_gate_tid2eid.weight"), I32, &shape, bytes);
    }
}

#[test]
fn a_layer_is_the_same_as_from_safetensors() {
    let mut failures = Vec::new();
    for case in CASES {
        let checkpoint = Checkpoint::open(&golden(&format!("{}.safetensors", case.golden))).expect("a golden file");
        let number = checkpoint.metadata("layer_idx").and_then(|n| n.parse().ok()).unwrap_or(0);
        let expected = checkpoint.load_layer(None, number).expect("a golden file");
        // Python writes infinities, which JSON does not have.
        let config = checkpoint.metadata("config").expect("there").replace("Infinity", "null");
        let config: Value = serde_json::from_str(&config).expect("JSON");
        let family = Family::named(&expected.family).expect("built in");
        for fused in [false, true] {
            if fused && !family.layout_names().contains(&"gguf_fused") {
                continue;
            }
            let mut file = converted(case, &config);
            add_tensors(&mut file, &expected, number, fused);
            let name = format!("{} as {}, fused: {fused}", case.golden, case.architecture);
            // What is converted is the same layer still.
            let converted = convert(&file, number).map(|found| (found, "converted"));
            for result in [load(&file, number).map(|found| (found, "as it is")), converted] {
                let (found, how) = match result {
                    Ok(found) => found,
                    Err(error) => {
                        failures.push(format!("{name}: {error}"));
                        continue;
                    }
                };
                if found.family != expected.family {
                    failures.push(format!("{name}, {how}: {} instead of {}", found.family, expected.family));
                }
                if found.config != expected.config {
                    let (found, expected) = (found.config, &expected.config);
                    failures.push(format!("{name}, {how}:\n  {found:?}\n  instead of\n  {expected:?}"));
                }
                if found.weights != expected.weights {
                    failures.push(format!("{name}, {how}: other weights"));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

/// Families of which no golden file has a layer, or none that llama.cpp could convert: family, configuration as it is
/// published, and what becomes of it.
const CONFIGURATIONS: &[(&str, &str, Case)] = &[
    (
        "afmoe",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2,
            "route_norm": true, "route_scale": 2.826, "score_func": "sigmoid", "num_shared_experts": 1}"#,
        case(
            "",
            "afmoe",
            &[WIDTH, ("expert_weights_norm", "route_norm"), ("expert_weights_scale", "route_scale"), SHARED_NUM],
        ),
    ),
    (
        "bailing_moe",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2,
            "norm_topk_prob": true, "num_shared_experts": 2}"#,
        case("", "bailingmoe", &[WIDTH, NORM, ("expert_weights_scale", "=1.0"), SHARED_NUM]),
    ),
    (
        "dbrx",
        r#"{"d_model": 8, "ffn_config": {"ffn_hidden_size": 4, "moe_num_experts": 6, "moe_top_k": 4,
            "moe_normalize_expert_weights": 1, "ffn_act_fn": {"name": "silu"}}}"#,
        case(
            "",
            "dbrx",
            &[
                ("embedding_length", "d_model"),
                ("feed_forward_length", "=4"),
                ("expert_count", "=6"),
                ("expert_used_count", "=4"),
            ],
        ),
    ),
    (
        "deepseek_v2",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 160, "num_experts_per_tok": 6,
            "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
            "n_shared_experts": 2}"#,
        case("", "deepseek2", &[WIDTH, SCALE, SHARED]),
    ),
    (
        "deepseek_v3",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 16, "num_experts_per_tok": 6,
            "n_group": 8, "topk_group": 4, "norm_topk_prob": true, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5,
            "n_shared_experts": 1}"#,
        case("", "deepseek32", &[WIDTH, SCALE, NORM, SHARED]),
    ),
    (
        "ernie4_5_moe",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "intermediate_size": 32, "moe_num_experts": 6, "moe_k": 3,
            "moe_num_shared_experts": 2}"#,
        case(
            "",
            "ernie4_5-moe",
            &[
                WIDTH,
                ("expert_used_count", "moe_k"),
                ("expert_shared_count", "moe_num_shared_experts"),
                ("expert_shared_feed_forward_length", "=8"),
            ],
        ),
    ),
    (
        "exaone_moe",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": true, "scoring_func": "sigmoid", "routed_scaling_factor": 2.5,
            "num_shared_experts": 1}"#,
        case("", "exaone-moe", &[WIDTH, SCALE, NORM, SHARED_NUM, ("expert_shared_feed_forward_length", "=4")]),
    ),
    (
        "hunyuan_v1_moe",
        r#"{"hidden_size": 8, "intermediate_size": 4, "moe_intermediate_size": [4, 4], "num_experts": 6,
            "moe_topk": [3, 3], "num_shared_expert": [1, 1]}"#,
        case(
            "",
            "hunyuan-moe",
            &[
                ("expert_feed_forward_length", "=4"),
                ("expert_used_count", "=3"),
                ("expert_shared_feed_forward_length", "intermediate_size"),
                ("expert_shared_count", "=1"),
            ],
        ),
    ),
    (
        "jamba",
        r#"{"hidden_size": 8, "intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2}"#,
        case("", "jamba", &[]),
    ),
    (
        "laguna",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2,
            "norm_topk_prob": true, "moe_routed_scaling_factor": 2.5, "moe_router_logit_softcapping": 0.0,
            "moe_apply_router_weight_on_input": false, "shared_expert_intermediate_size": 5}"#,
        case(
            "",
            "laguna",
            &[
                WIDTH,
                ("expert_weights_norm", "=true"),
                ("expert_weights_scale", "moe_routed_scaling_factor"),
                SHARED_WIDTH,
                SIGMOID,
            ],
        ),
    ),
    (
        "lfm2_moe",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "num_experts": 6, "num_experts_per_tok": 2,
            "norm_topk_prob": true, "use_expert_bias": true, "routed_scaling_factor": 1.0}"#,
        case("", "lfm2moe", &[WIDTH, SIGMOID]),
    ),
    (
        "mimo_v2_flash",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": true, "scoring_func": "sigmoid", "routed_scaling_factor": null}"#,
        case("", "mimo2", &[WIDTH]),
    ),
    (
        "minimax_m2",
        r#"{"hidden_size": 8, "intermediate_size": 4, "num_local_experts": 6, "num_experts_per_tok": 2,
            "scoring_func": "sigmoid"}"#,
        case("", "minimax-m2", &[OWN_WIDTH]),
    ),
    (
        "minimax_m3_vl",
        r#"{"hidden_size": 8, "intermediate_size": 4, "num_local_experts": 6, "num_experts_per_tok": 2,
            "scoring_func": "sigmoid", "n_shared_experts": 2, "shared_intermediate_size": 8, "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702, "routed_scaling_factor": 2.0}"#,
        case("", "minimax-m3", &[OWN_WIDTH, SCALE, ("expert_weights_norm", "=true"), SHARED]),
    ),
    (
        "mistral4",
        r#"{"hidden_size": 8, "moe_intermediate_size": 4, "n_routed_experts": 6, "num_experts_per_tok": 2, "n_group": 1,
            "topk_group": 1, "norm_topk_prob": true, "scoring_func": "softmax", "routed_scaling_factor": 1.0,
            "n_shared_experts": 1}"#,
        case("", "deepseek2", &[WIDTH, SCALE, NORM, SHARED]),
    ),
];

#[test]
fn a_configuration_becomes_the_same_layer() {
    let mut failures = Vec::new();
    for (n, (family, json, case)) in CONFIGURATIONS.iter().enumerate() {
        let family = Family::named(family).expect("built in");
        let config = family.layer_config(Path::new("config.json"), json.as_bytes(), 1).expect("as published");
        let expected = LoadedLayer {
            weights: weights(&config, family, &mut Values(n as u64)),
            config,
            family: family.name().to_owned(),
            model_type: None,
            layout: String::new(),
            prefix: String::new(),
            stored_as: Vec::new(),
        };
        let mut file = converted(case, &serde_json::from_str(json).expect("JSON"));
        add_tensors(&mut file, &expected, 1, false);
        match load(&file, 1) {
            Ok(found) if (&found.family, &found.config) != (&expected.family, &expected.config) => {
                let [found, expected] = [found, expected].map(|layer| format!("{} {:?}", layer.family, layer.config));
                failures.push(format!("{}:\n  {found}\n  instead of\n  {expected}", family.name()));
            }
            Ok(found) if found.weights != expected.weights => failures.push(format!("{}: weights", family.name())),
            Ok(_) => {}
            Err(error) => failures.push(format!("{} as {}: {error}", family.name(), case.architecture)),
        }
    }
    assert!(failures.is_empty(), "{} failed:\n{}", failures.len(), failures.join("\n"));
}

/// Weights with what the family's layouts name and the layer has a use for, among router, bias and shared experts.
fn weights(config: &MoeConfig, family: &Family, values: &mut Values) -> MoeWeights {
    let mut weights = values.weights(config);
    let [h, e] = [config.hidden_size(), config.num_experts()].map(|n| n as usize);
    if family.toml().contains("selection_bias = ") {
        weights.extras.selection_bias = Some(values.even(e));
    }
    if let Some(shared) = &config.extras().shared {
        let v = shared.intermediate_size as usize;
        let [gate, up, down] = [0; 3].map(|_| values.even(v * h));
        let x = &mut weights.extras;
        (x.shared_gate_proj, x.shared_up_proj, x.shared_down_proj) = (gate, up, down);
    }
    weights
}

#[test]
fn every_architecture_is_tried() {
    let tried: Vec<&Case> = CASES.iter().chain(CONFIGURATIONS.iter().map(|(_, _, case)| case)).collect();
    for family in Family::builtin() {
        for architecture in family.gguf_architectures() {
            assert!(tried.iter().any(|case| case.architecture == architecture), "{architecture} of {}", family.name());
        }
    }
}

fn docs() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/families.md")).expect("readable")
}

#[test]
fn every_architecture_is_documented() {
    let docs = docs();
    let section = docs.split("## GGUF files").nth(1).expect("the section").split("\n## ").next().expect("its text");
    for family in Family::builtin() {
        let names: Vec<String> = family.gguf_architectures().iter().map(|name| format!("`{name}`")).collect();
        let (row, left_out) =
            (format!("| `{}` | {} |", family.name(), names.join(", ")), format!("`{}`", family.name()));
        let documented = if names.is_empty() { section.contains(&left_out) } else { section.contains(&row) };
        assert!(documented || family.unsupported().is_some(), "docs/families.md lacks {row}");
    }
}

#[test]
fn the_documented_example_reads_what_it_describes() {
    let docs = docs();
    let toml = |n: usize| docs.split("```toml\n").nth(n).and_then(|rest| rest.split("```").next()).expect("an example");
    let json = docs.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("its configuration");
    let text = format!("{}\n{}", toml(2), toml(3));
    let globex = Family::from_toml(Path::new("globex.toml"), &text).unwrap_or_else(|error| panic!("{error}"));
    let mut file = Gguf::new("globex").with(
        "globex",
        &[
            ("embedding_length", Meta::U32(2048)),
            ("expert_feed_forward_length", Meta::U32(512)),
            ("expert_count", Meta::U32(64)),
            ("expert_used_count", Meta::U32(6)),
            ("expert_shared_feed_forward_length", Meta::U32(1024)),
            ("expert_group_count", Meta::U32(8)),
            ("expert_group_used_count", Meta::U32(4)),
            ("expert_gating_func", Meta::U32(2)),
            ("expert_weights_scale", Meta::F32(2.5)),
            ("expert_weights_norm", Meta::Bool(true)),
            ("swiglu_clamp_exp", Meta::f32s(&[0.0, 7.0, 7.0])),
        ],
    );
    // In one expert only the first number is not zero: as large a file as it needs, no larger.
    let f16 = |name: &str, shape: &[usize], file: &mut Gguf| {
        let mut data = vec![0; shape.iter().product::<usize>() * 2];
        data[..2].copy_from_slice(&half::f16::ONE.to_le_bytes());
        file.tensor(&format!("blk.1.{name}"), 1, shape, data);
    };
    for (name, shape) in [
        ("ffn_gate_inp.weight", &[64, 2048][..]),
        ("exp_probs_b.bias", &[64]),
        ("ffn_gate_exps.weight", &[64, 512, 2048]),
        ("ffn_up_exps.weight", &[64, 512, 2048]),
        ("ffn_down_exps.weight", &[64, 2048, 512]),
        ("ffn_gate_shexp.weight", &[1024, 2048]),
        ("ffn_up_shexp.weight", &[1024, 2048]),
        ("ffn_down_shexp.weight", &[2048, 1024]),
        ("ffn_gate_inp_shexp.weight", &[2048]),
    ] {
        f16(name, shape, &mut file);
    }
    let folder = TempDir::new().expect("temporary folder");
    let path = folder.path().join("globex.gguf");
    fs::write(&path, file.bytes()).expect("writable");
    let checkpoint = Checkpoint::open(&path).expect("sound");
    let source = checkpoint.layer(Some(&globex), 1).unwrap_or_else(|error| panic!("{error}"));
    let expected = globex.layer_config(Path::new("config.json"), json.as_bytes(), 1).expect("documented");
    assert_eq!(source.config(), &expected);
}

/// A description that has the second documented example and this after it.
fn described(gguf: &str) -> Result<Family, Error> {
    let docs = docs();
    let example = docs.split("```toml\n").nth(2).and_then(|rest| rest.split("```").next()).expect("an example");
    Family::from_toml(Path::new("mine.toml"), &format!("{example}\n{gguf}"))
}

#[test]
fn mistakes_in_the_section_are_named_with_their_line() {
    let docs = docs();
    let good = docs.split("```toml\n").nth(3).and_then(|rest| rest.split("```").next()).expect("an example");
    described(good).unwrap_or_else(|error| panic!("{error}"));
    let layout = &good[good.find("[tensors.gguf]").expect("a layout")..];
    let without_layout = &good[..good.find("[tensors.gguf]").expect("a layout")];
    for (text, expected, at) in [
        (good.replace("d_model =", "d_modell ="), "no setting of this family reads \"d_modell\"", "d_modell"),
        (
            good.replace("\"moe.width\"", "\"moe.widht\""),
            "no setting of this family reads \"moe.widht\"",
            "\"moe.widht",
        ),
        (good.replace("\"moe.width\"", "moe.width"), "unknown field `width`", ""),
        (good.replace("architecture", "architektur"), "unknown field `architektur`", "architektur"),
        (good.replace("architecture = [\"globex\"]", ""), "missing field `architecture`", "[gguf]"),
        (good.replace("\"2\" = true", "\"2\" = 7"), "expected a boolean", "when = ["),
        (good.replace("from = \"expert_count\"", "form = \"expert_count\""), "unknown field `form`", "{ form = "),
        (good.replace("[tensors.gguf]", "[tensors.other]"), "[gguf] needs a layout [tensors.gguf]", "architecture"),
        (without_layout.to_owned(), "[gguf] needs a layout [tensors.gguf]", "architecture"),
        (layout.to_owned(), "this layout needs [gguf]", "prefix = \"blk"),
        (layout.replace("[tensors.gguf]", "[tensors.gguf_fused]"), "this layout needs [gguf]", "prefix = \"blk"),
    ] {
        let message = described(&text).expect_err(expected).to_string();
        assert!(message.starts_with("mine.toml: ") && message.contains(expected), "{expected}: {message}");
        let whole = format!(
            "{}\n{text}",
            docs.split("```toml\n").nth(2).unwrap_or_default().split("```").next().unwrap_or_default()
        );
        let line = whole.lines().position(|line| line.contains(at)).expect("the line") + 1;
        assert!(at.is_empty() || message.contains(&format!("line {line}:")), "line {line}, {expected}: {message}");
    }
}
