//! The race's view of a layer: its weights are uploaded once, each choice has a plan and prepared passes of its own.

use super::race::Contest;
use super::{Doing, Job};
use crate::bench::Workload;
use crate::bench::verify::{self, TOLERANCE};
use crate::error::{Error, Result};
use crate::gpu::layer::SetAside;
use crate::kernels::matmul::MatmulChoice;
use crate::layer::MoeLayer;
use crate::model::formats::WeightFormat;
use crate::model::routing::RoutingDecision;
use crate::plan::{ShapeClass, TunedChoices};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Multiplications that the reference may spend on each batch of each choice, a tenth of a second on one core, ...
const REFERENCE: u64 = 60_000_000;
/// ... and most tokens that they are spent on.
const MOST_TOKENS: u64 = 8;

/// Choices for one class of a layer's batches.
pub(super) struct LayerContest<'a> {
    layer: &'a mut MoeLayer,
    workload: &'a Workload,
    shape: ShapeClass,
    format: WeightFormat,
    tokens: &'a [u32],
    batches: Vec<Batch>,
    plans: HashMap<MatmulChoice, SetAside>,
    /// Tokens of the layer's resident input.
    resident: u32,
    begin: Instant,
    time: Duration,
    progress: &'a mut dyn FnMut(Doing<'_>),
}

struct Batch {
    num_tokens: u32,
    x: Vec<f32>,
    /// What the first choice that was right made of it.
    y: Option<Vec<f32>>,
}

impl<'a> LayerContest<'a> {
    pub(super) fn new(
        layer: &'a mut MoeLayer,
        workload: &'a Workload,
        job: &Job,
        (shape, tokens): (ShapeClass, &'a [u32]),
        time: Duration,
        progress: &'a mut dyn FnMut(Doing<'_>),
    ) -> Result<Self> {
        // The largest first: scratch buffers grow once.
        let batch = |&num_tokens: &u32| Ok(Batch { num_tokens, x: workload.input(num_tokens)?, y: None });
        let batches = tokens.iter().rev().map(batch).collect::<Result<_>>()?;
        let (format, begin, plans) = (job.weights, Instant::now(), HashMap::new());
        Ok(Self { layer, workload, shape, format, tokens, batches, plans, resident: 0, begin, time, progress })
    }

    /// The layer while it runs by `choice`, in passes that are those of a layer with that tuning.
    fn with<T>(&mut self, choice: MatmulChoice, run: impl FnOnce(&MoeLayer) -> Result<T>) -> Result<T> {
        if !self.plans.contains_key(&choice) {
            let mut tuned = TunedChoices::default();
            tuned.insert(self.shape, self.format, choice);
            self.plans.insert(choice, self.layer.with_tuned(Arc::new(tuned))?);
        }
        let Some(plan) = self.plans.get_mut(&choice) else { return run(self.layer) };
        self.layer.exchange(plan);
        let result = run(self.layer);
        self.layer.exchange(plan);
        result
    }

    /// A checked pass over a batch: its seconds, or what is wrong with it.
    fn check_batch(&mut self, choice: MatmulChoice, index: usize) -> Result<Result<f64, String>> {
        let (num_tokens, x) = (self.batches[index].num_tokens, std::mem::take(&mut self.batches[index].x));
        let passed = self.with(choice, |layer| {
            let plan = layer.plan(num_tokens)?;
            if plan.matmul != choice {
                // The plan has to do what will be said of it.
                return Err(Error::config("tile", format!("{:?}", plan.matmul), format!("{choice:?}")));
            }
            pollster::block_on(layer.prepare(num_tokens))?;
            let start = Instant::now();
            let y = layer.forward(&x)?;
            Ok((start.elapsed().as_secs_f64(), y, layer.routing()?))
        });
        self.resident = num_tokens;
        let batch = &mut self.batches[index];
        batch.x = x;
        let (seconds, y, routing) = passed?;
        if let Some(reason) = wrong(self.workload, batch, &y, &routing) {
            return Ok(Err(format!("{num_tokens} tokens: {reason}")));
        }
        batch.y.get_or_insert(y);
        Ok(Ok(seconds))
    }

    /// Geometric mean of what `seconds` says of each batch.
    fn mean(&mut self, mut seconds: impl FnMut(&mut Self, usize) -> Result<f64>) -> Result<f64> {
        let mut sum = 0.0;
        for index in 0..self.batches.len() {
            sum += seconds(self, index)?.max(1e-9).ln();
        }
        Ok((sum / self.batches.len().max(1) as f64).exp())
    }
}

impl Contest<MatmulChoice> for LayerContest<'_> {
    fn check(&mut self, choice: MatmulChoice) -> Result<Result<f64, String>> {
        (self.progress)(Doing::Checking(self.tokens, choice));
        let mut reason = None;
        let seconds = self.mean(|contest, index| match contest.check_batch(choice, index)? {
            Ok(seconds) => Ok(seconds),
            Err(wrong) => {
                reason.get_or_insert(wrong);
                Ok(f64::INFINITY)
            }
        });
        match (seconds, reason) {
            (_, Some(reason)) => Ok(Err(reason)),
            (Ok(seconds), None) => Ok(Ok(seconds)),
            // A choice that this device does not take is no reason not to try the others.
            (Err(error), None) => Ok(Err(super::of_the_layer(error)?)),
        }
    }

    fn time(&mut self, choice: MatmulChoice) -> Result<f64> {
        self.mean(|contest, index| {
            let (num_tokens, resident) = (contest.batches[index].num_tokens, contest.resident);
            let x = std::mem::take(&mut contest.batches[index].x);
            let seconds = contest.with(choice, |layer| {
                if resident != num_tokens {
                    layer.upload(&x)?;
                }
                Ok(layer.run_resident()?.as_secs_f64())
            });
            contest.batches[index].x = x;
            contest.resident = num_tokens;
            seconds
        })
    }

    fn used(&self) -> f64 {
        self.begin.elapsed().as_secs_f64() / self.time.as_secs_f64().max(1e-9)
    }

    fn round(&mut self, round: usize, racing: usize) {
        (self.progress)(Doing::Racing(self.tokens, round, racing));
    }
}

/// What is wrong with a result. Some tokens are compared with the reference, spread over the batch; each choice pays for
/// it, so those are few. All of them are compared with what the first choice that was right made of them: a hole
/// anywhere shows.
fn wrong(workload: &Workload, batch: &Batch, y: &[f32], routing: &RoutingDecision) -> Option<String> {
    let config = &workload.config;
    let [hidden, top_k] = [config.hidden_size(), config.top_k()].map(|n| n as usize);
    if y.len() != batch.x.len() || routing.topk_experts.len() * hidden != batch.x.len() * top_k {
        return Some(format!("{} outputs and {} choices", y.len(), routing.topk_experts.len()));
    }
    let mut some = RoutingDecision::default();
    let (mut some_x, mut some_y) = (Vec::new(), Vec::new());
    for token in sample(workload, batch.num_tokens) {
        some_x.extend_from_slice(&batch.x[token * hidden..][..hidden]);
        some_y.extend_from_slice(&y[token * hidden..][..hidden]);
        some.topk_experts.extend_from_slice(&routing.topk_experts[token * top_k..][..top_k]);
    }
    let verification = verify::verify(config, &workload.weights, &some_x, &some_y, &some);
    if verification.reason.is_some() {
        return verification.reason;
    }
    let right = batch.y.as_ref()?;
    let most = right.iter().fold(0.0f32, |most, value| most.max(value.abs()));
    // Both may be off by the tolerance. Written so that a NaN is not close to anything.
    let close = |(&a, &b): (&f32, &f32)| f64::from((a - b).abs()) <= 2.0 * TOLERANCE * f64::from(most);
    let at = y.iter().zip(right).position(|pair| !close(pair))?;
    Some(format!("token {} is {:e} in column {}, by another choice {:e}", at / hidden, y[at], at % hidden, right[at]))
}

/// Tokens to compare with the reference: the first, the last, and some in between.
fn sample(workload: &Workload, num_tokens: u32) -> Vec<usize> {
    let config = &workload.config;
    let [h, i, k, e] =
        [config.hidden_size(), config.intermediate_size(), config.top_k(), config.num_experts()].map(u64::from);
    let most = (REFERENCE / (3 * h * i * k + h * e).max(1)).clamp(2, MOST_TOKENS).min(num_tokens.into()) as usize;
    let last = num_tokens.saturating_sub(1) as usize;
    (0..most).map(|n| n * last / (most - 1).max(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::activation::Activation;
    use crate::model::config::MoeConfig;
    use crate::model::routing::Routing;
    use crate::reference;

    /// A batch with its right result, and what was chosen for it.
    fn case() -> (Workload, Batch, Vec<f32>, RoutingDecision) {
        let config = MoeConfig::new(48, 20, 6, 2, Routing::softmax(true), Activation::SWIGLU).expect("valid sizes");
        let workload = Workload::new(config, 0.0, 9).expect("small");
        let x = workload.input(40).expect("small");
        let forward = reference::moe_forward(&workload.config, &workload.weights, &x);
        let routing = RoutingDecision { topk_experts: forward.router.topk_experts, ..RoutingDecision::default() };
        let y = forward.y.iter().map(|&v| v as f32).collect();
        (workload, Batch { num_tokens: 40, x, y: None }, y, routing)
    }

    #[test]
    fn a_right_result_is_right_and_a_wrong_one_is_seen_wherever_it_is() {
        let (workload, mut batch, y, routing) = case();
        assert_eq!(wrong(&workload, &batch, &y, &routing), None);
        let sampled = sample(&workload, 40);
        assert_eq!((sampled.len(), sampled[0], sampled[7]), (8, 0, 39));
        for token in 0..40 {
            for value in [f32::NAN, 0.0, y[token * 48 + 5] + 1e-2] {
                let mut broken = y.clone();
                broken[token * 48 + 5] = value;
                // Without another result, only the sample is known.
                batch.y = None;
                assert_eq!(wrong(&workload, &batch, &broken, &routing).is_some(), sampled.contains(&token), "{token}");
                batch.y = Some(y.clone());
                assert!(wrong(&workload, &batch, &broken, &routing).is_some(), "{token} {value}");
            }
        }
        assert!(wrong(&workload, &batch, &y[1..], &routing).is_some());
        let mut other = routing;
        other.topk_experts[0] = other.topk_experts[1];
        assert!(wrong(&workload, &batch, &y, &other).is_some());
    }

    #[test]
    fn samples_are_tokens_of_the_batch() {
        let (workload, ..) = case();
        for num_tokens in [1, 2, 3, 7, 8, 9, 1000] {
            let sample = sample(&workload, num_tokens);
            assert!(!sample.is_empty() && sample.iter().all(|&token| token < num_tokens as usize), "{sample:?}");
            assert!(sample.is_sorted() && sample[0] == 0 && sample.last() == Some(&(num_tokens as usize - 1)));
        }
    }
}
