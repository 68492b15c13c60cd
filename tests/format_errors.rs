//! What rounding costs: the table in docs/formats.md is measured here, and has to stay true.

mod support;

use std::collections::BTreeMap;
use std::path::Path;
use support::{Values, config};
use wgmoe::{Batch, LayerFormats, MoeConfig, MoeWeights, WeightFormat, reference};

/// Sums of uniform numbers: nearly normal, as trained weights are; variance 1 / `inputs`.
fn normal(v: &mut Values, len: usize, inputs: usize) -> Vec<f32> {
    let factor = 0.5 / (inputs as f32).sqrt();
    (0..len).map(|_| v.even(12).iter().sum::<f32>() * factor).collect()
}

fn weights(v: &mut Values, c: &MoeConfig) -> MoeWeights {
    let [h, i, e] = [c.hidden_size(), c.intermediate_size(), c.num_experts()].map(|n| n as usize);
    MoeWeights {
        router: normal(v, e * h, h),
        gate_proj: normal(v, e * i * h, h),
        up_proj: normal(v, e * i * h, h),
        down_proj: normal(v, e * i * h, i),
        ..MoeWeights::default()
    }
}

/// Root of the mean square of the differences by that of the values.
fn rms_error(got: impl Iterator<Item = f64>, want: impl Iterator<Item = f64>) -> f64 {
    let (mut errors, mut values) = (0.0, 0.0);
    for (got, want) in got.zip(want) {
        errors += (got - want).powi(2);
        values += want * want;
    }
    (errors / values).sqrt()
}

/// Bits of a weight, error of weights, error of the layer's output, in per cent, by format: the first table that has
/// these columns.
fn documented() -> BTreeMap<String, [f64; 3]> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/formats.md");
    let text = std::fs::read_to_string(path).expect("the document is there");
    let rows = text.lines().skip_while(|line| !line.starts_with("| format | bits |")).skip(2);
    let rows = rows.take_while(|line| line.starts_with('|'));
    let number = |cell: &str| cell.trim().trim_end_matches('%').trim().parse().unwrap_or_else(|_| panic!("{cell:?}"));
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
        (cells[0].trim().trim_matches('`').to_owned(), [number(cells[1]), number(cells[2]), number(cells[3])])
    };
    rows.map(row).collect()
}

#[test]
fn errors_are_those_of_the_document() {
    let c = config([512, 256, 8, 2], true);
    let mut v = Values(21);
    let weights = weights(&mut v, &c);
    let x: Vec<f32> = v.even(48 * 512);
    let whole = reference::moe_forward(&c, &weights, Batch::from(&x[..])).y;
    let documented = documented();
    let mut wrong = Vec::new();
    println!("| format | bits | weights | output |\n| --- | ---: | ---: | ---: |");
    for format in WeightFormat::every() {
        LayerFormats::from(format).check(&c).expect("rows are whole blocks");
        let rounded = weights.rounded(&c, format).expect("moderate weights");
        let all = |w: &MoeWeights| {
            let all = [&w.gate_proj[..], &w.up_proj, &w.down_proj].concat();
            all.into_iter().map(f64::from)
        };
        let y = reference::moe_forward(&c, &rounded, Batch::from(&x[..])).y;
        let errors = [
            format.bits_per_weight(512),
            100.0 * rms_error(all(&rounded), all(&weights)),
            100.0 * rms_error(y.into_iter(), whole.iter().copied()),
        ];
        let [bits, of_weights, of_output] = errors;
        let digits = if of_weights < 0.1 {
            4
        } else if of_weights < 1.0 {
            2
        } else {
            1
        };
        println!("| `{format}` | {bits:.2} | {of_weights:.digits$} | {of_output:.digits$} |");
        match documented.get(&format.name()) {
            // As many digits as the table has, and some room for another processor's last bits.
            Some(row) if row.iter().zip(errors).all(|(&row, error)| (row - error).abs() <= 0.06 * error + 1e-9) => {}
            Some(row) => wrong.push(format!("{format}: {errors:?}, the document says {row:?}")),
            None => wrong.push(format!("{format} is not in the document: {errors:?}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(documented.len(), WeightFormat::every().len(), "formats that there are not");
}
