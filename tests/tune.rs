//! Tuning: candidates that a device can run, files that nobody has to trust, and choices that reach the plan. How a race
//! is decided is tested beside its code, without a clock; nothing here depends on how long something takes.

mod support;

use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use support::{Values, assert_close, assert_same_bits, config, gpu_context};
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest, ShapeClass, TunedChoices, variant};
use wgmoe::tune::{Doing, Identity, Job, SCHEMA};
use wgmoe::{
    Context, Error, LayerOptions, MatmulChoice, MatmulVariant, MoeConfig, MoeLayer, Tuning, WeightFormat, reference,
};

/// Any device that meets the floor.
fn any_device() -> impl Strategy<Value = DeviceProfile> {
    let subgroup_size = prop_oneof![Just(None), (2..=7u32).prop_map(|log| Some(1 << log))];
    (256..=2048u32, (16 << 10)..=(128u32 << 10), subgroup_size, any::<bool>()).prop_map(
        |(max_invocations, max_workgroup_storage, subgroup_size, software)| DeviceProfile {
            max_invocations,
            max_workgroup_storage,
            subgroup_size,
            software,
            ..DeviceProfile::webgpu_floor()
        },
    )
}

fn request(choice: MatmulChoice) -> MatmulRequest {
    MatmulRequest { choice: Some(choice), ..MatmulRequest::default() }
}

/// A request that has only this measured.
fn tuned(shape: ShapeClass, format: WeightFormat, choice: MatmulChoice) -> MatmulRequest {
    let mut choices = TunedChoices::default();
    assert!(choices.insert(shape, format, choice));
    MatmulRequest { tuned: Some(Arc::new(choices)), ..MatmulRequest::default() }
}

proptest! {
    #[test]
    fn candidates_run_on_the_device_and_the_tables_choice_is_the_first(
        device in any_device(),
        (num_experts, top_k) in (1..=1024u32).prop_flat_map(|experts| (Just(experts), 1..=experts.min(16))),
        num_tokens in prop_oneof![1..=40u32, 1..=5000u32, Just(u32::MAX)],
    ) {
        let candidates = variant::candidates(top_k, num_experts, num_tokens, &device);
        let table = variant::choose(top_k, num_experts, num_tokens, &device, &MatmulRequest::default());
        prop_assert_eq!(candidates[0], table);
        prop_assert!(candidates.len() > 1, "there is something to choose");
        prop_assert_eq!(candidates.iter().collect::<HashSet<_>>().len(), candidates.len());
        let config = config([64, 48, num_experts, top_k], true);
        for choice in candidates {
            request(choice).check(&device).expect("the device can run it");
            request(choice).check_tokens(num_tokens).expect("the batch can do without a sort, or is sorted");
            prop_assert!(choice.workgroup_bytes() <= device.max_workgroup_storage.into());
            prop_assert!(!choice.needs_subgroups() || device.subgroup_size.is_some());
            if num_tokens <= 5000 {
                let shape = ShapeClass::of(&config, num_tokens);
                let request = tuned(shape, WeightFormat::F16, choice);
                let plan = LayerPlan::new(&config, WeightFormat::F16, &device, &request).expect("it fits");
                let pass = plan.plan(num_tokens).expect("it fits");
                prop_assert_eq!((pass.matmul, pass.tuned), (choice, true));
                for dispatch in pass.dispatches {
                    prop_assert!(dispatch.kernel.workgroup_size <= device.max_invocations);
                }
            }
        }
    }

    #[test]
    fn classes_are_powers_of_two_around_what_they_hold(
        (num_experts, top_k) in (1..=512u32).prop_flat_map(|experts| (Just(experts), 1..=experts.min(16))),
        (hidden, intermediate) in (1..=9000u32, 1..=9000u32),
        num_tokens in prop_oneof![1..=40u32, any::<u32>()],
    ) {
        let class = ShapeClass::of(&config([hidden, intermediate, num_experts, top_k], true), num_tokens.max(1));
        prop_assert_eq!(class.few_tokens, num_tokens <= variant::FEW_TOKENS);
        for (bucket, size) in [(class.hidden_size, hidden), (class.intermediate_size, intermediate)] {
            prop_assert!(bucket.is_power_of_two() && bucket >= size && bucket < 2 * size.max(1));
        }
        prop_assert!(class.rows_per_expert.is_power_of_two());
    }
}

/// What a caller asks for is held to the device's workgroup memory, too.
#[test]
fn a_tile_larger_than_the_workgroup_memory_is_refused() {
    let device = DeviceProfile { max_invocations: 1024, ..DeviceProfile::webgpu_floor() };
    let large = MatmulChoice::Tiled { tile_m: 128, tile_n: 128 };
    let needed = (128 * 5 + 128 * 4) * 16;
    let refused = |device: &DeviceProfile| request(large).check(device).expect_err("it does not fit");
    assert!(matches!(refused(&device), Error::LimitExceeded { required, available: 16384, .. } if required == needed));
    let exact = DeviceProfile { max_workgroup_storage: needed as u32, ..device.clone() };
    request(large).check(&exact).expect("it just fits");
    refused(&DeviceProfile { max_workgroup_storage: needed as u32 - 1, ..device });
}

const CHOICE: MatmulChoice = MatmulChoice::Tiled { tile_m: 64, tile_n: 32 };

#[test]
fn a_measured_choice_goes_before_the_table_and_after_the_caller() {
    let device = DeviceProfile::webgpu_floor();
    let config = config([64, 48, 8, 2], true);
    let tuned = tuned(ShapeClass::of(&config, 100), WeightFormat::F16, CHOICE);
    let matmul = |format, request: &MatmulRequest, tokens| {
        let plan =
            LayerPlan::new(&config, format, &device, request).and_then(|plan| plan.plan(tokens)).expect("it fits");
        (plan.matmul, plan.tuned)
    };
    let table = |tokens| matmul(WeightFormat::F16, &MatmulRequest::default(), tokens);
    assert_ne!(table(100).0, CHOICE, "or this test shows nothing");
    assert_eq!(matmul(WeightFormat::F16, &tuned, 100), (CHOICE, true));
    assert_eq!(matmul(WeightFormat::F16, &tuned, 65), (CHOICE, true), "17 to 32 rows are one class");
    assert_eq!(matmul(WeightFormat::F16, &tuned, 1000), table(1000));
    assert_eq!(matmul(WeightFormat::F16, &tuned, 1), table(1));
    assert_eq!(matmul(WeightFormat::F32, &tuned, 100), table(100), "measured for other weights");

    for &variant in &[MatmulVariant::Vec, MatmulVariant::Tiled] {
        let pinned = MatmulRequest { variant: Some(variant), ..MatmulRequest::default() };
        let both = MatmulRequest { variant: Some(variant), ..tuned.clone() };
        assert_eq!(matmul(WeightFormat::F16, &both, 100), matmul(WeightFormat::F16, &pinned, 100));
    }
    let exact = MatmulChoice::Tiled { tile_m: 16, tile_n: 64 };
    let both = MatmulRequest { choice: Some(exact), ..tuned };
    assert_eq!(matmul(WeightFormat::F16, &both, 100), (exact, false));
}

#[test]
fn measured_choices_that_the_device_cannot_run_are_refused() {
    let device = DeviceProfile::webgpu_floor();
    let config = config([64, 48, 8, 2], true);
    let (few, many) = (ShapeClass::of(&config, 4), ShapeClass::of(&config, 100));
    let unsorted = MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: false };
    let plan = |shape, choice| {
        LayerPlan::new(&config, WeightFormat::F16, &device, &tuned(shape, WeightFormat::F16, choice)).map(drop)
    };
    plan(few, unsorted).expect("few tokens need no sort");
    assert!(matches!(plan(many, unsorted), Err(Error::InvalidConfig { field: "tile", .. })));
    assert!(matches!(plan(few, MatmulChoice::Subgroup { subgroup_size: 8 }), Err(Error::Unsupported { .. })));
    let huge = MatmulChoice::Tiled { tile_m: u32::MAX - 3, tile_n: u32::MAX - 3 };
    assert!(matches!(plan(many, huge), Err(Error::InvalidConfig { field: "tile", .. })));
}

/// Shared experts have every token; what was measured of routed ones says nothing about them.
#[test]
fn dense_tiles_keep_the_table() {
    let device = DeviceProfile::webgpu_floor();
    let shared = wgmoe::SharedExperts {
        num: 1,
        intermediate_size: 48,
        activation: wgmoe::Activation::SWIGLU,
        gate: wgmoe::SharedGate::None,
        average: false,
    };
    let extras = wgmoe::LayerExtras { shared: Some(shared), ..wgmoe::LayerExtras::default() };
    let config = config([64, 48, 8, 2], true).with_extras(extras).expect("valid");
    let kernels = |request: &MatmulRequest| {
        let plan = LayerPlan::new(&config, WeightFormat::F16, &device, request).expect("it fits");
        let dense = plan.plan(100).expect("it fits").dispatches.into_iter().filter(|d| d.name.starts_with("shared"));
        dense.map(|d| format!("{} {:?}", d.kernel.label, d.kernel.overrides)).collect::<Vec<_>>()
    };
    let tuned = tuned(ShapeClass::of(&config, 100), WeightFormat::F16, CHOICE);
    assert_eq!(kernels(&tuned), kernels(&MatmulRequest::default()));
    assert!(!kernels(&tuned).is_empty());
}

/// A file of this device with one entry, for layers of 64 by 48 and 17 to 32 rows.
fn file(context: &Context) -> Value {
    json!({
        "schema": SCHEMA,
        "device": Identity::of(context.device()),
        "date": "2026-11-25",
        "entries": [{
            "shape": { "few_tokens": false, "rows_per_expert": 32, "hidden_size": 64, "intermediate_size": 64 },
            "weights": "f16",
            "layer": "a layer",
            "tokens": [100],
            "chosen": { "choice": { "kind": "tiled", "tile_m": 64, "tile_n": 32 }, "median_s": 0.001, "runs": 7 },
            "default": { "choice": { "kind": "tiled", "tile_m": 32, "tile_n": 64 }, "median_s": 0.002, "runs": 7 },
            "runner_up": null,
            "candidates": 2,
            "tried": 2,
        }],
    })
}

fn write(path: &Path, content: &Value) {
    std::fs::write(path, serde_json::to_vec_pretty(content).expect("JSON")).expect("the folder is writable");
}

#[test]
fn a_file_survives_and_its_choice_reaches_a_layer_of_its_class_only() {
    let Some(context) = gpu_context() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let (first, second) = (folder.path().join("a.json"), folder.path().join("no/such/folder/b.json"));
    write(&first, &file(&context));
    let tuning = Tuning::load(&first, &context).expect("it is of this device");
    tuning.save(&second).expect("folders are made");
    assert_eq!(Tuning::load(&second, &context).expect("just written"), tuning);
    let written: Value = serde_json::from_slice(&std::fs::read(&second).expect("it is there")).expect("JSON");
    assert_eq!(written, file(&context));
    assert_eq!((tuning.entries().len(), tuning.date()), (1, "2026-11-25"));
    assert_eq!(tuning.entries()[0].gain(), Some(2.0));

    let tuning = Some(Arc::new(tuning));
    let config = config([64, 48, 8, 2], true);
    let mut values = Values(3);
    let weights = values.weights(&config);
    let layer = |format, matmul, tuning: &Option<Arc<Tuning>>| {
        let options = LayerOptions { weights: format, matmul, tuning: tuning.clone(), ..LayerOptions::default() };
        MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("it fits")
    };
    let chosen = |layer: &MoeLayer, tokens| layer.plan(tokens).expect("it fits").matmul;
    let with = layer(WeightFormat::F16, None, &tuning);
    let without = layer(WeightFormat::F16, None, &None);
    assert_eq!(chosen(&with, 100), CHOICE);
    assert_eq!(chosen(&with, 10), chosen(&without, 10));
    let other = layer(WeightFormat::F32, None, &tuning);
    assert_eq!(chosen(&other, 100), chosen(&without, 100));

    // Pinned is pinned: a token has the same bits with a tuning as without.
    let x = values.floats(100 * 64);
    let pinned = [&tuning, &None].map(|tuning| layer(WeightFormat::F16, Some(MatmulVariant::Vec), tuning));
    let [a, b] = pinned.map(|layer| layer.forward(&x).expect("it runs"));
    assert_same_bits("pinned", &a, &b);

    // The CPU engine has nothing to choose, and takes the same options.
    let options = LayerOptions { tuning, ..LayerOptions::default() };
    MoeLayer::with_options(&Context::cpu(), config, &weights, &options).expect("the tuning does not concern it");
}

#[test]
fn damaged_foreign_and_hostile_files_are_typed_errors() {
    let Some(context) = gpu_context() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tuning.json");
    let good = serde_json::to_string(&file(&context)).expect("JSON");
    let edited = |edit: &dyn Fn(&mut Value)| {
        let mut value = file(&context);
        edit(&mut value);
        value.to_string()
    };
    let entry = |edit: &dyn Fn(&mut Value)| edited(&|value| edit(&mut value["entries"][0]));
    let choice = |choice: Value| entry(&|entry| entry["chosen"]["choice"] = choice.clone());
    let device = |field: &str| edited(&|value| value["device"][field] = json!("another"));
    let subgroup = context.gpu().and_then(|gpu| gpu.profile().subgroup_size).unwrap_or(4);
    let cases: Vec<(&str, String, &str)> = vec![
        ("empty", String::new(), "damaged"),
        ("half", good[..good.len() / 2].to_owned(), "damaged"),
        ("a tail", format!("{good} x"), "damaged"),
        ("not JSON", "schema = 1".to_owned(), "damaged"),
        ("bytes", "\u{0}\u{1}\u{2}".to_owned(), "damaged"),
        ("another thing", "[]".to_owned(), "damaged"),
        ("nested", "[".repeat(100_000), "damaged"),
        ("too large", format!("{good}{}", " ".repeat(1 << 20)), "more than 1048576 bytes"),
        ("no schema", edited(&|v| drop(v.as_object_mut().map(|v| v.remove("schema")))), "schema"),
        ("another schema", edited(&|v| v["schema"] = json!(SCHEMA + 1)), "the schema is 2, expected 1"),
        ("a newer schema with other fields", json!({"schema": 7, "new": true}).to_string(), "the schema is 7"),
        ("another adapter", device("name"), "the adapter is \"another\""),
        ("another backend", device("backend"), "the backend is \"another\""),
        ("another driver", device("driver"), "the driver is \"another\""),
        ("another version", device("wgmoe_version"), "the version of wgmoe is \"another\""),
        ("no device", edited(&|v| drop(v.as_object_mut().map(|v| v.remove("device")))), "device"),
        ("an unknown field", edited(&|v| v["more"] = json!(1)), "unknown field"),
        ("an unknown field of an entry", entry(&|e| e["more"] = json!(1)), "unknown field"),
        (
            "an unknown field of a choice",
            choice(json!({"kind": "tiled", "tile_m": 32, "tile_n": 64, "x": 1})),
            "unknown",
        ),
        ("a missing size", choice(json!({"kind": "tiled", "tile_m": 32})), "tile_n"),
        ("an unknown kind", choice(json!({"kind": "fast"})), "unknown variant"),
        ("no date", edited(&|v| v["date"] = json!("\u{1b}[2J")), "the date"),
        ("a string for a number", choice(json!({"kind": "tiled", "tile_m": "32", "tile_n": 64})), "damaged"),
        ("a negative size", choice(json!({"kind": "tiled", "tile_m": -32, "tile_n": 64})), "damaged"),
        ("a size of 2^40", choice(json!({"kind": "tiled", "tile_m": 1u64 << 40, "tile_n": 64})), "damaged"),
        ("a size of zero", choice(json!({"kind": "tiled", "tile_m": 0, "tile_n": 64})), "not possible here"),
        (
            "the largest sizes",
            choice(json!({"kind": "tiled", "tile_m": u32::MAX - 3, "tile_n": u32::MAX - 3})),
            "possible",
        ),
        ("more lanes than there are", choice(json!({"kind": "tiled", "tile_m": 512, "tile_n": 512})), "possible"),
        (
            "more memory than there is",
            choice(json!({"kind": "tiled", "tile_m": 1020, "tile_n": 4})),
            "workgroup memory",
        ),
        ("an odd tile", choice(json!({"kind": "tiled", "tile_m": 30, "tile_n": 64})), "possible"),
        ("odd lanes", choice(json!({"kind": "vec", "workgroup_size": 64, "k_lanes": 3, "sorted": true})), "possible"),
        ("no lanes", choice(json!({"kind": "vec", "workgroup_size": 0, "k_lanes": 0, "sorted": true})), "possible"),
        (
            "unsorted",
            choice(json!({"kind": "vec", "workgroup_size": 64, "k_lanes": 16, "sorted": false})),
            "sorted: true",
        ),
        ("another subgroup size", choice(json!({"kind": "subgroup", "subgroup_size": 2 * subgroup})), "possible"),
        ("a class of no rows", entry(&|e| e["shape"]["rows_per_expert"] = json!(0)), "power of two"),
        ("a class between classes", entry(&|e| e["shape"]["hidden_size"] = json!(63)), "power of two"),
        ("a time of zero", entry(&|e| e["chosen"]["median_s"] = json!(0.0)), "above zero"),
        ("a negative time", entry(&|e| e["default"]["median_s"] = json!(-1.0)), "above zero"),
        ("an endless time", good.replace("0.001", "1e999"), "damaged"),
        ("an unknown format", entry(&|e| e["weights"] = json!("f17")), "f16"),
        ("one class twice", edited(&|v| v["entries"] = json!([v["entries"][0], v["entries"][0]])), "2 for 1 classes"),
        ("a field twice", good.replacen("\"schema\"", "\"schema\":1,\"schema\"", 1), "duplicate field"),
    ];
    std::fs::write(&path, &good).expect("writable");
    Tuning::load(&path, &context).expect("what the cases are made of is right");
    assert!(cases.len() >= 15);
    for (name, content, expected) in cases {
        assert_ne!(content, good, "{name} changes something");
        std::fs::write(&path, content).expect("writable");
        let error = Tuning::load(&path, &context).expect_err(name);
        let message = error.to_string();
        assert!(matches!(error, Error::BadTuning { .. }), "{name}: {error:?}");
        assert!(message.contains(expected) && message.contains("tuning.json"), "{name}: {message}");
        assert!(message.contains("expected") && message.contains("`wgmoe tune`"), "{name}: {message}");
        assert!(message.len() < 600 && !message.contains('\u{1b}'), "{name}: {message}");
    }
    let folder_error = Tuning::load(folder.path(), &context).expect_err("a folder is no file");
    assert!(matches!(folder_error, Error::BadTuning { .. }), "{folder_error:?}");
    let missing = Tuning::load(&folder.path().join("none.json"), &context);
    assert!(matches!(missing, Err(Error::Io { .. })), "{missing:?}");
    std::fs::write(&path, &good).expect("writable");
    assert!(matches!(Tuning::load(&path, &Context::cpu()), Err(Error::Unsupported { .. })));
}

fn job(config: &MoeConfig, weights: WeightFormat, tokens: &[u32]) -> Job {
    Job { layer: "tiny".to_owned(), config: config.clone(), weights, tokens: tokens.to_vec() }
}

/// Every class gets a choice that the device can run, and layers compute the same with it.
#[test]
fn what_is_measured_is_right_and_used() {
    let Some(context) = gpu_context() else { return };
    let config = config([64, 32, 8, 2], true);
    let jobs = [job(&config, WeightFormat::F16, &[1, 2, 40]), job(&config, WeightFormat::INT4, &[40])];
    let mut steps = Vec::new();
    let outcome = Tuning::measure(&context, &jobs, Duration::from_secs(60), &mut |progress| {
        assert!(progress.done < progress.total && progress.total == 3 && progress.layer == "tiny");
        steps.push(match progress.doing {
            Doing::Loading => 'L',
            Doing::Checking(..) => 'C',
            Doing::Racing(..) => 'R',
        });
    });
    let outcome = outcome.expect("it measures");
    assert_eq!((outcome.failures, outcome.untried), (Vec::new(), Vec::new()));
    assert_eq!(steps.iter().filter(|&&step| step == 'L').count(), 2, "weights are loaded once for each layer");
    let tuning = outcome.tuning;
    let tokens: Vec<&[u32]> = tuning.entries().iter().map(|entry| entry.tokens.as_slice()).collect();
    assert_eq!(tokens, [&[1, 2][..], &[40], &[40]]);
    for entry in tuning.entries() {
        request(entry.chosen.choice).check(context.gpu().expect("a GPU").profile()).expect("it can run");
        assert!(entry.chosen.median_s > 0.0 && entry.chosen.runs > 0 && entry.tried > 0, "{entry:?}");
        let default = entry.default.expect("the table's choice is right");
        assert!(default.choice == entry.chosen.choice || default.median_s > entry.chosen.median_s, "{entry:?}");
    }

    let mut values = Values(5);
    let (weights, x) = (values.weights(&config), values.floats(40 * 64));
    let tuning = Some(Arc::new(tuning));
    let options = LayerOptions { weights: WeightFormat::F16, tuning, ..LayerOptions::default() };
    let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("it fits");
    assert!(layer.plan(40).expect("it fits").tuned && !layer.plan(4000).expect("it fits").tuned);
    let y = layer.forward(&x).expect("it runs");
    let rounded = weights.rounded(&config, WeightFormat::F16).expect("floats");
    let expected = reference::moe_forward(&config, &rounded, &x).y;
    let most = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    assert_close("tuned", &y, &expected, |_| 1e-5 * most);
}

#[test]
fn without_time_nothing_is_measured_and_all_of_it_is_said() {
    let Some(context) = gpu_context() else { return };
    let config = config([64, 32, 8, 2], true);
    let jobs = [job(&config, WeightFormat::F16, &[1, 40])];
    let outcome = Tuning::measure(&context, &jobs, Duration::ZERO, &mut |_| ()).expect("there is nothing to fail");
    assert_eq!((outcome.tuning.entries().len(), outcome.failures.len()), (0, 0));
    assert_eq!(outcome.untried, [("tiny, f16".to_owned(), vec![1]), ("tiny, f16".to_owned(), vec![40])]);
}

#[test]
fn a_layer_that_cannot_be_measured_does_not_stop_the_others() {
    let Some(context) = gpu_context() else { return };
    let config = config([60, 32, 8, 2], true);
    let jobs = [job(&config, WeightFormat::INT4, &[1, 40]), job(&config, WeightFormat::F16, &[40])];
    let outcome = Tuning::measure(&context, &jobs, Duration::from_secs(60), &mut |_| ()).expect("it goes on");
    assert_eq!(outcome.tuning.entries().len(), 1);
    assert_eq!(outcome.failures.len(), 1);
    let failure = &outcome.failures[0];
    assert!(failure.choice.is_none() && failure.reason.contains("a multiple of 32"), "{failure:?}");
}

#[test]
fn the_cpu_engine_has_nothing_to_tune() {
    let error = Tuning::measure(&Context::cpu(), &[], Duration::from_secs(1), &mut |_| ()).expect_err("one kernel");
    assert!(matches!(error, Error::Unsupported { .. }) && error.to_string().contains("one kernel"), "{error}");
    assert!(matches!(Tuning::for_context(&Context::cpu()), Ok(None)));
}

/// What the tuner would try on a GPU is right, wherever this runs.
#[test]
fn candidates_of_gpus_compute_the_right_thing() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("a GPU").profile();
    let config = config([96, 64, 6, 2], true);
    let mut values = Values(8);
    let weights = values.weights(&config);
    let mut tried = HashSet::new();
    for num_tokens in [5, 75] {
        let device = DeviceProfile { software: false, ..gpu.clone() };
        let mut choices = variant::candidates(2, 6, num_tokens, &device);
        choices.extend(variant::candidates(1, 1, 4 * num_tokens.max(17), &device));
        let x = values.floats(num_tokens as usize * 96);
        let expected = reference::moe_forward(&config, &weights, &x).y;
        let most = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        for choice in choices {
            let options = LayerOptions { tile: Some(choice), ..LayerOptions::default() };
            let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("it fits");
            let y = layer.forward(&x).expect("it runs");
            assert_close(&format!("{choice:?}, {num_tokens} tokens"), &y, &expected, |_| 1e-5 * most);
            tried.insert(choice);
        }
    }
    assert!(tried.len() > 20 && tried.contains(&CHOICE), "{tried:?}");
}
