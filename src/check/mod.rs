//! Every kernel variant against its reference, one stage at a time, and whole layers of every kind.
//!
//! Each stage gets what the reference made of the stage before it, so that a failure names its stage. Outputs are
//! poisoned before the run and have guards on both sides. Movement is compared exactly, arithmetic against the error
//! bound of an f32 sum (docs/numerics.md).

mod layers;

use crate::bench::workload::Workload;
use crate::context::{Context, Engine};
use crate::cpu::CpuLayer;
use crate::error::Result;
use crate::golden;
use crate::gpu::Gpu;
use crate::gpu::harness::{Harness, Output, POISON};
use crate::kernels::Stage;
use crate::kernels::matmul::MatmulChoice;
use crate::model::activation::Activation;
use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use crate::model::weights::MoeWeights;
use crate::plan::{DeviceProfile, LayerPlan, MatmulRequest, Plan, variant};
use crate::reference::router::{self, Logits, Router};
use crate::reference::{self, Forward, permute::Permutation};

/// Unit roundoff of f32.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;

/// What became of one kernel on one shape.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelCheck {
    /// The kernel's label.
    pub kernel: String,
    /// Tokens, sizes, experts, weights.
    pub shape: String,
    /// Largest error relative to the largest reference value; 0 for a kernel that only moves data.
    pub max_rel_error: f64,
    /// Every element is within its bound, every index exact, every guard untouched.
    pub passed: bool,
    /// What failed.
    pub reason: Option<String>,
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

/// Runs every check that the context's device can run. `progress(done, total, kernel)` is called before each.
pub fn check_kernels(context: &Context, progress: &mut dyn FnMut(usize, usize, &str)) -> Result<Vec<KernelCheck>> {
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
            let shape = format!("t{tokens} h{hidden} i{intermediate} e{experts} k{top_k} {}", format.name());
            progress(done, total, &shape);
            done += 1;
            let case = Case::new(&workload, &x, format, shape)?;
            match context.engine() {
                Engine::Gpu(gpu) => pollster::block_on(case.check_gpu(gpu, f == 0, &mut checks))?,
                Engine::Cpu => checks.push(case.check_cpu()?),
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

/// One shape with its reference.
struct Case<'a> {
    config: &'a MoeConfig,
    weights: &'a MoeWeights,
    /// The weights as `format` holds them.
    stored: MoeWeights,
    format: WeightFormat,
    x: &'a [f32],
    expected: Forward,
    shape: String,
}

impl<'a> Case<'a> {
    fn new(workload: &'a Workload, x: &'a [f32], format: WeightFormat, shape: String) -> Result<Self> {
        let stored = workload.weights.rounded(&workload.config, format)?;
        let expected = reference::moe_forward(&workload.config, &stored, x);
        Ok(Self { config: &workload.config, weights: &workload.weights, stored, format, x, expected, shape })
    }

    fn check_cpu(&self) -> Result<KernelCheck> {
        let layer = CpuLayer::new(self.config.clone(), self.weights, self.format)?;
        let mut y = vec![0.0; self.x.len()];
        layer.forward_into(self.x, &mut y)?;
        let most = self.expected.y.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        let verdict = compare(&y, &self.expected.y, |_| golden::TOLERANCE * most);
        Ok(self.report(&format!("cpu.{}", self.format.name()), verdict))
    }

    /// Every stage; those that do not depend on the weight format only if `all_stages`.
    async fn check_gpu(&self, gpu: &Gpu, all_stages: bool, checks: &mut Vec<KernelCheck>) -> Result<()> {
        let tokens = (self.x.len() / self.config.hidden_size() as usize) as u32;
        // The layout of the weights is the same for every choice.
        let any = LayerPlan::new(self.config, self.format, gpu.profile(), &MatmulRequest::default())?;
        let harness = Harness::new(gpu, &any, self.weights).await?;
        let device = gpu.profile();
        // Where it reads 64 bits at a time, it has to be able to do without.
        let narrow = DeviceProfile { int64: false, ..device.clone() };
        let choices = choices(device, self.config, tokens);
        let subgroup_choices = choices.iter().filter(|choice| device.int64 && choice.needs_subgroups());
        let narrow_choices: Vec<_> = subgroup_choices.map(|&choice| (&narrow, choice)).collect();
        for (device, choice) in choices.iter().map(|&choice| (device, choice)).chain(narrow_choices) {
            let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
            let plan = LayerPlan::new(self.config, self.format, device, &request)?.plan(tokens)?;
            for stage in Stage::ALL.into_iter().chain([Stage::DownCombine]) {
                let is_matmul = matches!(stage, Stage::GateUp | Stage::Down | Stage::DownCombine);
                let is_first = choice == MatmulChoice::Tiled { tile_m: 32, tile_n: 64 };
                // Router and combine do not depend on the matmul, permute only on its tile height.
                let due = is_matmul || (all_stages && (is_first || stage == Stage::Permute && choice.sorted()));
                let due = due && (is_matmul || device.int64 == gpu.profile().int64);
                let Some(dispatch) = plan.dispatches.iter().find(|d| d.kernel.stage == stage) else { continue };
                if due {
                    let verdict = match stage {
                        Stage::Router => self.check_router(&harness, &plan).await,
                        Stage::Permute => self.check_permute(&harness, &plan).await,
                        Stage::GateUp => self.check_gate_up(&harness, &plan).await,
                        Stage::Down => self.check_down(&harness, &plan).await,
                        Stage::DownCombine => self.check_down_combine(&harness, &plan).await,
                        _ => self.check_combine(&harness, &plan).await,
                    };
                    let label = match stage {
                        _ if is_matmul => format!("{} {}", dispatch.kernel.label, choice.sizes()),
                        Stage::Permute => format!("permute tile {}", plan.params.tile_m),
                        _ => dispatch.kernel.label.clone(),
                    };
                    // A device error ends the check; a wrong result is a line in its report.
                    let verdict = match verdict {
                        Err(crate::Error::Kernel { message, .. }) => Verdict::failed(message),
                        other => other?,
                    };
                    checks.push(self.report(&label, verdict));
                }
            }
        }
        Ok(())
    }

    async fn check_router(&self, harness: &Harness<'_>, plan: &Plan) -> Result<Verdict> {
        let c = self.config;
        let [t, h, e, k] = [plan.num_tokens, c.hidden_size(), c.num_experts(), c.top_k()].map(|n| n as usize);
        let outputs = [
            Output::poisoned("router_logits", t * e),
            Output::poisoned("topk_experts", t * k),
            Output::poisoned("topk_weights", t * k),
            Output { name: "status", words: 4, before: 0 },
        ];
        let inputs = [("x", words(self.x))];
        let out = harness.run(plan, Stage::Router, &inputs, &outputs).await?;
        let logits = floats(&out[0]);
        let bias = self.weights.router_bias.as_deref();
        // sum |x| |w| of each logit bounds its rounding
        let magnitudes =
            MoeWeights { router: abs(&self.weights.router), router_bias: bias.map(abs), ..MoeWeights::default() };
        let magnitude = router::router_logits(c, &magnitudes, &Batch::from(&abs(self.x))).experts;
        let verdict = compare(&logits, &self.expected.router.router_logits, |i| sum_bound(h + 1, magnitude[i]));
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
        let weights = compare(&floats(&out[2]), &own.topk_weights, |i| 1e-6 + 5e-6 * own.topk_weights[i]);
        Ok(Verdict { max_rel_error: verdict.max_rel_error.max(weights.max_rel_error), reason: weights.reason })
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
        for (name, got, want) in pairs {
            if let Some(at) = got.iter().zip(want).position(|(g, w)| g != w) {
                return Ok(Verdict::failed(format!("{name}[{at}] is {}, expected {}", got[at], want[at])));
            }
        }
        Ok(Verdict { max_rel_error: 0.0, reason: None })
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
        Ok(compare(&got, &self.expected.intermediate, |at| bounds[at]))
    }

    /// For each element of `intermediate`: what rounding can do to act(g) * u, when g and u are sums of `h` products.
    /// silu is 1.1-Lipschitz; its exp may be off by 3 + 2 |g| units in the last place (WGSL's accuracy table).
    fn gate_up_bounds(&self, rows: &Permutation, h: usize) -> Vec<f64> {
        let i = self.config.intermediate_size() as usize;
        let dot = |row: &[f32], x: &[f32]| row.iter().zip(x).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
        let dot_abs =
            |row: &[f32], x: &[f32]| row.iter().zip(x).map(|(&a, &b)| (f64::from(a) * f64::from(b)).abs()).sum::<f64>();
        let mut bounds = Vec::new();
        for (row, &a) in rows.assignment_of_row.iter().enumerate() {
            let x = &self.x[a as usize / self.config.top_k() as usize * h..][..h];
            for column in 0..i {
                let at = (rows.expert_of_row(row) * i + column) * h;
                let (gate, up) = (&self.stored.gate_proj[at..][..h], &self.stored.up_proj[at..][..h]);
                let (g, u) = (dot(gate, x), dot(up, x));
                let (dg, du) = (sum_bound(h, dot_abs(gate, x)), sum_bound(h, dot_abs(up, x)));
                let silu = self.config.activation().apply(g, 1.0);
                let exp_error = UNIT * (2.0 * (3.0 + 2.0 * g.abs()) + 8.0);
                bounds.push(1.1 * dg * (u.abs() + du) + silu.abs() * du + exp_error * (silu * u).abs() + 1e-37);
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
        let down = |weights: &[f32], v: &[f64]| reference::down::down([h, i], weights, None, v, experts.clone());
        let expected = down(&self.stored.down_proj, &exact);
        let magnitudes: Vec<f64> = exact.iter().map(|v| v.abs()).collect();
        let magnitude = down(&abs(&self.stored.down_proj), &magnitudes);

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
        Ok(compare(&got, &expected, |at| sum_bound(i, magnitude[at])))
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
                for product in products.map(|(&w, &x)| weight * f64::from(w) * f64::from(x)) {
                    *expected += product;
                    *magnitude += product.abs();
                }
            }
        }
        let inputs = [
            ("x", words(&x)),
            ("topk_experts", self.expected.router.topk_experts.as_slice()),
            ("topk_weights", words(&weights)),
        ];
        let out = harness.run(plan, Stage::DownCombine, &inputs, &[Output::poisoned("y", h)]).await?;
        Ok(compare(&floats(&out[0]), &expected, |at| sum_bound(i + weights.len(), magnitude[at])))
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
        Ok(compare(&floats(&out[0]), &expected, |at| sum_bound(k, magnitude[at])))
    }

    fn report(&self, kernel: &str, verdict: Verdict) -> KernelCheck {
        KernelCheck {
            kernel: kernel.to_owned(),
            shape: self.shape.clone(),
            max_rel_error: verdict.max_rel_error,
            passed: verdict.reason.is_none(),
            reason: verdict.reason,
        }
    }
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

/// The result of one comparison.
struct Verdict {
    max_rel_error: f64,
    reason: Option<String>,
}

impl Verdict {
    fn failed(reason: String) -> Self {
        Self { max_rel_error: f64::INFINITY, reason: Some(reason) }
    }
}

/// How far an f32 sum of `count` products may be from the exact one, when the products' magnitudes sum to `magnitude`.
fn sum_bound(count: usize, magnitude: f64) -> f64 {
    4.0 * (count as f64).sqrt() * UNIT * magnitude
}

/// Element by element; NaN, poison and a wrong length fail.
fn compare(got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) -> Verdict {
    if got.len() != want.len() {
        return Verdict::failed(format!("{} elements, expected {}", got.len(), want.len()));
    }
    let most = want.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    let mut worst = 0.0f64;
    let mut reason = None;
    for (at, (&g, &w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(g) - w).abs();
        worst = worst.max(error);
        // Written so that a NaN is not within any bound.
        let within = error <= bound(at);
        if !within && reason.is_none() {
            let what = if g.to_bits() == POISON { "was never written".to_owned() } else { format!("is {g:e}") };
            reason = Some(format!("element {at} {what}, expected {w:e} within {:e}", bound(at)));
        }
    }
    let relative = if most > 0.0 { worst / most } else { worst };
    Verdict { max_rel_error: if reason.is_some() && relative.is_nan() { f64::INFINITY } else { relative }, reason }
}

fn floats(words: &[u32]) -> Vec<f32> {
    words.iter().map(|&word| f32::from_bits(word)).collect()
}

fn words(floats: &[f32]) -> &[u32] {
    bytemuck::cast_slice(floats)
}

fn abs(values: &[f32]) -> Vec<f32> {
    values.iter().map(|v| v.abs()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparison_fails_where_it_must() {
        let want = [1.0, -2.0, 3.0];
        let bound = |_: usize| 1e-6;
        assert!(compare(&[1.0, -2.0, 3.0], &want, bound).reason.is_none());
        assert!(compare(&[1.0, -2.0, 3.1], &want, bound).reason.is_some());
        assert!(compare(&[1.0, f32::NAN, 3.0], &want, bound).reason.is_some());
        assert!(compare(&[1.0, f32::from_bits(POISON), 3.0], &want, bound).reason.is_some());
        assert!(compare(&[1.0, -2.0], &want, bound).reason.is_some());
        assert!(compare(&[f32::INFINITY, -2.0, 3.0], &want, bound).reason.is_some());
    }
}
