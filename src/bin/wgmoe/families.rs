//! `wgmoe families`: which models are known, and what is known about them.

use crate::bench_table::plain_table;
use crate::output::Output;
use crate::{Verdict, unusable};
use serde::Serialize;
use std::path::Path;
use wgmoe::Family;

const EXAMPLES: &str = "\
A family is a TOML description. docs/families.md explains the format; --show prints a built-in one to start from, and \
--family of `run` and `check` takes a file of your own. Those with a layout `gguf` can be read from GGUF files.

Examples:
  wgmoe families
  wgmoe families --show deepseek_v3 > mine.toml
  wgmoe families --json -";

/// List the model families that are known, or print the description of one
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Print the TOML of this family, or check that of a file
    #[arg(long, value_name = "NAME|TOML")]
    show: Option<String>,
}

#[derive(Serialize)]
struct Row {
    name: &'static str,
    model_types: &'static [String],
    routing: String,
    layouts: Vec<&'static str>,
    /// Architectures of GGUF files.
    gguf: &'static [String],
    /// Why it is not supported.
    unsupported: Option<&'static str>,
}

pub fn execute(args: &Args, output: &mut Output) -> anyhow::Result<Verdict> {
    if let Some(wanted) = &args.show {
        output.bytes(chosen("--show", wanted)?.toml().as_bytes());
        return Ok(Verdict::Right);
    }
    let row = |family: &'static Family| Row {
        name: family.name(),
        model_types: family.model_types(),
        routing: family.summary(),
        layouts: family.layout_names(),
        gguf: family.gguf_architectures(),
        unsupported: family.unsupported(),
    };
    let rows: Vec<Row> = Family::builtin().iter().map(row).collect();
    let mut table = plain_table(&["family", "model_type", "routing", "layouts"]);
    for column in table.column_iter_mut() {
        column.set_cell_alignment(comfy_table::CellAlignment::Left);
    }
    // Some families have a dozen names; a terminal has its width, and a file gets a readable one.
    table.set_content_arrangement(comfy_table::ContentArrangement::Dynamic);
    if table.width().is_none() {
        table.set_width(120);
    }
    for row in &rows {
        let types: Vec<String> = row.model_types.chunks(2).map(|types| types.join(" ")).collect();
        table.add_row([row.name.to_owned(), types.join("\n"), row.routing.clone(), row.layouts.join(" ")]);
    }
    output.line(&table.to_string());
    for row in &rows {
        if let Some(reason) = row.unsupported {
            output.line(&format!("{} is not supported: {reason}", row.name));
        }
    }
    output.json(&rows)?;
    Ok(Verdict::Right)
}

/// A built-in family, or the description in a file. A file wins, because a name can be written as one (`./name`).
pub fn chosen(argument: &str, wanted: &str) -> anyhow::Result<Family> {
    let path = Path::new(wanted);
    if path.is_file() {
        return Ok(Family::from_file(path)?);
    }
    let unknown =
        || unusable(format!("{argument} {wanted}: neither a file nor a built-in family; see `wgmoe families`"));
    Family::named(wanted).cloned().ok_or_else(unknown)
}
