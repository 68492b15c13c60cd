//! The `wgmoe` command.
//!
//! Exit codes, the same for every subcommand:
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done; for `check` and `bench`: and everything was right |
//! | 1 | something was wrong or went wrong: a failed or unsupported case, a wrong result, a row that `compare --fail-over` found slower, a file whose content cannot be used, a device that failed |
//! | 2 | the arguments cannot be used: unknown options, names and devices, values out of range, paths that do not exist |
//! | 130 | `bench` was interrupted by Ctrl-C; what was measured by then is printed and written |

mod bench;
mod bench_table;
mod check;
mod compare;
mod families;
mod html;
mod info;
mod inspect;
mod inspect_page;
mod inspect_view;
mod lint;
mod output;
mod plan;
mod quantize;
mod report;
mod run;
mod shader;
mod shell;
mod soak;
mod tune;
mod tuning;

use clap::{Parser, Subcommand};
use output::Output;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use wgmoe::bench::presets::{self, Preset};
use wgmoe::{Context, DeviceChoice, GpuMemory, LayerOptions, MatmulVariant, WeightFormat};

/// Environment variable that chooses a device where `--device` does not.
const DEVICE_VARIABLE: &str = "WGMOE_ADAPTER";

const EXIT_CODES: &str = "\
Exit codes: 0 done and right; 1 something was wrong or failed; 2 the arguments cannot be used; 130 interrupted.
Environment: WGMOE_ADAPTER chooses the device where --device does not; WGMOE_TUNING the tuning where --tuning does not; \
NO_COLOR turns colours off.

Examples:
  wgmoe bench                              how fast MoE runs here
  wgmoe check                              are the kernels right here
  wgmoe tune                               which kernels are the fastest here
  wgmoe bench --device cpu --json -        the CPU engine, as JSON";

/// Mixture-of-Experts layers on any GPU, or on the CPU: measured, checked, run.
#[derive(Parser, Debug)]
#[command(version, about, after_help = EXIT_CODES)]
struct Cli {
    /// Device: auto, cpu (the embedded engine), an index of `wgmoe info`, or a part of an adapter's or driver's name
    #[arg(long, global = true, help_heading = "Everywhere", value_name = "DEVICE")]
    device: Option<String>,

    /// Also write the results as JSON to this file; with - to standard output, and all else to standard error
    #[arg(long, global = true, help_heading = "Everywhere", value_name = "FILE|-")]
    json: Option<PathBuf>,

    /// Print errors and warnings only; what --json and the like write is written
    #[arg(long, short, global = true, help_heading = "Everywhere", conflicts_with = "verbose")]
    quiet: bool,

    /// Also say on standard error what the library does, and how long it takes
    #[arg(long, short, global = true, help_heading = "Everywhere")]
    verbose: bool,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    Info(info::Args),
    Bench(bench::Args),
    Check(check::Args),
    Compare(compare::Args),
    Completions(shell::Completions),
    Families(families::Args),
    Inspect(inspect::Args),
    Lint(lint::Args),
    Man(shell::Man),
    Plan(plan::Args),
    Quantize(quantize::Args),
    Report(report::Args),
    Run(run::Args),
    Shader(shader::Args),
    Soak(soak::Args),
    Tune(tune::Args),
}

/// Exit code of a run that Ctrl-C ended: 128 and the signal's number, as shells have it.
const INTERRUPTED: u8 = 130;

/// Whether everything that was looked at was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Right,
    Wrong,
    Interrupted,
}

/// Arguments that cannot be used: exit code 2.
#[derive(Debug)]
struct Unusable(String);

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unusable {}

fn unusable(message: impl Into<String>) -> anyhow::Error {
    Unusable(message.into()).into()
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let mut output = Output::new(cli.json.clone(), cli.quiet);
    if cli.verbose {
        output::tell_spans();
    }
    match execute(&cli, &mut output) {
        Ok(Verdict::Right) => ExitCode::SUCCESS,
        Ok(Verdict::Wrong) => ExitCode::from(1),
        Ok(Verdict::Interrupted) => ExitCode::from(INTERRUPTED),
        Err(error) => {
            output::report(&error);
            let arguments = error.is::<Unusable>()
                || matches!(error.downcast_ref::<wgmoe::Error>(), Some(wgmoe::Error::NoDevice { .. }));
            ExitCode::from(if arguments { 2 } else { 1 })
        }
    }
}

fn execute(cli: &Cli, output: &mut Output) -> anyhow::Result<Verdict> {
    output.check_target()?;
    let device = || device_choice(cli.device.as_deref());
    match &cli.command {
        Command::Info(args) => info::execute(args, device()?, output),
        Command::Bench(args) => bench::execute(args, device()?, output),
        Command::Check(args) => check::execute(args, device()?, output),
        Command::Compare(args) => compare::execute(args, output),
        Command::Completions(args) => Ok(shell::completions(args, output)),
        Command::Families(args) => families::execute(args, output),
        Command::Inspect(args) => inspect::execute(args, device()?, output),
        Command::Lint(args) => lint::execute(args, output),
        Command::Man(args) => shell::man(args, output),
        Command::Plan(args) => plan::execute(args, cli.device.as_deref(), output),
        Command::Quantize(args) => quantize::execute(args, output),
        Command::Report(args) => report::execute(args, output),
        Command::Run(args) => run::execute(args, device()?, output),
        Command::Shader(args) => shader::execute(args, output),
        Command::Soak(args) => soak::execute(args, device()?, output),
        Command::Tune(args) => tune::execute(args, device()?, output),
    }
}

/// The device that was asked for: the option, or the environment variable, or auto.
fn device_choice(option: Option<&str>) -> anyhow::Result<DeviceChoice> {
    let variable = std::env::var(DEVICE_VARIABLE).ok();
    let wanted = option.or(variable.as_deref()).filter(|wanted| !wanted.is_empty()).unwrap_or("auto");
    wanted.parse().map_err(|error| unusable(format!("--device {wanted}: {error}")))
}

/// Opens the device with the limits that WebGPU guarantees, and says which one and why: what is right with these is
/// right on any device.
fn open(choice: &DeviceChoice, output: &mut Output) -> anyhow::Result<Context> {
    let context = Context::new(choice)?;
    let device = context.device();
    let detail: Vec<&str> =
        [&device.backend, &device.driver].into_iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
    output.line(&format!("device: {} ({})", device.name, detail.join(", ")));
    output.line(&format!("        {}", context.choice_reason()));
    Ok(context)
}

/// The same device with all the limits it has, if a layer needs more than WebGPU guarantees.
fn widen(context: Context, choice: &DeviceChoice, needed: bool, output: &mut Output) -> anyhow::Result<Context> {
    if !needed || context.gpu().is_none() {
        return Ok(context);
    }
    output.line("        opened with all its limits: WebGPU's defaults would cut the layer into pages or passes");
    Ok(Context::with_all_limits(choice)?)
}

/// A path given as an argument must exist; what is in it is another matter.
fn must_exist(argument: &str, path: &Path) -> anyhow::Result<()> {
    match path.try_exists() {
        Ok(true) => Ok(()),
        Ok(false) => Err(unusable(format!("{argument} {}: no such file or folder", path.display()))),
        Err(error) => Err(unusable(format!("{argument} {}: {error}", path.display()))),
    }
}

/// The folder of a file that will be written must exist, which is better said before an hour of work than after.
fn must_be_writable(argument: &str, path: &Path) -> anyhow::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if path.is_dir() {
        return Err(unusable(format!("{argument} {}: this is a folder, expected the name of a file", path.display())));
    }
    if !folder.is_dir() {
        return Err(unusable(format!("{argument} {}: the folder {} does not exist", path.display(), folder.display())));
    }
    Ok(())
}

/// clap value parser for `--weights`.
fn weight_format(text: &str) -> Result<WeightFormat, String> {
    text.parse().map_err(|error: wgmoe::Error| error.to_string())
}

/// clap value parser for `--matmul`; auto is `None`.
fn matmul_variant(text: &str) -> Result<Matmul, String> {
    if text == "auto" {
        return Ok(Matmul(None));
    }
    let found = MatmulVariant::ALL.iter().copied().find(|variant| variant.name() == text);
    found
        .map(|variant| Matmul(Some(variant)))
        .ok_or_else(|| format!("expected one of auto, {}", names(MatmulVariant::ALL, |variant| variant.name())))
}

/// A choice of matmul. A type of its own, because clap reads a bare `Option` as "may be absent".
#[derive(Clone, Copy, Debug)]
struct Matmul(Option<MatmulVariant>);

/// Sizes of a layer.
#[derive(clap::Args, Clone, Debug)]
struct Sizes {
    /// Width of a token
    #[arg(long, value_name = "N")]
    hidden: Option<u32>,
    /// Inner width of one expert
    #[arg(long, value_name = "N")]
    intermediate: Option<u32>,
    /// Experts in the layer
    #[arg(long, value_name = "N")]
    experts: Option<u32>,
    /// Experts for each token
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
}

impl Sizes {
    /// One was given.
    fn any(&self) -> bool {
        [self.hidden, self.intermediate, self.experts, self.top_k].iter().any(Option::is_some)
    }

    /// The preset of that name, or the small one, with the sizes that were given.
    fn of(&self, preset: Option<&str>) -> Preset {
        let mut preset = preset.and_then(Preset::find).unwrap_or(presets::SMALL);
        preset.hidden_size = self.hidden.unwrap_or(preset.hidden_size);
        preset.intermediate_size = self.intermediate.unwrap_or(preset.intermediate_size);
        preset.num_experts = self.experts.unwrap_or(preset.num_experts);
        preset.top_k = self.top_k.unwrap_or(preset.top_k);
        preset
    }
}

/// Options for layers that are larger than the device.
#[derive(clap::Args, Clone, Debug)]
struct Memory {
    /// GPU memory for the weights of routed experts, such as 4GiB or 512MiB; auto: what the device has. What does not fit
    /// stays on the host and is brought in as tokens are routed to it; each pass then waits for its router
    #[arg(long, value_name = "SIZE|auto", default_value = "auto", value_parser = gpu_memory)]
    gpu_memory: GpuMemory,
    /// Experts that stay on the GPU whoever else comes and goes
    #[arg(long, value_name = "A,B,C", value_delimiter = ',')]
    pin_experts: Vec<u32>,
}

impl Memory {
    fn options(&self) -> LayerOptions {
        LayerOptions {
            gpu_memory: self.gpu_memory,
            pinned_experts: self.pin_experts.clone(),
            ..LayerOptions::default()
        }
    }
}

/// clap value parser for `--gpu-memory`.
fn gpu_memory(text: &str) -> Result<GpuMemory, String> {
    if text == "auto" { Ok(GpuMemory::Available) } else { size(text).map(GpuMemory::Bytes) }
}

/// Sizes in bytes: `1500`, `64KiB`, `512MiB`, `4GiB`, or with `KB`, `MB`, `GB`.
fn size(text: &str) -> Result<u64, String> {
    let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "kib" | "k" => 1024.0,
        "mib" | "m" => 1048576.0,
        "gib" | "g" => 1073741824.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        _ => f64::NAN,
    };
    match number.parse::<f64>() {
        Ok(number) if (number * factor).is_finite() && number * factor >= 1.0 => Ok((number * factor) as u64),
        _ => Err("expected a size such as 4GiB, 512MiB or 800MB".to_owned()),
    }
}

fn names<T: Copy>(all: &[T], name: impl Fn(T) -> &'static str) -> String {
    all.iter().map(|&item| name(item)).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_subcommand_has_an_example() {
        for command in Cli::command().get_subcommands().filter(|command| command.get_name() != "help") {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("wgmoe {}", command.get_name())), "{}", command.get_name());
        }
    }

    #[test]
    fn sizes_have_units() {
        let sizes = ["1500", "64KiB", "1.5 GiB", "2gb", "7M"].map(size);
        assert_eq!((gpu_memory("auto"), gpu_memory("1k")), (Ok(GpuMemory::Available), Ok(GpuMemory::Bytes(1024))));
        assert_eq!(sizes, [1500, 65536, 1610612736, 2_000_000_000, 7 << 20].map(Ok));
        for wrong in ["", "GiB", "-1GiB", "4TiBs", "0", "1e400", "nan", "4 G i B"] {
            assert!(size(wrong).is_err_and(|error| error.contains("4GiB")), "{wrong}");
        }
    }

    #[test]
    fn names_of_formats_and_variants_are_read() {
        assert_eq!(weight_format("f16"), Ok(WeightFormat::F16));
        assert!(weight_format("f17").is_err_and(|error| error.contains("f16")));
        assert!(matmul_variant("auto").is_ok_and(|matmul| matmul.0.is_none()));
        for &variant in MatmulVariant::ALL {
            assert!(matmul_variant(variant.name()).is_ok_and(|matmul| matmul.0 == Some(variant)));
        }
        assert!(matmul_variant("fast").is_err_and(|error| error.contains("tiled")));
    }
}
