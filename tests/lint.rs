//! The uniformity lint: our kernels are clean, seeded faults are found, and what only looks like one is not.
//!
//! `tests/uniformity/faulty` holds kernels with one fault each: its line ends with `// FAULT` and the rule, and the
//! first lines say what the explanation has to name. `clean` holds kernels that a coarser analysis would refuse.
//! `scripts/check-portability.sh` holds the same files against Tint.
#![cfg(feature = "lint")]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use wgmoe::kernels;
use wgmoe::lint::{Finding, Rule, lint};

/// The files of a folder of `tests/uniformity`, with their text.
fn fixtures(folder: &str) -> Vec<(PathBuf, String)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/uniformity").join(folder);
    let entries = std::fs::read_dir(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.expect("a folder entry").path()).collect();
    files.sort();
    let read = |path: &PathBuf| std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    files.into_iter().map(|path| (path.clone(), read(&path))).collect()
}

fn found(path: &Path, source: &str) -> Vec<Finding> {
    lint(&path.display().to_string(), source).unwrap_or_else(|error| panic!("{error}"))
}

/// The rule that a line says is broken there.
fn marked(line: &str) -> Option<Rule> {
    let (_, rule) = line.split_once("// FAULT ")?;
    match rule.trim() {
        "barrier" => Some(Rule::Barrier),
        "subgroup" => Some(Rule::Subgroup),
        other => panic!("no rule {other:?}"),
    }
}

#[test]
fn seeded_faults_are_found_where_they_are_and_explained() {
    let fixtures = fixtures("faulty");
    assert!(fixtures.len() >= 20, "{} files", fixtures.len());
    for (path, source) in fixtures {
        let findings = found(&path, &source);
        let places: Vec<(Rule, u32)> = findings.iter().map(|finding| (finding.rule, finding.line)).collect();
        let lines = source.lines().zip(1..);
        let expected: Vec<(Rule, u32)> = lines.filter_map(|(line, n)| Some((marked(line)?, n))).collect();
        assert_eq!(expected.len(), 1, "{}: one fault each", path.display());
        assert_eq!(places, expected, "{}: {findings:#?}", path.display());
        let because: Vec<&str> = findings[0].because.iter().map(|step| step.text.as_str()).collect();
        let wanted: Vec<&str> = source.lines().filter_map(|line| line.strip_prefix("// why: ")).collect();
        assert!(!wanted.is_empty(), "{}: no explanation is asked for", path.display());
        for why in wanted {
            assert!(because.iter().any(|text| text.contains(why)), "{}: no {why:?} in {because:#?}", path.display());
        }
    }
}

#[test]
fn what_only_looks_like_a_fault_is_none() {
    let fixtures = fixtures("clean");
    assert!(fixtures.len() >= 12, "{} files", fixtures.len());
    for (path, source) in fixtures {
        let findings = found(&path, &source);
        assert!(findings.is_empty(), "{}: {findings:#?}", path.display());
        let has_something = ["Barrier()", "subgroup"].iter().any(|what| source.contains(what));
        assert!(has_something, "{}: there is nothing to find", path.display());
    }
}

#[test]
fn every_kernel_is_clean() {
    // Many variants are the same text with other overrides.
    let mut texts: HashMap<String, String> = HashMap::new();
    for kernel in kernels::all() {
        texts.entry(kernel.wgsl()).or_insert(kernel.label);
    }
    assert!(texts.len() > 100, "{} texts", texts.len());
    for (source, label) in texts {
        let findings = lint(&label, &source).unwrap_or_else(|error| panic!("{error}"));
        assert!(findings.is_empty(), "{label}: {findings:#?}");
    }
}

/// Our own kernels with one barrier moved under a condition by lane: what a slip would look like.
#[test]
fn a_barrier_of_our_kernels_under_a_condition_is_found() {
    let mut num_moved = 0;
    for stage in ["permute", "gate_up.tiled.f32", "capacity.by_position", "norm"] {
        let kernel = kernels::all().into_iter().find(|kernel| kernel.label.starts_with(stage));
        let source = kernel.unwrap_or_else(|| panic!("no kernel {stage}")).wgsl();
        let argument = "@builtin(local_invocation_index)";
        assert!(source.contains(argument), "{stage} has no {argument}");
        let name = source.split(argument).nth(1).and_then(|rest| rest.split(':').next()).expect("an argument").trim();
        let name = name.to_owned();
        let entry = source.find("@compute").expect("an entry point");
        for (at, _) in source.match_indices("workgroupBarrier();").filter(|(at, _)| *at > entry) {
            let moved = format!("{}if {name} < 3u {{ workgroupBarrier(); }}{}", &source[..at], &source[at + 19..]);
            let Ok(findings) = lint(stage, &moved) else { continue };
            let line = moved[..at].matches('\n').count() as u32 + 1;
            assert!(
                findings.iter().any(|f| f.line == line && f.rule == Rule::Barrier),
                "{stage}:{line}: {findings:#?}"
            );
            num_moved += 1;
        }
    }
    assert!(num_moved >= 3, "{num_moved} barriers were moved");
}

#[test]
fn wgsl_that_naga_refuses_is_an_error_with_the_name_and_the_place() {
    for source in ["fn f() { let x = y; }", "@compute @workgroup_size(1) fn f() { let x: f32 = 1u; }", "\u{0}", "{"] {
        let error = lint("mine.wgsl", source).expect_err("it is no WGSL").to_string();
        assert!(error.contains("mine.wgsl"), "{error}");
    }
    assert!(lint("empty.wgsl", "").expect("nothing is valid").is_empty());
}
