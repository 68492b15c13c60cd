//! Plots and tables of a report.

use super::run::{Layer, Report, conditions};
use super::words::{grouped, throughput, tokens};
use crate::bench_table::{number, percent, seconds};
use crate::html::{Axis, Chart, Extent, Figure, Ink, Key, Mark, Shape, Table};
use wgmoe::bench::facts::Facts;
use wgmoe::bench::presets::Preset;
use wgmoe::bench::results::{RooflineResult, Row, StageResult, YardstickResult};
use wgmoe::bench::stats::Interval;

/// Rows of one plot; more of them are in its table.
const MOST_PLACES: usize = 120;

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "–".to_owned())
}

/// Where the median is; files of schema 1 do not say.
fn interval(row: &Row) -> Option<Interval> {
    row.timing.as_ref().map(|timing| timing.interval_s)
}

fn batch(row: &Row) -> String {
    format!("{} {}", row.tokens, tokens(row.tokens))
}

fn case(layer: &Layer, row: &Row) -> String {
    format!("{}, {}", layer.short, batch(row))
}

/// Files have colours and layers have shapes; with one file alone, its layers have both.
fn look(report: &Report, run: usize, layer: usize) -> (Ink, Shape) {
    (Ink::Series(if report.is_of_one() { layer } else { run }), Shape(layer))
}

/// One key for each pair of a file and a layer that `used` has.
fn keys(report: &Report, used: &[(usize, usize)]) -> Vec<Key> {
    if report.is_of_one() {
        return of_layers(report, used, Ink::Series);
    }
    let mut keys = of_runs(report, used.iter().map(|(run, _)| *run));
    keys.extend(of_layers(report, used, |_| Ink::Muted));
    keys
}

fn of_runs(report: &Report, used: impl Iterator<Item = usize>) -> Vec<Key> {
    let used: std::collections::BTreeSet<usize> = used.collect();
    used.into_iter()
        .map(|run| Key { ink: Ink::Series(run), shape: None, text: report.runs[run].label.clone() })
        .collect()
}

fn of_layers(report: &Report, used: &[(usize, usize)], ink: impl Fn(usize) -> Ink) -> Vec<Key> {
    let layers = (0..report.layers.len()).filter(|layer| used.iter().any(|(_, used)| used == layer));
    layers.map(|n| Key { ink: ink(n), shape: Some(Shape(n)), text: report.layers[n].short.clone() }).collect()
}

// --- tables

pub fn results_table(report: &Report) -> Table {
    let columns = [
        "batch",
        "device",
        "time",
        "95 % within",
        "tokens/s",
        "GFLOP/s",
        "GB/s",
        "of roofline",
        "experts used",
        "error",
    ];
    let mut table = Table::new("Every result; times are medians", &columns);
    for (n, layer) in report.layers.iter().enumerate() {
        table.rows.push(vec![layer.title.clone()]);
        let mut rows: Vec<(usize, usize, &Row)> = report.rows().filter(|(_, layer, _)| *layer == n).collect();
        rows.sort_by_key(|(run, _, row)| (row.tokens, *run));
        table.rows.extend(rows.into_iter().map(|(run, _, row)| {
            vec![
                batch(row),
                report.runs[run].label.clone(),
                seconds(row.median_s),
                or_dash(interval(row).map(|within| format!("{} to {}", seconds(within.low), seconds(within.high)))),
                grouped(throughput(row)),
                number(row.gflops),
                number(row.gbytes_per_s),
                or_dash(row.roofline_fraction.map(percent)),
                format!("{} of {}", row.active_experts, row.num_experts),
                format!("{:.0e}", row.max_rel_error),
            ]
        }));
    }
    if report.is_of_one() {
        table.without_column(1);
    }
    table
}

/// What has no result, if there is any.
pub fn failures_table(report: &Report) -> Option<Table> {
    let mut table = Table::of_text("Without a result", &["layer", "device", "tokens", "why"]);
    for run in &report.runs {
        table.rows.extend(run.results.failures.iter().map(|failure| {
            let tokens = or_dash(failure.tokens.map(|tokens| tokens.to_string()));
            vec![failure.layer.clone(), run.label.clone(), tokens, failure.reason.clone()]
        }));
    }
    (!table.rows.is_empty()).then_some(table)
}

/// A line for each fact, a column for each file.
pub fn environment(report: &Report) -> Table {
    let labels: Vec<&str> = report.runs.iter().map(|run| run.label.as_str()).collect();
    let mut table = Table::of_text("Environment", &[&["fact"], &labels[..]].concat());
    let mut fact = |name: &str, value: &dyn Fn(&super::run::Run) -> Option<String>| {
        let values: Vec<Option<String>> = report.runs.iter().map(value).collect();
        if values.iter().any(Option::is_some) {
            table.rows.push(std::iter::once(name.to_owned()).chain(values.into_iter().map(or_dash)).collect());
        }
    };
    fact("device", &|run| Some(run.results.device.name.clone()));
    fact("kind", &|run| Some(run.results.device.kind.clone()));
    fact("backend", &|run| Some(run.results.device.backend.clone()).filter(|text| !text.is_empty()));
    fact("driver", &|run| Some(run.results.device.driver.clone()).filter(|text| !text.is_empty()));
    fact("arithmetic at best", &|run| Some(format!("{} GFLOP/s", number(run.results.roofline.as_ref()?.gflops))));
    fact("reads at best", &|run| run.results.roofline.as_ref().map(reads));
    fact("measured with", &|run| Some(run.results.roofline.as_ref()?.how.clone()));
    fact("tuning", &|run| Some(run.results.tuning.clone().unwrap_or_else(|| "none".to_owned())));
    let mut of_machine = |name: &str, value: &dyn Fn(&Facts) -> Option<String>| {
        fact(name, &|run| value(run.results.facts.as_ref()?));
    };
    of_machine("began", &|facts| Some(facts.began.clone()));
    of_machine("processor", &|facts| facts.cpu.clone());
    of_machine("logical processors", &|facts| facts.cores.map(|cores| cores.to_string()));
    of_machine("system", &|facts| Some(facts.os.clone()));
    of_machine("clock governor", &|facts| facts.governor.clone());
    of_machine("power", &|facts| facts.power.clone());
    of_machine("load before", &|facts| facts.load_before.clone());
    of_machine("commit", &|facts| facts.git_commit.clone());
    fact("yardstick", &|run| run.results.yardstick.as_ref().map(yardstick));
    fact("wgmoe", &|run| Some(run.results.wgmoe_version.clone()));
    fact("file", &|run| Some(run.file.display().to_string()));
    table
}

fn reads(roofline: &RooflineResult) -> String {
    let rate = |&(bytes, rate): &(u64, f64)| format!("{} GB/s within {} MiB", number(rate), bytes >> 20);
    match roofline.bandwidths.as_slice() {
        [] => format!("{} GB/s", number(roofline.gbytes_per_s)),
        rates => rates.iter().map(rate).collect::<Vec<_>>().join(", "),
    }
}

fn yardstick(yardstick: &YardstickResult) -> String {
    format!(
        "{}; {}, eight of ten runs from {} to {}",
        yardstick.what,
        seconds(yardstick.median_s),
        seconds(yardstick.fast_s),
        seconds(yardstick.slow_s)
    )
}

/// What measures each layer again.
pub fn commands(report: &Report) -> Table {
    let mut table = Table::of_text("To measure it again, on a device of the reader's", &["layer", "command"]);
    for (n, layer) in report.layers.iter().enumerate() {
        let rows: Vec<&Row> = report.rows().filter(|(_, layer, _)| *layer == n).map(|(_, _, row)| row).collect();
        let Some(row) = rows.first() else { continue };
        let mut sizes: Vec<u32> = rows.iter().map(|row| row.tokens).collect();
        sizes.sort_unstable();
        sizes.dedup();
        table.rows.push(vec![layer.title.clone(), command(row, &sizes)]);
    }
    table
}

fn command(row: &Row, sizes: &[u32]) -> String {
    let sizes = sizes.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    // A preset brings its router; what was changed about it stands in parentheses.
    let name = row.preset.as_deref().unwrap_or_default();
    let base = name.split(" (").next().and_then(Preset::find);
    let mut command = "wgmoe bench".to_owned();
    if let Some(preset) = &base {
        command.push_str(&format!(" --preset {}", preset.name));
    }
    if base.is_none_or(|preset| preset.name != name) {
        let Row { hidden_size, intermediate_size, num_experts, top_k, .. } = row;
        command.push_str(&format!(" --hidden {hidden_size} --intermediate {intermediate_size}"));
        command.push_str(&format!(" --experts {num_experts} --top-k {top_k}"));
    }
    command.push_str(&format!(" --weights {} --tokens {sizes}", row.weights.name()));
    if row.skew > 0.0 {
        command.push_str(&format!(" --skew {}", row.skew));
    }
    if row.fresh_tokens {
        command.push_str(" --fresh-tokens");
    }
    if let Some(residency) = &row.residency {
        command
            .push_str(&format!(" --gpu-memory {}", u64::from(residency.places).saturating_mul(residency.expert_bytes)));
    }
    command
}

// --- roofline

/// FLOPs for each byte.
fn intensity(row: &Row) -> f64 {
    row.gflops / row.gbytes_per_s
}

pub fn roofline(report: &Report) -> Option<Figure> {
    let ceilings: Vec<(usize, &RooflineResult)> =
        report.runs.iter().enumerate().filter_map(|(n, run)| Some((n, run.results.roofline.as_ref()?))).collect();
    let is_usable = |row: &&Row| intensity(row).is_finite() && intensity(row) > 0.0;
    let rows: Vec<(usize, usize, &Row)> = report.rows().filter(|(_, _, row)| is_usable(row)).collect();
    if ceilings.is_empty() || rows.is_empty() {
        return None;
    }
    let ridges = ceilings.iter().flat_map(|(_, r)| [r.gflops / r.gbytes_per_s, 4.0 * r.gflops / r.gbytes_per_s]);
    let x = Axis::log(
        "FLOP for each byte that has to be moved",
        rows.iter().map(|(_, _, row)| intensity(row)).chain(ridges),
    );
    let peaks = ceilings.iter().map(|(_, r)| r.gflops);
    let y = Axis::log("GFLOP/s", rows.iter().map(|(_, _, row)| row.gflops).chain(peaks));
    let ceiling_ink = |run: usize| if report.is_of_one() { Ink::Text } else { Ink::Series(run) };
    let mut marks = Vec::new();
    for &(run, roofline) in &ceilings {
        let rates = roofline.bandwidths.iter().map(|&(_, rate)| rate).chain([roofline.gbytes_per_s]);
        let fastest = rates.fold(0.0, f64::max);
        for (rate, is_dashed) in [(fastest, true), (roofline.gbytes_per_s, false)] {
            marks.push(Mark::Line { points: ceiling(roofline.gflops, rate, &x, &y), ink: ceiling_ink(run), is_dashed });
        }
    }
    for &(run, layer, row) in &rows {
        let (ink, shape) = look(report, run, layer);
        marks.push(Mark::Point { at: (intensity(row), row.gflops), ink, shape, label: row.tokens.to_string() });
    }
    let used: Vec<(usize, usize)> = rows.iter().map(|&(run, layer, _)| (run, layer)).collect();
    let mut keys = keys(report, &used);
    if report.is_of_one() {
        keys.insert(0, Key { ink: Ink::Text, shape: None, text: "ceilings; dashed: from caches".to_owned() });
    }
    Some(Figure {
        heading: "Roofline".to_owned(),
        text: "A layer can be no faster than the lines: memory holds it back on the slope, arithmetic under the flat part. \
               Points are results with their numbers of tokens; the nearer to the line, the better. Points above the \
               solid slope had their weights in a cache."
            .to_owned(),
        keys,
        chart: Chart {
            title: "Roofline".to_owned(),
            description: format!(
                "Arithmetic rate over arithmetic intensity, both logarithmic, of {} results under the measured ceilings of \
                 {} devices.",
                rows.len(),
                ceilings.len()
            ),
            x,
            y,
            extent: Extent::Landscape,
            marks,
            heat: None,
        },
        table: roofline_table(report, &rows, &ceilings),
    })
}

/// From where the slope enters the chart, by the ridge, to the right end.
fn ceiling(gflops: f64, rate: f64, x: &Axis, y: &Axis) -> Vec<(f64, f64)> {
    let (left, right) = x.range();
    let start = left.max(y.range().0 / rate);
    let ridge = gflops / rate;
    if start < ridge {
        vec![(start, start * rate), (ridge, gflops), (right, gflops)]
    } else {
        vec![(left, gflops), (right, gflops)]
    }
}

fn roofline_table(report: &Report, rows: &[(usize, usize, &Row)], ceilings: &[(usize, &RooflineResult)]) -> Table {
    let mut table =
        Table::new("Ceilings and results", &["what", "device", "FLOP/byte", "GFLOP/s", "GB/s", "of roofline"]);
    for &(run, roofline) in ceilings {
        table.rows.push(vec![
            "ceilings; FLOP/byte where they meet".to_owned(),
            report.runs[run].label.clone(),
            number(roofline.gflops / roofline.gbytes_per_s),
            number(roofline.gflops),
            number(roofline.gbytes_per_s),
            String::new(),
        ]);
    }
    for &(run, layer, row) in rows {
        table.rows.push(vec![
            case(&report.layers[layer], row),
            report.runs[run].label.clone(),
            number(intensity(row)),
            number(row.gflops),
            number(row.gbytes_per_s),
            or_dash(row.roofline_fraction.map(percent)),
        ]);
    }
    table
}

// --- stages

/// One figure for each file whose stages have times.
pub fn stages(report: &Report) -> Vec<Option<Figure>> {
    let names = stage_names(report);
    (0..report.runs.len()).map(|run| stages_of(report, run, &names)).collect()
}

/// Stages by the time that they take in all files, so that the largest have the clearest colours.
fn stage_names(report: &Report) -> Vec<String> {
    let mut totals: Vec<(String, f64)> = Vec::new();
    for (_, _, row) in report.rows() {
        let whole = whole(row);
        for stage in &row.stages {
            let share = stage.median_s.map_or(0.0, |time| time / whole);
            match totals.iter_mut().find(|(name, _)| *name == stage.name) {
                Some((_, total)) => *total += share,
                None => totals.push((stage.name.clone(), share)),
            }
        }
    }
    totals.sort_by(|a, b| b.1.total_cmp(&a.1));
    totals.into_iter().map(|(name, _)| name).collect()
}

fn whole(row: &Row) -> f64 {
    row.stages.iter().filter_map(|stage| stage.median_s).sum()
}

fn stages_of(report: &Report, run: usize, names: &[String]) -> Option<Figure> {
    let rows: Vec<(usize, &Row)> =
        report.rows_of(run).filter(|(_, row)| whole(row).is_finite() && whole(row) > 0.0).collect();
    if rows.is_empty() {
        return None;
    }
    let mut labels = Vec::new();
    let mut marks = Vec::new();
    let mut above = None;
    for &(layer, row) in rows.iter().take(MOST_PLACES) {
        if above != Some(layer) {
            marks.push(Mark::Heading { y: labels.len() as f64, text: report.layers[layer].short.clone() });
            labels.push(String::new());
            above = Some(layer);
        }
        marks.extend(stacked(row, names, labels.len() as f64));
        labels.push(batch(row));
    }
    let percents = (0..=4).map(|n| (f64::from(n) / 4.0, format!("{} %", n * 25)));
    let is_used = |name: &&String| rows.iter().any(|(_, row)| row.stages.iter().any(|stage| stage.name == **name));
    let key = |(n, name): (usize, &String)| Key { ink: Ink::Series(n), shape: Some(Shape(1)), text: name.clone() };
    let label = &report.runs[run].label;
    Some(Figure {
        heading: if report.is_of_one() { "Time by stage".to_owned() } else { format!("Time by stage: {label}") },
        text: "Each stage's share of a pass; after the bar, the time of all stages together.".to_owned(),
        keys: names.iter().enumerate().filter(|(_, name)| is_used(name)).map(key).collect(),
        chart: Chart {
            title: format!("Time by stage on {label}"),
            description: format!("Stacked bars: the shares of {} stages in {} passes.", names.len(), rows.len()),
            x: Axis::linear("", 0.0, 1.2).without_grid().with_ticks(percents),
            extent: Extent::Rows(labels.len()),
            y: Axis::places("", labels).reversed(),
            marks,
            heat: None,
        },
        table: stages_table(report, &rows, names),
    })
}

/// The bars of one pass.
fn stacked(row: &Row, names: &[String], y: f64) -> Vec<Mark> {
    let whole = whole(row);
    let timed = |name: &String| row.stages.iter().find(|stage| stage.name == *name)?.median_s;
    let mut start = 0.0;
    let mut bars = Vec::new();
    for (n, name) in names.iter().enumerate() {
        let Some(time) = timed(name) else { continue };
        let x = (start, start + time / whole);
        let label = percent(time / whole);
        bars.push(Mark::Bar { x, y: (y - 0.36, y + 0.36), ink: Ink::Series(n), label, is_label_after: false });
        start = x.1;
    }
    let end = Mark::Bar {
        x: (1.0, 1.0),
        y: (y - 0.36, y + 0.36),
        ink: Ink::Ground,
        label: seconds(whole),
        is_label_after: true,
    };
    bars.push(end);
    bars
}

fn stages_table(report: &Report, rows: &[(usize, &Row)], names: &[String]) -> Table {
    let columns: Vec<&str> =
        ["layer and batch", "all stages"].into_iter().chain(names.iter().map(String::as_str)).collect();
    let mut table = Table::new("Time of each stage", &columns);
    for &(layer, row) in rows {
        let time = |name: &String| {
            let stage: Option<&StageResult> = row.stages.iter().find(|stage| stage.name == *name);
            or_dash(stage.and_then(|stage| stage.median_s).map(seconds))
        };
        let first = [case(&report.layers[layer], row), seconds(whole(row))];
        table.rows.push(first.into_iter().chain(names.iter().map(time)).collect());
    }
    table
}

// --- scaling

/// Points that belong together.
struct Series {
    run: usize,
    layer: usize,
    /// (x, y), ascending.
    points: Vec<(f64, f64)>,
    /// Both ends of where each point may be, where that is known.
    within: Vec<[(f64, f64); 2]>,
}

impl Series {
    fn marks(&self, report: &Report) -> Vec<Mark> {
        let (ink, shape) = look(report, self.run, self.layer);
        let line = Mark::Line { points: self.points.clone(), ink, is_dashed: false };
        let point = |&at: &(f64, f64)| Mark::Point { at, ink, shape, label: String::new() };
        let within = |ends: &[(f64, f64); 2]| Mark::Line { points: ends.to_vec(), ink: Ink::Text, is_dashed: false };
        let marks = std::iter::once(line).chain(self.points.iter().map(point));
        marks.chain(self.within.iter().map(within)).collect()
    }
}

fn is_drawable(&(x, y): &(f64, f64)) -> bool {
    x.is_finite() && x > 0.0 && y.is_finite() && y > 0.0
}

pub fn by_tokens(report: &Report) -> Option<Figure> {
    let mut all: Vec<Series> = Vec::new();
    for run in 0..report.runs.len() {
        for layer in 0..report.layers.len() {
            let rows = || report.rows_of(run).filter(|(other, _)| *other == layer).map(|(_, row)| row);
            let mut points: Vec<(f64, f64)> =
                rows().map(|row| (f64::from(row.tokens), throughput(row))).filter(is_drawable).collect();
            let ends = |row: &Row| {
                let tokens = f64::from(row.tokens);
                interval(row).map(|within| [within.low, within.high].map(|seconds| (tokens, tokens / seconds)))
            };
            let within = rows().filter_map(ends).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            if points.len() > 1 {
                all.push(Series { run, layer, points, within });
            }
        }
    }
    let points: Vec<(f64, f64)> = all.iter().flat_map(|series| series.points.clone()).collect();
    if points.is_empty() {
        return None;
    }
    let mut sizes: Vec<f64> = points.iter().map(|point| point.0).collect();
    sizes.sort_by(f64::total_cmp);
    sizes.dedup();
    let ticks = sizes.iter().map(|&size| (size, format!("{size}")));
    let used: Vec<(usize, usize)> = all.iter().map(|series| (series.run, series.layer)).collect();
    let mut table = Table::new("Tokens per second", &["layer", "device", "tokens", "tokens/s", "time of a pass"]);
    for series in &all {
        for &(x, y) in &series.points {
            table.rows.push(vec![
                report.layers[series.layer].short.clone(),
                report.runs[series.run].label.clone(),
                format!("{x}"),
                grouped(y),
                seconds(x / y),
            ]);
        }
    }
    Some(Figure {
        heading: "Tokens".to_owned(),
        text: "Larger batches share each expert's weights among more tokens, until arithmetic is the limit. \
               Vertical lines are where the median is with 95 % certainty."
            .to_owned(),
        keys: keys(report, &used),
        chart: Chart {
            title: "Tokens per second over tokens in the batch".to_owned(),
            description: format!("{} lines, both axes logarithmic.", all.len()),
            x: Axis::log("tokens in the batch", sizes.iter().copied()).with_ticks(ticks),
            y: Axis::log("tokens per second", points.iter().map(|point| point.1)),
            extent: Extent::Landscape,
            marks: all.iter().flat_map(|series| series.marks(report)).collect(),
            heat: None,
        },
        table,
    })
}

/// The number of the run, what its rows have in common, and (experts, ms).
type Group = (usize, String, Vec<(f64, f64)>);

/// Time over the number of experts, where layers differ in nothing else.
pub fn by_experts(report: &Report) -> Option<Figure> {
    let alike = |row: &Row| {
        let Row { hidden_size, intermediate_size, top_k, weights, .. } = row;
        format!("{}, top-{top_k}, {hidden_size}×{intermediate_size}, {}{}", batch(row), weights.name(), conditions(row))
    };
    let mut groups: Vec<Group> = Vec::new();
    for (run, _, row) in report.rows().filter(|(_, _, row)| row.residency.is_none()) {
        let (name, point) = (alike(row), (f64::from(row.num_experts), row.median_s * 1e3));
        match groups.iter_mut().find(|(other, group, _)| *other == run && *group == name) {
            Some((_, _, points)) => points.push(point),
            None => groups.push((run, name, vec![point])),
        }
    }
    for (_, _, points) in &mut groups {
        points.retain(is_drawable);
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        points.dedup_by_key(|point| point.0);
    }
    groups.retain(|(_, _, points)| points.len() > 1);
    if groups.is_empty() {
        return None;
    }
    let mut names: Vec<String> = groups.iter().map(|(_, name, _)| name.clone()).collect();
    names.sort();
    names.dedup();
    let mut keys = if report.is_of_one() { Vec::new() } else { of_runs(report, groups.iter().map(|(run, _, _)| *run)) };
    keys.extend(names.iter().enumerate().map(|(n, name)| {
        let ink = if report.is_of_one() { Ink::Series(n) } else { Ink::Muted };
        Key { ink, shape: Some(Shape(n)), text: name.clone() }
    }));
    let mut marks = Vec::new();
    let mut table = Table::new("Time of a pass", &["batch and layer", "device", "experts", "time"]);
    for (run, name, points) in &groups {
        let shape = Shape(names.iter().position(|other| other == name).unwrap_or(0));
        let label = &report.runs[*run].label;
        let ink = Ink::Series(if report.is_of_one() { shape.0 } else { *run });
        marks.push(Mark::Line { points: points.clone(), ink, is_dashed: false });
        for &at in points {
            marks.push(Mark::Point { at, ink, shape, label: String::new() });
            table.rows.push(vec![name.clone(), label.clone(), format!("{}", at.0), seconds(at.1 / 1e3)]);
        }
    }
    let points = || groups.iter().flat_map(|(_, _, points)| points);
    let mut counts: Vec<f64> = points().map(|point| point.0).collect();
    counts.sort_by(f64::total_cmp);
    counts.dedup();
    Some(Figure {
        heading: "Experts".to_owned(),
        text: "The same batch through layers with more experts: more weights, the same arithmetic.".to_owned(),
        keys,
        chart: Chart {
            title: "Time of a pass over the number of experts".to_owned(),
            description: format!("{} lines, both axes logarithmic.", groups.len()),
            x: Axis::log("experts", counts.iter().copied())
                .with_ticks(counts.iter().map(|&count| (count, format!("{count}")))),
            y: Axis::log("ms", points().map(|point| point.1)),
            extent: Extent::Landscape,
            marks,
            heat: None,
        },
        table,
    })
}

// --- comparison

/// One layer at one batch size in the first file and in another.
pub struct Pair<'a> {
    pub run: usize,
    layer: usize,
    first: &'a Row,
    other: &'a Row,
    /// The first file's time by the other's.
    pub speed: f64,
}

/// What other files have in common with the first.
pub fn pairs(report: &Report) -> Vec<Pair<'_>> {
    let mut pairs = Vec::new();
    for (run, layer, other) in report.rows().filter(|(run, _, _)| *run > 0) {
        let same = |(of, row): &(usize, &Row)| *of == layer && row.tokens == other.tokens;
        if let Some((_, first)) = report.rows_of(0).find(same) {
            let speed = first.median_s / other.median_s;
            if speed.is_finite() && speed > 0.0 {
                pairs.push(Pair { run, layer, first, other, speed });
            }
        }
    }
    pairs
}

pub fn comparison(report: &Report) -> Option<Figure> {
    let pairs = pairs(report);
    let mut cases: Vec<(usize, u32)> = pairs.iter().map(|pair| (pair.layer, pair.first.tokens)).collect();
    cases.sort_unstable();
    cases.dedup();
    if cases.is_empty() {
        return None;
    }
    let mut labels = Vec::new();
    let mut marks = Vec::new();
    let mut above = None;
    for &(layer, size) in cases.iter().take(MOST_PLACES) {
        if above != Some(layer) {
            marks.push(Mark::Heading { y: labels.len() as f64, text: report.layers[layer].short.clone() });
            labels.push(String::new());
            above = Some(layer);
        }
        let y = labels.len() as f64;
        labels.push(format!("{size} {}", tokens(size)));
        for pair in pairs.iter().filter(|pair| (pair.layer, pair.first.tokens) == (layer, size)) {
            let ink = Ink::Series(pair.run);
            marks.push(Mark::Point { at: (pair.speed, y), ink, shape: Shape(pair.run), label: number(pair.speed) });
        }
    }
    let bottom = labels.len() as f64;
    marks.insert(0, Mark::Line { points: vec![(1.0, -0.5), (1.0, bottom)], ink: Ink::Series(0), is_dashed: false });
    let others = (1..report.runs.len()).filter(|run| pairs.iter().any(|pair| pair.run == *run));
    let key = |run: usize| Key { ink: Ink::Series(run), shape: Some(Shape(run)), text: report.runs[run].label.clone() };
    let first = Key { ink: Ink::Series(0), shape: None, text: format!("{} = 1", report.runs[0].label) };
    let mut table = Table::new(
        "Times",
        &[
            "layer and batch",
            "device",
            "time",
            &format!("time on {}", report.runs[0].label),
            "times as fast",
            "intervals apart",
        ],
    );
    table.rows = pairs
        .iter()
        .map(|pair| {
            vec![
                case(&report.layers[pair.layer], pair.first),
                report.runs[pair.run].label.clone(),
                seconds(pair.other.median_s),
                seconds(pair.first.median_s),
                number(pair.speed),
                match interval(pair.first).zip(interval(pair.other)) {
                    Some((first, other)) if first.overlaps(&other) => "no".to_owned(),
                    Some(_) => "yes".to_owned(),
                    None => "unknown".to_owned(),
                },
            ]
        })
        .collect();
    Some(Figure {
        heading: "Speed".to_owned(),
        text: format!("Times as fast as {}; to the right is faster.", report.runs[0].label),
        keys: std::iter::once(first).chain(others.map(key)).collect(),
        chart: Chart {
            title: format!("Speed relative to {}", report.runs[0].label),
            description: format!("{} ratios on a logarithmic axis, a row for each layer and batch size.", pairs.len()),
            x: Axis::log("times as fast", pairs.iter().map(|pair| pair.speed).chain([1.0])),
            y: Axis::places("", labels.iter().cloned()).reversed(),
            extent: Extent::Rows(labels.len()),
            marks,
            heat: None,
        },
        table,
    })
}
