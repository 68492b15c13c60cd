//! One layer with its reference: each of its stages fed with what the reference made of the stage before, so that a
//! failure names its stage.

use super::bounds::evaluation_error;
use super::verdict::{Verdict, abs, compare, compare_bits, compare_words, floats, nmse, sum_bound, words};
use crate::bench::workload::Workload;
use crate::error::{Error, Result};
use crate::gpu::harness::{Harness, Output};
use crate::kernels::Stage;
use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::{Renormalize, Scores};
use crate::model::weights::{MoeWeights, OptionalTensors};
use crate::plan::{DeviceProfile, LayerPlan, MatmulRequest, Plan};
use crate::reference::router::{self, Logits, Router};
use crate::reference::{self, Forward, permute::Permutation};

/// A layer, its input and what the reference makes of them.
pub(super) struct Case<'a> {
    pub config: &'a MoeConfig,
    pub weights: &'a MoeWeights,
    /// The weights as `format` holds them.
    stored: MoeWeights,
    pub format: WeightFormat,
    pub x: &'a [f32],
    pub expected: Forward,
    /// No sum is rounded, so every bit has to be right.
    exact: bool,
}

impl<'a> Case<'a> {
    pub fn new(workload: &'a Workload, x: &'a [f32], format: WeightFormat) -> Result<Self> {
        let stored = workload.weights.rounded(&workload.config, format)?;
        let expected = reference::moe_forward(&workload.config, &stored, x);
        Ok(Self { config: &workload.config, weights: &workload.weights, stored, format, x, expected, exact: false })
    }

    /// A layer whose sums are exact in f32, with choices and weights that are given.
    pub fn exact(
        config: &'a MoeConfig,
        weights: &'a MoeWeights,
        format: WeightFormat,
        batch: Batch<'a>,
    ) -> Result<Self> {
        let stored = weights.rounded(config, format)?;
        if stored != *weights {
            let message = format!("{} does not hold the weights of an exact case", format.name());
            return Err(Error::Kernel { kernel: "exact".to_owned(), message });
        }
        let expected = reference::moe_forward(config, &stored, batch);
        Ok(Self { config, weights, stored, format, x: batch.x, expected, exact: true })
    }

    /// Tokens, sizes, experts, weights.
    pub fn shape(&self) -> String {
        let c = self.config;
        let [h, i, e, k] = [c.hidden_size(), c.intermediate_size(), c.num_experts(), c.top_k()];
        format!("t{} h{h} i{i} e{e} k{k} {}", self.num_tokens(), self.format.name())
    }

    pub fn num_tokens(&self) -> u32 {
        self.x.len() as u32 / self.config.hidden_size()
    }

    /// How the device runs it.
    pub fn plan(&self, device: &DeviceProfile, request: &MatmulRequest) -> Result<LayerPlan> {
        let (tensors, experts) = (OptionalTensors::of(self.weights), self.config.num_experts());
        LayerPlan::with_tensors(self.config, tensors, self.format, device, request, experts)
    }

    /// One stage of the plan. A device error ends the check; a kernel that is wrong, or that wrote where it must not, is
    /// a verdict.
    pub async fn check(&self, harness: &Harness<'_>, plan: &Plan, stage: Stage) -> Result<Verdict> {
        let verdict = match stage {
            Stage::Router => self.check_router(harness, plan).await,
            Stage::Permute => self.check_permute(harness, plan).await,
            Stage::GateUp => self.check_gate_up(harness, plan).await,
            Stage::Down => self.check_down(harness, plan).await,
            Stage::DownCombine => self.check_down_combine(harness, plan).await,
            _ => self.check_combine(harness, plan).await,
        };
        match verdict {
            Err(Error::Kernel { message, .. }) => Ok(Verdict::failed(message)),
            other => other,
        }
    }

    /// Against the bounds, or bit by bit where nothing is rounded.
    fn compare(&self, got: &[f32], want: &[f64], most_nmse: f64, bound: impl Fn(usize) -> f64) -> Verdict {
        if self.exact { compare_bits(got, want) } else { compare(got, want, most_nmse, bound) }
    }

    async fn check_router(&self, harness: &Harness<'_>, plan: &Plan) -> Result<Verdict> {
        let c = self.config;
        let [t, h, e, k] = [plan.num_tokens, c.hidden_size(), c.num_experts(), c.top_k()].map(|n| n as usize);
        let outputs = [
            Output::poisoned("router_logits", t * e),
            Output::poisoned("topk_experts", t * k),
            Output::poisoned("topk_weights", t * k),
            Output::zeroed("status", 4),
        ];
        let inputs = [("x", words(self.x))];
        let out = harness.run(plan, Stage::Router, &inputs, &outputs).await?;
        let logits = floats(&out[0]);
        let bias = self.weights.router_bias.as_deref();
        // sum |x| |w| of each logit bounds its rounding
        let magnitudes =
            MoeWeights { router: abs(&self.weights.router), router_bias: bias.map(abs), ..MoeWeights::default() };
        let magnitude = router::router_logits(c, &magnitudes, &Batch::from(&abs(self.x))).experts;
        let verdict =
            compare(&logits, &self.expected.router.router_logits, nmse::SUMS, |i| sum_bound(h + 1, magnitude[i]));
        if verdict.reason.is_some() {
            return Ok(verdict);
        }
        // Near-ties may go either way in the logits; of its own logits the device must make exactly the right choice.
        let experts = logits.iter().map(|&l| f64::from(l)).collect();
        let own = router::route(c, self.weights, Logits { experts, shared: Vec::new() }, &Batch::from(self.x));
        if let Some(at) = (0..t * k).find(|&i| own.topk_experts[i] != out[1][i]) {
            return Ok(Verdict::failed(format!(
                "choice {} of token {} is expert {}, expected {}",
                at % k,
                at / k,
                out[1][at],
                own.topk_experts[at]
            )));
        }
        if out[3][0] != 0 {
            return Ok(Verdict::failed(format!("{} tokens reported as not finite, expected none", out[3][0])));
        }
        let got = floats(&out[2]);
        let weights = compare(&got, &own.topk_weights, nmse::WEIGHTS, |i| 1e-6 + 5e-6 * own.topk_weights[i].abs());
        if let Some(sum) = self.wrong_sum(&got) {
            return Ok(Verdict::failed(format!("the weights of a token sum to {sum}, expected 1")));
        }
        Ok(Verdict { max_rel_error: verdict.max_rel_error.max(weights.max_rel_error), reason: weights.reason })
    }

    /// Of weights that are shares of one: a token's sum that is not.
    fn wrong_sum(&self, weights: &[f32]) -> Option<f64> {
        let routing = self.config.routing();
        let shares = routing.scores == Scores::Softmax && routing.renormalize == Some(Renormalize::default());
        let sums = weights.chunks_exact(self.config.top_k() as usize);
        let mut sums = sums.map(|weights| weights.iter().map(|&w| f64::from(w)).sum::<f64>());
        sums.find(|sum| shares && routing.scale == 1.0 && !(-2e-6..=2e-6).contains(&(sum - 1.0)))
    }

    async fn check_permute(&self, harness: &Harness<'_>, plan: &Plan) -> Result<Verdict> {
        let expected = &self.expected.permutation;
        let a = plan.params.num_assignments as usize;
        let slots = plan.params.num_tile_slots as usize;
        let outputs = [
            Output::poisoned("expert_offsets", expected.expert_offsets.len()),
            Output::poisoned("assignment_of_row", a),
            Output::poisoned("row_of_assignment", a),
            Output::poisoned("tiles", 3 * slots),
        ];
        let inputs = [("topk_experts", self.expected.router.topk_experts.as_slice())];
        let out = harness.run(plan, Stage::Permute, &inputs, &outputs).await?;
        let tile_words = self.tile_words(plan);
        let pairs = [
            ("expert_offsets", &out[0], &expected.expert_offsets),
            ("assignment_of_row", &out[1], &expected.assignment_of_row),
            ("row_of_assignment", &out[2], &expected.row_of_assignment),
            ("tiles", &out[3], &tile_words),
        ];
        let wrong = pairs.into_iter().find_map(|(name, got, want)| compare_words(name, got, want));
        Ok(wrong.map_or(Verdict::right(), Verdict::failed))
    }

    /// Where the rows of this plan are: sorted by expert, or each at its assignment.
    fn rows(&self, plan: &Plan) -> Vec<usize> {
        let assignments = &self.expected.permutation.assignment_of_row;
        match plan.matmul.sorted() {
            true => (0..assignments.len()).collect(),
            false => assignments.iter().map(|&a| a as usize).collect(),
        }
    }

    fn tile_words(&self, plan: &Plan) -> Vec<u32> {
        let tiles = reference::permute::tiles(&self.expected.permutation.expert_offsets, plan.params.tile_m);
        let mut words: Vec<u32> = tiles.iter().flat_map(|t| [t.expert, t.first_row, t.num_rows]).collect();
        while words.len() < 3 * plan.params.num_tile_slots as usize {
            words.extend([self.config.num_weighted_experts(), 0, 0]);
        }
        words
    }

    async fn check_gate_up(&self, harness: &Harness<'_>, plan: &Plan) -> Result<Verdict> {
        let c = self.config;
        let [h, i] = [c.hidden_size(), c.intermediate_size()].map(|n| n as usize);
        let stride = i.next_multiple_of(4);
        let permutation = &self.expected.permutation;
        let tiles = self.tile_words(plan);
        let inputs = [
            ("x", words(self.x)),
            ("tiles", tiles.as_slice()),
            ("assignment_of_row", &permutation.assignment_of_row),
            ("topk_experts", &self.expected.router.topk_experts),
        ];
        let outputs = [Output::poisoned("intermediate", permutation.assignment_of_row.len() * stride)];
        let out = harness.run(plan, Stage::GateUp, &inputs, &outputs).await?;
        let (got, padding) = self.unpad(plan, &out[0], i);
        if padding.is_some() {
            return Ok(Verdict::failed("padding columns are not zero".to_owned()));
        }
        let bounds = self.gate_up_bounds(permutation, h);
        Ok(self.compare(&got, &self.expected.intermediate, nmse::SUMS, |at| bounds[at]))
    }

    /// For each element of `intermediate`: what rounding can do to the activation of two sums of `h` products, and what
    /// WGSL allows the activation itself to be off.
    fn gate_up_bounds(&self, rows: &Permutation, h: usize) -> Vec<f64> {
        let i = self.config.intermediate_size() as usize;
        let activation = self.config.activation();
        let extras = &self.stored.extras;
        // A sum and how far it may be off.
        let sum = |weights: &[f32], bias: &Option<Vec<f32>>, at: usize, x: &[f32]| {
            let bias = bias.as_ref().map(|bias| f64::from(bias[at]));
            let products = weights[at * h..][..h].iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b));
            let (sum, magnitude) = products.fold((0.0, 0.0), |(s, m): (f64, f64), p| (s + p, m + p.abs()));
            let (sum, magnitude) = (sum + bias.unwrap_or(0.0), magnitude + bias.unwrap_or(0.0).abs());
            (sum, sum_bound(h + usize::from(bias.is_some()), magnitude))
        };
        let mut bounds = Vec::new();
        for (row, &a) in rows.assignment_of_row.iter().enumerate() {
            let x = &self.x[a as usize / self.config.top_k() as usize * h..][..h];
            for column in 0..i {
                let at = rows.expert_of_row(row) * i + column;
                let (u, du) = sum(&self.stored.up_proj, &extras.up_bias, at, x);
                let (g, dg) = match activation.is_gated() {
                    true => sum(&self.stored.gate_proj, &extras.gate_bias, at, x),
                    false => (0.0, 0.0),
                };
                // So small a box that the activation is steepest towards one of its corners.
                let value = activation.apply(g, u);
                let corners = [(-dg, -du), (-dg, du), (dg, -du), (dg, du)];
                let off = corners.map(|(dg, du)| (activation.apply(g + dg, u + du) - value).abs());
                bounds.push(off.into_iter().fold(0.0, f64::max) + evaluation_error(activation, g, u) + 1e-37);
            }
        }
        bounds
    }

    async fn check_down(&self, harness: &Harness<'_>, plan: &Plan) -> Result<Verdict> {
        let c = self.config;
        let [h, i] = [c.hidden_size(), c.intermediate_size()].map(|n| n as usize);
        let permutation = &self.expected.permutation;
        // What the kernel reads is f32, so the reference gets the same rounded values.
        let rounded: Vec<f32> = self.expected.intermediate.iter().map(|&v| v as f32).collect();
        let exact: Vec<f64> = rounded.iter().map(|&v| f64::from(v)).collect();
        let experts: Vec<usize> =
            (0..permutation.assignment_of_row.len()).map(|row| permutation.expert_of_row(row)).collect();
        let bias = self.stored.extras.down_bias.as_deref();
        let down = |weights: &[f32], bias: Option<&[f32]>, v: &[f64]| {
            reference::down::down([h, i], weights, bias, v, experts.clone())
        };
        let expected = down(&self.stored.down_proj, bias, &exact);
        let magnitudes: Vec<f64> = exact.iter().map(|v| v.abs()).collect();
        let magnitude = down(&abs(&self.stored.down_proj), bias.map(abs).as_deref(), &magnitudes);
        let terms = i + usize::from(bias.is_some());

        let rows = self.rows(plan);
        let mut x = vec![0.0f32; rows.len() * i.next_multiple_of(4)];
        for (row, values) in rounded.chunks_exact(i).enumerate() {
            x[rows[row] * i.next_multiple_of(4)..][..i].copy_from_slice(values);
        }
        let tiles = self.tile_words(plan);
        let inputs =
            [("x", words(&x)), ("tiles", tiles.as_slice()), ("topk_experts", &self.expected.router.topk_experts)];
        let outputs = [Output::poisoned("expert_out", rows.len() * h.next_multiple_of(4))];
        let out = harness.run(plan, Stage::Down, &inputs, &outputs).await?;
        let (got, padding) = self.unpad(plan, &out[0], h);
        if padding.is_some() {
            return Ok(Verdict::failed("padding columns are not zero".to_owned()));
        }
        Ok(self.compare(&got, &expected, nmse::SUMS, |at| sum_bound(terms, magnitude[at])))
    }

    /// The token's experts one after the other, in the order of its choices.
    async fn check_down_combine(&self, harness: &Harness<'_>, plan: &Plan) -> Result<Verdict> {
        let c = self.config;
        let [h, i] = [c.hidden_size(), c.intermediate_size()].map(|n| n as usize);
        let permutation = &self.expected.permutation;
        let weights: Vec<f32> = self.expected.router.topk_weights.iter().map(|&v| v as f32).collect();
        let stride = i.next_multiple_of(4);
        let mut x = vec![0.0f32; weights.len() * stride];
        for (row, values) in self.rows(plan).into_iter().zip(self.expected.intermediate.chunks_exact(i)) {
            x[row * stride..][..i].iter_mut().zip(values).for_each(|(x, &value)| *x = value as f32);
        }
        let (mut expected, mut magnitude) = (vec![0.0; h], vec![0.0; h]);
        for (row, &a) in permutation.assignment_of_row.iter().enumerate() {
            let (expert, weight) = (permutation.expert_of_row(row), f64::from(weights[a as usize]));
            let x = &x[a as usize * stride..][..i];
            for (column, (expected, magnitude)) in expected.iter_mut().zip(&mut magnitude).enumerate() {
                let products = self.stored.down_proj[(expert * h + column) * i..][..i].iter().zip(x);
                let bias = self.stored.extras.down_bias.as_ref().map(|bias| f64::from(bias[expert * h + column]));
                for term in products.map(|(&w, &x)| f64::from(w) * f64::from(x)).chain(bias) {
                    *expected += weight * term;
                    *magnitude += (weight * term).abs();
                }
            }
        }
        let inputs = [
            ("x", words(&x)),
            ("topk_experts", self.expected.router.topk_experts.as_slice()),
            ("topk_weights", words(&weights)),
        ];
        let out = harness.run(plan, Stage::DownCombine, &inputs, &[Output::poisoned("y", h)]).await?;
        Ok(self.compare(&floats(&out[0]), &expected, nmse::SUMS, |at| sum_bound(i + weights.len(), magnitude[at])))
    }

    /// The device's rows in the reference's order and without their padding, and the first padding word that is not 0.
    fn unpad(&self, plan: &Plan, out: &[u32], width: usize) -> (Vec<f32>, Option<u32>) {
        let stride = width.next_multiple_of(4);
        let mut values = Vec::new();
        let mut padding = None;
        for row in self.rows(plan) {
            let (row, rest) = out[row * stride..][..stride].split_at(width);
            values.extend(floats(row));
            padding = padding.or(rest.iter().copied().find(|&word| word != 0));
        }
        (values, padding)
    }

    async fn check_combine(&self, harness: &Harness<'_>, plan: &Plan) -> Result<Verdict> {
        let c = self.config;
        let [h, k] = [c.hidden_size(), c.top_k()].map(|n| n as usize);
        let permutation = &self.expected.permutation;
        let rounded: Vec<f32> = self.expected.expert_out.iter().map(|&v| v as f32).collect();
        let weights: Vec<f32> = self.expected.router.topk_weights.iter().map(|&v| v as f32).collect();
        let exact = |values: &[f32], f: fn(f64) -> f64| values.iter().map(|&v| f(f64::from(v))).collect::<Vec<f64>>();
        let same = |v: f64| v;
        let combine = |f: fn(f64) -> f64| {
            let router = Router { topk_weights: exact(&weights, f), ..self.expected.router.clone() };
            reference::combine::combine(c, &exact(&rounded, f), &[], &router, permutation)
        };
        let (expected, magnitude) = (combine(same), combine(f64::abs));
        let mut expert_out = Vec::new();
        for row in rounded.chunks_exact(h) {
            expert_out.extend_from_slice(row);
            expert_out.extend(std::iter::repeat_n(0.0, h.next_multiple_of(4) - h));
        }
        let inputs = [
            ("expert_out", words(&expert_out)),
            ("row_of_assignment", permutation.row_of_assignment.as_slice()),
            ("topk_weights", words(&weights)),
        ];
        let outputs = [Output::poisoned("y", self.x.len())];
        let out = harness.run(plan, Stage::Combine, &inputs, &outputs).await?;
        Ok(self.compare(&floats(&out[0]), &expected, nmse::SUMS, |at| sum_bound(k, magnitude[at])))
    }
}
