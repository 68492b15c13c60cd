//! The `wgmoe` command from outside: exit codes, what it prints, what it writes. On the embedded CPU engine, so that
//! it runs anywhere.
#![cfg(feature = "cli")]

#[path = "support/command.rs"]
mod command;

use command::{assert_code, json, stderr, stdout, text};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use wgmoe::model::checkpoint::{read_activations, read_tensor, write_tensor};

/// Sizes that any machine times in an instant.
const TINY: [&str; 12] =
    ["--hidden", "64", "--intermediate", "24", "--experts", "8", "--top-k", "2", "--runs", "2", "--tokens", "1,70"];

fn wgmoe(args: &[&str]) -> Output {
    command::wgmoe(args).env("WGMOE_ADAPTER", "cpu").output().expect("the binary should start")
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

#[test]
fn unusable_arguments_are_exit_code_2_and_name_the_argument() {
    let table: &[(&[&str], &str)] = &[
        (&[], "Usage"),
        (&["frobnicate"], "frobnicate"),
        (&["bench", "--top-k", "0"], "top_k is 0"),
        (&["bench", "--top-k", "9", "--experts", "8"], "1 to 8"),
        (&["bench", "--hidden", "0"], "hidden_size"),
        (&["bench", "--hidden", "-4"], "-4"),
        (&["bench", "--intermediate", "99999999"], "intermediate_size"),
        (&["bench", "--experts", "5000"], "num_experts"),
        (&["bench", "--tokens", "0"], "--tokens"),
        (&["bench", "--tokens", "1,x"], "--tokens"),
        (&["bench", "--runs", "0"], "--runs"),
        (&["bench", "--skew", "nan"], "--skew"),
        (&["bench", "--skew=-1"], "--skew"),
        (&["bench", "--weights", "f8"], "f16"),
        (&["bench", "--weights", "int4", "--hidden", "100"], "a multiple of 32"),
        (&["bench", "--matmul", "fast"], "subgroup"),
        (&["bench", "--preset", "gpt-99"], "mixtral-8x7b"),
        (&["bench", "--device", "no such adapter"], "no such adapter"),
        (&["check", "--device", "4711"], "4711"),
        (&["info", "--device", "4711"], "4711"),
        (&["bench", "--json", "no-such-folder/x.json"], "no-such-folder"),
        (&["check", "no-such-file.safetensors"], "no-such-file"),
        (&["run", "no-such-file", "--input", "x", "--output", "y"], "no-such-file"),
        (&["run", "Cargo.toml", "--input", "no-such-input:x", "--output", "y"], "no-such-input"),
        (&["run", "Cargo.toml", "--input", "Cargo.toml", "--output", "no-such-folder/y"], "no-such-folder"),
        (&["run", "Cargo.toml", "--input", "Cargo.toml", "--output", "y", "--family", "no.toml"], "no.toml"),
        (&["check", "Cargo.toml", "--family", "no-such-family"], "no-such-family"),
        (&["families", "--show", "no-such-family"], "no-such-family"),
        (&["quantize", "no-such-file", "--to", "int4", "--output", "y"], "no-such-file"),
        (&["quantize", "Cargo.toml", "--to", "int3", "--output", "y"], "int4:g16"),
        (&["quantize", "Cargo.toml", "--to", "int4:g48", "--output", "y"], "16, 32, 64 or 128"),
        (&["quantize", "Cargo.toml", "--to", "int4", "--output", "no-such-folder/y"], "no-such-folder"),
        (&["run", "Cargo.toml", "--input", "Cargo.toml", "--output", "y", "--gpu-memory", "lots"], "4GiB"),
        (&["bench", "--tuning", "no-such-tuning.json"], "no-such-tuning"),
        (&["tune", "--tokens", "0"], "--tokens"),
        (&["tune", "--budget", "0"], "--budget"),
        (&["tune", "--budget", "soon"], "--budget"),
        (&["tune", "--preset", "gpt-99"], "mixtral-8x7b"),
        (&["tune", "--top-k", "9", "--experts", "8"], "1 to 8"),
        (&["tune", "--weights", "f16,f17"], "f17"),
        (&["tune", "--weights", "int4", "--hidden", "100"], "a multiple of 32"),
        (&["tune", "--output", "no-such-folder/y.json"], "no-such-folder"),
        (&["report", "no-such.json", "--html", "y"], "no-such.json"),
        (&["report", "Cargo.toml", "--html", "no-such-folder/y"], "no-such-folder"),
        (&["report", "Cargo.toml"], "--html"),
        (&["shader", "no-such-kernel"], "combine"),
        (&["shader", "combine", "--to", "glsl"], "hlsl"),
    ];
    for (args, named) in table {
        let output = wgmoe(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", stderr(&output));
        let message = stderr(&output);
        assert!(message.contains(named), "{args:?} should name {named:?}:\n{message}");
        assert!(!message.contains("panicked"), "{args:?}: {message}");
    }
}

#[test]
fn bench_prints_a_table_and_writes_what_it_promises() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("results.json");
    let output = wgmoe(&[&["bench", "--json", text(&file)], &TINY[..]].concat());
    assert_code(&output, 0);
    let words = stdout(&output);
    for word in ["device: ", "roofline: ", "of roofline", "dispatches", "where the time goes", "gate_up"] {
        assert!(words.contains(word), "{word} is missing:\n{words}");
    }
    let results: Value = serde_json::from_slice(&std::fs::read(&file).expect("written")).expect("JSON");
    assert_eq!(results["schema"], 2);
    assert_eq!(results["device"]["kind"], "cpu-engine");
    let rows = results["rows"].as_array().expect("rows");
    assert_eq!(rows.len(), 2);
    for (row, tokens) in rows.iter().zip([1.0, 70.0]) {
        let number = |field: &str| row[field].as_f64().unwrap_or_else(|| panic!("{field} in {row}"));
        assert_eq!(
            [number("hidden_size"), number("num_experts"), number("tokens"), number("readbacks")],
            [64.0, 8.0, tokens, 0.0]
        );
        assert!(number("min_s") > 0.0 && number("min_s") <= number("median_s"));
        assert!(number("max_rel_error") <= 1e-5 && number("roofline_fraction") > 0.0);
        let flops = 2.0 * tokens * (2.0 * 3.0 * 64.0 * 24.0 + 64.0 * 8.0);
        assert!((number("gflops") * 1e9 * number("median_s") / flops - 1.0).abs() < 1e-6);
        for stage in row["stages"].as_array().expect("stages") {
            assert!(stage["name"].is_string() && stage["flops"].is_u64() && stage["bytes"].is_u64(), "{stage}");
        }
    }
}

#[test]
fn bench_says_what_the_first_result_takes() {
    let output = wgmoe(&[&["bench", "--json", "-"], &TINY[..]].concat());
    assert_code(&output, 0);
    let words = stderr(&output);
    let line = words.lines().find(|line| line.starts_with("first result: ")).expect("the line is there");
    for word in [" cold (device ", ", weights ", ", kernels and first pass ", " warm"] {
        assert!(line.contains(word), "{word} is missing: {line}");
    }
    let report = json(&output);
    let first = &report["first_results"][0];
    assert_eq!((&first["tokens"], report["first_results"].as_array().map(Vec::len)), (&1.into(), Some(1)));
    assert!(first["layer"].as_str().is_some_and(|layer| layer.contains("hidden 64")), "{first}");
    assert!(first["device_s"].as_f64().is_some_and(|s| s > 0.0), "{first}");
    for start in ["cold", "warm"] {
        for field in ["load_s", "first_pass_s", "second_pass_s"] {
            assert!(first[start][field].as_f64().is_some_and(|s| s > 0.0), "{start} {field}: {first}");
        }
    }
}

/// On the device that WGMOE_ADAPTER names, or the best: what dispatches request is known where there are any.
#[test]
fn bench_shows_what_each_stage_moves_when_asked() {
    let bench = |more: &[&str]| {
        let args = [&["bench", "--json", "-"], &TINY[..], more].concat();
        let output = command::wgmoe(&args).output();
        let output = output.expect("the binary should start");
        assert_code(&output, 0);
        output
    };
    let output = bench(&["--stages"]);
    let words = stderr(&output);
    for word in
        ["what each stage moves", "least MB", "requested MB", "x least", "of its ceiling", "share of logits, router"]
    {
        assert!(words.contains(word), "{word} is missing:\n{words}");
    }
    let plain = bench(&[]);
    assert!(!stderr(&plain).contains("what each stage moves") && !stderr(&plain).contains("share of"));
    // The JSON has it in any case.
    for report in [json(&output), json(&plain)] {
        let is_gpu = report["device"]["kind"] != "cpu-engine";
        for row in report["rows"].as_array().expect("rows") {
            for stage in row["stages"].as_array().expect("stages") {
                let least = stage["least_bytes"].as_u64().unwrap_or_else(|| panic!("least_bytes: {stage}"));
                let requested = stage["requested_bytes"].as_u64();
                assert_eq!((requested.is_some(), stage["dispatches"].is_u64()), (is_gpu, is_gpu), "{stage}");
                assert!(requested.is_none_or(|bytes| bytes >= least && least > 0), "{stage}");
                let (time, fraction) = (stage["median_s"].as_f64(), stage["roofline_fraction"].as_f64());
                assert_eq!(time.is_some(), fraction.is_some(), "{stage}");
                assert!(fraction.is_none_or(|fraction| fraction > 0.0), "{stage}");
            }
        }
    }
}

#[test]
fn json_on_standard_output_is_nothing_but_json() {
    let bench = wgmoe(&[&["bench", "--json", "-"], &TINY[..]].concat());
    assert_code(&bench, 0);
    assert_eq!(json(&bench)["rows"].as_array().map(Vec::len), Some(2));
    assert!(stderr(&bench).contains("of roofline"), "the table goes to standard error");

    let info = wgmoe(&["info", "--json", "-"]);
    assert_code(&info, 0);
    assert!(json(&info)["cpu_engine"]["threads"].as_u64().is_some_and(|threads| threads > 0));

    let shader = wgmoe(&["--json", "-", "shader", "combine", "--to", "spirv"]);
    assert_code(&shader, 0);
    assert_eq!(json(&shader)["code"]["words"][0], 0x0723_0203, "SPIR-V's magic number");

    let case = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    let check = wgmoe(&["check", text(&case), "--json", "-"]);
    assert_code(&check, 0);
    assert_eq!(json(&check)["passed"], 1);
}

#[test]
fn a_skew_is_reported_and_seen() {
    let output = wgmoe(&[&["bench", "--skew", "2", "--json", "-"], &TINY[..]].concat());
    assert_code(&output, 0);
    let row = &json(&output)["rows"][1];
    assert_eq!(row["skew"], 2.0);
    assert!(row["imbalance"].as_f64().is_some_and(|imbalance| imbalance > 2.0), "{row}");
}

#[test]
fn check_passes_right_cases_in_a_fixed_order() {
    let folder = golden("");
    let output = wgmoe(&["check", text(&folder), "--json", "-"]);
    assert_code(&output, 0);
    let report = json(&output);
    let cases = report["cases"].as_array().expect("cases");
    assert!(cases.len() > 2 && report["failed"] == 0 && report["unsupported"] == 0);
    assert_eq!(report["passed"].as_u64(), Some(cases.len() as u64));
    let files: Vec<&str> = cases.iter().filter_map(|case| case["file"].as_str()).collect();
    assert!(files.is_sorted() && files.len() == cases.len(), "{files:?}");
    for case in cases {
        assert!(case["family"].is_string() && case["status"] == "pass" && case["reason"].is_null(), "{case}");
        assert!(case["max_rel_error"].as_f64().is_some_and(|error| error <= 1e-5), "{case}");
    }
    assert!(stderr(&output).trim_end().ends_with(&format!("{} passed, 0 failed", cases.len())));
}

#[test]
fn check_runs_every_format() {
    let case = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    let output = wgmoe(&["check", text(&case), "--weights", "f16"]);
    assert_code(&output, 0);
    assert!(stdout(&output).contains("1 passed, 0 failed"));
}

#[test]
fn check_reports_broken_files_and_goes_on() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let whole = std::fs::read(golden("mixtral__t7_h72_i40_e8k2_hub.safetensors")).expect("a golden case");
    let put = |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).expect("writable");
    put("a_truncated.safetensors", &whole[..whole.len() / 2]);
    put("b_empty.safetensors", b"");
    put("c_text.safetensors", b"this is no safetensors file, however long it may go on");
    put("d_right.safetensors", &whole);
    put("e_wrong.safetensors", &with_wrong_output(&whole));
    put("f_ignored.txt", b"not a case");
    std::fs::create_dir(folder.path().join("g.safetensors")).expect("writable");
    let output = wgmoe(&["check", text(folder.path()), "--json", "-"]);
    assert_code(&output, 1);
    let report = json(&output);
    let status: Vec<&str> =
        report["cases"].as_array().expect("cases").iter().filter_map(|case| case["status"].as_str()).collect();
    assert_eq!(status, ["fail", "fail", "fail", "pass", "fail"]);
    for case in report["cases"].as_array().expect("cases").iter().filter(|case| case["status"] == "fail") {
        assert!(case["reason"].as_str().is_some_and(|reason| reason.len() > 10), "{case}");
    }
    assert!(stderr(&output).contains("1 passed, 4 failed"));
}

/// The same file with one element of `io.output` changed: its sign bit, so that the size stays plausible.
fn with_wrong_output(file: &[u8]) -> Vec<u8> {
    let header_len = u64::from_le_bytes(file[..8].try_into().expect("eight bytes")) as usize;
    let header: Value = serde_json::from_slice(&file[8..8 + header_len]).expect("a header");
    let start = header["io.output"]["data_offsets"][0].as_u64().expect("io.output is there") as usize;
    let mut wrong = file.to_vec();
    wrong[8 + header_len + start + 3] ^= 0x80;
    wrong
}

#[test]
fn check_without_cases_is_no_success() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let output = wgmoe(&["check", text(folder.path())]);
    assert_code(&output, 1);
    assert!(stdout(&output).contains("nothing to check"));
}

#[test]
fn run_writes_an_output_of_the_inputs_shape() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    let (input, written) = (format!("{}:io.hidden_states", text(&case)), folder.path().join("y.safetensors"));
    let args = ["run", text(&case), "--layer", "0", "--input", &input, "--output", text(&written)];
    let output = wgmoe(&[&args[..], &["--json", "-"]].concat());
    assert_code(&output, 0);
    let report = json(&output);
    assert_eq!((&report["tokens"], &report["num_experts"]), (&7.into(), &8.into()));
    let load: u64 = report["tokens_per_expert"].as_array().expect("counts").iter().filter_map(Value::as_u64).sum();
    assert_eq!(load, 14, "7 tokens with 2 experts each");

    let (y, shape) = read_tensor(&written, None).expect("one tensor");
    let (expected, expected_shape) = read_tensor(&case, Some("io.output")).expect("in the file");
    assert_eq!(shape, expected_shape);
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    assert!(y.iter().zip(&expected).all(|(y, e)| (y - e).abs() <= 1e-5 * largest));
    assert_eq!(std::fs::read_dir(folder.path()).expect("a folder").count(), 1, "no temporary file is left");
}

/// A layer that routes by token id, and one that counts within sequences: what they need beside activations arrives.
#[test]
fn run_takes_ids_and_sequences() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let written = folder.path().join("y.safetensors");
    let hash = "deepseek_v4__t13_h56_i24_e8k3_hash_module.safetensors";
    let switch = "switch_transformers__t32_h48_i40_e4k1_cap3_hub.safetensors";
    for (case, layer, has_ids) in [(golden(hash), "0", true), (golden(switch), "1", false)] {
        let (input, ids) = (format!("{}:io.hidden_states", text(&case)), format!("{}:io.input_ids", text(&case)));
        let args = ["run", text(&case), "--layer", layer, "--input", &input, "--output", text(&written)];
        if has_ids {
            let output = wgmoe(&args);
            assert_code(&output, 1);
            assert!(stderr(&output).contains("token_ids"), "{}", stderr(&output));
        }
        let with_ids = ["--ids", &ids];
        assert_code(&wgmoe(&[&args[..], if has_ids { &with_ids[..] } else { &[] }].concat()), 0);
        let (y, _) = read_tensor(&written, None).expect("one tensor");
        let (expected, _) = read_tensor(&case, Some("io.output")).expect("in the file");
        let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(y.iter().zip(&expected).all(|(y, e)| (y - e).abs() <= 1e-5 * largest));
    }
}

#[test]
fn run_refuses_what_it_cannot_use_and_writes_nothing() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    let written = folder.path().join("y.safetensors");
    let nan = folder.path().join("nan.safetensors");
    write_tensor(&nan, "x", &[f32::NAN; 72], &[1, 72]).expect("writable");
    let tensor = |name: &str| format!("{}:{name}", text(&case));
    let table = [
        (tensor("io.router_logits"), "hidden_size"),
        (tensor("no.such.tensor"), "no.such.tensor"),
        (text(&nan).to_owned(), "NaN"),
    ];
    for (input, named) in table {
        let output = wgmoe(&["run", text(&case), "--input", &input, "--output", text(&written)]);
        assert_code(&output, 1);
        assert!(stderr(&output).contains(named), "{input} should name {named}: {}", stderr(&output));
        assert!(!written.exists());
    }
}

#[test]
fn run_drops_or_propagates_what_is_no_number() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    let [input, written] = ["x.safetensors", "y.safetensors"].map(|name| folder.path().join(name));
    let (mut x, shape) = read_tensor(&case, Some("io.hidden_states")).expect("in the file");
    x[72] = f32::NAN; // in the second of seven tokens
    write_tensor(&input, "x", &x, &shape).expect("writable");
    let args = ["run", text(&case), "--input", text(&input), "--output", text(&written)];
    for (policy, is_expected) in [("drop", (|v| v == 0.0) as fn(f32) -> bool), ("propagate", f32::is_nan)] {
        let output = wgmoe(&[&args[..], &["--non-finite", policy, "--json", "-"]].concat());
        assert_code(&output, 0);
        assert_eq!(json(&output)["non_finite_tokens"], 1);
        assert!(stderr(&output).contains("1 of them with NaN"), "{}", stderr(&output));
        let (y, _) = read_activations(&written, None).expect("one tensor");
        for (t, row) in y.chunks_exact(72).enumerate() {
            assert!(row.iter().all(|&v| if t == 1 { is_expected(v) } else { v.is_finite() }), "{policy}: token {t}");
        }
    }
}

/// Files may not grow past a kilobyte, as on a full disk: what was there before stays, nothing half-written is left, and the
/// message says which file it was.
#[cfg(unix)]
#[test]
fn a_full_disk_costs_nothing_that_was_there() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    let (input, file) = (format!("{}:io.hidden_states", text(&case)), folder.path().join("written"));
    let commands = [
        vec!["run", text(&case), "--input", &input, "--output", text(&file)],
        vec!["quantize", text(&case), "--to", "f16", "--output", text(&file)],
        [&["bench", "--json", text(&file)], &TINY[..]].concat(),
    ];
    for (args, old) in commands.iter().flat_map(|args| [(args, false), (args, true)]) {
        if old {
            std::fs::write(&file, "what was there").expect("writable");
        }
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_wgmoe")]).args(args);
        let output = command.env("WGMOE_ADAPTER", "cpu").stdin(Stdio::null()).output().expect("there is a shell");
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{args:?}: {message}");
        assert!(message.contains(text(&file)) && !message.contains("panicked"), "{args:?}: {message}");
        let left: Vec<_> = std::fs::read_dir(folder.path()).expect("a folder").map(|f| f.map(|f| f.path())).collect();
        assert_eq!(left.len(), usize::from(old), "{args:?}: {left:?}");
        if old {
            assert_eq!(std::fs::read(&file).expect("it stays"), b"what was there", "{args:?}");
            std::fs::remove_file(&file).expect("it is there");
        }
    }
}

#[test]
fn quantize_says_what_it_did_and_run_reads_it() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let case = golden("gpt_oss__t7_h64_i96_e8k4_mxfp4_hub.safetensors");
    let small = folder.path().join("small.safetensors");
    let args = ["quantize", text(&case), "--to", "int4:g32", "--output", text(&small)];
    let output = wgmoe(&args);
    assert_code(&output, 0);
    let words = stdout(&output);
    for word in ["experts.gate_up_proj", "mxfp4", "int4", "rms error", "1 layer(s)"] {
        assert!(words.contains(word), "{word} is missing:\n{words}");
    }
    let report = json(&wgmoe(&[&args[..], &["--json", "-"]].concat()));
    assert_eq!((&report["to"], &report["layers"]), (&"int4".into(), &vec![0].into()));
    for tensor in report["tensors"].as_array().expect("tensors") {
        let error = tensor["rms_error"].as_f64().expect("a number");
        assert!(error > 0.001 && error < 0.2, "{tensor}");
    }

    let (input, written) = (format!("{}:io.hidden_states", text(&case)), folder.path().join("y.safetensors"));
    let run = ["run", text(&small), "--input", &input, "--output", text(&written), "--json", "-"];
    let output = wgmoe(&run);
    assert_code(&output, 0);
    assert_eq!(json(&output)["weights"], "int4");
    let (y, _) = read_tensor(&written, None).expect("one tensor");
    let (expected, _) = read_tensor(&case, Some("io.output")).expect("in the file");
    let rms = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v * v)).sum::<f64>().sqrt();
    let error = rms(&mut y.iter().zip(&expected).map(|(y, e)| y - e)) / rms(&mut expected.iter().copied());
    assert!(error > 0.001 && error < 0.3, "four bits give about the output: {error}");

    // Over itself, to a format that its rows do not fit, and a layer that is not there.
    let original = std::fs::read(&small).expect("it is there");
    let over = wgmoe(&["quantize", text(&small), "--to", "f32", "--output", text(&small)]);
    assert_code(&over, 2);
    assert!(std::fs::read(&small).expect("it is there") == original);
    let other = folder.path().join("other.safetensors");
    let blocks = wgmoe(&["quantize", text(&case), "--to", "q4_k", "--output", text(&other)]);
    assert_code(&blocks, 1);
    assert!(stderr(&blocks).contains("a multiple of 256"), "{}", stderr(&blocks));
    assert_code(&wgmoe(&["quantize", text(&case), "--to", "f16", "--output", text(&other), "--layer", "7"]), 1);
    assert!(!other.exists());
}

#[test]
fn info_says_what_the_cpu_engine_is() {
    let output = wgmoe(&["info"]);
    assert_code(&output, 0);
    assert!(stdout(&output).contains("embedded CPU engine"), "{}", stdout(&output));
}

#[test]
fn shader_lists_kernels_and_prints_each_language() {
    let list = wgmoe(&["shader", "--list"]);
    assert_code(&list, 0);
    assert!(stdout(&list).lines().any(|line| line.starts_with("combine")));
    for (to, mark) in [("wgsl", "@compute"), ("msl", "metal_stdlib"), ("hlsl", "numthreads")] {
        let output = wgmoe(&["shader", "combine", "--to", to]);
        assert_code(&output, 0);
        assert!(stdout(&output).contains(mark), "{to}");
    }
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("combine.spv");
    assert_code(&wgmoe(&["shader", "combine", "--to", "spirv", "--output", text(&file)]), 0);
    assert_eq!(std::fs::read(&file).expect("written")[..4], [0x03, 0x02, 0x23, 0x07]);
}

#[test]
fn a_reader_that_leaves_changes_nothing() {
    for args in [&["shader"][..], &["info"], &["check", text(&golden(""))]] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_wgmoe"))
            .args(args)
            .env("WGMOE_ADAPTER", "cpu")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary should start");
        // Closed before a word is read.
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("it ends by itself");
        assert_code(&output, 0);
        assert!(!stderr(&output).contains("panicked"), "{args:?}");
    }
}

#[test]
fn the_device_option_wins_over_the_environment() {
    let run =
        |args: &[&str], variable: &str| command::wgmoe(args).env("WGMOE_ADAPTER", variable).output().expect("starts");
    let file = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    assert_code(&run(&["check", text(&file)], "no such adapter"), 2);
    assert_code(&run(&["check", text(&file), "--device", "cpu"], "no such adapter"), 0);
}

#[test]
fn families_are_listed_shown_and_chosen() {
    let output = wgmoe(&["families", "--json", "-"]);
    assert_code(&output, 0);
    let rows = json(&output);
    let rows = rows.as_array().expect("a list");
    assert!(rows.iter().any(|row| row["name"] == "deepseek_v3" && row["unsupported"].is_null()));
    assert!(rows.iter().any(|row| row["name"] == "zaya" && row["unsupported"].is_string()));
    assert!(stderr(&output).contains("deepseek_v3") && stderr(&output).contains("zaya is not supported: its router"));

    let shown = wgmoe(&["families", "--show", "qwen2_moe"]);
    assert_code(&shown, 0);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mine = folder.path().join("mine.toml");
    std::fs::write(&mine, stdout(&shown).replace("\"qwen2_moe\"", "\"mine\"")).expect("writable");
    assert_code(&wgmoe(&["families", "--show", text(&mine)]), 0);

    let case = golden("mixtral__t7_h72_i40_e8k2_hub.safetensors");
    assert_code(&wgmoe(&["check", text(&case), "--family", "mixtral"]), 0);
    let other = wgmoe(&["check", text(&case), "--family", "olmoe"]);
    assert_code(&other, 1);
    std::fs::write(&mine, "name = 3").expect("writable");
    let broken = wgmoe(&["check", text(&case), "--family", text(&mine)]);
    assert_code(&broken, 1);
    assert!(stderr(&broken).contains("mine.toml: line 1"), "{}", stderr(&broken));
}

#[test]
fn check_says_why_a_family_is_not_supported() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let file = folder.path().join("zaya.safetensors");
    let metadata = std::collections::HashMap::from([("config".to_owned(), "{\"model_type\": \"zaya\"}".to_owned())]);
    let data = [0; 4];
    let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, vec![1], &data).expect("consistent");
    std::fs::write(&file, safetensors::serialize([("a", view)], Some(metadata)).expect("serializable"))
        .expect("writable");
    let output = wgmoe(&["check", text(&file), "--json", "-"]);
    assert_code(&output, 1);
    let report = json(&output);
    assert_eq!(report["unsupported"], 1);
    assert!(report["cases"][0]["reason"].as_str().is_some_and(|reason| reason.contains("network of several layers")));
}
