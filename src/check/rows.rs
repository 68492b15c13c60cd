//! Rows of logits of every kind, by the thousand, through router and permute: indices have to be exact.

use super::draw::Draw;
use super::verdict::{Verdict, compare, compare_words, floats, nmse, words};
use super::{CheckKind, KernelCheck, Progress};
use crate::context::{Context, Engine};
use crate::cpu::CpuLayer;
use crate::error::{Error, Result};
use crate::gpu::Gpu;
use crate::gpu::harness::{Harness, Output};
use crate::kernels::Stage;
use crate::kernels::matmul::MatmulChoice;
use crate::kernels::router::FrontKind;
use crate::model::activation::Activation;
use crate::model::batch::{Batch, Front};
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::{DROPPED, Routing, Scores};
use crate::model::weights::MoeWeights;
use crate::plan::{LayerPlan, MatmulRequest, PassKind, Plan};
use crate::reference;
use crate::reference::permute::Permutation;
use crate::reference::router::{self, Logits, Router};

/// Around everything that a kernel's lanes, groups and workgroups are multiples of.
const EXPERTS: [u32; 19] = [1, 2, 3, 7, 8, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024];
/// Batches of each number of experts: the fewest choices, the most, and some in between.
const BATCHES: u32 = 5;
/// Logits times choices of a batch: more would keep a software driver busy for seconds.
const MAX_WORK: u64 = 8_000_000;
/// Width of a token whose logits are made by the router.
const WIDTH: usize = 8;

/// At least `rows` rows of logits: with ties, signed zeros, NaN, infinities, huge and tiny values and masked experts, for
/// 1 to 1024 experts and 1 to 32 choices.
///
/// # Errors
/// What the device reports; a wrong index is no error.
pub fn check_rows(context: &Context, rows: u64, progress: Progress<'_>) -> Result<Vec<KernelCheck>> {
    let mut batches = batches(rows);
    let total = batches.len();
    let mut checks = Vec::new();
    for (done, batch) in batches.iter_mut().enumerate() {
        progress(done, total, &format!("rows of {} logits", batch.config.num_experts()));
        match context.engine() {
            Engine::Gpu(gpu) => pollster::block_on(batch.check_gpu(gpu, &mut checks))?,
            Engine::Cpu => batch.check_cpu(&mut checks)?,
        }
    }
    progress(total, total, "");
    Ok(checks)
}

/// Rows of one layer.
struct Rows {
    config: MoeConfig,
    weights: MoeWeights,
    num_rows: u32,
    /// The router makes the logits of small integers, NaN and infinities; otherwise they are given.
    from_x: bool,
    draw: Draw,
}

/// What is special about a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Plain,
    Ties,
    AllEqual,
    SignedZeros,
    Huge,
    Tiny,
    Masked,
    AllMasked,
    OneNan,
    SomeNan,
    AllNan,
    PlusInfinity,
    Mixed,
}

/// Each as often as it is written here.
const KINDS: [Kind; 16] = [
    Kind::Plain,
    Kind::Plain,
    Kind::Ties,
    Kind::Ties,
    Kind::Ties,
    Kind::AllEqual,
    Kind::SignedZeros,
    Kind::Huge,
    Kind::Tiny,
    Kind::Masked,
    Kind::AllMasked,
    Kind::OneNan,
    Kind::SomeNan,
    Kind::AllNan,
    Kind::PlusInfinity,
    Kind::Mixed,
];

/// Batches of at least `rows` rows in all.
fn batches(rows: u64) -> Vec<Rows> {
    let each = rows.div_ceil(u64::from(BATCHES) * EXPERTS.len() as u64).max(1);
    let mut batches = Vec::new();
    let mut planned = 0;
    for number in 0u64.. {
        let (index, b) = (number / u64::from(BATCHES), (number % u64::from(BATCHES)) as u32);
        // Every layer once, and then as many again as it takes.
        if index >= EXPERTS.len() as u64 && planned >= rows {
            break;
        }
        let index = (index % EXPERTS.len() as u64) as u32;
        let e = EXPERTS[index as usize];
        // Between them, the layers of many experts have every number of choices.
        let top_k = match b {
            0 => 1,
            1 => 32,
            _ => 2 + (3 * index + b) % 30,
        };
        let routing = match (index + b) % 3 {
            0 => Routing::softmax(true),
            1 => Routing::softmax(false),
            _ => Routing::new(Scores::SoftmaxSelected, false),
        };
        let Ok(config) = MoeConfig::new(WIDTH as u32, 1, e, top_k.min(e), routing, Activation::SWIGLU) else {
            continue;
        };
        let work = u64::from(e) * u64::from(config.top_k() + 4);
        let num_rows = each.min((MAX_WORK / work).max(1)) as u32;
        planned += u64::from(num_rows);
        let mut draw = Draw::new(1, 4, number);
        let weights = weights(&config, &mut draw);
        // The last of each number of experts has its logits from the router.
        batches.push(Rows { config, weights, num_rows, from_x: b + 1 == BATCHES, draw });
    }
    batches
}

/// Experts of nothing, and a router of small integers.
fn weights(config: &MoeConfig, draw: &mut Draw) -> MoeWeights {
    let e = config.num_experts() as usize;
    MoeWeights {
        router: (0..e * WIDTH).map(|_| draw.integer(4)).collect(),
        gate_proj: vec![0.0; e * WIDTH],
        up_proj: vec![0.0; e * WIDTH],
        down_proj: vec![0.0; e * WIDTH],
        ..MoeWeights::default()
    }
}

impl Rows {
    fn shape(&self) -> String {
        let from = if self.from_x { "x" } else { "logits" };
        format!("{} rows e{} k{} from {from}", self.num_rows, self.config.num_experts(), self.config.top_k())
    }

    /// Of a layer with its variant pinned: then the router makes its own logits.
    fn plan(&self, gpu: &Gpu) -> Result<(LayerPlan, Plan)> {
        let choice = MatmulChoice::Tiled { tile_m: 16, tile_n: 64 };
        let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
        let layer = LayerPlan::new(&self.config, WeightFormat::F32, gpu.profile(), &request)?;
        let front = if self.from_x { FrontKind::Router } else { FrontKind::Logits };
        let plan = layer.plan_pass(self.num_rows, PassKind { front, ..PassKind::default() })?;
        Ok((layer, plan))
    }

    /// What the router made of new rows, and the ids that it chose.
    async fn route(&mut self, harness: &Harness<'_>, plan: &Plan) -> Result<(Verdict, Vec<u32>)> {
        let [e, k] = [self.config.num_experts(), self.config.top_k()].map(|n| n as usize);
        let n = self.num_rows as usize;
        let (x, given) = match self.from_x {
            true => (self.inputs(), None),
            false => (vec![0.0; n * WIDTH], Some(self.logits())),
        };
        let logits_before = match &given {
            Some(logits) => Output { name: "router_logits", before: words(logits).to_vec() },
            None => Output::poisoned("router_logits", n * e),
        };
        let outputs = [
            logits_before,
            Output::poisoned("topk_experts", n * k),
            Output::poisoned("topk_weights", n * k),
            Output::zeroed("status", 4),
        ];
        let out = match harness.run(plan, Stage::Router, &[("x", words(&x))], &outputs).await {
            Err(Error::Kernel { message, .. }) => return Ok((Verdict::failed(message), vec![DROPPED; n * k])),
            other => other?,
        };
        let logits = floats(&out[0]);
        let wrong = match &given {
            Some(given) if words(given) != out[0] => Some("it changed the given logits".to_owned()),
            Some(_) => None,
            None => self.wrong_logits(&x, &logits),
        };
        let choices =
            || check_choices(&self.config, &self.weights, &logits, &out[1], &floats(&out[2]), Some(out[3][0]));
        let verdict = wrong.map_or_else(choices, Verdict::failed);
        Ok((verdict, out[1].clone()))
    }

    async fn check_gpu(&mut self, gpu: &Gpu, checks: &mut Vec<KernelCheck>) -> Result<()> {
        let [e, k] = [self.config.num_experts(), self.config.top_k()].map(|n| n as usize);
        let n = self.num_rows as usize;
        let (layer, plan) = self.plan(gpu)?;
        let harness = Harness::new(gpu, &layer, &self.weights).await?;
        let (verdict, chosen) = self.route(&harness, &plan).await?;
        checks.push(self.report("router", n, verdict));

        // The choices as the router made them, and then anything: crowded, empty, nobody.
        let crowded: Vec<u32> = (0..n * k).map(|_| self.any_id()).collect();
        for ids in [&chosen, &crowded] {
            let expected = reference::permute::permute(ids, e as u32);
            let outputs = [
                Output::poisoned("expert_offsets", e + 1),
                // Rows that nobody has stay as they are.
                Output::poisoned("assignment_of_row", n * k),
                Output::poisoned("row_of_assignment", n * k),
                Output::poisoned("tiles", 3 * plan.params.num_tile_slots as usize),
            ];
            let verdict = match harness.run(&plan, Stage::Permute, &[("topk_experts", ids)], &outputs).await {
                Err(Error::Kernel { message, .. }) => Verdict::failed(message),
                other => check_permutation(ids, &other?, &expected),
            };
            checks.push(self.report("permute", n, verdict));
        }
        Ok(())
    }

    /// The engine refuses logits that are not numbers, so here all are; and it has to refuse those that are all masked.
    fn check_cpu(&mut self, checks: &mut Vec<KernelCheck>) -> Result<()> {
        let (e, k) = (self.config.num_experts(), self.config.top_k() as usize);
        let mut logits = self.logits();
        for row in logits.chunks_exact_mut(e as usize) {
            row.iter_mut().filter(|l| l.is_nan() || **l == f32::INFINITY).for_each(|l| *l = 0.25);
            if row.iter().all(|&l| l == f32::NEG_INFINITY) {
                row[0] = -1.0;
            }
        }
        let layer = CpuLayer::new(self.config.clone(), &self.weights, WeightFormat::F32)?;
        let x = vec![0.0; self.num_rows as usize * WIDTH];
        let mut y = vec![0.0; x.len()];
        let decision = layer.forward_batch(&Batch { front: Front::Logits(&logits), ..Batch::from(&x) }, &mut y)?;
        let (ids, weights) = (&decision.topk_experts, &decision.topk_weights);
        let mut verdict = check_choices(&self.config, &self.weights, &logits, ids, weights, None);
        let counts = reference::permute::permute(ids, e).expert_offsets;
        let counts: Vec<u32> = counts.windows(2).map(|range| range[1] - range[0]).collect();
        verdict.reason = verdict.reason.or(compare_words("tokens_per_expert", &decision.tokens_per_expert, &counts));
        checks.push(self.report("cpu.router", ids.len() / k, verdict));

        logits.fill(f32::NEG_INFINITY);
        let refused = layer.forward_batch(&Batch { front: Front::Logits(&logits), ..Batch::from(&x) }, &mut y);
        let verdict = match refused {
            Err(Error::NonFiniteLogits { num_tokens }) if num_tokens == self.num_rows => Verdict::right(),
            other => Verdict::failed(format!("masked rows came to {:?}", other.map(|decision| decision.num_tokens))),
        };
        checks.push(self.report("cpu.router all masked", 1, verdict));
        Ok(())
    }

    fn report(&self, kernel: &str, rows: usize, verdict: Verdict) -> KernelCheck {
        let check = KernelCheck::new(CheckKind::Rows, kernel.to_owned(), self.shape(), verdict);
        KernelCheck { count: rows as u64, ..check }
    }

    /// `[num_rows, num_experts]`
    fn logits(&mut self) -> Vec<f32> {
        let e = self.config.num_experts() as usize;
        let mut logits = Vec::with_capacity(self.num_rows as usize * e);
        for _ in 0..self.num_rows {
            let kind = self.draw.pick(&KINDS);
            let first = logits.len();
            logits.extend((0..e).map(|_| value(kind, &mut self.draw)));
            fix_row(kind, &mut logits[first..], &mut self.draw);
        }
        logits
    }

    /// `[num_rows, WIDTH]`: small integers, so that logits are exact and often tie, and rows that no logit survives.
    fn inputs(&mut self) -> Vec<f32> {
        let mut x = Vec::with_capacity(self.num_rows as usize * WIDTH);
        for _ in 0..self.num_rows {
            let first = x.len();
            x.extend((0..WIDTH).map(|_| self.draw.integer(4)));
            let row = &mut x[first..];
            match self.draw.below(12) {
                0 => row.fill(0.0),
                1 => row[self.draw.below(WIDTH as u32) as usize] = f32::NAN,
                2 => row[self.draw.below(WIDTH as u32) as usize] = f32::INFINITY,
                3 => row[self.draw.below(WIDTH as u32) as usize] = f32::NEG_INFINITY,
                4 => row.fill(f32::MAX),
                _ => {}
            }
        }
        x
    }

    /// Of rows whose inputs are small integers the logits are known exactly: the first that is another.
    fn wrong_logits(&self, x: &[f32], logits: &[f32]) -> Option<String> {
        let e = self.config.num_experts() as usize;
        let expected = router::router_logits(&self.config, &self.weights, &Batch::from(x)).experts;
        let is_small = |at: &usize| x[at / e * WIDTH..][..WIDTH].iter().all(|v| v.abs() <= 4.0);
        let at = (0..logits.len()).filter(is_small).find(|&at| f64::from(logits[at]) != expected[at])?;
        Some(format!("logit {} of row {} is {}, expected {}", at % e, at / e, logits[at], expected[at]))
    }

    /// Often one of the first, sometimes nobody.
    fn any_id(&mut self) -> u32 {
        let e = self.config.num_experts();
        match self.draw.below(8) {
            0 => DROPPED,
            1 | 2 => self.draw.below(e.min(3)),
            _ => self.draw.below(e),
        }
    }
}

/// One logit of a row of this kind.
fn value(kind: Kind, draw: &mut Draw) -> f32 {
    let plain = |draw: &mut Draw| (draw.next() as i32) as f32 * (8.0 / 2_147_483_648.0);
    match kind {
        Kind::Ties => draw.integer(1),
        Kind::AllEqual => 0.5,
        Kind::SignedZeros => draw.pick(&[0.0, -0.0]),
        Kind::Huge => draw.pick(&[f32::MAX, f32::MIN, 3e38, -3e38, 1e30, -1e30, 1e4]),
        Kind::Tiny => f32::from_bits(draw.below(1 << 25) | (draw.below(2) << 31)),
        Kind::Masked if !draw.once_in(4) => f32::NEG_INFINITY,
        Kind::AllMasked => f32::NEG_INFINITY,
        Kind::SomeNan if draw.once_in(2) => nan(draw),
        Kind::AllNan => nan(draw),
        // Anything that a float can be.
        Kind::Mixed => f32::from_bits(draw.next() as u32),
        _ => plain(draw),
    }
}

/// Quiet or not, of either sign.
fn nan(draw: &mut Draw) -> f32 {
    f32::from_bits((0x7f80_0001 + draw.below(0x7f_fffe)) | (draw.below(2) << 31))
}

/// What there is one of in a row.
fn fix_row(kind: Kind, row: &mut [f32], draw: &mut Draw) {
    let at = draw.below(row.len() as u32) as usize;
    match kind {
        Kind::OneNan => row[at] = nan(draw),
        Kind::PlusInfinity => row[at] = f32::INFINITY,
        Kind::Masked => row[at] = 1.0,
        _ => {}
    }
}

/// Whether a row has no weights: a logit is NaN or infinity, or all are masked.
fn is_broken(row: &[f32]) -> bool {
    row.iter().any(|l| l.is_nan() || *l == f32::INFINITY) || row.iter().all(|&l| l == f32::NEG_INFINITY)
}

/// The choices of these logits have to be those of the reference, each another expert. Rows without weights have NaN
/// for each choice, and, where there is a `status`, are counted there.
fn check_choices(
    config: &MoeConfig,
    weights: &MoeWeights,
    logits: &[f32],
    ids: &[u32],
    got: &[f32],
    status: Option<u32>,
) -> Verdict {
    let [e, k] = [config.num_experts(), config.top_k()].map(|n| n as usize);
    let experts = logits.iter().map(|&l| f64::from(l)).collect();
    let Router { topk_experts, topk_weights, .. } =
        router::route(config, weights, Logits { experts, shared: Vec::new() }, &Batch::default());
    if let Some(wrong) = compare_words("topk_experts", ids, &topk_experts) {
        return Verdict::failed(wrong);
    }
    let (mut broken, mut sound, mut expected) = (0, Vec::new(), Vec::new());
    for (t, row) in logits.chunks_exact(e).enumerate() {
        let choices = t * k..(t + 1) * k;
        let mut seen = ids[choices.clone()].to_vec();
        seen.retain(|&id| id != DROPPED);
        seen.sort_unstable();
        if seen.windows(2).any(|pair| pair[0] == pair[1]) || seen.last().is_some_and(|&id| id as usize >= e) {
            return Verdict::failed(format!("row {t} chose {:?}", &ids[choices]));
        }
        if is_broken(row) {
            broken += 1;
            // Nobody has no weight that anything would come of.
            let number = choices.clone().find(|&a| ids[a] != DROPPED && !got[a].is_nan());
            if let Some(a) = number {
                return Verdict::failed(format!("row {t} is not of numbers, but choice {} weighs {}", a % k, got[a]));
            }
        } else {
            sound.extend(&got[choices.clone()]);
            expected.extend(&topk_weights[choices]);
        }
    }
    if let Some(counted) = status.filter(|&counted| counted != broken) {
        return Verdict::failed(format!("{counted} rows are counted as not finite, expected {broken}"));
    }
    compare(&sound, &expected, nmse::WEIGHTS, |i| 1e-6 + 5e-6 * expected[i])
}

/// Offsets, both maps and the fact that each undoes the other. `out` has the four outputs of permute.
fn check_permutation(ids: &[u32], out: &[Vec<u32>], expected: &Permutation) -> Verdict {
    let rows = expected.assignment_of_row.len();
    let wrong = compare_words("expert_offsets", &out[0], &expected.expert_offsets)
        .or_else(|| compare_words("assignment_of_row", &out[1][..rows], &expected.assignment_of_row))
        .or_else(|| compare_words("row_of_assignment", &out[2], &expected.row_of_assignment));
    if let Some(wrong) = wrong {
        return Verdict::failed(wrong);
    }
    let undone = |a: usize| out[1].get(out[2][a] as usize) == Some(&(a as u32));
    match (0..ids.len()).find(|&a| out[2][a] != DROPPED && !undone(a)) {
        Some(a) => Verdict::failed(format!("assignment {a} has row {}, which is another's", out[2][a])),
        None => Verdict::right(),
    }
}

/// What is wrong with the choices of some rows, by a plan that `change` made another of.
#[cfg(test)]
pub(super) async fn check_choices_of(gpu: &Gpu, change: impl FnOnce(&mut Plan)) -> Result<Option<String>> {
    let config = MoeConfig::new(WIDTH as u32, 1, 65, 4, Routing::softmax(true), Activation::SWIGLU)?;
    let mut draw = Draw::new(1, 7, 0);
    let weights = weights(&config, &mut draw);
    let mut rows = Rows { config, weights, num_rows: 400, from_x: false, draw };
    let (layer, mut plan) = rows.plan(gpu)?;
    change(&mut plan);
    let harness = Harness::new(gpu, &layer, &rows.weights).await?;
    Ok(rows.route(&harness, &plan).await?.0.reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn batches_have_the_rows_and_every_number_of_choices() {
        for rows in [1, 100_000] {
            let batches = batches(rows);
            assert!(batches.iter().map(|batch| u64::from(batch.num_rows)).sum::<u64>() >= rows);
            let top_ks: BTreeSet<u32> = batches.iter().map(|batch| batch.config.top_k()).collect();
            let experts: BTreeSet<u32> = batches.iter().map(|batch| batch.config.num_experts()).collect();
            assert_eq!((top_ks.len(), experts.len()), (32, EXPERTS.len()));
        }
    }

    #[test]
    fn wrong_choices_are_noticed() {
        let config = MoeConfig::new(WIDTH as u32, 1, 4, 2, Routing::softmax(true), Activation::SWIGLU).expect("sound");
        let weights = weights(&config, &mut Draw::new(1, 1, 1));
        let logits = [1.0, 2.0, 2.0, 0.0, 0.0, f32::NAN, -0.0, -1.0];
        let nan = f32::NAN;
        let check = |ids: [u32; 4], w: [f32; 4], status| {
            check_choices(&config, &weights, &logits, &ids, &w, Some(status)).reason.is_none()
        };
        assert!(check([1, 2, 0, 2], [0.5, 0.5, nan, nan], 1));
        for ids in [[2, 1, 0, 2], [1, 1, 0, 2], [1, 2, 2, 0], [1, 2, 1, 0], [1, 4, 0, 2], [1, 2, 0, 3]] {
            assert!(!check(ids, [0.5, 0.5, nan, nan], 1), "{ids:?}");
        }
        assert!(!check([1, 2, 0, 2], [0.5, 0.500_02, nan, nan], 1));
        assert!(!check([1, 2, 0, 2], [0.5, nan, nan, nan], 1));
        assert!(!check([1, 2, 0, 2], [0.5, 0.5, 0.5, nan], 1));
        assert!(!check([1, 2, 0, 2], [0.5, 0.5, nan, nan], 0));
    }

    #[test]
    fn wrong_permutations_are_noticed() {
        let ids = [1, 0, DROPPED, 1];
        let expected = reference::permute::permute(&ids, 2);
        let right = [
            expected.expert_offsets.clone(),
            [&expected.assignment_of_row[..], &[7]].concat(),
            expected.row_of_assignment.clone(),
        ];
        assert!(check_permutation(&ids, &right, &expected).reason.is_none());
        for (output, word) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 2), (2, 3)] {
            let mut wrong = right.clone();
            wrong[output][word] ^= 1;
            assert!(check_permutation(&ids, &wrong, &expected).reason.is_some(), "word {word} of output {output}");
        }
    }
}
