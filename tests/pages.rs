//! The pages of `wgmoe report` and `wgmoe inspect` in a real browser: light and dark, wide and narrow. Nothing may go wrong
//! in the console, ask for anything, or be wider than the screen, and no word of a chart may be out of it.
#![cfg(all(feature = "cli", unix))]

#[path = "support/browser.rs"]
mod browser;
#[path = "support/command.rs"]
mod command;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use browser::{Browser, View};
use command::{assert_code, json, stderr, stdout, text};
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json as value};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use wgmoe::model::checkpoint::write_tensor;

/// What a driver or a file may call itself.
const HOSTILE: &str = "</title><script>console.log('run')</script><img src=http://127.0.0.1:9/x>\
    AVeryLongNameWithoutAnySpacesThatNoScreenIsWideEnoughForAVeryLongNameWithoutAnySpaces\u{202e}\u{0}";

const VIEWS: [View; 4] = [
    View { width: 1280, scheme: "light" },
    View { width: 1280, scheme: "dark" },
    View { width: 390, scheme: "light" },
    View { width: 390, scheme: "dark" },
];

fn wgmoe(args: &[&str]) -> Output {
    command::wgmoe(args).env("WGMOE_ADAPTER", "cpu").output().expect("the binary should start")
}

/// Results of tiny layers with different numbers of experts.
fn results(folder: &Path) -> Value {
    let file = folder.join("results.json");
    let mut all: Option<Value> = None;
    for experts in ["4", "8", "16"] {
        let sizes = ["--hidden", "64", "--intermediate", "32", "--experts", experts, "--top-k", "2"];
        let options = ["bench", "--runs", "2", "--tokens", "1,16,64", "--json", text(&file)];
        assert_code(&wgmoe(&[&options[..], &sizes[..]].concat()), 0);
        let more: Value = serde_json::from_slice(&fs::read(&file).expect("written")).expect("JSON");
        match &mut all {
            None => all = Some(more),
            Some(all) => {
                let rows = all["rows"].as_array_mut().expect("rows");
                rows.extend(more["rows"].as_array().expect("rows").iter().cloned());
            }
        }
    }
    all.expect("three runs")
}

/// The same, as another device might have measured it.
fn elsewhere(results: &Value) -> Value {
    let mut other = results.clone();
    other["device"]["name"] = value!(HOSTILE);
    other["device"]["driver"] = value!(HOSTILE);
    other["roofline"]["gflops"] = value!(91_000.0);
    for row in other["rows"].as_array_mut().expect("rows") {
        row["preset"] = value!(HOSTILE);
        for (field, factor) in [("median_s", 0.01), ("gflops", 100.0), ("gbytes_per_s", 100.0)] {
            row[field] = value!(row[field].as_f64().expect("a number") * factor);
        }
    }
    let mut same = results["rows"].clone();
    for row in same.as_array_mut().expect("rows") {
        row["median_s"] = value!(row["median_s"].as_f64().expect("a number") * 0.3);
        row["timing"] = Value::Null;
    }
    other["rows"].as_array_mut().expect("rows").extend(same.as_array().expect("rows").iter().cloned());
    other["failures"] = value!([{"layer": HOSTILE, "tokens": 7, "reason": HOSTILE}]);
    other
}

fn save(path: &Path, json: &Value) {
    fs::write(path, json.to_string()).expect("writable");
}

/// Pages of results: of one device, and of two.
fn reports(folder: &Path) -> Vec<PathBuf> {
    let [here, there] = ["here.json", "there.json"].map(|name| folder.join(name));
    let results = results(folder);
    save(&here, &results);
    save(&there, &elsewhere(&results));
    let [one, two] = ["report-one.html", "report-two.html"].map(|name| folder.join(name));
    assert_code(&wgmoe(&["report", text(&here), "--html", text(&one)]), 0);
    assert_code(&wgmoe(&["report", text(&here), text(&there), "--html", text(&two)]), 0);
    vec![one, two]
}

/// A model of the family qwen3_moe with random weights, whose experts are not liked equally, and activations for it.
fn model(folder: &Path, layers: usize, experts: usize, top_k: usize) -> [PathBuf; 2] {
    const HIDDEN: usize = 32;
    const INTERMEDIATE: usize = 16;
    let mut state = 1u32;
    let mut random = move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f64::from(state >> 8) / f64::from(1u32 << 23) - 1.0
    };
    let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
    for layer in 0..layers {
        let mut tensor = |name: String, shape: [usize; 2], size: &dyn Fn(usize) -> f64| {
            let count = shape[0] * shape[1];
            let values = (0..count).map(|n| (random() * size(n / shape[1])) as f32);
            let bytes = values.flat_map(f32::to_le_bytes).collect();
            tensors.push((format!("model.layers.{layer}.mlp.{name}.weight"), shape.to_vec(), bytes));
        };
        tensor("gate".to_owned(), [experts, HIDDEN], &|e| 0.2 + (e * 7 % 13) as f64 / 13.0);
        for e in 0..experts {
            for (name, shape) in [
                ("gate_proj", [INTERMEDIATE, HIDDEN]),
                ("up_proj", [INTERMEDIATE, HIDDEN]),
                ("down_proj", [HIDDEN, INTERMEDIATE]),
            ] {
                tensor(format!("experts.{e}.{name}"), shape, &|_| 0.5);
            }
        }
    }
    fs::create_dir_all(folder).expect("writable");
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("consistent"))
    });
    fs::write(folder.join("model.safetensors"), safetensors::serialize(views, None).expect("sound")).expect("writable");
    save(
        &folder.join("config.json"),
        &value!({"model_type": "qwen3_moe", "hidden_size": HIDDEN, "intermediate_size": 99,
            "moe_intermediate_size": INTERMEDIATE, "num_experts": experts, "num_experts_per_tok": top_k,
            "norm_topk_prob": true, "hidden_act": "silu"}),
    );
    let x: Vec<f32> = (0..200 * HIDDEN).map(|_| random() as f32 * 3.0).collect();
    let input = folder.join("x.safetensors");
    write_tensor(&input, "x", &x, &[200, HIDDEN]).expect("writable");
    [folder.to_owned(), input]
}

/// Pages of layers: of one with few experts, and of several with more experts than a picture has cells along a side.
fn inspections(folder: &Path) -> Vec<PathBuf> {
    let labels = folder.join("labels.json");
    save(&labels, &value!((0..200).map(|n| format!("{HOSTILE}{n}")).collect::<Vec<_>>()));
    let [few, many] = ["inspect-few.html", "inspect-many.html"].map(|name| folder.join(name));
    let [model_of_few, x] = model(&folder.join("few"), 1, 8, 2);
    let options = ["--capacity", "1.25", "--labels", text(&labels)];
    let inspect = ["inspect", text(&model_of_few), "--input", text(&x), "--html", text(&few)];
    assert_code(&wgmoe(&[&inspect[..], &options[..]].concat()), 0);
    let [model_of_many, x] = model(&folder.join("many"), 6, 300, 4);
    let inspect = ["inspect", text(&model_of_many), "--input", text(&x), "--all-layers", "--html", text(&many)];
    assert_code(&wgmoe(&inspect), 0);
    vec![few, many]
}

#[test]
fn pages_are_right_in_a_browser() {
    let Some(mut browser) = Browser::open() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let pages = [reports(folder.path()), inspections(folder.path())].concat();
    for page in &pages {
        let mut grounds = Vec::new();
        for view in VIEWS {
            let wrong = browser.look_at(page, view);
            assert!(wrong.is_empty(), "{} {view:?}:\n{}", page.display(), wrong.join("\n"));
            let charts = browser.value_of("document.querySelectorAll('figure > svg').length");
            assert!(charts.as_u64().is_some_and(|charts| charts >= 6), "{}: {charts} charts", page.display());
            grounds.push(browser.value_of("getComputedStyle(document.body).backgroundColor"));
            keep_picture(&mut browser, page, view);
        }
        assert!(grounds[0] == grounds[2] && grounds[1] == grounds[3] && grounds[0] != grounds[1], "{grounds:?}");
        let size = fs::metadata(page).expect("there").len();
        assert!(size < 3_000_000, "{}: {size} bytes", page.display());
    }
}

/// For people: what was looked at, in the folder `WGMOE_SCREENSHOTS` if it is set.
fn keep_picture(browser: &mut Browser, page: &Path, View { width, scheme }: View) {
    let Ok(folder) = std::env::var("WGMOE_SCREENSHOTS") else { return };
    let name = page.file_stem().unwrap_or_default().to_string_lossy();
    let file = Path::new(&folder).join(format!("{name}-{width}-{scheme}.png"));
    let picture = BASE64_STANDARD.decode(browser.picture()).expect("base64");
    fs::write(file, picture).expect("WGMOE_SCREENSHOTS is a folder");
}

#[test]
fn looking_finds_what_is_wrong() {
    let Some(mut browser) = Browser::open() else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let policy = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'\">";
    let figure = "<figure><svg viewBox='0 0 100 100' width='100' height='100'>";
    let table = [
        (String::new(), None),
        ("<p>fine</p>".to_owned(), None),
        ("<script>console.log(1)</script>".to_owned(), Some("console")),
        ("<script>throw new Error('e')</script>".to_owned(), Some("exception")),
        ("<div style='width:2000px'>wide</div>".to_owned(), Some("pixels wide")),
        ("<details><div style='width:2000px'>wide</div></details>".to_owned(), Some("pixels wide")),
        ("<img src='http://127.0.0.1:9/x.png'>".to_owned(), Some("request: http://127.0.0.1:9")),
        ("<link rel='stylesheet' href='other.css'>".to_owned(), Some("request: file://")),
        (format!("{policy}<script>document.title = 'x'</script>"), Some("log")),
        (format!("{figure}<text x='10' y='50'>within</text></svg></figure>"), None),
        (format!("{figure}<text x='90' y='50'>beyond</text></svg></figure>"), Some("out of its chart")),
    ];
    for (body, expected) in table {
        let page = folder.path().join("page.html");
        let head = "<!DOCTYPE html><html><head><meta charset='utf-8'><link rel='icon' href='data:,'></head><body>";
        fs::write(&page, format!("{head}{body}</body></html>")).expect("writable");
        let wrong = browser.look_at(&page, VIEWS[0]).join("\n");
        match expected {
            None => assert_eq!(wrong, "", "{body}"),
            Some(expected) => assert!(wrong.contains(expected), "{body} should be {expected:?}, found {wrong:?}"),
        }
    }
}

#[test]
fn files_that_are_no_results_are_named_with_what_is_wrong() {
    let folder = tempfile::tempdir().expect("a folder");
    let [file, page] = ["in.json", "out.html"].map(|name| folder.path().join(name));
    let table = [
        ("", "no JSON"),
        ("[1, 2]", "its schema is missing"),
        ("{\"schema\": 4711}", "its schema is 4711"),
        ("{\"schema\": 1}", "missing field"),
        ("{\"schema\": 1, \"wgmoe_version\": 7}", "invalid type"),
    ];
    for (content, expected) in table {
        fs::write(&file, content).expect("writable");
        let output = wgmoe(&["report", text(&file), "--html", text(&page)]);
        assert_code(&output, 1);
        let message = stderr(&output);
        assert!(message.contains("in.json") && message.contains(expected), "{expected}:\n{message}");
        assert!(message.contains("expected"), "{message}");
        assert!(!page.exists(), "{expected}");
    }
}

#[test]
fn a_report_says_in_words_what_it_shows() {
    let folder = tempfile::tempdir().expect("a folder");
    let page = &reports(folder.path())[1];
    let html = fs::read_to_string(page).expect("written");
    for part in ["Roofline", "Time by stage", "tokens per second", "times as fast as", "Environment", "--experts 16"] {
        assert!(html.contains(part), "{part}");
    }
    let here = folder.path().join("here.json");
    let output = wgmoe(&["report", text(&here), "--html", text(page)]);
    assert!(stdout(&output).contains("9 results, all right to"), "{}", stdout(&output));
    let output = wgmoe(&["report", text(&here), text(&here), "--html", text(page), "--json", "-"]);
    assert_eq!(json(&output).as_array().map(Vec::len), Some(2), "nothing but the results is on standard output");
}
