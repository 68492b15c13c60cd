//! `wgmoe lint`: barriers and subgroup operations that not all invocations reach alike.

use crate::output::Output;
use crate::{Verdict, must_exist};
use anyhow::Context as _;
use serde::Serialize;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use wgmoe::kernels::{self, Kernel};
use wgmoe::lint::{Finding, Rule, lint};

const EXAMPLES: &str = "\
Looks at WGSL without a GPU: naga's own checks, then what naga does not check and browsers refuse. A barrier in control \
flow that is not uniform is an error, a subgroup operation in such control flow a warning. Without files it looks at \
wgmoe's kernels.

Examples:
  wgmoe lint my_kernel.wgsl other.wgsl
  wgmoe lint shaders/*.wgsl --json -";

/// Find barriers that not all invocations reach, in any WGSL
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// WGSL files, each complete in itself; without one, all kernels of wgmoe
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
}

/// One source: its findings, or why there are none.
#[derive(Serialize)]
struct Row {
    name: String,
    findings: Vec<Finding>,
    /// Why naga refused it.
    error: Option<String>,
}

pub fn execute(args: &Args, output: &mut Output) -> anyhow::Result<Verdict> {
    for file in &args.files {
        must_exist("FILE", file)?;
    }
    let rows = if args.files.is_empty() { of_kernels(output) } else { of_files(&args.files, output)? };
    let all = || rows.iter().flat_map(|row| &row.findings);
    let num_barrier = all().filter(|finding| finding.rule == Rule::Barrier).count();
    let num_subgroup = all().filter(|finding| finding.rule == Rule::Subgroup).count();
    let num_refused = rows.iter().filter(|row| row.error.is_some()).count();
    let counted = |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
    output.line(&format!(
        "{}: {}, {}",
        counted(rows.len(), "source"),
        counted(num_barrier + num_refused, "error"),
        counted(num_subgroup, "warning")
    ));
    output.json(&serde_json::json!({ "sources": rows }))?;
    Ok(if num_barrier + num_refused == 0 { Verdict::Right } else { Verdict::Wrong })
}

fn of_files(files: &[PathBuf], output: &mut Output) -> anyhow::Result<Vec<Row>> {
    let mut rows = Vec::new();
    for file in files {
        let source = std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.display().to_string();
        let row = look(&name, &source);
        tell(&row, |line| (name.clone(), line), output);
        rows.push(row);
    }
    Ok(rows)
}

/// Each text once: many variants differ in the values of their overrides only.
fn of_kernels(output: &mut Output) -> Vec<Row> {
    let mut seen = HashSet::new();
    let mut rows = Vec::new();
    for kernel in kernels::all().into_iter().filter(|kernel| seen.insert(kernel.wgsl())) {
        let row = look(kernel.label(), &kernel.wgsl());
        tell(&row, |line| place(&kernel, line), output);
        rows.push(row);
    }
    rows
}

fn place(kernel: &Kernel, line: u32) -> (String, u32) {
    let (file, line) = kernel.locate(line);
    (Path::new("shaders").join(file).with_extension("wgsl").display().to_string(), line)
}

fn look(name: &str, source: &str) -> Row {
    let (findings, error) = match lint(name, source) {
        Ok(findings) => (findings, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    Row { name: name.to_owned(), findings, error }
}

/// As compilers print it, so that editors find the place.
fn tell(row: &Row, place: impl Fn(u32) -> (String, u32), output: &mut Output) {
    if let Some(error) = &row.error {
        output.line(&format!("error: {error}"));
    }
    for finding in &row.findings {
        let (file, line) = place(finding.line);
        let kind = if finding.rule == Rule::Barrier { "error" } else { "warning" };
        let Finding { column, message, entry_point, .. } = finding;
        let mut text =
            format!("{file}:{line}:{column}: {kind}[{}]: {message}, in `{entry_point}`", finding.rule.name());
        for step in &finding.because {
            let (file, line) = place(step.line);
            // Writing to a string cannot fail.
            let _ = write!(text, "\n  {file}:{line}: {}", step.text);
        }
        output.line(&text);
    }
}
