//! `wgmoe soak`: many passes in a row, after which memory has to be where it was.

use crate::output::{Output, Status};
use crate::{Verdict, open};
use indicatif::HumanBytes;
use serde::Serialize;
use std::time::Instant;
use wgmoe::{Context, DeviceChoice, DeviceInfo, LoadReport, LoadRequest, check_load};

/// What memory may grow by.
const MOST: f64 = 0.01;

const EXAMPLES: &str = "\
Two contexts of the device, each shared by several threads, run batches of changing sizes on layers that are dropped and \
built anew. Twenty times everything is dropped and memory is looked at: that of the process and that of the device may \
grow by 1 % at most from the first quarter after warming up to the last (that of the process by 1 MiB, if that is more), \
and every result has to have the bits of the first of its kind.

Examples:
  wgmoe soak
  wgmoe soak --forwards 2000 --device cpu
  wgmoe soak --forwards 2000 --keep-layers      a control, which has to fail";

/// Run many passes and see whether memory stays where it was
#[derive(clap::Args, Debug)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Passes, of all threads together
    #[arg(long, value_name = "N", default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(200..))]
    forwards: u64,
    /// Threads of each of the two contexts
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    threads: u8,
    /// A control: never drop a layer. It has to be found
    #[arg(long)]
    keep_layers: bool,
}

#[derive(Serialize)]
struct Report {
    device: DeviceInfo,
    threads: u8,
    seconds: f64,
    passed: bool,
    #[serde(flatten)]
    load: LoadReport,
}

pub fn execute(args: &Args, device: DeviceChoice, output: &mut Output) -> anyhow::Result<Verdict> {
    let contexts = [open(&device, output)?, Context::new(&device)?];
    let request = LoadRequest { forwards: args.forwards, threads: args.threads.into(), keep_layers: args.keep_layers };
    let started = Instant::now();
    let status = Status::new();
    let mut progress = |done, total, what: &str| status.set(format!("{what}: {done} of {total} parts done"));
    let load = check_load(&contexts, &request, &mut progress)?;
    drop(status);
    let passed = load.passed(MOST);
    let report = Report {
        device: contexts[0].device().clone(),
        threads: args.threads,
        seconds: started.elapsed().as_secs_f64(),
        passed,
        load,
    };
    output.line(&describe(&report));
    output.json(&report)?;
    Ok(if passed { Verdict::Right } else { Verdict::Wrong })
}

fn describe(report: &Report) -> String {
    let Report { load, seconds, threads, .. } = report;
    let percent = |growth: f64| format!("{:+.2} %", growth * 100.0);
    let mut lines = vec![format!(
        "{} passes on {} layers, two contexts of {threads} threads each, {seconds:.0} s; {} results with other bits",
        load.forwards, load.layers, load.wrong
    )];
    let samples = [load.samples.get(4), load.samples.last()];
    if let [Some(first), Some(last)] = samples {
        let process = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), |bytes| HumanBytes(bytes).to_string());
        lines.push(format!(
            "process: {} after {} passes, {} at the end ({})",
            process(first.process_bytes),
            first.forwards,
            process(last.process_bytes),
            load.process_growth.map_or("not judged: only Linux says".to_owned(), percent)
        ));
        lines.push(format!(
            "device:  {} in {} buffers, {} in {} at the end ({})",
            HumanBytes(first.device_bytes),
            first.device_buffers,
            HumanBytes(last.device_bytes),
            last.device_buffers,
            percent(load.device_growth)
        ));
    }
    lines.push(format!(
        "{}: 1 % is allowed, or 1 MiB of the process",
        if report.passed { "flat" } else { "NOT FLAT, or wrong" }
    ));
    lines.join("\n")
}
