//! The CPU engine against the reference on random layers of the whole vocabulary: every score, selection, activation
//! and surrounding, in combinations that nobody would think of. Each comparison is also made with something changed,
//! and has to notice.

use std::collections::BTreeSet;
use wgmoe::cpu::CpuLayer;
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, DROPPED, Error, ExpertWeights, ExtraWeights, Front, Function,
    GroupScore, Groups, LayerExtras, LayerFormats, Masked, MoeConfig, MoeWeights, Noise, Norm, Priority, RankBy,
    Renormalize, Routing, RoutingDecision, Scores, Selection, SharedExperts, SharedGate, SpecialKind, WeightFormat,
    cpu, reference,
};

/// A small generator: the same values on every machine.
struct Values(u64);

impl Values {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn below(&mut self, end: u32) -> u32 {
        (self.next() % u64::from(end)) as u32
    }

    /// True once in `n` times.
    fn once_in(&mut self, n: u32) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }

    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }

    fn floats(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.float() * scale).collect()
    }
}

const SCORES: [Scores; 6] = [
    Scores::Softmax,
    Scores::SoftmaxSelected,
    Scores::Sigmoid,
    Scores::SqrtSoftplus,
    Scores::Raw,
    Scores::Hierarchical,
];

fn random_routing(v: &mut Values, num_experts: u32, top_k: u32) -> Routing {
    let scores = v.pick(&SCORES);
    let selection = match v.below(10) {
        0 => Selection::Sparsemixer { jitter: 0.3 },
        1 => Selection::TokenTable { vocab_size: 17 },
        2 => Selection::Given,
        3 => Selection::Dense,
        4 => Selection::ExpertChoice,
        _ => Selection::TopK,
    };
    let divisors: Vec<u32> = (1..=num_experts).filter(|n| num_experts.is_multiple_of(*n)).collect();
    let groups = (scores == Scores::Hierarchical || v.once_in(3)).then(|| {
        let num_groups = v.pick(&divisors);
        Groups {
            num_groups,
            keep: if scores == Scores::Hierarchical { num_groups } else { 1 + v.below(num_groups) },
            score: v.pick(&[GroupScore::Max, GroupScore::SumTop2]),
            masked: v.pick(&[Masked::NegInfinity, Masked::Zero]),
        }
    });
    let renormalize = v.once_in(2).then(|| match v.below(3) {
        0 => Renormalize::default(),
        1 => Renormalize { p: 2.0, epsilon: 1e-3, floor: 0.0 },
        _ => Renormalize { p: 1.0, epsilon: 0.0, floor: 0.5 },
    });
    let capacity = (selection == Selection::ExpertChoice || v.once_in(4)).then(|| Capacity {
        limit: match v.below(2) {
            0 => CapacityLimit::Number(1 + v.below(6)),
            _ => CapacityLimit::Fraction {
                fraction: f64::from(top_k) / f64::from(num_experts) * v.pick(&[0.5, 1.0, 1.25]),
                round_up: v.once_in(2),
                minimum: v.below(3),
            },
        },
        per_sequence: v.once_in(2),
        priority: v.pick(&[Priority::Position, Priority::Choice, Priority::Score]),
        renormalize_after: renormalize.is_some() && v.once_in(2),
        pass_through: v.once_in(2),
    });
    let mut routing = Routing::new(scores, false);
    routing.rank_by = v.pick(&[RankBy::Scores, RankBy::Logits]);
    routing.selection = selection;
    routing.groups = groups;
    routing.renormalize = renormalize;
    routing.scale = v.pick(&[1.0, 1.0, 2.5]);
    routing.logit_scale = v.pick(&[1.0, 1.0, 0.3]);
    routing.logit_softcap = v.once_in(4).then_some(1.5);
    routing.weigh_input = v.once_in(4);
    routing.capacity = capacity;
    routing.noise =
        v.pick(&[Noise::None, Noise::None, Noise::Jitter { epsilon: 0.3 }, Noise::NoisyTopK, Noise::RandomSecond]);
    routing
}

fn random_extras(v: &mut Values, num_experts: u32) -> LayerExtras {
    let mut norm = || v.once_in(5).then(|| Norm { epsilon: 1e-3, scale_first: v.once_in(2) });
    let [router_norm, expert_norm, expert_out_norm, routed_norm, output_norm] = [(); 5].map(|()| norm());
    LayerExtras {
        special_experts: if v.once_in(4) { v.below(num_experts) } else { 0 },
        special_kind: v.pick(&[SpecialKind::Identity, SpecialKind::Zero]),
        latent_size: v.once_in(4).then(|| 1 + v.below(70)),
        router_norm,
        expert_norm,
        expert_out_norm,
        routed_norm,
        routed_scale: v.pick(&[1.0, 1.0, 0.4]),
        shared: v.once_in(3).then(|| SharedExperts {
            num: 1 + v.below(3),
            intermediate_size: 1 + v.below(70),
            activation: v.pick(&Activation::examples()),
            gate: v.pick(&[SharedGate::None, SharedGate::Sigmoid, SharedGate::Joint, SharedGate::Mix]),
            average: v.once_in(3),
        }),
        output_norm,
    }
}

/// A random layer; None if the numbers contradict each other.
fn random_config(v: &mut Values) -> Option<MoeConfig> {
    let [mut hidden, mut intermediate, num_experts] = [1 + v.below(70), 1 + v.below(70), 1 + v.below(24)];
    if v.once_in(4) {
        // Whole blocks of most formats.
        [hidden, intermediate] = [hidden, intermediate].map(|n| n.next_multiple_of(32));
    }
    let top_k = 1 + v.below(num_experts.min(8));
    let routing = random_routing(v, num_experts, top_k);
    let top_k = if routing.is_dense() { num_experts } else { top_k };
    let activation = v.pick(&Activation::examples());
    let config = MoeConfig::new(hidden, intermediate, num_experts, top_k, routing, activation).ok()?;
    let extras = random_extras(v, num_experts);
    // A norm of one or two numbers that nearly cancelled makes their rounding as large as they are.
    let norms =
        [extras.router_norm, extras.expert_norm, extras.expert_out_norm, extras.routed_norm, extras.output_norm];
    let narrowest = extras.latent_size.map_or(hidden, |latent| latent.min(hidden));
    if narrowest < 4 && norms.iter().any(Option::is_some) {
        return None;
    }
    // Three in four layers have surroundings, and not all of them at once.
    if v.once_in(4) { Some(config) } else { config.with_extras(extras).ok() }
}

/// One that packs rows of these lengths.
fn random_format(config: &MoeConfig, v: &mut Values) -> WeightFormat {
    let fits = |format: &WeightFormat| LayerFormats::from(*format).check(config).is_ok();
    v.pick(&WeightFormat::every().into_iter().filter(fits).collect::<Vec<_>>())
}

fn random_weights(config: &MoeConfig, v: &mut Values) -> MoeWeights {
    let [h, i, d, e] = [config.hidden_size(), config.intermediate_size(), config.expert_size(), config.num_experts()]
        .map(|n| n as usize);
    let n = config.num_weighted_experts() as usize;
    let (routing, c) = (config.routing(), config.extras());
    let matrix = |v: &mut Values, rows: usize, width: usize| v.floats(rows * width, 2.0 / (width as f32).sqrt());
    let vector = |v: &mut Values, len: usize, one_in: u32| v.once_in(one_in).then(|| v.floats(len, 0.5));
    let ones = |v: &mut Values, there: bool, len: usize| {
        there.then(|| v.floats(len, 0.5).into_iter().map(|w| w + 1.0).collect::<Vec<f32>>())
    };
    let gated = config.activation().is_gated();
    let ranked = !routing.choices_are_given() && !routing.is_dense();
    let first_bias = v.once_in(3);
    let groups = routing.groups.map_or(0, |groups| groups.num_groups) as usize;
    let mut extras = ExtraWeights {
        selection_bias: if ranked { vector(v, e, 3) } else { None },
        per_expert_scale: if v.once_in(4) { ones(v, true, e) } else { None },
        router_noise: (routing.noise == Noise::NoisyTopK).then(|| matrix(v, e, h)),
        group_router: (routing.scores == Scores::Hierarchical).then(|| matrix(v, groups, h)),
        token_table: match routing.selection {
            Selection::TokenTable { vocab_size } => {
                Some((0..vocab_size * config.top_k()).map(|_| v.below(e as u32)).collect())
            }
            _ => None,
        },
        gate_bias: (first_bias && gated).then(|| v.floats(n * i, 0.5)),
        up_bias: first_bias.then(|| v.floats(n * i, 0.5)),
        down_bias: vector(v, n * d, 3),
        latent_in: c.latent_size.map(|_| matrix(v, d, h)),
        latent_out: c.latent_size.map(|_| matrix(v, h, d)),
        router_norm: ones(v, c.router_norm.is_some(), h),
        expert_norm: ones(v, c.expert_norm.is_some(), d),
        expert_out_norm: ones(v, c.expert_out_norm.is_some(), d),
        routed_norm: ones(v, c.routed_norm.is_some(), h),
        output_norm: ones(v, c.output_norm.is_some(), h),
        output_bias: vector(v, h, 4),
        ..ExtraWeights::default()
    };
    if let Some(shared) = c.shared {
        let [num, s] = [shared.num, shared.intermediate_size].map(|n| n as usize);
        extras.shared_gate_proj = if shared.activation.is_gated() { matrix(v, num * s, h) } else { Vec::new() };
        extras.shared_up_proj = matrix(v, num * s, h);
        extras.shared_down_proj = matrix(v, num * h, s);
        extras.shared_gate = (shared.gate != SharedGate::None).then(|| matrix(v, num, h));
    }
    MoeWeights {
        router: matrix(v, e, h),
        router_bias: vector(v, e, 2),
        gate_proj: if gated { matrix(v, n * i, d) } else { Vec::new() },
        up_proj: matrix(v, n * i, d),
        down_proj: matrix(v, n * d, i),
        extras,
    }
}

/// What a batch borrows.
struct Input {
    num_tokens: u32,
    x: Vec<f32>,
    tokens_per_sequence: Option<u32>,
    token_ids: Vec<u32>,
    experts: Vec<i32>,
    seed: Option<u64>,
    front: u32,
    logits: Vec<f32>,
    weights: Vec<f32>,
}

impl Input {
    fn random(config: &MoeConfig, v: &mut Values) -> Self {
        let [h, e, k] = [config.hidden_size(), config.num_experts(), config.top_k()];
        let sequence = 1 + v.below(10);
        let num_tokens = sequence * (1 + v.below(4));
        let joint = config.extras().shared.is_some_and(|shared| shared.gate == SharedGate::Joint);
        let [n, e_len, k_len] = [h, e, k].map(|width| (num_tokens * width) as usize);
        let front = v.below(8);
        let mut logits = v.floats(e_len, 3.0);
        if config.routing().scores != Scores::Raw && v.once_in(2) {
            // The first expert stays, so that there is one.
            (0..e_len).filter(|at| !at.is_multiple_of(e as usize)).for_each(|at| {
                if v.once_in(4) {
                    logits[at] = f32::NEG_INFINITY;
                }
            });
        }
        Self {
            num_tokens,
            x: v.floats(n, 1.5),
            tokens_per_sequence: v.once_in(2).then_some(sequence),
            token_ids: (0..num_tokens).map(|_| v.below(17)).collect(),
            experts: (0..k_len).map(|_| v.below(e + 1) as i32 - 1).collect(),
            seed: v.once_in(2).then(|| v.next()),
            front: if joint && front == 1 { 7 } else { front },
            logits,
            weights: v.floats(k_len, 1.0),
        }
    }

    fn batch(&self) -> Batch<'_> {
        Batch {
            x: &self.x,
            tokens_per_sequence: self.tokens_per_sequence,
            token_ids: Some(&self.token_ids),
            experts: Some(&self.experts),
            seed: self.seed,
            front: match self.front {
                0 => Front::Logits(&self.logits),
                1 => Front::Assignments { experts: &self.experts, weights: &self.weights },
                _ => Front::Router,
            },
        }
    }

    /// One token of it.
    fn token(&self, t: usize) -> Self {
        let one = |len: usize| t * len / self.num_tokens as usize..(t + 1) * len / self.num_tokens as usize;
        Self {
            num_tokens: 1,
            x: self.x[one(self.x.len())].to_vec(),
            tokens_per_sequence: None,
            token_ids: vec![self.token_ids[t]],
            experts: self.experts[one(self.experts.len())].to_vec(),
            logits: self.logits[one(self.logits.len())].to_vec(),
            weights: self.weights[one(self.weights.len())].to_vec(),
            ..*self
        }
    }
}

fn largest(values: &[f64]) -> f64 {
    values.iter().fold(0.0f64, |a, b| a.max(b.abs()))
}

/// The first difference above `bound`; NaN is one.
fn compare(what: &str, got: &[f32], expected: &[f64], bound: f64) -> Result<(), String> {
    if got.len() != expected.len() {
        return Err(format!("{what}: {} instead of {} values", got.len(), expected.len()));
    }
    let close = |(&got, &expected): (&f32, &f64)| (f64::from(got) - expected).abs() <= bound;
    match got.iter().zip(expected).position(|pair| !close(pair)) {
        None => Ok(()),
        Some(at) => Err(format!("{what}: {} instead of {} at {at}, bound {bound:e}", got[at], expected[at])),
    }
}

fn check(decision: &RoutingDecision, y: &[f32], expected: &reference::Forward, logits: bool) -> Result<(), String> {
    let router = &expected.router;
    if decision.topk_experts != router.topk_experts {
        return Err("choices".to_owned());
    }
    if logits {
        let finite: Vec<f64> = router.router_logits.iter().copied().filter(|l| l.is_finite()).collect();
        let both = decision.router_logits.iter().zip(&router.router_logits);
        let (got, expected): (Vec<f32>, Vec<f64>) = both.filter(|(_, l)| l.is_finite()).map(|(a, b)| (*a, *b)).unzip();
        compare("logits", &got, &expected, 3e-6 * largest(&finite).max(1.0))?;
    }
    compare("weights", &decision.topk_weights, &router.topk_weights, 1e-5 * largest(&router.topk_weights).max(1.0))?;
    let shared = &router.shared_weights;
    compare("shared weights", &decision.shared_weights, shared, 1e-5 * largest(shared).max(1.0))?;
    compare("y", y, &expected.y, 1e-5 * largest(&expected.y).max(1e-3))
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

fn forward(layer: &CpuLayer, batch: &Batch<'_>) -> (RoutingDecision, Vec<f32>) {
    let mut y = vec![f32::NAN; batch.x.len()];
    let decision = layer.forward_batch(batch, &mut y).expect("the input is valid");
    (decision, y)
}

/// The same layer with one thing changed, by name.
fn changed_configs(config: &MoeConfig) -> Vec<(&'static str, MoeConfig)> {
    let [h, i, e, k] = [config.hidden_size(), config.intermediate_size(), config.num_experts(), config.top_k()];
    let mut changed = Vec::new();
    let mut routing = |name, change: &dyn Fn(&mut Routing)| {
        let mut routing = config.routing();
        change(&mut routing);
        let new = MoeConfig::new(h, i, e, k, routing, config.activation());
        if let (true, Ok(Ok(new))) =
            (routing != config.routing(), new.map(|new| new.with_extras(config.extras().clone())))
        {
            changed.push((name, new));
        }
    };
    for scores in SCORES {
        routing("scores", &|r| r.scores = scores);
    }
    routing("rank_by", &|r| r.rank_by = RankBy::Scores);
    routing("selection", &|r| r.selection = Selection::TopK);
    routing("groups", &|r| r.groups = None);
    routing("group score", &|r| r.groups.iter_mut().for_each(|g| g.score = GroupScore::Max));
    routing("masked", &|r| r.groups.iter_mut().for_each(|g| g.masked = Masked::Zero));
    routing("renormalize", &|r| r.renormalize = None);
    routing("renormalize p", &|r| r.renormalize.iter_mut().for_each(|n| n.p = 3.0));
    routing("renormalize epsilon", &|r| r.renormalize.iter_mut().for_each(|n| n.epsilon += 0.1));
    routing("renormalize floor", &|r| r.renormalize.iter_mut().for_each(|n| n.floor += 0.3));
    routing("scale", &|r| r.scale = 1.0);
    routing("logit_scale", &|r| r.logit_scale = 1.0);
    routing("logit_softcap", &|r| r.logit_softcap = None);
    routing("weigh_input", &|r| r.weigh_input = false);
    routing("capacity", &|r| r.capacity = None);
    routing("per_sequence", &|r| r.capacity.iter_mut().for_each(|c| c.per_sequence = false));
    routing("priority: position", &|r| r.capacity.iter_mut().for_each(|c| c.priority = Priority::Position));
    routing("priority: choice", &|r| r.capacity.iter_mut().for_each(|c| c.priority = Priority::Choice));
    routing("priority: score", &|r| r.capacity.iter_mut().for_each(|c| c.priority = Priority::Score));
    routing("renormalize_after", &|r| r.capacity.iter_mut().for_each(|c| c.renormalize_after = false));
    routing("pass_through", &|r| r.capacity.iter_mut().for_each(|c| c.pass_through = false));
    if config.routing().noise != Noise::NoisyTopK {
        routing("noise", &|r| r.noise = Noise::None);
    }
    let mut extras = |name, change: &dyn Fn(&mut LayerExtras)| {
        let mut extras = config.extras().clone();
        change(&mut extras);
        let new = MoeConfig::new(h, i, e, k, config.routing(), config.activation());
        if let (true, Ok(Ok(new))) = (extras != *config.extras(), new.map(|new| new.with_extras(extras))) {
            changed.push((name, new));
        }
    };
    extras("special_kind", &|x| x.special_kind = SpecialKind::Zero);
    extras("routed_scale", &|x| x.routed_scale = 1.0);
    extras("average", &|x| x.shared.iter_mut().for_each(|s| s.average = false));
    extras("shared gate", &|x| x.shared.iter_mut().for_each(|s| s.gate = SharedGate::Sigmoid));
    type NormOf = fn(&mut LayerExtras) -> &mut Option<Norm>;
    let norms: [(_, NormOf); 5] = [
        ("router_norm", |x| &mut x.router_norm),
        ("expert_norm", |x| &mut x.expert_norm),
        ("expert_out_norm", |x| &mut x.expert_out_norm),
        ("routed_norm", |x| &mut x.routed_norm),
        ("output_norm", |x| &mut x.output_norm),
    ];
    for (name, of) in norms {
        extras(name, &|x| *of(x) = None);
        extras("scale_first", &|x| of(x).iter_mut().for_each(|norm| norm.scale_first = false));
    }
    for activation in Activation::examples() {
        if activation != config.activation() && activation.is_gated() == config.activation().is_gated() {
            let new = MoeConfig::new(h, i, e, k, config.routing(), activation);
            let new = new.and_then(|new| new.with_extras(config.extras().clone()));
            changed.push(("activation", new.expect("only the activation changed")));
        }
    }
    changed
}

/// The same weights with one tensor changed.
fn changed_weights(config: &MoeConfig, weights: &MoeWeights, v: &mut Values) -> (&'static str, MoeWeights) {
    let names: Vec<&'static str> = weights.tensors(config).into_iter().map(|(name, ..)| name).collect();
    let name = v.pick(&names);
    let mut changed = weights.clone();
    let x = &mut changed.extras;
    let tensor = match name {
        "router" => &mut changed.router,
        "gate_proj" => &mut changed.gate_proj,
        "up_proj" => &mut changed.up_proj,
        "down_proj" => &mut changed.down_proj,
        "shared_gate_proj" => &mut x.shared_gate_proj,
        "shared_up_proj" => &mut x.shared_up_proj,
        "shared_down_proj" => &mut x.shared_down_proj,
        _ => {
            let optional = match name {
                "router_bias" => &mut changed.router_bias,
                "selection_bias" => &mut x.selection_bias,
                "per_expert_scale" => &mut x.per_expert_scale,
                "router_noise" => &mut x.router_noise,
                "group_router" => &mut x.group_router,
                "gate_bias" => &mut x.gate_bias,
                "up_bias" => &mut x.up_bias,
                "down_bias" => &mut x.down_bias,
                "latent_in" => &mut x.latent_in,
                "latent_out" => &mut x.latent_out,
                "router_norm" => &mut x.router_norm,
                "expert_norm" => &mut x.expert_norm,
                "expert_out_norm" => &mut x.expert_out_norm,
                "routed_norm" => &mut x.routed_norm,
                "output_norm" => &mut x.output_norm,
                "output_bias" => &mut x.output_bias,
                "shared_gate" => &mut x.shared_gate,
                other => panic!("unknown tensor {other}"),
            };
            optional.as_mut().expect("tensors lists what is there")
        }
    };
    let at = v.below(tensor.len() as u32) as usize;
    tensor[at..].iter_mut().for_each(|w| *w = *w * 1.25 + 0.125);
    (name, changed)
}

/// What the comparisons have to notice when it changes, in at least one layer.
const NOTICED: [&str; 62] = [
    "activation",
    "average",
    "capacity",
    "choices: dense",
    "choices: expert choice",
    "choices: given",
    "choices: sparsemixer",
    "choices: table",
    "choices: top-k",
    "down_bias",
    "down_proj",
    "expert_norm",
    "expert_out_norm",
    "front: assignments",
    "front: logits",
    "front: router",
    "gate_bias",
    "gate_proj",
    "group score",
    "group_router",
    "groups",
    "latent_in",
    "latent_out",
    "logit_scale",
    "logit_softcap",
    "masked",
    "noise",
    "output_bias",
    "output_norm",
    "pass_through",
    "per_expert_scale",
    "per_sequence",
    "priority: choice",
    "priority: position",
    "priority: score",
    "rank_by",
    "renormalize",
    "renormalize epsilon",
    "renormalize floor",
    "renormalize p",
    "renormalize_after",
    "routed_norm",
    "routed_scale",
    "router",
    "router_bias",
    "router_noise",
    "router_norm",
    "scale",
    "scale_first",
    "scores",
    "seed",
    "selection",
    "selection_bias",
    "shared gate",
    "shared_down_proj",
    "shared_gate",
    "shared_gate_proj",
    "shared_up_proj",
    "special_kind",
    "up_bias",
    "up_proj",
    "weigh_input",
];

#[test]
fn random_layers_are_those_of_the_reference() {
    let mut v = Values(11);
    let (mut noticed, mut seen) = (BTreeSet::new(), BTreeSet::new());
    let (mut cases, mut other_choices) = (0, 0);
    while cases < 3000 {
        let Some(config) = random_config(&mut v) else { continue };
        let weights = random_weights(&config, &mut v);
        let format = random_format(&config, &mut v);
        let input = Input::random(&config, &mut v);
        let batch = input.batch();
        let layer = CpuLayer::new(config.clone(), &weights, format).expect("the weights are valid");
        let stored = weights.rounded(&config, format).expect("the format holds the weights");
        let expected = reference::moe_forward(&config, &stored, batch);
        let (decision, y) = forward(&layer, &batch);
        let has_logits = !matches!(batch.front, Front::Assignments { .. });
        cases += 1;
        match check(&decision, &y, &expected, has_logits) {
            Ok(()) => {}
            // A near-tie may fall either way.
            Err(what) if what == "choices" => {
                other_choices += 1;
                continue;
            }
            Err(what) => panic!("case {cases}: {what}\n{config:?}\n{:?} {:?}", batch.seed, batch.front),
        }

        let mut counts = vec![0; config.num_experts() as usize];
        let computed = decision.topk_experts.iter().filter(|&&expert| expert != DROPPED);
        computed.for_each(|&expert| counts[expert as usize] += 1);
        assert_eq!(decision.tokens_per_expert, counts);
        assert_eq!(decision.num_dropped, decision.topk_experts.iter().filter(|&&e| e == DROPPED).count());

        // Nobody else's tokens matter, unless experts fill up or the noise is by position.
        if config.routing().capacity.is_none() && (batch.seed.is_none() || config.routing().noise == Noise::None) {
            let h = config.hidden_size() as usize;
            for t in (0..input.num_tokens as usize).step_by(7) {
                let alone = forward(&layer, &input.token(t).batch()).1;
                assert!(bits(&alone) == bits(&y[t * h..][..h]), "case {cases}, token {t}: {config:?}");
            }
        }

        let notices = |config: &MoeConfig, weights: &MoeWeights, batch: Batch<'_>| {
            check(&decision, &y, &reference::moe_forward(config, weights, batch), has_logits).is_err()
        };
        let (name, changed) = changed_weights(&config, &stored, &mut v);
        if notices(&config, &changed, batch) {
            noticed.insert(name);
        }
        for (name, changed) in changed_configs(&config) {
            if !noticed.contains(name) && notices(&changed, &stored, batch) {
                noticed.insert(name);
            }
        }
        if notices(&config, &stored, Batch { seed: batch.seed.map_or(Some(1), |_| None), ..batch }) {
            noticed.insert("seed");
        }
        noticed.insert(match batch.front {
            Front::Router => "front: router",
            Front::Logits(_) => "front: logits",
            Front::Assignments { .. } => "front: assignments",
        });
        noticed.insert(match config.routing().selection {
            Selection::TopK => "choices: top-k",
            Selection::Sparsemixer { .. } => "choices: sparsemixer",
            Selection::TokenTable { .. } => "choices: table",
            Selection::Given => "choices: given",
            Selection::Dense => "choices: dense",
            Selection::ExpertChoice => "choices: expert choice",
            other => panic!("{other:?} is not in the vocabulary of this test"),
        });
        seen.insert((config.activation().name(), "activation"));
        seen.insert((format.name(), "format"));
        seen.insert((format!("{:?}", config.routing().scores), "scores"));
    }
    let missing: Vec<&str> = NOTICED.into_iter().filter(|name| !noticed.contains(name)).collect();
    assert!(missing.is_empty(), "nothing noticed a change of {missing:?}");
    assert_eq!(noticed.len(), NOTICED.len(), "{noticed:?}");
    // Blocks of 128 and of 256 inputs are longer than these rows.
    let num_formats = WeightFormat::every().into_iter().filter(|format| format.block() <= 64).count();
    assert_eq!(seen.len(), Activation::examples().len() + num_formats + SCORES.len(), "{seen:?}");
    assert!(other_choices * 500 < cases, "{other_choices} of {cases} layers chose otherwise");
}

#[test]
fn statistics_are_those_of_the_reference() {
    let mut v = Values(5);
    let mut cases = 0;
    while cases < 200 {
        let Some(config) = random_config(&mut v) else { continue };
        let weights = random_weights(&config, &mut v);
        let input = Input { front: 7, ..Input::random(&config, &mut v) };
        let layer = CpuLayer::new(config.clone(), &weights, WeightFormat::F32).expect("the weights are valid");
        let (decision, _) = forward(&layer, &input.batch());
        let router = reference::moe_forward(&config, &weights, input.batch()).router;
        if decision.topk_experts != router.topk_experts {
            continue;
        }
        cases += 1;
        let sequence = input.tokens_per_sequence.unwrap_or(input.num_tokens) as usize;
        let got = cpu::statistics(&config, &decision, sequence);
        let expected = reference::statistics::statistics(&config, &router, sequence);
        assert_eq!(got.tokens_per_expert, expected.tokens_per_expert);
        assert_eq!((got.num_tokens, got.num_dropped), (expected.num_tokens, expected.num_dropped));
        assert_eq!(got.sequences.len(), expected.sequences.len());
        let of =
            |s: &wgmoe::Statistics| [s.switch_load_balancing_loss, s.load_balancing_loss, s.router_z_loss, s.entropy];
        for (got, expected) in of(&got).into_iter().zip(of(&expected)) {
            assert!((got - expected).abs() <= 2e-5 * expected.abs().max(1e-3), "{got} {expected}");
        }
        for (got, expected) in got.sequences.iter().zip(&expected.sequences) {
            assert_eq!((&got.best, &got.assigned), (&expected.best, &expected.assigned));
        }
    }
    let none = cpu::statistics(
        &MoeConfig::new(1, 1, 3, 1, Routing::softmax(true), Activation::SWIGLU).expect("the sizes are valid"),
        &RoutingDecision::default(),
        0,
    );
    assert_eq!((none.num_tokens, none.sequences.len()), (0, 0));
}

/// A random expert that fits these weights.
fn random_expert(config: &MoeConfig, weights: &MoeWeights, v: &mut Values) -> ExpertWeights {
    let [h, i, d] = [config.hidden_size(), config.intermediate_size(), config.expert_size()].map(|n| n as usize);
    let extras = &weights.extras;
    let gated = config.activation().is_gated();
    ExpertWeights {
        gate_proj: if gated { v.floats(i * d, 0.5) } else { Vec::new() },
        up_proj: v.floats(i * d, 0.5),
        down_proj: v.floats(d * i, 0.5),
        gate_bias: extras.gate_bias.is_some().then(|| v.floats(i, 0.5)),
        up_bias: extras.up_bias.is_some().then(|| v.floats(i, 0.5)),
        down_bias: extras.down_bias.is_some().then(|| v.floats(d, 0.5)),
        router_row: v.floats(h, 0.5),
        router_bias: if weights.router_bias.is_some() { v.float() } else { 0.0 },
        selection_bias: if extras.selection_bias.is_some() { v.float() } else { 0.0 },
        per_expert_scale: if extras.per_expert_scale.is_some() { v.float() + 1.5 } else { 1.0 },
    }
}

/// A layer whose experts came and went is the layer that was made of what is left.
#[test]
fn edited_layers_are_those_made_anew() {
    let mut v = Values(23);
    let (mut edits, mut refused) = (0, 0);
    while edits < 1000 {
        let Some(mut config) = random_config(&mut v) else { continue };
        let mut weights = random_weights(&config, &mut v);
        let format = random_format(&config, &mut v);
        let mut layer = CpuLayer::new(config.clone(), &weights, format).expect("the weights are valid");
        for _ in 0..4 {
            let expert = random_expert(&config, &weights, &mut v);
            let (weighted, before) = (config.num_weighted_experts(), weights.clone());
            let id = v.below(weighted);
            let edited = match v.below(3) {
                0 => {
                    let grown = weights.insert_expert(&config, weighted, &expert);
                    assert_eq!(layer.add_expert(&expert).ok(), grown.is_ok().then_some(weighted));
                    grown
                }
                1 => {
                    let shrunk = weights.remove_expert(&config, id);
                    assert_eq!(layer.remove_expert(id).is_ok(), shrunk.is_ok());
                    shrunk
                }
                _ => {
                    // On the host: one out, one in. The noise of the router is not the expert's, and stays.
                    let noise = weights.extras.router_noise.clone();
                    let shrunk = weights.remove_expert(&config, id);
                    let same = shrunk.and_then(|shrunk| weights.insert_expert(&shrunk, id, &expert));
                    if same.is_err() {
                        weights = before.clone();
                        continue;
                    }
                    weights.extras.router_noise = noise;
                    layer.replace_expert(id, &expert).expect("the expert fits");
                    same
                }
            };
            match edited {
                Ok(new) => config = new,
                Err(Error::InvalidConfig { .. }) => {
                    refused += 1;
                    assert!(weights == before, "an error changes nothing");
                }
                Err(error) => panic!("{error}"),
            }
            edits += 1;
            assert_eq!(layer.config(), &config);
            let input = Input::random(&config, &mut v);
            let anew = CpuLayer::new(config.clone(), &weights, format).expect("the weights are valid");
            let ((got, y), (expected, z)) = (forward(&layer, &input.batch()), forward(&anew, &input.batch()));
            assert_eq!(got, expected, "{config:?}");
            assert!(bits(&y) == bits(&z), "{config:?}");
        }
    }
    assert!(refused > 0 && refused < edits / 2, "{refused} of {edits}");
}

/// An expert that nobody chooses changes nobody's bits, where weights do not depend on it.
#[test]
fn an_expert_that_nobody_chooses_changes_no_bits() {
    let routings = [
        Routing::softmax(true),
        Routing::new(Scores::SoftmaxSelected, false),
        Routing::new(Scores::Sigmoid, true),
        Routing::new(Scores::Sigmoid, false),
    ];
    for (case, routing) in routings.into_iter().enumerate() {
        let mut v = Values(31 + case as u64);
        let config = MoeConfig::new(33, 21, 7, 2, routing, Activation::SWIGLU).expect("the sizes are valid");
        let mut weights = random_weights(&config, &mut v);
        weights.router_bias = Some(vec![0.0; 7]);
        weights.extras = ExtraWeights::default();
        let mut layer = CpuLayer::new(config.clone(), &weights, WeightFormat::F32).expect("the weights are valid");
        let x = v.floats(20 * 33, 1.0);
        let before = forward(&layer, &Batch::from(&x)).1;
        let mut expert = random_expert(&config, &weights, &mut v);
        expert.router_bias = -1e4;
        assert_eq!(layer.add_expert(&expert).expect("the expert fits"), 7);
        assert!(bits(&forward(&layer, &Batch::from(&x)).1) == bits(&before), "{routing:?}");
        expert.router_bias = 1e4;
        layer.replace_expert(7, &expert).expect("the expert fits");
        assert!(bits(&forward(&layer, &Batch::from(&x)).1) != bits(&before), "{routing:?}: now everybody chooses it");
        layer.remove_expert(7).expect("it is there");
        assert!(bits(&forward(&layer, &Batch::from(&x)).1) == bits(&before), "{routing:?}");
    }
}

#[test]
fn experts_that_do_not_fit_are_refused() {
    let mut v = Values(41);
    let config = MoeConfig::new(5, 3, 4, 2, Routing::softmax(true), Activation::SWIGLU).expect("the sizes are valid");
    let mut weights = random_weights(&config, &mut v);
    (weights.router_bias, weights.extras) = (None, ExtraWeights::default());
    let mut layer = CpuLayer::new(config.clone(), &weights, WeightFormat::F16).expect("the weights are valid");
    let good = random_expert(&config, &weights, &mut v);
    let mut refused = |change: fn(&mut ExpertWeights)| {
        let mut expert = good.clone();
        change(&mut expert);
        let (mut host, error) = (weights.clone(), layer.add_expert(&expert).expect_err("it does not fit"));
        assert_eq!(layer.config(), &config);
        if !matches!(error, Error::NotRepresentable { .. }) {
            let on_host = host.insert_expert(&config, 4, &expert).expect_err("it does not fit");
            assert_eq!(on_host.to_string(), error.to_string());
        }
        error
    };
    let short = |e: &mut ExpertWeights| e.router_row.truncate(4);
    assert!(matches!(refused(short), Error::LengthMismatch { tensor: "router_row", .. }));
    assert!(matches!(refused(|e| e.up_proj[1] = f32::NAN), Error::NonFinite { index: 1, .. }));
    assert!(matches!(refused(|e| e.down_proj[2] = 1e6), Error::NotRepresentable { index: 2, .. }));
    let changes: [fn(&mut ExpertWeights); 4] = [
        |e| e.router_bias = 1.0,
        |e| e.selection_bias = 1.0,
        |e| e.per_expert_scale = 0.0,
        |e| e.down_bias = Some(vec![0.0; 5]),
    ];
    for change in changes {
        assert!(matches!(refused(change), Error::InvalidConfig { .. }));
    }
    assert!(matches!(layer.remove_expert(4), Err(Error::InvalidConfig { .. })));
    assert!(matches!(layer.replace_expert(4, &good), Err(Error::InvalidConfig { .. })));
    for _ in 0..2 {
        layer.remove_expert(0).expect("two are left");
    }
    assert!(matches!(layer.remove_expert(0), Err(Error::InvalidConfig { field: "top_k", .. })));
}

#[test]
fn stages_are_those_that_the_layer_has() {
    let mut v = Values(61);
    let config = MoeConfig::new(5, 3, 4, 2, Routing::softmax(true), Activation::SWIGLU).expect("the sizes are valid");
    let norm = Some(Norm { epsilon: 1e-6, scale_first: false });
    let shared = SharedExperts {
        num: 2,
        intermediate_size: 3,
        activation: Activation::SWIGLU,
        gate: SharedGate::None,
        average: false,
    };
    let extras = LayerExtras {
        latent_size: Some(4),
        expert_norm: norm,
        expert_out_norm: norm,
        shared: Some(shared),
        ..LayerExtras::default()
    };
    let all = [
        "router",
        "shared",
        "latent_in",
        "expert_norm",
        "permute",
        "gate_up",
        "down",
        "expert_out_norm",
        "combine",
        "latent_out",
    ];
    let plain = ["router", "permute", "gate_up", "down", "combine"];
    let with = config.clone().with_extras(extras).expect("the surroundings fit");
    for (config, expected) in [(config, &plain[..]), (with, &all[..])] {
        let layer = CpuLayer::new(config.clone(), &random_weights(&config, &mut v), WeightFormat::F32);
        let x = v.floats(15, 1.0);
        let pass = layer.expect("the weights are valid").forward_profiled(&Batch::from(&x), &mut [0.0; 15]);
        let names: Vec<&str> = pass.expect("the input is valid").1.into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, expected);
    }
}

/// Bits depend on nobody's threads, whatever the layer has.
#[test]
fn bits_do_not_depend_on_the_threads() {
    let mut v = Values(51);
    let pools = [1, 3].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads can be started"));
    let mut cases = 0;
    while cases < 150 {
        let Some(config) = random_config(&mut v) else { continue };
        cases += 1;
        let weights = random_weights(&config, &mut v);
        let layer = CpuLayer::new(config.clone(), &weights, WeightFormat::F32).expect("the weights are valid");
        let input = Input::random(&config, &mut v);
        let [one, three] = [&pools[0], &pools[1]].map(|pool| pool.install(|| forward(&layer, &input.batch())));
        assert_eq!(one.0, three.0);
        assert!(bits(&one.1) == bits(&three.1), "{config:?}");
    }
}

/// With other tokens around it a token may lose its expert: the promise of equal bits has this one exception.
#[test]
fn capacity_counts_by_its_rules() {
    let weights = |priority, per_sequence| {
        let mut routing = Routing::softmax(false);
        routing.capacity = Some(Capacity {
            limit: CapacityLimit::Number(1),
            per_sequence,
            priority,
            renormalize_after: false,
            pass_through: false,
        });
        MoeConfig::new(2, 1, 3, 2, routing, Activation::plain(Function::Relu)).expect("the sizes are valid")
    };
    // Token 0 prefers expert 0 then 1, token 1 prefers 1 then 0, token 2 prefers 0, most of all, then 2.
    let logits = [2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 9.0, 0.0, 1.0];
    let none = DROPPED;
    for (priority, sequence, expected) in [
        (Priority::Position, None, [0, 1, none, none, none, 2]),
        (Priority::Choice, None, [0, none, 1, none, none, 2]),
        (Priority::Score, None, [none, none, 1, none, 0, 2]),
        (Priority::Position, Some(1), [0, 1, 1, 0, 0, 2]),
    ] {
        let config = weights(priority, sequence.is_some());
        let weights = MoeWeights {
            router: vec![0.0; 6],
            up_proj: vec![1.0; 6],
            down_proj: vec![1.0; 6],
            ..MoeWeights::default()
        };
        let layer = CpuLayer::new(config, &weights, WeightFormat::F32).expect("the weights are valid");
        let x = [1.0; 6];
        let front = Front::Logits(&logits);
        let batch = Batch { x: &x, tokens_per_sequence: sequence, front, ..Batch::default() };
        let (decision, y) = forward(&layer, &batch);
        assert_eq!(decision.topk_experts, expected, "{priority:?}");
        let dropped = |t: usize| expected[2 * t..][..2] == [none; 2];
        (0..3).for_each(|t| assert_eq!(y[2 * t..][..2] == [0.0; 2], dropped(t), "{priority:?}, token {t}"));
    }
}
