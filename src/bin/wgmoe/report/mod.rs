//! `wgmoe report`: results of `wgmoe bench` as a page to show.

mod figures;
mod run;
mod words;

use crate::html::Page;
use crate::output::Output;
use crate::{Verdict, must_be_writable, must_exist};
use run::Report;
use std::path::PathBuf;

const EXAMPLES: &str = "\
The page is one file without scripts; it fetches nothing, is light or dark as the reader's system is, and has the numbers \
behind every plot. Several files, for example of several devices, are compared.

Examples:
  wgmoe bench --json here.json
  wgmoe report here.json --html report.html
  wgmoe report here.json there.json --html report.html";

/// Make a page of results: roofline, time by stage, scaling, comparison of devices
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Results, as `bench --json` writes them
    #[arg(required = true, value_name = "FILES")]
    files: Vec<PathBuf>,
    /// The page
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
}

pub fn execute(args: &Args, output: &mut Output) -> anyhow::Result<Verdict> {
    must_be_writable("--html", &args.html)?;
    for file in &args.files {
        must_exist("FILES", file)?;
    }
    let report = Report::read(&args.files)?;
    let html = page(&report)?;
    for sentence in words::summary(&report) {
        output.line(&sentence);
    }
    output.page(&args.html, &html)?;
    output.json(&report.runs.iter().map(|run| &run.results).collect::<Vec<_>>())?;
    Ok(Verdict::Right)
}

/// The whole page, from what matters most to what explains it.
fn page(report: &Report) -> anyhow::Result<String> {
    let mut page = Page::new(&words::title(report), words::LEAD);
    if let [run] = report.runs.as_slice() {
        page.tiles(&words::tiles(run));
    }
    page.list(&words::summary(report));
    page.heading("Results");
    page.table(&figures::results_table(report));
    if let Some(failures) = figures::failures_table(report) {
        page.table(&failures);
    }
    let sections = [
        ("How near the device's limits", vec![figures::roofline(report)]),
        ("Where the time goes", figures::stages(report)),
        ("Scaling", vec![figures::by_tokens(report), figures::by_experts(report)]),
        ("Devices compared", vec![figures::comparison(report)]),
    ];
    for (heading, figures) in sections {
        let figures: Vec<_> = figures.into_iter().flatten().collect();
        if !figures.is_empty() {
            page.heading(heading);
        }
        for figure in &figures {
            page.figure(figure)?;
        }
    }
    page.heading("How it was measured");
    page.paragraph(words::METHOD);
    page.table(&figures::environment(report));
    page.table(&figures::commands(report));
    Ok(page.finish())
}
