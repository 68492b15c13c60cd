//! The built-in families against blocks that somebody else's implementation computed, with the f64 reference: what is
//! tested is the descriptions, not an engine.

use safetensors::{Dtype, tensor::TensorView};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use wgmoe::golden::{self, GoldenCase, compare, compare_losses};
use wgmoe::reference::{moe_forward, statistics::statistics};
use wgmoe::{Activation, CapacityLimit, Checkpoint, Error, Family, Form, MoeConfig, RoutingDecision, SharedGate};

fn golden_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("the folder of golden files should be readable");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a folder entry").path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files
}

fn own_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// Runs the reference: the first thing that is wrong, and the relative error of the output.
fn run(case: &GoldenCase) -> (f64, Option<String>) {
    let forward = moe_forward(&case.config, &case.weights, case.batch());
    let to_f32 = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
    let routing = RoutingDecision {
        num_tokens: case.num_tokens,
        topk_experts: forward.router.topk_experts.clone(),
        topk_weights: to_f32(&forward.router.topk_weights),
        shared_weights: to_f32(&forward.router.shared_weights),
        router_logits: to_f32(&forward.router.router_logits),
        ..RoutingDecision::default()
    };
    let verdict = compare(case, &to_f32(&forward.y), &routing, golden::TOLERANCE);
    let sequence = case.tokens_per_sequence.map_or(case.num_tokens, |tokens| tokens as usize);
    let losses = compare_losses(case, &statistics(&case.config, &forward.router, sequence), golden::TOLERANCE);
    (verdict.max_rel_error, verdict.reason.or(losses))
}

/// Every case of a folder: right, or of a family that says why it is not supported.
fn check_folder(folder: &Path) {
    let (mut failures, mut passed, mut unsupported, mut worst) = (Vec::new(), 0, Vec::new(), 0.0f64);
    for path in golden_files(folder) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match GoldenCase::read(&path, None) {
            Ok(case) => match run(&case) {
                (error, None) => {
                    worst = worst.max(error);
                    passed += 1;
                }
                (_, Some(reason)) => failures.push(format!("{name}: {reason}")),
            },
            Err(Error::Unsupported { what, .. }) if what.starts_with("family ") => unsupported.push(name),
            Err(error) => failures.push(format!("{name}: {error}")),
        }
    }
    println!("{}: {passed} cases, worst relative error {worst:.1e}; unsupported: {unsupported:?}", folder.display());
    assert!(failures.is_empty(), "{} of {} failed:\n{}", failures.len(), failures.len() + passed, failures.join("\n"));
}

#[test]
fn the_reference_agrees_with_golden_files() {
    check_folder(&own_folder());
}

/// A larger collection beside the checkout, or where WGMOE_GOLDEN says.
#[test]
fn the_reference_agrees_with_neighbouring_golden_files() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden");
    let folder = std::env::var_os("WGMOE_GOLDEN").map_or(beside, PathBuf::from);
    if folder.is_dir() {
        check_folder(&folder);
    } else {
        println!("no {}: only the cases in tests/golden run", folder.display());
    }
}

/// Families whose descriptions no golden file confirms: they say so themselves.
const FROM_MEMORY: [&str; 9] =
    ["afmoe", "bailing_moe", "dbrx", "ernie4_5_moe", "exaone_moe", "hunyuan_v1_moe", "jamba", "lfm2_moe", "minimax_m2"];

#[test]
fn every_supported_family_has_a_golden_file() {
    let read = |path: &PathBuf| GoldenCase::read(path, None).expect("a case of our own").family;
    let covered: Vec<String> = golden_files(&own_folder()).iter().map(read).collect();
    for family in Family::builtin().iter().filter(|family| family.unsupported().is_none()) {
        let from_memory = FROM_MEMORY.contains(&family.name());
        let is_covered = covered.iter().any(|covered| covered == family.name());
        assert!(is_covered || from_memory, "no case of family {}", family.name());
        assert!(!from_memory || family.toml().contains("from memory"), "{}", family.name());
    }
}

#[test]
fn every_description_in_the_folder_is_built_in_and_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = std::fs::read_to_string(root.join("docs/families.md")).expect("readable");
    let entries = std::fs::read_dir(root.join("src/model/families")).expect("readable");
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a folder entry").path()).collect();
    files.sort();
    let built_in: Vec<&str> = Family::builtin().iter().map(Family::name).collect();
    let names: Vec<String> =
        files.iter().map(|file| file.file_stem().expect("a name").to_string_lossy().into_owned()).collect();
    assert_eq!(built_in, names, "src/model/family/builtin.rs must list the folder");
    for family in Family::builtin() {
        assert!(docs.contains(&format!("| `{}` |", family.name())), "docs/families.md lacks {}", family.name());
        assert!(!family.model_types().is_empty(), "{}", family.name());
        for model_type in family.model_types() {
            assert_eq!(Family::detect(model_type).expect("listed").name(), family.name());
        }
    }
    assert!(matches!(Family::detect("t5"), Err(Error::Unsupported { .. })));
}

#[test]
fn an_unsupported_family_says_why() {
    let zaya = Family::detect("zaya").expect("known by name");
    let message = zaya.layer_config(Path::new("config.json"), b"{}", 0).expect_err("not describable").to_string();
    assert!(message.contains("\"zaya\"") && message.contains("network of several layers"), "{message}");
}

// ---- settings and configurations ----

/// A description with these lines in [routing] and [experts].
fn with(routing: &str, experts: &str) -> String {
    format!(
        "name = \"mine\"\n[detect]\nmodel_type = []\n[sizes]\nhidden_size = {{ from = \"h\" }}\nintermediate_size = \
         {{ from = \"i[{{layer}}]\" }}\nnum_experts = {{ from = \"moe.experts\", default = 8 }}\ntop_k = 2\n[routing]\n\
         scores = \"softmax\"\nrenormalize = true\n{routing}\n[experts]\nactivation = \"silu\"\n{experts}\n[tensors.hub]\n\
         prefix = \"\"\nrouter = \"r\"\ngate_up_proj = \"gu\"\ndown_proj = \"d\"\n"
    )
}

fn family(text: &str) -> Family {
    Family::from_toml(Path::new("mine.toml"), text).unwrap_or_else(|error| panic!("{error}"))
}

fn config_of(text: &str, json: &str, layer: u32) -> Result<MoeConfig, Error> {
    family(text).layer_config(Path::new("config.json"), json.as_bytes(), layer)
}

#[test]
fn settings_compute() {
    let scale = |setting: &str, json: &str, layer| {
        let json = format!("{{\"h\": 16, \"i\": [4, 8], {json}}}");
        config_of(&with(&format!("scale = {setting}"), ""), &json, layer).map(|config| config.routing().scale)
    };
    let value =
        |setting: &str, json: &str, layer| scale(setting, json, layer).unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(value("2.5", "\"a\": 1", 0), 2.5);
    assert_eq!(value("{ from = \"h\", power = -0.5 }", "\"a\": 1", 0), 0.25);
    assert_eq!(
        value("{ from = \"a\", power = 2, times = 3, divided_by = \"b\", plus = -1 }", "\"a\": 4, \"b\": 6", 0),
        7.0
    );
    assert_eq!(value("{ value = 1, divided_by = \"a\" }", "\"a\": 4", 0), 0.25);
    assert_eq!(value("{ value = 1, minus = \"a\" }", "\"a\": 0.25", 0), 0.75);
    assert_eq!(value("{ from = [\"a\", \"b\"] }", "\"a\": null, \"b\": 6", 0), 6.0);
    assert_eq!(value("{ from = \"a\", times = 5, default = 9 }", "\"b\": 1", 0), 9.0);
    assert_eq!(value("{ from = \"a\", times = \"c\", default = 9 }", "\"a\": 1", 0), 9.0);
    assert_eq!(value("{ from = \"a.b[1]\" }", "\"a\": {\"b\": [1, 2]}", 0), 2.0);
    assert_eq!(value("{ from = \"a[{layer}]\" }", "\"a\": 3", 7 - 6), 3.0);
    let map = "{ from = \"a\", map = { true = 2, \"3\" = { from = \"b\" }, \"*\" = 5 } }";
    assert_eq!(value(map, "\"a\": true", 0), 2.0);
    assert_eq!(value(map, "\"a\": 3, \"b\": 4", 0), 4.0);
    assert_eq!(value(map, "\"a\": \"other\"", 0), 5.0);
    let layers = "{ if_layer_below = \"n\", then = 1, else = 2 }";
    assert_eq!((value(layers, "\"n\": 1", 0), value(layers, "\"n\": 1", 1)), (1.0, 2.0));

    let error = |setting: &str, json: &str| scale(setting, json, 0).expect_err("cannot be computed").to_string();
    assert!(error("{ from = [\"a\", \"b\"] }", "\"c\": 1").contains("lacks \"a\" or \"b\""));
    assert!(error("{ from = \"a\" }", "\"a\": [1, 2]").contains("a[{layer}]"));
    assert!(error("{ from = \"a[2]\" }", "\"a\": [1, 2]").contains("2 entries"));
    assert!(error("{ from = \"a\" }", "\"a\": \"x\"").contains("\"a\" of the configuration"));
    assert!(error("{ from = \"a\", times = 2 }", "\"a\": \"x\"").contains("expected a number"));
    assert!(error("{ from = \"a\", map = { x = 1 } }", "\"a\": \"y\"").contains("it knows x"));
}

#[test]
fn absent_options_are_absent() {
    let routing = "num_groups = { from = \"n\" }\nkeep_groups = { from = \"keep\" }\nlogit_softcap = { from = \"cap\" }\n\
                   [routing.capacity]\nfraction = { from = \"share\" }\nnumber = { from = \"most\" }";
    let experts = "form = \"clamped\"\nlimit = { from = \"limit\" }";
    let config =
        |json: &str| config_of(&with(routing, experts), &format!("{{\"h\": 16, \"i\": 4{json}}}"), 0).expect("valid");
    let plain = config(", \"n\": null, \"limit\": 0, \"cap\": 0.0");
    assert_eq!((plain.routing().groups, plain.routing().capacity, plain.routing().logit_softcap), (None, None, None));
    assert_eq!(plain.activation(), Activation::SWIGLU);
    let full = config(", \"n\": 4, \"keep\": 2, \"limit\": 7, \"cap\": 30, \"share\": 0, \"most\": 3");
    assert_eq!(full.routing().groups.map(|groups| (groups.num_groups, groups.keep)), Some((4, 2)));
    assert_eq!(full.routing().capacity.map(|capacity| capacity.limit), Some(CapacityLimit::Number(3)));
    assert_eq!(full.activation().form, Form::Clamped { limit: 7.0 });
}

#[test]
fn configurations_that_contradict_themselves_name_the_key() {
    let routing = "num_groups = { from = \"n\" }\nkeep_groups = { from = \"keep\" }\n[routing.capacity]\nnumber = { from = \"most\" }";
    let field = |json: &str| match config_of(&with(routing, ""), &format!("{{\"h\": 16, \"i\": 4, {json}}}"), 0) {
        Err(Error::InvalidConfig { field, .. }) => field,
        other => panic!("{json}: {other:?}"),
    };
    assert_eq!(field("\"n\": 3, \"keep\": 1"), "num_groups");
    assert_eq!(field("\"n\": 3"), "num_groups", "also where all are kept");
    assert_eq!(field("\"n\": 4, \"keep\": 5"), "keep_groups");
    assert_eq!(field("\"n\": 8, \"keep\": 1"), "top_k");
    assert_eq!(field("\"most\": 0"), "capacity");
    let experts = "special = { count = { from = \"special\" } }";
    assert!(config_of(&with("", experts), "{\"h\": 16, \"i\": 4, \"special\": 2000}", 0).is_err());
    let unknown = with("", "").replace("\"silu\"", "{ from = \"act\" }");
    let message = config_of(&unknown, "{\"h\": 16, \"i\": 4, \"act\": \"mish\"}", 0).expect_err("unknown").to_string();
    assert!(message.contains("mish") && message.contains("gelu_new"), "{message}");
}

// ---- mistakes in descriptions ----

#[test]
fn mistakes_are_named_with_their_line() {
    let good = with("", "");
    family(&good);
    let cases = [
        (good.replace("renormalize = true", "renormalise = true"), "unknown field `renormalise`", "renormalise"),
        (good.replace("\"softmax\"", "\"sofmax\""), "`softmax`", "sofmax"),
        (good.replace("renormalize = true", "renormalize = 3"), "expected a boolean", "renormalize = 3"),
        (good.replace("default = 8", "fallback = 8"), "unknown field `fallback`", "fallback"),
        (good.replace("default = 8", "default = true"), "expected u32", "default = true"),
        (good.replace("from = \"h\"", "from = \"h[\""), "is not a key", "h["),
        (good.replace("from = \"h\"", "from = \"h\", then = 3"), "if_layer_below", "then"),
        (good.replace("router = \"r\"", "router = \"{e}\""), "no placeholder", "{e}"),
        (good.replace("router = \"r\"", "ruter = \"r\""), "unknown field `ruter`", ""),
        (good.replace("gate_up_proj = \"gu\"\n", ""), "either gate_proj and up_proj", ""),
        (good.replace("name = \"mine\"", "name = 7"), "string", "name = 7"),
        (good.replace("\"silu\"", "\"mish\""), "unknown activation \"mish\"", "mish"),
        (good.replace("renormalize = true", "renormalize = true\nkeep_groups = 2"), "needs num_groups", "keep_groups"),
        (good.replace("renormalize = true", "renormalize = true\njitter = 2"), "sparsemixer", "jitter"),
        (
            good.replace("renormalize = true", "renormalize = false\nrenormalize_p = 2"),
            "renormalize is false",
            "renormalize_p",
        ),
        (good.replace("router = \"r\"", "router = \"r\"\nup_proj = \"u\""), "in one tensor", "gate_up_proj"),
        (
            good.replace("router = \"r\"", "router = \"r\"\nflattened = true\nup_bias = \"u{expert}\""),
            "flattened",
            "flattened",
        ),
        (
            good.replace("router = \"r\"", "router = \"r\"\ninterleaved = [\"shared_gate_up_proj\"]"),
            "does not name",
            "interleaved",
        ),
        (good.replace("router = \"r\"", "router = \"r\"\ntransposed = [\"router_bias\"]"), "none of the tensors", ""),
        (good.replace("router = \"r\"", "router = \"r\"\noutput_norm = \"n\""), "in [experts]", "output_norm"),
        (good.replace("router = \"r\"", "router = \"r\"\nshared_gate = \"n\""), "[shared]", "shared_gate"),
        (good.replace("\"silu\"", "\"silu\"\nform = \"clamped\""), "this form needs limit", "form ="),
        (good.replace("\"silu\"", "\"silu\"\nlimit = 7"), "limit needs form", "limit"),
        (good.replace("\"silu\"", "\"silu\"\nform = \"plain\""), "have no gate", "gate_up_proj"),
        (good.replace("gate_up_proj = \"gu\"", "up_proj = \"gu\""), "form = \"plain\"", "up_proj"),
        (good.replace("default = 8", "default = \"h\""), "write { from = \"h\" }", "default ="),
        (good.replace("default = 8", "times = n_experts"), "in quotes", "times"),
        (good.replace("\"silu\"", "\"silu\"\noutput_norm = 1e-6"), "{ epsilon = 1e-6 }", "output_norm"),
        (good.replace("\"silu\"", "\"silu\"\nlatent_size = 4"), "must name latent_in", ""),
        (format!("{good}[shared]\nwidth = 3\n"), "must name shared_down_proj", ""),
        (good.replace("scores = \"softmax\"", "scores = \"hierarchical\""), "needs num_groups", "hierarchical"),
        (
            good.replace("renormalize = true", "renormalize = true\nselect = \"token_table\""),
            "needs vocab_size",
            "select",
        ),
    ];
    for (text, expected, culprit) in cases {
        let message = match Family::from_toml(Path::new("mine.toml"), &text) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("accepted: {expected}"),
        };
        assert!(message.starts_with("mine.toml: line "), "{message}");
        assert!(message.contains(expected), "expected {expected}: {message}");
        if !culprit.is_empty() {
            let line = text.lines().position(|line| line.contains(culprit)).expect("the mistake is there") + 1;
            assert!(message.contains(&format!("line {line}:")), "expected line {line}: {message}");
        }
    }
}

// ---- layouts ----

/// A folder with one tensor file, F32 or bytes, and a configuration.
fn checkpoint(
    tensors: &[(&str, &[usize], Vec<f32>)],
    bytes: &[(&str, Dtype, &[usize], Vec<u8>)],
    json: &str,
) -> TempDir {
    let folder = TempDir::new().expect("temporary folder");
    let f32s: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|v| v.to_le_bytes()).collect()).collect();
    let mut views = Vec::new();
    for ((name, shape, _), data) in tensors.iter().zip(&f32s) {
        views.push((*name, TensorView::new(Dtype::F32, shape.to_vec(), data).expect("consistent")));
    }
    for (name, dtype, shape, data) in bytes {
        views.push((*name, TensorView::new(*dtype, shape.to_vec(), data).expect("consistent")));
    }
    let file = safetensors::serialize(views, None).expect("serializable");
    std::fs::write(folder.path().join("model.safetensors"), file).expect("writable");
    std::fs::write(folder.path().join("config.json"), json).expect("writable");
    folder
}

fn numbers(count: usize, first: f32) -> Vec<f32> {
    (0..count).map(|n| first + n as f32 / 8.0).collect()
}

/// `[rows, columns]` as `[columns, rows]`
fn transposed(values: &[f32], columns: usize) -> Vec<f32> {
    let rows = values.len() / columns;
    (0..values.len()).map(|at| values[at % rows * columns + at / rows]).collect()
}

/// The second example of docs/families.md, with a small model of its kind.
#[test]
fn the_documented_example_reads_what_it_describes() {
    let docs =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/families.md")).expect("readable");
    let toml = docs.split("```toml\n").nth(2).and_then(|rest| rest.split("```").next()).expect("a second example");
    let json = docs.split("```json\n").nth(1).and_then(|rest| rest.split("```").next()).expect("its configuration");
    let published =
        family(toml).layer_config(Path::new("config.json"), json.as_bytes(), 1).expect("the documented model");
    assert_eq!((published.hidden_size(), published.intermediate_size(), published.num_experts()), (2048, 512, 64));
    let shared = published.extras().shared.expect("there");
    assert_eq!((shared.num, shared.intermediate_size, shared.gate), (1, 1024, SharedGate::Sigmoid));
    assert_eq!(published.activation().form, Form::Clamped { limit: 7.0 });
    assert_eq!(published.routing().groups.map(|groups| (groups.num_groups, groups.keep)), Some((8, 4)));

    let (h, i, e) = (4, 2, 3);
    let small = json
        .replace("2048", "4")
        .replace("512", "2")
        .replace("64", "3")
        .replace("\"active\": 6", "\"active\": 2")
        .replace("\"groups\": 8", "\"groups\": 1");
    let (gate, up, down) = (numbers(e * i * h, 1.0), numbers(e * i * h, 100.0), numbers(e * h * i, 200.0));
    let mut wi = Vec::new();
    let mut wo = Vec::new();
    for expert in 0..e {
        let rows = |all: &[f32], row: usize| all[expert * i * h + row * h..][..h].to_vec();
        let both: Vec<f32> = (0..i).flat_map(|row| [rows(&gate, row), rows(&up, row)].concat()).collect();
        wi.extend(transposed(&both, h));
        wo.extend(transposed(&down[expert * h * i..][..h * i], i));
    }
    let folder = checkpoint(
        &[
            ("layers.1.attn.wq.weight", &[2], numbers(2, 0.0)),
            ("layers.1.moe.gate.weight", &[e, h], numbers(e * h, 0.0)),
            ("layers.1.moe.gate.bias", &[1, e], numbers(e, 0.5)),
            ("layers.1.moe.wi", &[e, h, 2 * i], wi),
            ("layers.1.moe.wo", &[e, i, h], wo),
            ("layers.1.dense.gate.weight", &[2 * i, h], numbers(2 * i * h, 1.0)),
            ("layers.1.dense.up.weight", &[2 * i, h], numbers(2 * i * h, 2.0)),
            ("layers.1.dense.down.weight", &[h, 2 * i], numbers(2 * i * h, 3.0)),
            ("layers.1.dense_gate.weight", &[1, h], numbers(h, 4.0)),
        ],
        &[],
        &small,
    );
    let layer = Checkpoint::open(folder.path()).expect("sound").load_layer(Some(&family(toml)), 1).expect("described");
    assert_eq!((&layer.weights.gate_proj, &layer.weights.up_proj, &layer.weights.down_proj), (&gate, &up, &down));
    assert_eq!(layer.weights.extras.selection_bias, Some(numbers(e, 0.5)));
    assert_eq!(layer.weights.extras.shared_gate, Some(numbers(h, 4.0)));
    assert_eq!(layer.weights.extras.shared_up_proj, numbers(2 * i * h, 2.0));
}

#[test]
fn dbrx_merges_experts_and_rows() {
    let (h, i, e) = (4, 2, 3);
    let json = r#"{"model_type": "dbrx", "d_model": 4, "ffn_config": {"ffn_hidden_size": 2, "moe_num_experts": 3,
        "moe_top_k": 2, "moe_normalize_expert_weights": 1.0, "ffn_act_fn": {"name": "silu"}}}"#;
    let down = numbers(e * h * i, 9.0);
    let w2: Vec<f32> = down.chunks(h * i).flat_map(|matrix| transposed(matrix, i)).collect();
    let folder = checkpoint(
        &[
            ("transformer.blocks.0.ffn.router.layer.weight", &[e, h], numbers(e * h, 0.0)),
            ("transformer.blocks.0.ffn.experts.mlp.w1", &[e * i, h], numbers(e * i * h, 1.0)),
            ("transformer.blocks.0.ffn.experts.mlp.v1", &[e * i, h], numbers(e * i * h, 2.0)),
            ("transformer.blocks.0.ffn.experts.mlp.w2", &[e * i, h], w2),
        ],
        &[],
        json,
    );
    let layer = Checkpoint::open(folder.path()).expect("sound").load_layer(None, 0).expect("described");
    assert_eq!((layer.family.as_str(), layer.weights.down_proj), ("dbrx", down));
    assert_eq!(layer.config.routing().renormalize.map(|renormalize| renormalize.p), Some(1.0));
}

#[test]
fn optional_names_alternatives_and_up_first() {
    let (h, i, e) = (4, 2, 2);
    let text = with("", "")
        .replace("\"gu\"", "\"gu\"\nup_first = true\nselection_bias = \"b?\"")
        .replace("router = \"r\"", "router = [\"absent\", \"r\"]");
    let json = "{\"h\": 4, \"i\": 2, \"moe\": {\"experts\": 2}}";
    let tensors = |bias: bool| {
        let mut tensors: Vec<(&str, &[usize], Vec<f32>)> = vec![
            ("r", &[2, 4], numbers(e * h, 0.0)),
            ("gu", &[2, 4, 4], numbers(e * 2 * i * h, 0.0)),
            ("d", &[2, 4, 2], numbers(e * h * i, 0.0)),
        ];
        if bias {
            tensors.push(("b", &[2], numbers(e, 0.0)));
        }
        tensors
    };
    for bias in [false, true] {
        let folder = checkpoint(&tensors(bias), &[], json);
        let layer =
            Checkpoint::open(folder.path()).expect("sound").load_layer(Some(&family(&text)), 0).expect("described");
        assert_eq!(layer.weights.extras.selection_bias.is_some(), bias);
        assert_eq!(layer.weights.up_proj[..i * h], numbers(i * h, 0.0)[..]);
    }
}

/// fp4 with the scales beside it, and fp8 with wrong ones.
#[test]
fn packed_weights_are_unpacked_or_refused() {
    let text = with("", "");
    let json = "{\"h\": 32, \"i\": 1, \"moe\": {\"experts\": 2}}";
    let rest: Vec<(&str, &[usize], Vec<f32>)> =
        vec![("r", &[2, 32], numbers(64, 0.0)), ("d", &[2, 32, 1], numbers(64, 0.0))];
    let open = |bytes: &[(&str, Dtype, &[usize], Vec<u8>)]| {
        let folder = checkpoint(&rest, bytes, json);
        Checkpoint::open(folder.path()).expect("sound").load_layer(Some(&family(&text)), 0)
    };
    let packed = vec![0x32; 2 * 2 * 16]; // 1, 1.5, 1, 1.5, ...
    let layer =
        open(&[("gu", Dtype::U8, &[2, 2, 16], packed), ("gu_scale", Dtype::U8, &[2, 2, 1], vec![127, 128, 129, 127])]);
    let layer = layer.expect("fp4");
    assert_eq!((layer.weights.gate_proj[..2].to_vec(), layer.weights.gate_proj[33]), (vec![1.0, 1.5], 6.0));
    assert_eq!(layer.weights.up_proj[..2], [2.0, 3.0]);
    assert!(layer.stored_as.contains(&"MXFP4".to_owned()));
    let wrong =
        [("gu", Dtype::F8_E4M3, &[2, 2, 32][..], vec![0x38; 128]), ("gu_scale_inv", Dtype::U8, &[3, 5], vec![127; 15])];
    assert!(matches!(open(&wrong), Err(Error::BadTensor { .. })));
    let alone = [("gu", Dtype::F8_E4M3, &[2, 2, 32][..], vec![0x38; 128])];
    assert!(matches!(open(&alone), Err(Error::Unsupported { .. })));
}
