//! What `wgmoe inspect` prints: bars and maps of block characters, which need no colours.

use crate::bench_table::{number, percent, plain_table};
use wgmoe::inspect::{Distribution, Inspection, LayerInspection, Similarity};

/// Experts that have a line of their own; of more, only the busiest.
const MOST_LINES: usize = 32;
/// Lines for the busiest experts where there are more than [`MOST_LINES`].
const BUSIEST: usize = 12;
/// Experts of a layer whose pairs are drawn.
const MOST_MAPPED: usize = 32;
/// Characters of a line of a map of layers.
const MAP_WIDTH: usize = 64;
/// Characters of the longest bar.
const BAR_WIDTH: usize = 24;
/// Characters for the tokens of an expert.
const TOKENS_WIDTH: usize = 44;

/// One layer in full, or several side by side.
pub fn inspection(inspection: &Inspection) -> String {
    let mut text = format!("{} of {}\n", count(inspection.num_tokens, "token"), inspection.input);
    match &inspection.layers[..] {
        [only] => text.push_str(&layer(inspection, only)),
        all => {
            if inspection.same_input {
                text.push_str("each layer got the same activations: see --help for its own\n");
            }
            text.push_str(&layers(inspection, all));
        }
    }
    text.push('\n');
    for definition in &inspection.definitions {
        text.push_str(&wrapped(&format!("{}: {}", definition.word, definition.meaning), 2));
    }
    text.trim_end().to_owned()
}

fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn title(inspection: &Inspection, layer: &LayerInspection) -> String {
    let LayerInspection { layer, hidden_size, intermediate_size, num_experts, top_k, weights, .. } = layer;
    format!(
        "layer {layer} of {} ({}): hidden {hidden_size}, intermediate {intermediate_size}, {num_experts} experts, \
         top-{top_k}, {weights} weights\n",
        inspection.file, inspection.family
    )
}

fn layer(inspection: &Inspection, layer: &LayerInspection) -> String {
    let mut text = title(inspection, layer);
    let load = &layer.load;
    text.push_str(&format!(
        "\nload           {} for each expert on average; the largest {} x that; coefficient of variation {}\n",
        number(load.mean),
        number(load.max_over_mean),
        number(load.coefficient_of_variation),
    ));
    text.push_str(&format!(
        "               entropy {} of {} bits; dead: {}; hot: {}{}\n",
        number(load.entropy),
        number(load.max_entropy),
        experts(&load.dead),
        experts(&load.hot),
        if load.dropped > 0 { format!("; dropped: {}", load.dropped) } else { String::new() },
    ));
    let entropy = &layer.entropy;
    text.push_str(&format!(
        "token entropy  {} of {} bits on average, {} to {} for eight of ten  {}\n",
        number(entropy.mean),
        number(f64::from(layer.top_k).log2()),
        number(entropy.p10),
        number(entropy.p90),
        sparkline(&entropy.histogram),
    ));
    text.push_str(&ranks(&layer.weights_by_rank));
    if let Some(what_if) = &layer.capacity {
        text.push_str(&format!(
            "capacity       {} x the mean, {} each: {} ({}) dropped, {} lose all; none from {} x on\n",
            number(what_if.factor),
            what_if.capacity,
            count(what_if.dropped as usize, "assignment"),
            percent(what_if.share),
            count(what_if.tokens_without_expert as usize, "token"),
            number(what_if.factor_without_drops),
        ));
    }
    text.push_str(&expert_lines(inspection, layer));
    text.push_str(&pairs(layer));
    text
}

/// The first few, and how many more there are.
fn experts(ids: &[u32]) -> String {
    const SHOWN: usize = 8;
    if ids.is_empty() {
        return "none".to_owned();
    }
    let mut text = ids.iter().take(SHOWN).map(u32::to_string).collect::<Vec<_>>().join(" ");
    if ids.len() > SHOWN {
        text.push_str(&format!(" and {} more", ids.len() - SHOWN));
    }
    text
}

/// Weights of the choices, best first.
fn ranks(ranks: &[Distribution]) -> String {
    let mut text = String::new();
    for (rank, weights) in ranks.iter().enumerate() {
        let name = if rank == 0 { "weights" } else { "" };
        text.push_str(&format!(
            "{name:15}choice {}: {} on average, {} to {} for eight of ten  {}\n",
            rank + 1,
            number(weights.mean),
            number(weights.p10),
            number(weights.p90),
            sparkline(&weights.histogram),
        ));
    }
    if let Some(first) = ranks.first() {
        let (from, to) = (number(first.histogram_from), number(first.histogram_to));
        text.push_str(&format!("{:15}(each histogram goes from {from} to {to})\n", ""));
    }
    text
}

/// A line for each expert, or a map of all and lines for the busiest.
fn expert_lines(inspection: &Inspection, layer: &LayerInspection) -> String {
    let loads = &layer.load.tokens_per_expert;
    let most = loads.iter().copied().max().unwrap_or(0);
    let mut text = String::new();
    let mut shown: Vec<usize> = (0..loads.len()).collect();
    if loads.len() > MOST_LINES {
        text.push_str(&format!("\nload of all experts, {MAP_WIDTH} in a line; a full block is {most} assignments\n"));
        for (line, loads) in loads.chunks(MAP_WIDTH).enumerate() {
            let cells: String = loads.iter().map(|&n| level(n.into(), most.into())).collect();
            text.push_str(&format!("{:>6} ▕{cells}▏\n", line * MAP_WIDTH));
        }
        shown.sort_by_key(|&e| (std::cmp::Reverse(loads[e]), e));
        shown.truncate(BUSIEST);
        text.push_str(&format!("\nthe {BUSIEST} busiest\n"));
    } else {
        text.push('\n');
    }
    text.push_str(&format!("{:>6} {:BAR_WIDTH$}  {:>6}  {:>7}  tokens\n", "expert", "load", "", "share"));
    for e in shown {
        let bar = bar(loads[e].into(), most.into());
        let share = percent_signed(layer.contributions.share[e]);
        let tokens = tokens(inspection, &layer.tokens_of_expert[e]);
        text.push_str(format!("{e:>6} {bar:BAR_WIDTH$}  {:>6}  {share:>7}  {tokens}", loads[e]).trim_end());
        text.push('\n');
    }
    let c = &layer.contributions;
    let of_output = if c.output_norm > 0.0 { c.routed_norm / c.output_norm } else { 0.0 };
    text.push_str(&format!(
        "share: of what the experts add up to, whose norm is {} x that of the layer's output\n",
        number(of_output)
    ));
    text
}

fn percent_signed(share: f64) -> String {
    let text = format!("{:.1} %", 100.0 * share);
    if text == "-0.0 %" { "0.0 %".to_owned() } else { text }
}

/// Tokens of an expert: texts and how often they are there, most frequent first; or numbers, largest weight first.
fn tokens(inspection: &Inspection, tokens: &[u32]) -> String {
    let texts: Vec<String> = match &inspection.labels {
        None => tokens.iter().map(u32::to_string).collect(),
        Some(labels) => {
            let mut counted: Vec<(&str, usize)> = Vec::new();
            for text in tokens.iter().filter_map(|&t| labels.get(t as usize)) {
                match counted.iter_mut().find(|(other, _)| other == text) {
                    Some((_, n)) => *n += 1,
                    None => counted.push((text, 1)),
                }
            }
            // Stable: those with the largest weights stay first.
            counted.sort_by_key(|&(_, n)| std::cmp::Reverse(n));
            let times = |n: usize| if n > 1 { format!(" x{n}") } else { String::new() };
            counted.into_iter().map(|(text, n)| format!("{text:?}{}", times(n))).collect()
        }
    };
    let mut line = String::new();
    for (n, text) in texts.iter().enumerate() {
        let more = texts.len() - n;
        if line.chars().count() + text.chars().count() + 1 > TOKENS_WIDTH {
            line.push_str(&format!(" and {more} more"));
            break;
        }
        line.push_str(if n == 0 { "" } else { " " });
        line.push_str(text);
    }
    line.trim_start().to_owned()
}

/// Which experts are chosen together, and which are alike.
fn pairs(layer: &LayerInspection) -> String {
    let together = &layer.coactivation;
    let loads = &layer.load.tokens_per_expert;
    let mut all: Vec<(u32, usize, usize)> =
        (0..loads.len()).flat_map(|a| (0..a).map(move |b| (together[a][b], b, a))).filter(|pair| pair.0 > 0).collect();
    all.sort_by_key(|&(n, a, b)| (std::cmp::Reverse(n), a, b));
    let mut text = String::new();
    if loads.len() <= MOST_MAPPED && loads.len() > 1 {
        text.push_str(&maps(layer));
    }
    if !all.is_empty() {
        let pair = |&(n, a, b): &(u32, usize, usize)| format!("{a} and {b}: {n}");
        let most: Vec<String> = all.iter().take(6).map(pair).collect();
        text.push_str(&format!("\nmost often together, in tokens: {}\n", most.join(", ")));
    }
    if let Some(similarity) = &layer.similarity {
        let [a, b] = similarity.most_alike;
        text.push_str(&format!(
            "similarity: {} on average; most alike: {a} and {b} ({}){}\n",
            number(similarity.mean),
            number(similarity.cosine[a as usize][b as usize].into()),
            sample(similarity),
        ));
    }
    text
}

fn sample(similarity: &Similarity) -> String {
    let Similarity { weights_compared, weights_of_expert, .. } = *similarity;
    if weights_compared == weights_of_expert {
        return String::new();
    }
    format!("; by a sample of {} of the weights", percent(weights_compared as f64 / weights_of_expert as f64))
}

/// Pairs of experts that are chosen together, beside pairs that are alike.
fn maps(layer: &LayerInspection) -> String {
    let together = &layer.coactivation;
    let experts = together.len();
    let pairs = || (0..experts).flat_map(|a| (0..experts).map(move |b| (a, b))).filter(|(a, b)| a != b);
    let most = pairs().map(|(a, b)| together[a][b]).max().unwrap_or(0);
    let cosine = |a: usize, b: usize| -> Option<f64> {
        let row = layer.similarity.as_ref()?.cosine.get(a)?;
        row.get(b).map(|&cosine| f64::from(cosine.abs()))
    };
    let alike = pairs().filter_map(|(a, b)| cosine(a, b)).fold(0.0, f64::max);
    // Two characters make a square.
    let width = (2 * experts).max(20);
    let mut text = format!(
        "\n{:6} {:width$}   similarity, darkest: {}\n",
        "",
        format!("together, darkest: {most}"),
        number(alike)
    );
    for (a, together) in together.iter().enumerate() {
        let mut cells = [String::new(), String::new()];
        for (b, &tokens) in together.iter().enumerate() {
            let shades = [shade(tokens.into(), most.into()), cosine(a, b).map_or(' ', |c| shade(c, alike))];
            for (cells, shade) in cells.iter_mut().zip(shades) {
                cells.extend(if a == b { ['·'; 2] } else { [shade; 2] });
            }
        }
        let line = format!("{a:>6} {:width$}   {}", cells[0], cells[1]);
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Layers side by side.
fn layers(inspection: &Inspection, all: &[LayerInspection]) -> String {
    let Some(first) = all.first() else { return String::new() };
    let mut text = title(inspection, first).replacen(&format!("layer {}", first.layer), &count(all.len(), "layer"), 1);
    let experts = all.iter().map(|layer| layer.load.tokens_per_expert.len()).max().unwrap_or(0);
    let in_cell = experts.div_ceil(MAP_WIDTH).max(1);
    let most = all.iter().map(|layer| layer.load.max_over_mean).fold(0.0, f64::max);
    let cells = if in_cell > 1 { format!("; a cell is the busiest of {in_cell} experts") } else { String::new() };
    text.push_str(&format!("\nload by layer and expert; darkest: {} x the mean{cells}\n", number(most)));
    for layer in all {
        let relative = |&n: &u32| if layer.load.mean > 0.0 { f64::from(n) / layer.load.mean } else { 0.0 };
        let busiest = |loads: &[u32]| shade(loads.iter().map(relative).fold(0.0, f64::max), most);
        let cells: String = layer.load.tokens_per_expert.chunks(in_cell).map(busiest).collect();
        text.push_str(&format!("{:>6} ▕{cells}▏\n", layer.layer));
    }
    let mut table = plain_table(&[
        "layer",
        "largest / mean",
        "variation",
        "load entropy",
        "dead",
        "hot",
        "token entropy",
        "first weight",
        "similarity",
    ]);
    for layer in all {
        let load = &layer.load;
        table.add_row([
            layer.layer.to_string(),
            number(load.max_over_mean),
            number(load.coefficient_of_variation),
            format!("{} of {}", number(load.entropy), number(load.max_entropy)),
            load.dead.len().to_string(),
            load.hot.len().to_string(),
            number(layer.entropy.mean),
            layer.weights_by_rank.first().map_or("-".to_owned(), |weights| number(weights.mean)),
            layer.similarity.as_ref().map_or("-".to_owned(), |similarity| number(similarity.mean)),
        ]);
    }
    text.push_str(&format!("\n{table}\n"));
    if all.iter().any(|layer| layer.capacity.is_some()) {
        text.push_str(&capacities(all));
    }
    if let Some(similarity) = &first.similarity {
        let sample = sample(similarity);
        if !sample.is_empty() {
            text.push_str(&format!("similarity{}\n", sample.trim_start_matches(';')));
        }
    }
    text
}

/// What the capacity would drop, by layer.
fn capacities(all: &[LayerInspection]) -> String {
    let mut table = plain_table(&["layer", "capacity", "dropped", "share", "tokens that lose all", "none from"]);
    for (layer, what_if) in all.iter().filter_map(|layer| Some((layer, layer.capacity.as_ref()?))) {
        table.add_row([
            layer.layer.to_string(),
            format!("{} x: {}", number(what_if.factor), what_if.capacity),
            what_if.dropped.to_string(),
            percent(what_if.share),
            what_if.tokens_without_expert.to_string(),
            format!("{} x", number(what_if.factor_without_drops)),
        ]);
    }
    format!("\n{table}\n")
}

/// A bar of eighths of blocks; something is at least one of them.
fn bar(value: f64, most: f64) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let width = if most > 0.0 { BAR_WIDTH as f64 * 8.0 * value / most } else { 0.0 };
    let width = if value > 0.0 { (width.round() as usize).max(1) } else { 0 };
    format!("{}{}", "█".repeat(width / 8), EIGHTHS[width % 8])
}

/// A block as high as the value; nothing only for nothing.
fn level(value: f64, most: f64) -> char {
    pick(&[' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'], value, most)
}

/// A square as dark as the value; nothing only for nothing.
fn shade(value: f64, most: f64) -> char {
    pick(&[' ', '░', '▒', '▓', '█'], value, most)
}

/// The first step for nothing, the last for the most.
fn pick(steps: &[char], value: f64, most: f64) -> char {
    let last = steps.len() - 1;
    let step = if value > 0.0 && most > 0.0 { (value / most * last as f64).ceil() } else { 0.0 };
    steps[(step as usize).min(last)]
}

fn sparkline(histogram: &[u32]) -> String {
    let most = histogram.iter().copied().max().unwrap_or(0);
    histogram.iter().map(|&n| level(n.into(), most.into())).collect()
}

/// Words in lines of at most 100 characters, all but the first indented.
fn wrapped(text: &str, indent: usize) -> String {
    let mut lines = String::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if line.chars().count() + word.chars().count() + 1 > 100 {
            lines.push_str(&format!("{line}\n"));
            line = " ".repeat(indent) + word;
        } else {
            line.push_str(if line.is_empty() { "" } else { " " });
            line.push_str(word);
        }
    }
    format!("{lines}{line}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_and_blocks_show_something_for_something() {
        assert_eq!((bar(0.0, 8.0), bar(1e-9, 8.0)), (String::new(), "▏".to_owned()));
        assert_eq!(bar(8.0, 8.0), "█".repeat(BAR_WIDTH));
        assert_eq!([0.0, 0.1, 4.0, 8.0].map(|v| level(v, 8.0)), [' ', '▁', '▄', '█']);
        assert_eq!([0.0, 0.1, 4.0, 8.0].map(|v| shade(v, 8.0)), [' ', '░', '▒', '█']);
        assert_eq!((bar(0.0, 0.0), level(0.0, 0.0)), (String::new(), ' '));
        assert_eq!(sparkline(&[0, 1, 2]), " ▄█");
        assert_eq!([-1e-6, -0.02, 0.5].map(percent_signed), ["0.0 %", "-2.0 %", "50.0 %"]);
    }

    #[test]
    fn long_lists_end_with_how_many_more() {
        assert_eq!(experts(&[]), "none");
        assert_eq!(experts(&[3, 5]), "3 5");
        assert_eq!(experts(&(0..20).collect::<Vec<_>>()), "0 1 2 3 4 5 6 7 and 12 more");
    }

    #[test]
    fn lines_are_wrapped_between_words() {
        let text = wrapped(&"word ".repeat(30), 2);
        assert!(text.lines().count() == 2 && text.lines().all(|line| line.len() <= 100), "{text}");
        assert!(text.lines().nth(1).is_some_and(|line| line.starts_with("  word")), "{text}");
    }
}
