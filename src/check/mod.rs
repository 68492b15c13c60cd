//! Is this device right? Every kernel variant against its reference, one stage at a time; whole layers of every kind;
//! generated cases beyond those; layers of small integers, whose every bit has to be right; rows of logits of every kind
//! through router and permute; and the same bits every time.
//!
//! Each stage gets what the reference made of the stage before it, so that a failure names its stage. Outputs are
//! poisoned before the run and have guards on both sides. Movement is compared exactly, arithmetic against the error
//! bound of an f32 sum (docs/numerics.md). That each comparison finds the faults that it is there for is tested in
//! `controls.rs`.

mod bounds;
mod case;
#[cfg(test)]
mod controls;
mod determinism;
mod draw;
mod exact;
mod layers;
mod load;
mod random;
mod rows;
mod verdict;

pub use determinism::check_determinism;
pub use exact::check_exact;
pub use load::{LoadReport, LoadRequest, LoadSample, check_load};
pub use random::check_cases;
pub use rows::check_rows;

use crate::bench::workload::Workload;
use crate::context::{Context, Engine};
use crate::cpu::CpuLayer;
use crate::error::Result;
use crate::golden;
use crate::gpu::Gpu;
use crate::gpu::harness::Harness;
use crate::kernels::Stage;
use crate::kernels::matmul::MatmulChoice;
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use crate::plan::{DeviceProfile, MatmulRequest, variant};
use case::Case;
use serde::Serialize;
use verdict::{Verdict, compare, nmse};

/// Called before each piece of work: how many are done, of how many, and what is next.
pub type Progress<'a> = &'a mut dyn FnMut(usize, usize, &str);

/// What kind of check it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum CheckKind {
    /// One kernel on one shape of a fixed table.
    Kernel,
    /// A whole layer of a fixed table.
    Layer,
    /// One kernel on a generated shape.
    Case,
    /// Small integers, bit by bit.
    Exact,
    /// Rows of logits through router and permute.
    Rows,
    /// The same bits again.
    Determinism,
}

impl CheckKind {
    /// Its name in results.
    pub fn name(self) -> &'static str {
        match self {
            CheckKind::Kernel => "kernel",
            CheckKind::Layer => "layer",
            CheckKind::Case => "case",
            CheckKind::Exact => "exact",
            CheckKind::Rows => "rows",
            CheckKind::Determinism => "determinism",
        }
    }
}

/// A generated case, which the same numbers make again on the same device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct CaseId {
    /// Of all cases.
    pub seed: u64,
    /// Of this one.
    pub index: u64,
}

/// What became of one kernel on one shape, or of many runs of the same.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelCheck {
    /// What was checked.
    pub kind: CheckKind,
    /// The kernel's label.
    pub kernel: String,
    /// Tokens, sizes, experts, weights.
    pub shape: String,
    /// Cases, rows, or comparisons of runs that it stands for.
    pub count: u64,
    /// Which generated case it is.
    pub case: Option<CaseId>,
    /// Largest error relative to the largest reference value; 0 for a kernel that only moves data.
    pub max_rel_error: f64,
    /// Every element is within its bound, every index exact, every guard untouched.
    pub passed: bool,
    /// What failed.
    pub reason: Option<String>,
}

impl KernelCheck {
    fn new(kind: CheckKind, kernel: String, shape: String, verdict: Verdict) -> Self {
        let Verdict { max_rel_error, reason } = verdict;
        Self { kind, kernel, shape, count: 1, case: None, max_rel_error, passed: reason.is_none(), reason }
    }
}

/// (tokens, hidden, intermediate, experts, top_k, skew): tails of every tile, one and many experts, crowded and empty
/// experts, more experts than lanes.
const SHAPES: &[(u32, u32, u32, u32, u32, f64)] = &[
    (1, 64, 32, 8, 2, 0.0),
    (1, 1, 1, 1, 1, 0.0),
    (5, 17, 3, 3, 3, 0.0),
    (16, 128, 96, 16, 4, 1.0),
    (33, 64, 48, 8, 2, 0.0),
    (33, 30, 13, 5, 1, 2.0),
    (64, 100, 60, 1, 1, 0.0),
    (70, 256, 72, 4, 2, 0.0),
    (129, 36, 20, 257, 5, 0.5),
    (40, 52, 24, 1024, 32, 0.0),
    (300, 24, 16, 3, 1, 4.0),
    (48, 2048, 8, 6, 2, 0.0),
    // Wide enough for a single token's down and combine to be one.
    (1, 1030, 40, 6, 3, 0.0),
    // Whole blocks of every weight format.
    (1, 512, 256, 5, 2, 0.0),
    (1, 256, 256, 5, 2, 0.0),
    (37, 512, 256, 5, 2, 1.0),
];

/// Runs every kernel that the context's device can run on a fixed table of shapes, and whole layers of every kind.
pub fn check_kernels(context: &Context, progress: Progress<'_>) -> Result<Vec<KernelCheck>> {
    let shapes = (0..SHAPES.len()).map(|index| formats(index).len()).sum::<usize>();
    let mut done = 0;
    let total = shapes + layers::count();
    let mut checks = Vec::new();
    for (index, &(tokens, hidden, intermediate, experts, top_k, skew)) in SHAPES.iter().enumerate() {
        let routing = Routing::softmax(index % 2 == 0);
        let config = MoeConfig::new(hidden, intermediate, experts, top_k, routing, Activation::SWIGLU)?;
        let mut workload = Workload::new(config, skew, 7 + index as u64)?;
        if index % 3 == 0 {
            workload.weights.router_bias = Some((0..experts).map(|e| (e % 7) as f32 * 0.125 - 0.375).collect());
        }
        let x = workload.input(tokens)?;
        for (f, format) in formats(index).into_iter().enumerate() {
            let case = Case::new(&workload, &x, format)?;
            progress(done, total, &case.shape());
            done += 1;
            match context.engine() {
                Engine::Gpu(gpu) => pollster::block_on(check_stages(&case, gpu, f == 0, &mut checks))?,
                Engine::Cpu => {
                    let verdict = check_cpu(&case)?;
                    let label = format!("cpu.{}", format.name());
                    checks.push(KernelCheck::new(CheckKind::Kernel, label, case.shape(), verdict));
                }
            }
        }
    }
    checks.extend(layers::check(context, |layer| {
        progress(done, total, layer);
        done += 1;
    })?);
    progress(total, total, "");
    Ok(checks)
}

/// Floats on every shape; other formats on those that hold whole blocks of each, other groups of integers on the last.
fn formats(shape: usize) -> Vec<WeightFormat> {
    match SHAPES.len() - shape {
        1 => WeightFormat::every(),
        2 | 3 => WeightFormat::ALL.to_vec(),
        _ => vec![WeightFormat::F32, WeightFormat::F16],
    }
}

/// The engine's whole pass; it has no stages of its own to look into.
fn check_cpu(case: &Case<'_>) -> Result<Verdict> {
    let layer = CpuLayer::new(case.config.clone(), case.weights, case.format)?;
    let mut y = vec![0.0; case.x.len()];
    layer.forward_into(case.x, &mut y)?;
    let most = case.expected.y.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    Ok(compare(&y, &case.expected.y, nmse::LAYER, |_| golden::TOLERANCE * most))
}

/// Every stage; those that do not depend on the weight format only if `all_stages`.
async fn check_stages(case: &Case<'_>, gpu: &Gpu, all_stages: bool, checks: &mut Vec<KernelCheck>) -> Result<()> {
    let device = gpu.profile();
    // The layout of the weights is the same for every choice.
    let any = case.plan(device, &MatmulRequest::default())?;
    let harness = Harness::new(gpu, &any, case.weights).await?;
    let tokens = case.num_tokens();
    for (profile, choice) in with_read_widths(device, &choices(device, case.config, tokens)) {
        let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
        let plan = case.plan(&profile, &request)?.plan(tokens)?;
        for stage in Stage::ALL.into_iter().chain([Stage::DownCombine]) {
            let is_matmul = matches!(stage, Stage::GateUp | Stage::Down | Stage::DownCombine);
            let is_first = choice == MatmulChoice::Tiled { tile_m: 32, tile_n: 64 };
            // Router and combine do not depend on the matmul, permute only on its tile height.
            let due = is_matmul || (all_stages && (is_first || stage == Stage::Permute && choice.sorted()));
            let due = due && (is_matmul || profile.int64 == device.int64);
            let Some(dispatch) = plan.dispatches.iter().find(|d| d.kernel.stage == stage) else { continue };
            if due {
                let verdict = case.check(&harness, &plan, stage).await?;
                let label = label(stage, &dispatch.kernel.label, choice);
                checks.push(KernelCheck::new(CheckKind::Kernel, label, case.shape(), verdict));
            }
        }
    }
    Ok(())
}

/// The kernel and what of `choice` it depends on.
fn label(stage: Stage, kernel: &str, choice: MatmulChoice) -> String {
    match stage {
        Stage::GateUp | Stage::Down | Stage::DownCombine => format!("{kernel} {}", choice.sizes()),
        Stage::Permute => format!("permute tile {}", choice.tile_m()),
        _ => kernel.to_owned(),
    }
}

/// Each choice as the device runs it, and, where it reads 64 bits at a time, as it has to be able to do without.
fn with_read_widths(device: &DeviceProfile, choices: &[MatmulChoice]) -> Vec<(DeviceProfile, MatmulChoice)> {
    let narrow = DeviceProfile { int64: false, ..device.clone() };
    let wide = choices.iter().map(|&choice| (device.clone(), choice));
    let subgroup_choices = choices.iter().filter(|choice| device.int64 && choice.needs_subgroups());
    wide.chain(subgroup_choices.map(|&choice| (narrow.clone(), choice))).collect()
}

/// Every choice that a plan or the tuner may make here, and every other that a plan may make elsewhere, as far as the
/// device can run them.
fn choices(device: &DeviceProfile, config: &MoeConfig, tokens: u32) -> Vec<MatmulChoice> {
    let mut choices = variant::candidates(config.top_k(), config.num_experts(), tokens, device);
    let mut elsewhere: Vec<_> = [16, 32, 64].map(|tile_m| MatmulChoice::Tiled { tile_m, tile_n: 64 }).into();
    elsewhere.extend([32, 64, 128].map(|tile_m| MatmulChoice::TiledTall { tile_m, tile_n: 64 }));
    elsewhere.extend(device.subgroup_size.map(|subgroup_size| MatmulChoice::Subgroup { subgroup_size }));
    let few = tokens <= variant::FEW_TOKENS;
    for sorted in [true, false].into_iter().filter(|&sorted| sorted || few) {
        for (workgroup_size, k_lanes) in [(64, 16), (8, 1)] {
            elsewhere.push(MatmulChoice::Vec { workgroup_size, k_lanes, sorted });
        }
        elsewhere.extend(device.subgroup_size.map(|subgroup_size| MatmulChoice::VecSubgroup { subgroup_size, sorted }));
    }
    elsewhere.retain(|choice| !choices.contains(choice));
    choices.extend(elsewhere);
    choices
}
