//! The same bits every time: of the same pass again and again, of a token alone and in any batch, and of tokens in another
//! order. What is promised is in docs/numerics.md: on one device, with the variant of the matmul pinned.

use super::draw::Draw;
use super::verdict::Verdict;
use super::{CheckKind, KernelCheck, Progress, choices};
use crate::bench::workload::{Biases, Workload};
use crate::context::Context;
use crate::error::Result;
use crate::kernels::matmul::MatmulChoice;
use crate::layer::{LayerOptions, MoeLayer};
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::{Routing, Scores};
use crate::plan::DeviceProfile;
use crate::plan::variant::FEW_TOKENS;

/// Weight formats that are decoded in different ways: not at all, from halves, from integers with scales, from a table. None
/// has blocks that would make the layer large: runs are what counts here.
const FORMATS: [WeightFormat; 4] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT4, WeightFormat::Mxfp4];
/// Tokens of the largest batch.
const MOST_TOKENS: u32 = 256;
/// Comparisons of a token alone with itself in a batch, for as many runs.
const COMPARISONS: u64 = 10_000;
const RUNS: u64 = 1000;
/// Experts and choices of the layer.
const EXPERTS: u32 = 9;
const TOP_K: u32 = 3;

/// `runs` passes of every variant, shared among several formats, and in proportion batches of all sizes up to 256: 10,000
/// comparisons of a token alone with itself in a batch for 1,000 runs. A control has to fail: where the variant depends on
/// the batch, so do bits.
///
/// # Errors
/// What the device reports; bits that differ are no error.
pub fn check_determinism(context: &Context, runs: u32, progress: Progress<'_>) -> Result<Vec<KernelCheck>> {
    let mut work = Vec::new();
    for format in FORMATS {
        let all = match context.gpu() {
            Some(gpu) => all_choices(gpu.profile())?.into_iter().map(Some).collect(),
            None => vec![None],
        };
        work.extend(all.into_iter().map(|choice| (format, choice)));
    }
    let comparisons = (COMPARISONS * u64::from(runs) / RUNS).div_ceil(work.len() as u64).max(1);
    let runs = runs.div_ceil(FORMATS.len() as u32);
    let mut checks = Vec::new();
    for (done, &(format, choice)) in work.iter().enumerate() {
        let subject = Subject::new(context, format, choice, done as u64)?;
        progress(done, work.len(), &format!("{} again and again", subject.name));
        let forward = |x: &[f32]| subject.layer.forward(x);
        let again = repeat(forward, &subject.tokens(subject.most.min(37)), runs)?;
        checks.push(subject.report("again", u64::from(runs), again));
        progress(done, work.len(), &format!("{} in batches", subject.name));
        let mut draw = Draw::new(1, 5, done as u64);
        let (count, verdict) = in_batches(forward, &subject, comparisons, &mut draw)?;
        checks.push(subject.report("in batches", count, verdict));
        let (count, verdict) = permuted(forward, &subject, &mut draw)?;
        checks.push(subject.report("in another order", count, verdict));
    }
    checks.push(control(context)?);
    progress(work.len(), work.len(), "");
    Ok(checks)
}

/// Every variant and tile that a plan or the tuner may choose, for few tokens and for many.
fn all_choices(device: &DeviceProfile) -> Result<Vec<MatmulChoice>> {
    let mut all = Vec::new();
    for tokens in [FEW_TOKENS, 1000] {
        all.extend(choices(device, &config(64, 32)?, tokens));
    }
    let mut seen = std::collections::HashSet::new();
    all.retain(|&choice| seen.insert(choice));
    Ok(all)
}

fn config(hidden: u32, intermediate: u32) -> Result<MoeConfig> {
    MoeConfig::new(hidden, intermediate, EXPERTS, TOP_K, Routing::new(Scores::Sigmoid, true), Activation::SWIGLU)
}

/// A layer with its variant pinned.
struct Subject {
    layer: MoeLayer,
    workload: Workload,
    name: String,
    /// Tokens of its largest batch.
    most: u32,
    /// `[MOST_TOKENS, hidden_size]`
    x: Vec<f32>,
}

impl Subject {
    fn new(context: &Context, format: WeightFormat, choice: Option<MatmulChoice>, seed: u64) -> Result<Self> {
        let size =
            if format.block() == 1 { [100, 20] } else { [64, 32] }.map(|n: u32| n.next_multiple_of(format.block()));
        let biases = Biases { router: true, selection: false, experts: seed.is_multiple_of(2) };
        let workload = Workload::new(config(size[0], size[1])?, 0.5, 100 + seed)?.with_biases(biases);
        let options = LayerOptions { weights: format, tile: choice, ..LayerOptions::default() };
        let layer = MoeLayer::with_options(context, workload.config.clone(), &workload.weights, &options)?;
        let way = choice.map_or("cpu".to_owned(), |choice| format!("{} {}", choice.label(), choice.sizes()));
        let most = if choice.is_some_and(|choice| !choice.sorted()) { FEW_TOKENS } else { MOST_TOKENS };
        let x = workload.input(MOST_TOKENS)?;
        Ok(Self { layer, workload, name: format!("{way} {}", format.name()), most, x })
    }

    fn width(&self) -> usize {
        self.workload.config.hidden_size() as usize
    }

    fn tokens(&self, count: u32) -> Vec<f32> {
        self.x[..count as usize * self.width()].to_vec()
    }

    fn report(&self, what: &str, count: u64, verdict: Verdict) -> KernelCheck {
        let config = &self.workload.config;
        let shape = format!("h{} i{} e{EXPERTS} k{TOP_K}, {what}", config.hidden_size(), config.intermediate_size());
        let check = KernelCheck::new(CheckKind::Determinism, format!("layer {}", self.name), shape, verdict);
        KernelCheck { count, ..check }
    }
}

/// The first element whose bits differ.
fn difference(got: &[f32], want: &[f32]) -> Option<String> {
    if got.len() != want.len() {
        return Some(format!("{} elements, expected {}", got.len(), want.len()));
    }
    let at = got.iter().zip(want).position(|(g, w)| g.to_bits() != w.to_bits())?;
    Some(format!("element {at} is {:e}, and was {:e}", got[at], want[at]))
}

/// The same input again and again.
fn repeat(forward: impl Fn(&[f32]) -> Result<Vec<f32>>, x: &[f32], runs: u32) -> Result<Verdict> {
    let first = forward(x)?;
    for run in 1..runs {
        if let Some(difference) = difference(&forward(x)?, &first) {
            return Ok(Verdict::failed(format!("run {run}: {difference}")));
        }
    }
    Ok(Verdict::right())
}

/// Tokens alone and at random places of batches of random sizes; how many comparisons, and what they came to.
fn in_batches(
    forward: impl Fn(&[f32]) -> Result<Vec<f32>>,
    subject: &Subject,
    comparisons: u64,
    draw: &mut Draw,
) -> Result<(u64, Verdict)> {
    let h = subject.width();
    let row = |t: usize| &subject.x[t * h..][..h];
    let mut alone: Vec<Option<Vec<f32>>> = vec![None; MOST_TOKENS as usize];
    let mut done = 0;
    while done < comparisons {
        let size = draw.between(2, subject.most);
        let batch: Vec<usize> = (0..size).map(|_| draw.below(MOST_TOKENS) as usize).collect();
        let y = forward(&batch.iter().flat_map(|&t| row(t).to_vec()).collect::<Vec<f32>>())?;
        for (place, (&t, got)) in batch.iter().zip(y.chunks_exact(h)).enumerate() {
            let want = match &mut alone[t] {
                Some(want) => want,
                none => none.insert(forward(row(t))?),
            };
            if let Some(difference) = difference(got, want) {
                return Ok((done, Verdict::failed(format!("token {place} of {size}: {difference} alone"))));
            }
            done += 1;
        }
    }
    Ok((done, Verdict::right()))
}

/// Tokens in another order give their outputs in that order.
fn permuted(
    forward: impl Fn(&[f32]) -> Result<Vec<f32>>,
    subject: &Subject,
    draw: &mut Draw,
) -> Result<(u64, Verdict)> {
    let h = subject.width();
    let x = subject.tokens(subject.most);
    let y = forward(&x)?;
    let mut order: Vec<usize> = (0..subject.most as usize).collect();
    draw.shuffle(&mut order);
    let in_order = |values: &[f32]| order.iter().flat_map(|&t| values[t * h..][..h].to_vec()).collect::<Vec<f32>>();
    let verdict = match difference(&forward(&in_order(&x))?, &in_order(&y)) {
        Some(difference) => Verdict::failed(difference),
        None => Verdict::right(),
    };
    Ok((order.len() as u64, verdict))
}

/// A comparison that cannot fail proves nothing: here a token alone is computed in another way than in a batch (on a GPU,
/// by lanes that share its sums; on the CPU engine, with other digits), and that has to show.
fn control(context: &Context) -> Result<KernelCheck> {
    let shared_sums = MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: true };
    let whole_sums = MatmulChoice::Tiled { tile_m: 16, tile_n: 64 };
    let on_gpu = |choice| context.gpu().is_some().then_some(choice);
    let batch = Subject::new(context, WeightFormat::F32, on_gpu(whole_sums), 0)?;
    let alone = Subject::new(context, WeightFormat::F32, on_gpu(shared_sums), 0)?;
    let forward = |x: &[f32]| {
        if x.len() > batch.width() {
            return batch.layer.forward(x);
        }
        let mut y = alone.layer.forward(x)?;
        if context.gpu().is_none() {
            y[0] = f32::from_bits(y[0].to_bits() ^ 1);
        }
        Ok(y)
    };
    let (count, verdict) = in_batches(forward, &batch, 100, &mut Draw::new(1, 6, 0))?;
    let verdict = match verdict.reason {
        Some(_) => Verdict::right(),
        None => {
            Verdict::failed("a variant that depends on the batch made no difference: nothing here can fail".to_owned())
        }
    };
    let name = "control: another variant alone".to_owned();
    let check = KernelCheck::new(CheckKind::Determinism, name, "has to differ, and does".to_owned(), verdict);
    Ok(KernelCheck { count: count.max(1), ..check })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn one_bit_in_one_run_is_noticed() {
        let context = Context::cpu();
        let subject = Subject::new(&context, WeightFormat::F32, None, 0).expect("a small layer");
        let runs = Cell::new(0);
        let flips_in = |run: u32| {
            runs.set(0);
            let forward = |x: &[f32]| {
                let mut y = subject.layer.forward(x)?;
                if runs.replace(runs.get() + 1) == run {
                    let last = y.len() - 1;
                    y[last] = f32::from_bits(y[last].to_bits() ^ 1);
                }
                Ok(y)
            };
            repeat(forward, &subject.tokens(7), 9).expect("the engine runs").reason.is_some()
        };
        assert!(!flips_in(9), "the tenth run is not there");
        assert!((0..9).all(flips_in));
    }

    #[test]
    fn a_tokens_place_in_its_batch_is_noticed() {
        let context = Context::cpu();
        let subject = Subject::new(&context, WeightFormat::F32, None, 0).expect("a small layer");
        let h = subject.width();
        let by_place = |x: &[f32]| {
            let mut y = subject.layer.forward(x)?;
            y.iter_mut().skip(h).take(1).for_each(|v| *v = f32::from_bits(v.to_bits() ^ 1));
            Ok(y)
        };
        let mut draw = Draw::new(1, 1, 1);
        assert!(in_batches(by_place, &subject, 500, &mut draw).expect("the engine runs").1.reason.is_some());
        assert!(permuted(by_place, &subject, &mut draw).expect("the engine runs").1.reason.is_some());
        let right = |x: &[f32]| subject.layer.forward(x);
        let (count, verdict) = in_batches(right, &subject, 500, &mut draw).expect("the engine runs");
        assert!(count >= 500 && verdict.reason.is_none());
        assert!(permuted(right, &subject, &mut draw).expect("the engine runs").1.reason.is_none());
    }

    #[test]
    fn the_cpu_engine_keeps_its_bits() {
        let checks = check_determinism(&Context::cpu(), 30, &mut |_, _, _| {}).expect("it is always there");
        assert_eq!(checks.len(), 3 * FORMATS.len() + 1);
        assert!(checks.iter().all(|check| check.passed), "{checks:?}");
        assert!(checks.iter().map(|check| check.count).sum::<u64>() > 300);
    }
}
