//! `wgmoe compare`: results of `bench` side by side.

use crate::bench_table::{plain_table, seconds};
use crate::output::Output;
use crate::{Verdict, must_exist, unusable};
use std::path::PathBuf;
use wgmoe::bench::compare::{Comparison, Difference, Overall, Pair, compare};
use wgmoe::bench::{Interval, Results};

const EXAMPLES: &str = "\
Rows are matched by layer, weights, tokens and routing. Where both files are of one machine, times are compared in units \
of its yardstick, so that it may have been slower or shared in one of the runs. A difference counts if it is more than \
the noise: the interval of its ratio, for 95 % certainty about all rows, does not contain 1.

Examples:
  wgmoe compare before.json after.json
  wgmoe compare before.json after.json --fail-over 10%
  wgmoe compare gpu.json cpu.json phone.json --json ratios.json";

/// Compare results of `bench`, and say what differs by more than the noise
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// What the others are compared with
    #[arg(value_name = "BASE")]
    base: PathBuf,
    /// Results of other runs, builds or devices
    #[arg(value_name = "FILE", required = true)]
    others: Vec<PathBuf>,
    /// End with exit code 1 if a row is slower by more than this, and by more than the noise
    #[arg(long, value_name = "PERCENT", value_parser = fraction)]
    fail_over: Option<f64>,
}

/// clap value parser for `--fail-over`.
fn fraction(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim().parse::<f64>();
    match number {
        Ok(percent) if percent.is_finite() && percent >= 0.0 => Ok(percent / 100.0),
        _ => Err("expected a percentage from 0 up, such as 10%".to_owned()),
    }
}

pub fn execute(args: &Args, output: &mut Output) -> anyhow::Result<Verdict> {
    must_exist("BASE", &args.base)?;
    for path in &args.others {
        must_exist("FILE", path)?;
    }
    if args.others.contains(&args.base) {
        return Err(unusable(format!("{}: expected another file to compare with", args.base.display())));
    }
    let base = Results::load(&args.base)?;
    let mut comparisons = Vec::new();
    for path in &args.others {
        let comparison = compare(&base, &Results::load(path)?);
        output.line(&text(&path.display().to_string(), &comparison));
        comparisons.push(comparison);
    }
    output.json(&comparisons)?;
    let Some(fraction) = args.fail_over else { return Ok(Verdict::Right) };
    let slower = comparisons.iter().flat_map(|comparison| &comparison.rows).filter(|pair| pair.is_slower_by(fraction));
    let slower = slower.count();
    output.line(&format!("{slower} rows are slower by more than {} %, and by more than the noise", fraction * 100.0));
    Ok(if slower == 0 { Verdict::Right } else { Verdict::Wrong })
}

fn text(file: &str, comparison: &Comparison) -> String {
    let Comparison { base, other, rows, .. } = comparison;
    let mut text = format!("{file}\n");
    if base == other {
        text.push_str(&format!("device: {} ({})\n", base.name, base.driver));
    } else {
        text.push_str(&format!(
            "devices: {} ({}), compared with the base's {} ({})\n",
            other.name, other.driver, base.name, base.driver
        ));
    }
    text.push_str(match comparison.in_yardsticks {
        true => "ratios of times in yardsticks",
        false => "ratios of times by the clock: not one machine, or without a yardstick",
    });
    let machine =
        comparison.machine.map(|speed| format!("; by it, the machine ran at {speed:.2} times the base's speed"));
    text.push_str(&format!("{}\n{}\n", machine.unwrap_or_default(), table(rows)));
    for (rows, whose) in [(&comparison.only_in_base, "the base"), (&comparison.only_in_other, file)] {
        for row in rows {
            text.push_str(&format!("only in {whose}: {row}\n"));
        }
    }
    let count = |verdict| rows.iter().filter(|pair| pair.verdict == verdict).count();
    let [slower, faster, unknown] = [Difference::Slower, Difference::Faster, Difference::Unknown].map(count);
    text.push_str(&format!("{} rows: {slower} slower, {faster} faster by more than the noise", rows.len()));
    if let Some(Overall { ratio, interval: Interval { low, high }, verdict }) = comparison.overall {
        text.push_str(&format!("; all together {ratio:.3} ({low:.3}..{high:.3}): {}", name(verdict)));
    }
    if unknown > 0 {
        text.push_str(&format!("; of {unknown} nobody can tell: a file of schema 1 says nothing about noise"));
    }
    text
}

fn table(rows: &[Pair]) -> String {
    let mut table = plain_table(&["layer", "tokens", "base", "time", "ratio", "95 % within", "verdict"]);
    for pair in rows {
        table.add_row([
            pair.layer.clone(),
            pair.tokens.to_string(),
            seconds(pair.base_s),
            seconds(pair.other_s),
            format!("{:.3}", pair.ratio),
            pair.interval.map_or("-".to_owned(), |Interval { low, high }| format!("{low:.3}..{high:.3}")),
            name(pair.verdict).to_owned(),
        ]);
    }
    table.to_string()
}

fn name(difference: Difference) -> &'static str {
    match difference {
        Difference::None => "no difference",
        Difference::Slower => "slower",
        Difference::Faster => "faster",
        Difference::Unknown => "?",
    }
}
