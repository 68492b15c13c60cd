//! Result files, and what is the same in several of them.

use std::path::PathBuf;
use wgmoe::bench::results::{Results, Row};

/// One file.
pub struct Run {
    /// The device's name, with the file's where several files are of one device.
    pub label: String,
    pub file: PathBuf,
    pub results: Results,
}

/// A layer as it was timed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// All that is known of it; equal for equal layers.
    pub title: String,
    /// Enough to tell it from the others in this report.
    pub short: String,
}

/// All files.
pub struct Report {
    pub runs: Vec<Run>,
    /// Every layer once, in the order of the files.
    pub layers: Vec<Layer>,
}

impl Report {
    pub fn read(files: &[PathBuf]) -> wgmoe::Result<Report> {
        let results = files.iter().map(|file| Results::load(file)).collect::<wgmoe::Result<Vec<_>>>()?;
        let labels = labels(&results, files);
        let runs: Vec<Run> = results
            .into_iter()
            .zip(labels)
            .zip(files)
            .map(|((results, label), file)| Run { label, file: file.clone(), results })
            .collect();
        let layers = layers(runs.iter().flat_map(|run| &run.results.rows));
        Ok(Report { runs, layers })
    }

    /// (number of the run, number of the layer, row) of all rows.
    pub fn rows(&self) -> impl Iterator<Item = (usize, usize, &Row)> {
        self.runs
            .iter()
            .enumerate()
            .flat_map(move |(run, _)| self.rows_of(run).map(move |(layer, row)| (run, layer, row)))
    }

    /// (number of the layer, row) of one run's rows.
    pub fn rows_of(&self, run: usize) -> impl Iterator<Item = (usize, &Row)> {
        let rows = self.runs[run].results.rows.iter();
        rows.filter_map(|row| Some((self.layers.iter().position(|layer| layer.title == title(row))?, row)))
    }

    pub fn is_of_one(&self) -> bool {
        self.runs.len() == 1
    }
}

fn labels(results: &[Results], files: &[PathBuf]) -> Vec<String> {
    let name = |results: &Results| results.device.name.clone();
    let is_unique = |name: &str| results.iter().filter(|other| other.device.name == name).count() == 1;
    let label = |(results, file): (&Results, &PathBuf)| {
        let name = name(results);
        if is_unique(&name) { name } else { format!("{name}, {}", file.display()) }
    };
    results.iter().zip(files).map(label).collect()
}

fn layers<'a>(rows: impl Iterator<Item = &'a Row>) -> Vec<Layer> {
    let mut found: Vec<(Layer, Option<&str>)> = Vec::new();
    for row in rows {
        let title = title(row);
        if !found.iter().any(|(layer, _)| layer.title == title) {
            found.push((Layer { short: short(row), title }, row.preset.as_deref()));
        }
    }
    let presets: Vec<Option<&str>> = found.iter().map(|(_, preset)| *preset).collect();
    let is_unique = |preset: &str| presets.iter().filter(|other| **other == Some(preset)).count() == 1;
    for (layer, preset) in &mut found {
        if let Some(preset) = preset.filter(|preset| is_unique(preset)) {
            layer.short = preset.to_owned();
        }
    }
    found.into_iter().map(|(layer, _)| layer).collect()
}

/// Sizes, kept short.
fn short(row: &Row) -> String {
    let Row { hidden_size, intermediate_size, num_experts, top_k, weights, .. } = row;
    format!(
        "{num_experts} experts, top-{top_k}, {hidden_size}×{intermediate_size}, {}{}",
        weights.name(),
        conditions(row)
    )
}

/// All that makes a layer's times comparable with another's, in words.
fn title(row: &Row) -> String {
    let Row { hidden_size, intermediate_size, num_experts, top_k, weights, .. } = row;
    let preset = row.preset.as_ref().map(|preset| format!("{preset}: ")).unwrap_or_default();
    format!(
        "{preset}hidden {hidden_size}, intermediate {intermediate_size}, {num_experts} experts, top-{top_k}, {} weights{}",
        weights.name(),
        conditions(row)
    )
}

/// What else a time depends on.
pub fn conditions(row: &Row) -> String {
    let mut text = String::new();
    if row.skew > 0.0 {
        text.push_str(&format!(", Zipf {}", row.skew));
    }
    if let Some(trace) = &row.trace {
        text.push_str(&format!(", as in {trace}"));
    }
    if row.fresh_tokens {
        text.push_str(", fresh tokens");
    }
    if let Some(residency) = &row.residency {
        text.push_str(&format!(", {} experts on the device", residency.places));
    }
    text
}
