//! Files of results: earlier ones are read, and the published schema describes what is written.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Duration;
use wgmoe::bench::compare::{Difference, compare};
use wgmoe::bench::results::{DeviceResult, Failure, ResidencyResult, SCHEMA};
use wgmoe::bench::{Bench, Facts, Outcome, Results, RouterTime, Workload, Yardstick};
use wgmoe::{Activation, Context, DeviceChoice, Error, MoeConfig, Roofline, Routing};

fn earlier() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/results/schema-1.json")
}

#[test]
fn results_of_the_first_schema_are_read() {
    let results = Results::load(&earlier()).expect("it is whole");
    assert_eq!((results.schema, results.rows.len(), results.failures.len()), (1, 4, 0));
    let row = &results.rows[3];
    assert_eq!((row.preset.as_deref(), row.tokens, row.num_experts), (Some("small"), 512, 32));
    assert!(row.median_s > 0.9 && row.stages.len() == 6 && row.timing.is_none());
    assert!(results.facts.is_none() && results.yardstick.is_none() && !results.interrupted);
    // It says nothing about noise, so a comparison decides nothing.
    assert!(compare(&results, &results).rows.iter().all(|pair| pair.verdict == Difference::Unknown));
}

#[test]
fn half_a_file_is_an_error_with_its_name() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("half.json");
    let text = std::fs::read_to_string(earlier()).expect("it is there");
    std::fs::write(&path, &text[..text.len() / 2]).expect("writable");
    let error = Results::load(&path).expect_err("half of it is missing");
    assert!(matches!(&error, Error::BadResults { path: found, .. } if *found == path), "{error}");
}

/// What a document breaks of a JSON schema, of which it knows the keywords that `docs/results-schema.json` uses and
/// refuses all others.
fn violations(root: &Value, schema: &Value, value: &Value, at: &str, found: &mut Vec<String>) {
    for (keyword, rule) in schema.as_object().expect("a schema is an object") {
        let mut wrong = |what: &str| found.push(format!("{at}: {what}"));
        let number = || rule.as_f64().expect("a bound is a number");
        let is_below = |limit: f64| value.as_f64().is_some_and(|value| value < limit);
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "properties" | "required" => {}
            "type" => {
                let types = rule.as_array().cloned().unwrap_or_else(|| vec![rule.clone()]);
                if !types.iter().any(|name| is_of_type(value, name.as_str().expect("a name"))) {
                    wrong(&format!("{value} is no {rule}"));
                }
            }
            "minimum" if is_below(number()) => wrong(&format!("{value} is below {rule}")),
            "exclusiveMinimum" if is_below(number()) || value.as_f64() == Some(number()) => {
                wrong(&format!("{value} is not above {rule}"));
            }
            "maximum" if value.as_f64().is_some_and(|value| value > number()) => {
                wrong(&format!("{value} is above {rule}"))
            }
            "minItems" if value.as_array().is_some_and(|items| (items.len() as f64) < number()) => wrong("too short"),
            "maxItems" if value.as_array().is_some_and(|items| items.len() as f64 > number()) => wrong("too long"),
            // The one pattern there is: an instant.
            "pattern" if !value.as_str().is_some_and(|text| text.len() == 20 && text.ends_with('Z')) => {
                wrong("no instant")
            }
            "minimum" | "exclusiveMinimum" | "maximum" | "minItems" | "maxItems" | "pattern" => {}
            "additionalProperties" => assert_eq!(rule, false),
            "$ref" => {
                let pointer = rule.as_str().and_then(|path| path.strip_prefix('#')).expect("a reference into the file");
                violations(root, root.pointer(pointer).expect(pointer), value, at, found);
            }
            "anyOf" => {
                let tried = rule.as_array().expect("schemas").iter().map(|schema| {
                    let mut found = Vec::new();
                    violations(root, schema, value, at, &mut found);
                    found
                });
                let tried: Vec<Vec<String>> = tried.collect();
                if tried.iter().all(|found| !found.is_empty()) {
                    found.extend(tried.into_iter().next().expect("a choice"));
                }
            }
            "items" => {
                for (n, item) in value.as_array().into_iter().flatten().enumerate() {
                    violations(root, rule, item, &format!("{at}/{n}"), found);
                }
            }
            "prefixItems" => {
                let rules = rule.as_array().expect("schemas");
                for (n, (rule, item)) in rules.iter().zip(value.as_array().into_iter().flatten()).enumerate() {
                    violations(root, rule, item, &format!("{at}/{n}"), found);
                }
            }
            other => panic!("{at}: {other} is a keyword that this test does not know"),
        }
    }
    let (Some(properties), Some(object)) = (schema.get("properties"), value.as_object()) else { return };
    for (name, value) in object {
        match properties.get(name) {
            Some(schema) => violations(root, schema, value, &format!("{at}/{name}"), found),
            None => found.push(format!("{at}/{name}: not in the schema")),
        }
    }
    for name in schema["required"].as_array().expect("names").iter().filter_map(Value::as_str) {
        if !object.contains_key(name) {
            found.push(format!("{at}/{name}: missing"));
        }
    }
}

fn is_of_type(value: &Value, name: &str) -> bool {
    match name {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "string" => value.is_string(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no such type: {other}"),
    }
}

fn schema() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/results-schema.json");
    serde_json::from_slice(&std::fs::read(path).expect("it is there")).expect("JSON")
}

fn check(value: &Value) -> Vec<String> {
    let (schema, mut found) = (schema(), Vec::new());
    violations(&schema, &schema, value, "", &mut found);
    found
}

/// Results of a real run with everything in them that a run can have.
fn written() -> Value {
    let context = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
    let routing = Routing::softmax(true);
    let config = MoeConfig::new(64, 24, 8, 2, routing, Activation::SWIGLU).expect("valid sizes");
    let workload = Workload::new(config, 0.5, 1).expect("small").with_choices(&[0, 3, 2, 1]).expect("two tokens");
    let roofline =
        Roofline { gflops: 10.0, gbytes_per_s: 1.0, bandwidths: vec![(1024, 1.0)], how: "by hand".to_owned() };
    let bench = Bench {
        roofline: Some(roofline.clone()),
        runs: Some(3),
        slice: Duration::from_millis(10),
        trace: Some("trace.json:3".to_owned()),
        ..Bench::new(&context)
    };
    let mut yardstick = Yardstick::new(&context).expect("the engine runs");
    let outcomes = bench.run(Some("p"), workload, &[1, 70], &mut yardstick, &mut |_| ());
    let mut results = Results {
        schema: SCHEMA,
        wgmoe_version: "0.0.0".to_owned(),
        device: DeviceResult::from(context.device()),
        facts: Some(Facts::now()),
        yardstick: Some(yardstick.result()),
        interrupted: false,
        roofline: Some(roofline.into()),
        rows: Vec::new(),
        failures: vec![Failure { layer: "l".to_owned(), tokens: None, reason: "r".to_owned() }],
        first_results: Vec::new(),
        routers: vec![RouterTime {
            routing: "softmax".to_owned(),
            num_experts: 8,
            tokens: 1,
            router_s: 0.5,
            selection_s: None,
            read_s: 0.25,
        }],
        tuning: Some("tuning.json".to_owned()),
    };
    for outcome in outcomes {
        match outcome {
            Outcome::Started(first) => results.first_results.push(first),
            Outcome::Measured(row) => results.rows.push(*row),
            Outcome::Failed(failure) => panic!("{failure:?}"),
        }
    }
    // Only a GPU has these.
    let row = &mut results.rows[0];
    row.residency = Some(ResidencyResult {
        places: 4,
        pinned: 1,
        expert_bytes: 8,
        hits: 3,
        misses: 1,
        hit_rate: 0.75,
        passes: 2,
        uploaded_bytes_per_pass: 4.0,
        rounds_per_pass: 1.0,
    });
    (row.stages[0].dispatches, row.stages[0].requested_bytes) = (Some(1), Some(2));
    let facts = results.facts.as_mut().expect("just made");
    for fact in [&mut facts.governor, &mut facts.power, &mut facts.git_commit, &mut facts.cpu, &mut facts.load_before] {
        fact.get_or_insert_with(|| "said by a system that knows".to_owned());
    }
    serde_json::to_value(results).expect("serialises")
}

#[test]
fn what_is_written_is_what_the_published_schema_says() {
    let results = written();
    assert_eq!(check(&results), Vec::<String>::new());
    let first: Value = serde_json::from_slice(&std::fs::read(earlier()).expect("it is there")).expect("JSON");
    assert_eq!(check(&first), Vec::<String>::new());
    // Each property of the schema is somewhere in it: none is described that does not exist.
    let text = results.to_string();
    let schema = schema();
    let objects = schema["$defs"].as_object().expect("definitions").values().chain([&schema]);
    for name in objects.flat_map(|object| object["properties"].as_object().expect("properties").keys()) {
        assert!(text.contains(&format!("\"{name}\":")), "{name} is in no result");
    }
}

#[test]
fn what_is_not_in_the_schema_breaks_it() {
    let results = written();
    let broken = |pointer: &str, value: Value| {
        let mut results = results.clone();
        *results.pointer_mut(pointer).expect(pointer) = value;
        check(&results)
    };
    for (pointer, value, expected) in [
        ("/schema", Value::from(3), "/schema: 3 is above 2"),
        ("/rows/0/median_s", 0.0.into(), "/rows/0/median_s: 0.0 is not above 0"),
        ("/rows/0/tokens", "one".into(), "/rows/0/tokens: \"one\" is no \"integer\""),
        ("/rows/0/timing/rounds", serde_json::json!([]), "/rows/0/timing/rounds: too short"),
        ("/rows/1/stages/0/bytes", (-1).into(), "/rows/1/stages/0/bytes: -1 is below 0"),
        ("/yardstick/times/0", serde_json::json!([1.0]), "/yardstick/times/0: too short"),
        ("/facts/began", "today".into(), "/facts/began: no instant"),
        ("/device", serde_json::json!({"name": "d", "age": 3}), "/device/age: not in the schema"),
        ("/device", serde_json::json!({"name": "d"}), "/device/kind: missing"),
    ] {
        let found = broken(pointer, value);
        assert!(found.iter().any(|violation| violation == expected), "{pointer}: {found:?}");
    }
}
