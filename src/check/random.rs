//! Cases beyond the fixed table: what a case is follows from a seed and its number alone, given what the device can run.
//!
//! Drivers take far longer to compile a kernel than to run it on a small layer. Kernels differ by what is compiled into
//! them (variant, tile, weight format, activation, biases); shapes are numbers in a uniform. So eight cases in a row share
//! all of the former, and every one has a shape of its own.

use super::case::Case;
use super::draw::Draw;
use super::verdict::{Verdict, compare, nmse};
use super::{CaseId, CheckKind, KernelCheck, Progress, choices, label, with_read_widths};
use crate::bench::workload::{Biases, Workload};
use crate::context::{Context, Engine};
use crate::cpu::CpuLayer;
use crate::error::{Error, Result};
use crate::golden;
use crate::gpu::Gpu;
use crate::gpu::harness::Harness;
use crate::kernels::Stage;
use crate::kernels::matmul::MatmulChoice;
use crate::model::activation::Activation;
use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::{Routing, Scores};
use crate::plan::variant::FEW_TOKENS;
use crate::plan::{DeviceProfile, MatmulRequest};
use crate::reference;
use crate::reference::router::{self, Logits};
use std::ops::Range;

/// Cases in a row that share their kernels.
const GROUP: u64 = 8;
/// Weights of the experts of a case, and of one that is wide enough for down and combine to be one.
const MAX_WEIGHTS: u32 = 600_000;
const MAX_WIDE_WEIGHTS: u32 = 4_000_000;
/// Multiply-adds of its experts.
const MAX_PRODUCTS: u32 = 10_000_000;
/// Numbers of experts around those at which something changes.
const EXPERTS: [u32; 20] = [1, 2, 3, 4, 5, 7, 8, 16, 31, 63, 64, 65, 127, 128, 129, 255, 256, 257, 512, 1024];
const SKEWS: [f64; 6] = [0.0, 0.0, 0.5, 1.0, 2.0, 400.0];

/// What the cases of a group share.
#[derive(Clone, Debug)]
struct Kernels {
    format: WeightFormat,
    /// How the matmul is computed, and on which kind of device; the CPU engine has one way.
    choice: Option<(DeviceProfile, MatmulChoice)>,
}

/// One case.
#[derive(Clone, Debug, PartialEq)]
struct Spec {
    stage: Stage,
    config: MoeConfig,
    tokens: u32,
    format: WeightFormat,
    skew: f64,
    biases: Biases,
    seed: u64,
}

/// The generated cases of these numbers.
///
/// # Errors
/// What the device reports; a case that is wrong is no error.
pub fn check_cases(
    context: &Context,
    seed: u64,
    cases: Range<u64>,
    progress: Progress<'_>,
) -> Result<Vec<KernelCheck>> {
    let kernels = all_kernels(context, seed)?;
    let total = (cases.end - cases.start) as usize;
    let mut checks = Vec::with_capacity(total);
    for index in cases.clone() {
        let own = &kernels[(index / GROUP) as usize % kernels.len()];
        let spec = spec(seed, index, own)?;
        progress((index - cases.start) as usize, total, &format!("case {index}, {}", spec.stage.name()));
        let mut check = run(&spec, own, context)?;
        check.case = Some(CaseId { seed, index });
        checks.push(check);
    }
    progress(total, total, "");
    Ok(checks)
}

/// Every format in every way that the device can compute it, in the seed's order.
fn all_kernels(context: &Context, seed: u64) -> Result<Vec<Kernels>> {
    let ways: Vec<Option<(DeviceProfile, MatmulChoice)>> = match context.engine() {
        Engine::Gpu(gpu) => {
            let device = gpu.profile();
            let config = MoeConfig::new(64, 32, 8, 2, Routing::softmax(true), Activation::SWIGLU)?;
            // Between them they have candidates for few tokens and for many.
            let mut all = choices(device, &config, FEW_TOKENS);
            all.extend(choices(device, &config, 1000));
            let mut seen = std::collections::HashSet::new();
            all.retain(|&choice| seen.insert(choice));
            with_read_widths(device, &all).into_iter().map(Some).collect()
        }
        Engine::Cpu => vec![None],
    };
    let formats = WeightFormat::every().into_iter();
    let mut kernels: Vec<Kernels> =
        formats.flat_map(|format| ways.iter().map(move |choice| Kernels { format, choice: choice.clone() })).collect();
    Draw::new(seed, 0, 0).shuffle(&mut kernels);
    Ok(kernels)
}

/// The case of this number.
fn spec(seed: u64, index: u64, kernels: &Kernels) -> Result<Spec> {
    let group = index / GROUP;
    let mut shared = Draw::new(seed, 1, group);
    let activations = Activation::examples();
    let activation = if shared.once_in(2) { Activation::SWIGLU } else { shared.pick(&activations) };
    let experts_biased = shared.once_in(3);
    let mut draw = Draw::new(seed, 2, index);
    let unsorted = kernels.choice.as_ref().is_some_and(|(_, choice)| !choice.sorted());
    let stage = match (index % GROUP, group % 2) {
        (0..=2, _) => Stage::GateUp,
        // The last of them for one token, and wide enough to be fused with combine.
        (5, _) if unsorted => Stage::DownCombine,
        (3..=5, _) => Stage::Down,
        (6, 0) => Stage::Router,
        (6, _) => Stage::Permute,
        _ => Stage::Combine,
    };
    let format = match stage {
        Stage::Router | Stage::Permute | Stage::Combine => WeightFormat::F32,
        _ => kernels.format,
    };
    let [tokens, h, i, e, k] = sizes(&mut draw, stage, format, kernels);
    let routing = if stage == Stage::Router { any_routing(&mut draw) } else { Routing::softmax(draw.once_in(2)) };
    let biases = Biases { router: draw.once_in(2), selection: false, experts: experts_biased };
    let config = MoeConfig::new(h, i, e, k, routing, activation)?;
    Ok(Spec { stage, config, tokens, format, skew: draw.pick(&SKEWS), biases, seed: draw.next() })
}

/// A routing that ranks experts by their logits: then the device's own say which choice is right.
fn any_routing(draw: &mut Draw) -> Routing {
    let scores = [Scores::Softmax, Scores::SoftmaxSelected, Scores::Sigmoid, Scores::SqrtSoftplus];
    let routing = Routing::new(draw.pick(&scores), draw.once_in(2));
    Routing { scale: draw.pick(&[1.0, 1.0, 2.5]), logit_scale: draw.pick(&[1.0, 1.0, 0.5]), ..routing }
}

/// Tokens, width, inner width, experts, choices.
fn sizes(draw: &mut Draw, stage: Stage, format: WeightFormat, kernels: &Kernels) -> [u32; 5] {
    let choice = kernels.choice.as_ref().map(|(_, choice)| *choice);
    let few = choice.is_some_and(|choice| !choice.sorted());
    // Around the edges of a tile, and anywhere.
    let tile_m = choice.map_or(16, MatmulChoice::tile_m);
    let mut tokens = match draw.below(4) {
        0 => draw.between(1, 4),
        1 => draw.between(tile_m.max(2) - 1, tile_m + 1),
        2 => draw.between(1, 2) * tile_m + draw.below(3),
        _ => draw.between(1, 300),
    };
    let mut e = draw.pick(&EXPERTS);
    let k = |draw: &mut Draw, e: u32| {
        let most = e.min(32);
        if draw.once_in(4) { draw.between(1, most) } else { draw.between(1, most.min(8)) }
    };
    let block = format.block();
    let length = |draw: &mut Draw| match block {
        1 if draw.once_in(8) => draw.between(1, 600),
        1 => draw.between(1, 140),
        _ => block * draw.between(1, (320 / block).max(1)),
    };
    match stage {
        Stage::Router => {
            let h = draw.between(1, 300).min((120_000 / e).max(1));
            let k = k(draw, e);
            [tokens.min((6_000_000 / (e * h)).max(1)), h, 1, e, k]
        }
        Stage::Permute => {
            let k = k(draw, e);
            let tokens = draw.between(1, 3000).min((4_000_000 / (e * k)).max(1));
            [tokens, 4, 1, e, k]
        }
        Stage::Combine => {
            let h = length(draw).min((100_000 / e).max(1));
            let k = k(draw, e);
            [tokens.min((1_000_000 / (k * h)).max(1)), h, 1, e, k]
        }
        Stage::DownCombine => {
            // Enough columns for every workgroup that the device runs at once, or too few, and then they are two.
            let enough = kernels.choice.as_ref().map_or(1, |(d, c)| 4 * d.parallel_workgroups() * c.tile_n());
            let h = (enough + draw.below(9)).min(4096).next_multiple_of(block);
            let i = block * draw.between(1, (32 / block).max(1));
            e = e.min(MAX_WIDE_WEIGHTS / (3 * h * i)).max(1);
            [1, h, i, e, k(draw, e)]
        }
        _ => {
            let (h, i) = (length(draw), length(draw));
            e = e.min(MAX_WEIGHTS / (3 * h * i)).max(1);
            let k = k(draw, e);
            tokens = tokens.min(MAX_PRODUCTS / (k * 3 * h * i)).max(1);
            [if few { tokens.min(FEW_TOKENS) } else { tokens }, h, i, e, k]
        }
    }
}

fn run(spec: &Spec, kernels: &Kernels, context: &Context) -> Result<KernelCheck> {
    let workload = Workload::new(spec.config.clone(), spec.skew, spec.seed)?.with_biases(spec.biases);
    let x = workload.input(spec.tokens)?;
    let case = Case::new(&workload, &x, spec.format)?;
    let (kernel, verdict) = match (context.engine(), &kernels.choice) {
        (Engine::Gpu(gpu), Some((device, choice))) => {
            pollster::block_on(run_stage(&case, spec.stage, gpu, device, *choice))?
        }
        _ => (format!("cpu.{}", spec.format.name()), run_cpu(&case)?),
    };
    Ok(KernelCheck::new(CheckKind::Case, kernel, case.shape(), verdict))
}

/// The kernel's label and what became of it.
async fn run_stage(
    case: &Case<'_>,
    stage: Stage,
    gpu: &Gpu,
    device: &DeviceProfile,
    choice: MatmulChoice,
) -> Result<(String, Verdict)> {
    // A sort, where it is the sort that is checked; and stages of any number of tokens need one.
    let needs_sort = !matches!(stage, Stage::GateUp | Stage::Down | Stage::DownCombine);
    let choice = match choice.sorted() || !needs_sort {
        true => choice,
        false => MatmulChoice::Tiled { tile_m: 16, tile_n: 64 },
    };
    let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
    let layer = case.plan(device, &request)?;
    let plan = layer.plan(case.num_tokens())?;
    // A device without as many columns as it takes to fuse them has both stages.
    let found = |stage: Stage| plan.dispatches.iter().find(|d| d.kernel.stage == stage);
    let stage = if stage == Stage::DownCombine && found(stage).is_none() { Stage::Down } else { stage };
    let Some(dispatch) = found(stage) else {
        let message = "the plan has no such stage".to_owned();
        return Err(Error::Kernel { kernel: stage.name().to_owned(), message });
    };
    let harness = Harness::new(gpu, &layer, case.weights).await?;
    let verdict = case.check(&harness, &plan, stage).await?;
    Ok((label(stage, &dispatch.kernel.label, choice), verdict))
}

/// The engine's whole pass. In a near-tie its choice may be another than the reference's, rightly: what counts is that it is
/// right given the engine's own logits, and that the output is right given the choice.
fn run_cpu(case: &Case<'_>) -> Result<Verdict> {
    let layer = CpuLayer::new(case.config.clone(), case.weights, case.format)?;
    let mut y = vec![0.0; case.x.len()];
    let decision = layer.forward_into(case.x, &mut y)?;
    let experts = decision.router_logits.iter().map(|&l| f64::from(l)).collect();
    let logits = Logits { experts, shared: Vec::new() };
    let own = router::route(case.config, case.weights, logits, &Batch::from(case.x));
    if own.topk_experts != decision.topk_experts {
        return Ok(Verdict::failed("its choices are not those of its own logits".to_owned()));
    }
    let stored = case.weights.rounded(case.config, case.format)?;
    let logits = router::router_logits(case.config, &stored, &Batch::from(case.x));
    let batch = Batch::from(case.x);
    let chosen = router::route_with(case.config, &stored, logits, Some(&own.topk_experts), &batch);
    let expected = reference::forward_with_routing(case.config, &stored, case.x, chosen).y;
    let most = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    Ok(compare(&y, &expected, nmse::LAYER, |_| golden::TOLERANCE * most))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn kernels(format: WeightFormat, choice: MatmulChoice) -> Kernels {
        Kernels { format, choice: Some((DeviceProfile::webgpu_floor(), choice)) }
    }

    #[test]
    fn a_case_follows_from_its_seed_and_number() {
        let own = kernels(WeightFormat::F16, MatmulChoice::Tiled { tile_m: 32, tile_n: 64 });
        let case = |seed, index| spec(seed, index, &own).expect("sound sizes");
        assert_eq!(case(3, 1234), case(3, 1234));
        assert_ne!(case(3, 1234), case(4, 1234));
        assert_ne!(case(3, 1234), case(3, 1242));
    }

    /// Sizes are sound for every format and choice, and between them the cases have what a table would.
    #[test]
    fn cases_are_of_every_kind() {
        let formats = WeightFormat::every();
        let mut choices = MatmulChoice::examples();
        choices.retain(|choice| !choice.needs_subgroups());
        let (mut stages, mut experts, mut top_ks) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        let (mut tails, mut biased, mut activations) = (0, 0, BTreeSet::new());
        for index in 0..6000u64 {
            let group = (index / GROUP) as usize;
            let own = kernels(formats[group % formats.len()], choices[group % choices.len()]);
            let spec = spec(1, index, &own).expect("sound sizes");
            let c = &spec.config;
            spec.format.check_inputs("gate_proj", c.hidden_size()).expect("whole blocks");
            let weights =
                u64::from(c.num_experts()) * 3 * u64::from(c.hidden_size()) * u64::from(c.intermediate_size());
            assert!(weights <= 2 * u64::from(MAX_WIDE_WEIGHTS), "{spec:?}");
            stages.insert(spec.stage);
            experts.insert(c.num_experts());
            top_ks.insert(c.top_k());
            activations.insert(c.activation().name());
            tails += u32::from(!c.hidden_size().is_multiple_of(4));
            biased += u32::from(spec.biases.experts);
        }
        assert_eq!(stages.len(), 6, "{stages:?}");
        // Others come from experts that are too large to have as many of.
        assert!(EXPERTS.iter().all(|e| experts.contains(e)), "{experts:?}");
        assert_eq!(top_ks.len(), 32, "{top_ks:?}");
        assert_eq!(activations.len(), Activation::examples().len());
        assert!(tails > 1000 && biased > 1000, "{tails} {biased}");
    }
}
