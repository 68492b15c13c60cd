//! The page of `wgmoe inspect`: what experts do, in pictures.
//!
//! Its size has a bound whatever the model is: details are of a few layers, matrices are pictures of at most
//! [`html::LONGEST_SIDE`] cells along a side, and tables of large layers have the most telling rows.

use crate::bench_table::{number, percent};
use crate::html::{self, Axis, Chart, Extent, Figure, Heat, Ink, Key, Mark, Page, Shape, Table, Tile};
use wgmoe::inspect::{Distribution, Inspection, LayerInspection};

/// Layers whose details are shown.
const MOST_LAYERS: usize = 4;
/// Experts that have a bar with a name, or a row in the table of a matrix.
const MOST_NAMED: usize = 32;
/// Pairs in the table of a matrix that is too large to be one.
const MOST_PAIRS: usize = 40;
/// Tokens that an expert's row names.
const MOST_TOKENS: usize = 16;
/// Tokens with a row of their own.
const MOST_TOKEN_ROWS: usize = 200;

/// The whole page.
pub fn page(inspection: &Inspection) -> anyhow::Result<String> {
    let layers = &inspection.layers;
    let title = match layers.as_slice() {
        [only] => format!("The experts of layer {}", only.layer),
        all => format!("The experts of {} layers", all.len()),
    };
    let lead = format!(
        "{} ({}), {} tokens of {}, on {}.",
        inspection.file, inspection.family, inspection.num_tokens, inspection.input, inspection.device.name
    );
    let mut page = Page::new(&title, &lead);
    if layers.len() > 1 {
        if inspection.same_input {
            page.paragraph(
                "Each layer got the same activations. Only layers that get their own, with {layer} in the name of the \
                 input, show what they do in the model.",
            );
        }
        across(&mut page, layers)?;
    }
    let shown = most_telling(layers);
    if shown.len() < layers.len() {
        page.paragraph(&format!(
            "Details follow for the {} layers whose load is the least even; `wgmoe inspect --layer N` has those of any \
             other, and --json the numbers of all.",
            shown.len()
        ));
    }
    for layer in shown {
        details(&mut page, inspection, layer)?;
    }
    page.heading("Words");
    page.list(&inspection.definitions.iter().map(|d| format!("{}: {}", d.word, d.meaning)).collect::<Vec<_>>());
    Ok(page.finish())
}

/// The layers with the largest imbalance, in their order.
fn most_telling(layers: &[LayerInspection]) -> Vec<&LayerInspection> {
    let mut shown: Vec<&LayerInspection> = layers.iter().collect();
    shown.sort_by(|a, b| b.load.max_over_mean.total_cmp(&a.load.max_over_mean));
    shown.truncate(MOST_LAYERS);
    shown.sort_by_key(|layer| layer.layer);
    shown
}

// --- across layers

fn across(page: &mut Page, layers: &[LayerInspection]) -> anyhow::Result<()> {
    page.heading("Across layers");
    let table = layers_table(layers);
    let loads: Vec<Vec<f64>> = layers
        .iter()
        .map(|layer| layer.load.tokens_per_expert.iter().map(|&n| f64::from(n) / layer.load.mean.max(1e-9)).collect())
        .collect();
    let shares: Vec<Vec<f64>> = layers.iter().map(|layer| layer.contributions.share.clone()).collect();
    for (heading, text, values) in [
        ("Load", "Tokens of each expert by the mean of its layer: 1 is even, 0 is dead.", loads),
        ("Contribution", "Each expert's share of what the routed experts of its layer add up to.", shares),
    ] {
        page.figure(&by_layer(heading, text, layers, &values, table.clone()))?;
    }
    Ok(())
}

fn layers_table(layers: &[LayerInspection]) -> Table {
    let columns = [
        "layer",
        "experts",
        "largest load / mean",
        "variation",
        "entropy of the load",
        "at most",
        "dead",
        "hot",
        "entropy of a token",
        "mean similarity",
    ];
    let mut table = Table::new("Layers", &columns);
    for layer in layers {
        let load = &layer.load;
        table.rows.push(vec![
            layer.layer.to_string(),
            format!("{}, top-{}", layer.num_experts, layer.top_k),
            number(load.max_over_mean),
            number(load.coefficient_of_variation),
            format!("{} bits", number(load.entropy)),
            number(load.max_entropy),
            load.dead.len().to_string(),
            load.hot.len().to_string(),
            format!("{} bits", number(layer.entropy.mean)),
            layer.similarity.as_ref().map_or("–".to_owned(), |similarity| number(similarity.mean)),
        ]);
    }
    table
}

/// A row for each layer, a column for each expert.
fn by_layer(heading: &str, text: &str, layers: &[LayerInspection], values: &[Vec<f64>], table: Table) -> Figure {
    let num_experts = values.iter().map(Vec::len).max().unwrap_or(0);
    let rows: Vec<Vec<Option<f64>>> =
        values.iter().map(|row| (0..num_experts).map(|e| row.get(e).copied()).collect()).collect();
    let heat = Heat::new(&rows, None);
    let height = (layers.len() as u32).saturating_mul(16).clamp(96, 520) + 74;
    Figure {
        heading: heading.to_owned(),
        text: format!("{text}{}", of_blocks(&heat)),
        keys: Vec::new(),
        chart: Chart {
            title: format!("{heading} across layers"),
            description: format!("A map of {} layers by {num_experts} experts.", layers.len()),
            x: indices("expert", num_experts, 16, |e| e.to_string()),
            y: indices("layer", layers.len(), 24, |n| layers[n].layer.to_string()).reversed(),
            extent: Extent::Band(height),
            marks: Vec::new(),
            heat: Some(heat),
        },
        table,
    }
}

/// What a picture does not show one by one.
fn of_blocks(heat: &Heat) -> String {
    match heat.block {
        [1, 1] => String::new(),
        [rows, columns] => format!(
            " Each cell is the mean of {rows} by {columns}: a picture has at most {} cells along a side.",
            html::LONGEST_SIDE
        ),
    }
}

/// An axis of cells `0..count`, with names at no more than `most` of them.
fn indices(title: &str, count: usize, most: usize, name: impl Fn(usize) -> String) -> Axis {
    let steps = (0..).flat_map(|power| [1, 2, 4, 8].map(|digit| digit * 16usize.saturating_pow(power)));
    let step = steps.into_iter().find(|step| count / step <= most).unwrap_or(count.max(1));
    let ticks = (0..count).step_by(step).map(|n| (n as f64 + 0.5, name(n)));
    Axis::linear(title, 0.0, count.max(1) as f64).without_grid().with_ticks(ticks)
}

// --- one layer

fn details(page: &mut Page, inspection: &Inspection, layer: &LayerInspection) -> anyhow::Result<()> {
    page.heading(&format!("Layer {}", layer.layer));
    page.paragraph(&format!(
        "hidden {}, intermediate {}, {} experts, top-{}, {} weights",
        layer.hidden_size, layer.intermediate_size, layer.num_experts, layer.top_k, layer.weights
    ));
    page.tiles(&tiles(layer));
    let mut figures = vec![load(layer), contribution(layer), weights(layer), token_entropy(layer)];
    figures.extend([coactivation(layer), similarity(layer)].into_iter().flatten());
    for figure in &figures {
        page.figure(figure)?;
    }
    page.folded("Tokens of each expert", &tokens_of_experts(inspection, layer));
    page.folded("Experts of each token", &experts_of_tokens(inspection, layer));
    Ok(())
}

fn tiles(layer: &LayerInspection) -> Vec<Tile> {
    let tile = |value: String, text: &str| Tile { value, text: text.to_owned() };
    let load = &layer.load;
    let mut tiles = vec![
        tile(format!("{} ×", number(load.max_over_mean)), "the mean load has the busiest expert"),
        tile(
            format!("{} of {}", number(load.entropy), number(load.max_entropy)),
            "bits of entropy has the load; all of them if it is even",
        ),
        tile(
            format!("{} and {}", load.dead.len(), load.hot.len()),
            "experts without a token, and with at least twice the mean",
        ),
    ];
    match &layer.capacity {
        Some(what_if) => tiles.push(Tile {
            value: percent(what_if.share),
            text: format!(
                "of assignments are dropped at a capacity of {} × the mean; none from {} × on",
                number(what_if.factor),
                number(what_if.factor_without_drops)
            ),
        }),
        None => tiles
            .push(tile(format!("{} bits", number(layer.entropy.mean)), "of entropy has a token's choice, on average")),
    }
    tiles
}

/// A bar for each expert, from zero to its value.
fn per_expert(title: &str, unit: &str, values: &[f64], label: fn(f64) -> String, ink: impl Fn(usize) -> Ink) -> Chart {
    let low = values.iter().copied().fold(0.0, f64::min);
    let high = values.iter().copied().fold(0.0, f64::max);
    let (low, high) = if high > low { (low * 1.05, high * 1.05) } else { (0.0, 1.0) };
    let description = format!("Bars: a value for each of {} experts.", values.len());
    let (title, heat) = (title.to_owned(), None);
    if values.len() <= MOST_NAMED {
        let bar = |(n, &value): (usize, &f64)| {
            let (y, x) = ((n as f64 - 0.36, n as f64 + 0.36), (value.min(0.0), value.max(0.0)));
            Mark::Bar { x, y, ink: ink(n), label: label(value), is_label_after: true }
        };
        // Room for the label after the longest bar.
        let x = Axis::linear(unit, low, high + (high - low) * 0.2);
        let y = Axis::places("expert", (0..values.len()).map(|n| n.to_string())).reversed();
        let marks = values.iter().enumerate().map(bar).collect();
        return Chart { title, description, x, y, extent: Extent::Rows(values.len()), marks, heat };
    }
    let bar = |(n, &value): (usize, &f64)| {
        let (x, y) = ((n as f64, n as f64 + 1.0), (value.min(0.0), value.max(0.0)));
        Mark::Bar { x, y, ink: ink(n), label: String::new(), is_label_after: false }
    };
    let x = indices("expert", values.len(), 16, |e| e.to_string());
    let marks = values.iter().enumerate().map(bar).collect();
    Chart { title, description, x, y: Axis::linear(unit, low, high), extent: Extent::Landscape, marks, heat }
}

fn load(layer: &LayerInspection) -> Figure {
    let loads: Vec<f64> = layer.load.tokens_per_expert.iter().map(|&n| f64::from(n)).collect();
    let ink = |e: usize| Ink::Series(usize::from(layer.load.hot.contains(&(e as u32))));
    let mut chart = per_expert("Tokens of each expert", "tokens", &loads, |n| format!("{n}"), ink);
    let (mean, count) = (layer.load.mean, loads.len() as f64);
    let points = match chart.extent {
        Extent::Rows(_) => vec![(mean, -0.5), (mean, count - 0.5)],
        _ => vec![(0.0, mean), (count, mean)],
    };
    chart.marks.insert(0, Mark::Line { points, ink: Ink::Text, is_dashed: true });
    let mut table =
        Table::new("Load and contribution", &["expert", "tokens", "by the mean", "norm of contribution", "share"]);
    for (e, &tokens) in layer.load.tokens_per_expert.iter().enumerate() {
        table.rows.push(vec![
            e.to_string(),
            tokens.to_string(),
            number(f64::from(tokens) / mean.max(1e-9)),
            layer.contributions.norm.get(e).map_or("–".to_owned(), |&norm| number(norm)),
            layer.contributions.share.get(e).map_or("–".to_owned(), |&share| signed_percent(share)),
        ]);
    }
    let key = |ink, shape, text: &str| Key { ink, shape, text: text.to_owned() };
    let mut keys = vec![key(Ink::Text, None, &format!("mean: {}", number(mean)))];
    if !layer.load.hot.is_empty() {
        keys.push(key(Ink::Series(1), Some(Shape(1)), "hot: at least twice the mean"));
    }
    let dropped = match layer.load.dropped {
        0 => String::new(),
        n => format!(" {n} assignments were dropped."),
    };
    Figure {
        heading: "Tokens of each expert".to_owned(),
        text: format!("Assignments that each expert computes.{dropped}"),
        keys,
        chart,
        table,
    }
}

fn signed_percent(share: f64) -> String {
    if share < -0.0005 { format!("−{}", percent(-share)) } else { percent(share.max(0.0)) }
}

fn contribution(layer: &LayerInspection) -> Figure {
    let percents: Vec<f64> = layer.contributions.share.iter().map(|share| share * 100.0).collect();
    let label = |percent: f64| signed_percent(percent / 100.0);
    let ink = |e: usize| Ink::Series(if percents[e] < 0.0 { 1 } else { 2 });
    let chart = per_expert("Share of each expert in the output", "% of the routed experts' sum", &percents, label, ink);
    let mut table = Table::new("Contribution", &["expert", "norm", "share"]);
    for (e, (&norm, &share)) in layer.contributions.norm.iter().zip(&layer.contributions.share).enumerate() {
        table.rows.push(vec![e.to_string(), number(norm), signed_percent(share)]);
    }
    Figure {
        heading: "Contribution to the output".to_owned(),
        text: format!(
            "How much of the routed experts' sum each makes, measured along that sum; negative where the others outweigh it. \
             The sum's norm is {}, that of the layer's output {}.",
            number(layer.contributions.routed_norm),
            number(layer.contributions.output_norm)
        ),
        keys: Vec::new(),
        chart,
        table,
    }
}

/// (middle, share) of each bin.
fn bins(distribution: &Distribution) -> Vec<(f64, f64)> {
    let (from, to) = (distribution.histogram_from, distribution.histogram_to);
    let width = (to - from) / distribution.histogram.len().max(1) as f64;
    let share = |count: u32| f64::from(count) / distribution.count.max(1) as f64 * 100.0;
    distribution
        .histogram
        .iter()
        .enumerate()
        .map(|(n, &count)| (from + (n as f64 + 0.5) * width, share(count)))
        .collect()
}

fn highest(bins: &[(f64, f64)]) -> f64 {
    bins.iter().map(|bin| bin.1).fold(1.0, f64::max) * 1.08
}

fn summed_up(table: &mut Table, name: String, distribution: &Distribution) {
    let Distribution { mean, min, p10, median, p90, max, .. } = *distribution;
    table.rows.push(std::iter::once(name).chain([mean, min, p10, median, p90, max].map(number)).collect());
}

const DISTRIBUTION: [&str; 6] = ["mean", "least", "a tenth below", "median", "nine tenths below", "largest"];

fn weights(layer: &LayerInspection) -> Figure {
    let ranks = &layer.weights_by_rank;
    let mut table = Table::new("Weights", &[&["choice"], &DISTRIBUTION[..]].concat());
    let (mut marks, mut keys) = (Vec::new(), Vec::new());
    for (n, rank) in ranks.iter().enumerate() {
        summed_up(&mut table, format!("{}", n + 1), rank);
        let ink = Ink::Series(n);
        marks.push(Mark::Line { points: bins(rank), ink, is_dashed: false });
        for at in bins(rank).into_iter().filter(|bin| bin.1 > 0.0) {
            marks.push(Mark::Point { at, ink, shape: Shape(n), label: String::new() });
        }
        keys.push(Key { ink, shape: Some(Shape(n)), text: format!("choice {}, mean {}", n + 1, number(rank.mean)) });
    }
    let all: Vec<(f64, f64)> = ranks.iter().flat_map(bins).collect();
    let from = ranks.iter().map(|rank| rank.histogram_from).fold(f64::INFINITY, f64::min);
    let to = ranks.iter().map(|rank| rank.histogram_to).fold(f64::NEG_INFINITY, f64::max);
    Figure {
        heading: "Weights of the choices".to_owned(),
        text: "How much weight tokens give to their first choice, their second, and so on.".to_owned(),
        keys,
        chart: Chart {
            title: "Weights of the choices".to_owned(),
            description: format!("Histograms of the weights of {} choices, as lines.", ranks.len()),
            x: Axis::linear("weight", from, to),
            y: Axis::linear("% of tokens", 0.0, highest(&all)),
            extent: Extent::Landscape,
            marks,
            heat: None,
        },
        table,
    }
}

fn token_entropy(layer: &LayerInspection) -> Figure {
    let bins = bins(&layer.entropy);
    let (from, to) = (layer.entropy.histogram_from, layer.entropy.histogram_to);
    let half = (to - from) / bins.len().max(1) as f64 / 2.0;
    let bar = |&(middle, share): &(f64, f64)| Mark::Bar {
        x: (middle - half, middle + half),
        y: (0.0, share),
        ink: Ink::Series(4),
        label: String::new(),
        is_label_after: false,
    };
    let mut table = Table::new("Entropy of a token's choice, in bits", &[&["of"], &DISTRIBUTION[..]].concat());
    summed_up(&mut table, "tokens".to_owned(), &layer.entropy);
    Figure {
        heading: "How sure tokens are".to_owned(),
        text: "Entropy of each token's weights: 0 if one expert has all of it, to the right end if all have the same."
            .to_owned(),
        keys: Vec::new(),
        chart: Chart {
            title: "Entropy of the tokens' choices".to_owned(),
            description: format!("A histogram of {} tokens.", layer.entropy.count),
            x: Axis::linear("bits", from, to),
            y: Axis::linear("% of tokens", 0.0, highest(&bins)),
            extent: Extent::Band(260),
            marks: bins.iter().map(bar).collect(),
            heat: None,
        },
        table,
    }
}

// --- pairs of experts

/// A symmetric matrix of pairs; nothing is said of an expert and itself.
struct Pairs<'a> {
    heading: &'a str,
    text: String,
    /// What a value is.
    unit: &'a str,
    value: &'a dyn Fn(usize, usize) -> f64,
    count: usize,
}

impl Pairs<'_> {
    fn figure(&self) -> Figure {
        let cell = |a: usize, b: usize| (a != b).then(|| (self.value)(a, b));
        let rows: Vec<Vec<Option<f64>>> =
            (0..self.count).map(|a| (0..self.count).map(|b| cell(a, b)).collect()).collect();
        let heat = Heat::new(&rows, None);
        let axis = || indices("expert", self.count, 16, |e| e.to_string());
        Figure {
            heading: self.heading.to_owned(),
            text: format!("{}{}", self.text, of_blocks(&heat)),
            keys: Vec::new(),
            chart: Chart {
                title: self.heading.to_owned(),
                description: format!("A map of {0} by {0} experts, symmetric.", self.count),
                x: axis(),
                y: axis().reversed(),
                extent: Extent::Square,
                marks: Vec::new(),
                heat: Some(heat),
            },
            table: self.table(),
        }
    }

    /// All of a small matrix; of a large one, the pairs with the largest values.
    fn table(&self) -> Table {
        if self.count <= MOST_NAMED / 2 {
            let names: Vec<String> = (0..self.count).map(|e| e.to_string()).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let mut table = Table::new(self.unit, &[&["expert"], &names[..]].concat());
            for a in 0..self.count {
                let cell = |b: usize| if a == b { "–".to_owned() } else { html::compact((self.value)(a, b)) };
                table.rows.push(std::iter::once(a.to_string()).chain((0..self.count).map(cell)).collect());
            }
            return table;
        }
        let mut pairs: Vec<(usize, usize)> = (0..self.count).flat_map(|b| (0..b).map(move |a| (a, b))).collect();
        pairs.sort_by(|&(a, b), &(c, d)| (self.value)(c, d).total_cmp(&(self.value)(a, b)));
        let mut table = Table::new(&format!("The {MOST_PAIRS} largest; --json has all"), &["experts", self.unit]);
        table.rows = pairs
            .into_iter()
            .take(MOST_PAIRS)
            .map(|(a, b)| vec![format!("{a} and {b}"), html::compact((self.value)(a, b))])
            .collect();
        table
    }
}

fn coactivation(layer: &LayerInspection) -> Option<Figure> {
    if layer.top_k < 2 {
        return None;
    }
    let value = |a: usize, b: usize| f64::from(layer.coactivation[a][b]);
    let pairs = Pairs {
        heading: "Experts that work together",
        text: "Tokens that chose both experts.".to_owned(),
        unit: "tokens that chose both",
        value: &value,
        count: layer.coactivation.len(),
    };
    Some(pairs.figure())
}

fn similarity(layer: &LayerInspection) -> Option<Figure> {
    let similarity = layer.similarity.as_ref()?;
    let value = |a: usize, b: usize| f64::from(similarity.cosine[a][b]);
    let [a, b] = similarity.most_alike;
    let sample = if similarity.weights_compared < similarity.weights_of_expert {
        format!(" Compared by {} of {} weights.", similarity.weights_compared, similarity.weights_of_expert)
    } else {
        String::new()
    };
    let pairs = Pairs {
        heading: "Experts that are alike",
        text: format!(
            "Cosine between the weights of two experts; {} on average, and the most alike are {a} and {b}.{sample}",
            number(similarity.mean)
        ),
        unit: "cosine",
        value: &value,
        count: similarity.cosine.len(),
    };
    Some(pairs.figure())
}

// --- tokens

fn name(inspection: &Inspection, token: usize) -> String {
    match inspection.labels.as_ref().and_then(|labels| labels.get(token)) {
        Some(label) => format!("{token} “{}”", label.trim()),
        None => token.to_string(),
    }
}

fn tokens_of_experts(inspection: &Inspection, layer: &LayerInspection) -> Table {
    let mut table = Table::of_text(
        &format!("Up to {MOST_TOKENS} tokens of each, largest weight first"),
        &["expert", "load", "tokens"],
    );
    for (e, tokens) in layer.tokens_of_expert.iter().enumerate() {
        let named: Vec<String> = tokens.iter().take(MOST_TOKENS).map(|&t| name(inspection, t as usize)).collect();
        let more = if tokens.len() > MOST_TOKENS { ", …" } else { "" };
        table.rows.push(vec![e.to_string(), tokens.len().to_string(), format!("{}{more}", named.join(", "))]);
    }
    table
}

fn experts_of_tokens(inspection: &Inspection, layer: &LayerInspection) -> Table {
    let mut table = Table::of_text(
        &format!("The first {MOST_TOKEN_ROWS} tokens"),
        &["token", "entropy, bits", "experts with their weights"],
    );
    let choices = layer.experts.iter().zip(&layer.expert_weights).zip(&layer.token_entropy);
    for (t, ((experts, weights), &entropy)) in choices.enumerate().take(MOST_TOKEN_ROWS) {
        let choice = |(&e, &weight): (&i32, &f32)| match e {
            e if e < 0 => "dropped".to_owned(),
            e => format!("{e} ({})", number(f64::from(weight))),
        };
        let choices: Vec<String> = experts.iter().zip(weights).map(choice).collect();
        table.rows.push(vec![name(inspection, t), number(entropy), choices.join(", ")]);
    }
    table
}
