//! The whole vocabulary of routers and experts: random layers on the GPU against the definition. `cpu_vocabulary.rs` is
//! the same for the CPU engine.

mod support;

use support::{Values, bits, gpu_context, read_buffer};
use wgmoe::reference::{self, router::log_sum_exp};
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, Context, DROPPED, ExpertWeights, ExtraWeights, Form, Front, Function,
    GroupScore, Groups, LayerExtras, LayerOptions, Masked, MoeConfig, MoeLayer, MoeWeights, Noise, Norm, Priority,
    RankBy, Renormalize, Routing, Scores, Selection, SharedExperts, SharedGate, SpecialKind, wgpu,
};

/// A layer with everything that a pass may need.
struct Case {
    config: MoeConfig,
    weights: MoeWeights,
    x: Vec<f32>,
    token_ids: Vec<u32>,
    experts: Vec<i32>,
    tokens_per_sequence: Option<u32>,
    seed: Option<u64>,
}

impl Case {
    fn batch(&self) -> Batch<'_> {
        Batch {
            x: &self.x,
            tokens_per_sequence: self.tokens_per_sequence,
            token_ids: Some(&self.token_ids),
            experts: Some(&self.experts),
            seed: self.seed,
            front: Front::Router,
        }
    }

    fn num_tokens(&self) -> usize {
        self.x.len() / self.config.hidden_size() as usize
    }

    /// The reference's choices are not a matter of rounding: no rank is within 1e-4 of another.
    fn is_decided(&self) -> bool {
        let forward = reference::moe_forward(&self.config, &self.weights, self.batch());
        let e = self.config.num_experts() as usize;
        let close = |values: &[f64]| {
            let mut sorted = values.to_vec();
            sorted.sort_by(f64::total_cmp);
            sorted.windows(2).any(|pair| (pair[1] - pair[0]).abs() < 1e-5)
        };
        let router = &forward.router;
        let ranks = |t: usize| {
            let by_logits = self.config.routing().rank_by == RankBy::Logits;
            let from = if by_logits { &router.router_logits } else { &router.router_probs };
            let row = &from[t * e..][..e];
            let bias = self.weights.extras.selection_bias.as_deref();
            row.iter().enumerate().map(|(i, v)| v + bias.map_or(0.0, |b| f64::from(b[i]))).collect::<Vec<f64>>()
        };
        let by_tokens = self.config.routing().capacity.is_some() && close(&router.first_scores);
        !by_tokens && (0..self.num_tokens()).all(|t| !close(&ranks(t)) && !close(&router.router_logits[t * e..][..e]))
    }
}

fn norms(values: &mut Values, len: usize) -> Vec<f32> {
    values.even(len).into_iter().map(|v| 1.0 + 0.5 * v).collect()
}

/// A random layer. `plain_experts` leaves out what is not about routing.
fn random_case(seed: u64) -> Case {
    let mut values = Values(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) + 1);
    let v = &mut values;
    let pick = |v: &mut Values, choices: &[u32]| choices[v.below(choices.len())];
    let [h, i] = [pick(v, &[8, 20, 17, 64, 33]), pick(v, &[4, 8, 13, 32])];
    let group_size = pick(v, &[2, 3, 4]);
    let num_groups = pick(v, &[1, 2, 4]);
    let e = group_size * num_groups;
    let scores = [
        Scores::Softmax,
        Scores::SoftmaxSelected,
        Scores::Sigmoid,
        Scores::SqrtSoftplus,
        Scores::Softmax,
        Scores::Sigmoid,
        Scores::Hierarchical,
    ][v.below(7)];
    let vocab_size = 11;
    let selection = match v.below(9) {
        0 => Selection::Sparsemixer { jitter: 0.2 },
        1 => Selection::TokenTable { vocab_size },
        2 => Selection::Given,
        3 => Selection::Dense,
        4 => Selection::ExpertChoice,
        _ => Selection::TopK,
    };
    let top_k_selects = selection == Selection::TopK;
    let keep = if top_k_selects && scores != Scores::Hierarchical {
        1 + v.below(num_groups as usize) as u32
    } else {
        num_groups
    };
    let dense = matches!(selection, Selection::Dense | Selection::ExpertChoice);
    let top_k = if dense { e } else { 1 + v.below((keep * group_size).min(5) as usize) as u32 };
    let groups = (num_groups > 1 || scores == Scores::Hierarchical).then_some(Groups {
        num_groups,
        keep,
        score: if v.below(2) == 0 { GroupScore::Max } else { GroupScore::SumTop2 },
        masked: if v.below(3) == 0 { Masked::Zero } else { Masked::NegInfinity },
    });
    let renormalize = (v.below(3) > 0).then(|| Renormalize {
        p: if v.below(4) == 0 { 2.0 } else { 1.0 },
        epsilon: if v.below(3) == 0 { 1e-3 } else { 0.0 },
        floor: if v.below(4) == 0 { 0.5 } else { 0.0 },
    });
    let limited = selection == Selection::ExpertChoice || (scores != Scores::Raw && v.below(3) == 0);
    let capacity = limited.then(|| Capacity {
        limit: match v.below(2) {
            0 => CapacityLimit::Number(1 + v.below(6) as u32),
            _ => CapacityLimit::Fraction { fraction: 0.3, round_up: v.below(2) == 0, minimum: 2 },
        },
        per_sequence: v.below(2) == 0,
        priority: [Priority::Position, Priority::Choice, Priority::Score][v.below(3)],
        renormalize_after: renormalize.is_some() && scores != Scores::SoftmaxSelected && v.below(3) == 0,
        pass_through: v.below(4) == 0,
    });
    let noise = match v.below(8) {
        0 => Noise::Jitter { epsilon: 0.1 },
        1 if scores != Scores::Hierarchical => Noise::NoisyTopK,
        2 if top_k > 1 && top_k_selects => Noise::RandomSecond,
        _ => Noise::None,
    };
    let routing = Routing {
        rank_by: if v.below(4) == 0 { RankBy::Logits } else { RankBy::Scores },
        selection,
        groups,
        renormalize,
        scale: if v.below(3) == 0 { 2.5 } else { 1.0 },
        logit_scale: if v.below(4) == 0 { 0.7 } else { 1.0 },
        logit_softcap: (v.below(5) == 0).then_some(3.0),
        weigh_input: v.below(6) == 0,
        capacity,
        noise,
        ..Routing::new(scores, false)
    };
    let activations = Activation::examples();
    let activation = if v.below(3) == 0 { Activation::SWIGLU } else { activations[v.below(activations.len())] };
    let norm = |v: &mut Values, one_in: usize| {
        (v.below(one_in) == 0).then_some(Norm { epsilon: 1e-5, scale_first: v.below(3) == 0 })
    };
    let gate = match v.below(4) {
        1 => SharedGate::Sigmoid,
        2 if matches!(scores, Scores::Sigmoid | Scores::SqrtSoftplus) => SharedGate::Joint,
        3 => SharedGate::Mix,
        _ => SharedGate::None,
    };
    let shared = (v.below(2) == 0).then(|| SharedExperts {
        num: if gate == SharedGate::Mix { 1 } else { 1 + v.below(3) as u32 },
        intermediate_size: [4, 12, 7][v.below(3)],
        activation: activations[v.below(activations.len())],
        gate,
        average: v.below(3) == 0,
    });
    let latent_size = (v.below(5) == 0).then(|| [6, 12][v.below(2)]);
    let special_experts = if e > 2 && v.below(5) == 0 { 1 } else { 0 };
    let extras = LayerExtras {
        special_experts,
        special_kind: if v.below(2) == 0 { SpecialKind::Identity } else { SpecialKind::Zero },
        latent_size,
        router_norm: norm(v, 6),
        expert_norm: norm(v, 6),
        expert_out_norm: norm(v, 6),
        routed_norm: norm(v, 6),
        routed_scale: if v.below(4) == 0 { 1.7 } else { 1.0 },
        shared,
        output_norm: norm(v, 6),
    };
    let config = MoeConfig::new(h, i, e, top_k, routing, activation)
        .and_then(|config| config.with_extras(extras.clone()))
        .unwrap_or_else(|error| panic!("seed {seed}: {error}"));

    let d = config.expert_size() as usize;
    let weighted = config.num_weighted_experts() as usize;
    let [h, i, e] = [h, i, e].map(|n| n as usize);
    let scaled = |v: &mut Values, len: usize, fan_in: usize| -> Vec<f32> {
        v.even(len).into_iter().map(|w| w * 1.7 / (fan_in as f32).sqrt()).collect()
    };
    let gated = activation.is_gated();
    let mut weights = MoeWeights {
        router: scaled(v, e * h, h).into_iter().map(|w| 2.0 * w).collect(),
        router_bias: (v.below(3) == 0).then(|| v.even(e)),
        gate_proj: if gated { scaled(v, weighted * i * d, d) } else { Vec::new() },
        up_proj: scaled(v, weighted * i * d, d),
        down_proj: scaled(v, weighted * d * i, i),
        ..MoeWeights::default()
    };
    let has_bias = v.below(4) == 0;
    let selects = matches!(selection, Selection::TopK | Selection::Sparsemixer { .. });
    let num_shared = shared.map_or(0, |s| s.num) as usize;
    let s = shared.map_or(0, |s| s.intermediate_size) as usize;
    weights.extras = ExtraWeights {
        selection_bias: (selects && v.below(2) == 0).then(|| v.even(e).into_iter().map(|b| 0.3 * b).collect()),
        per_expert_scale: (v.below(4) == 0).then(|| norms(v, e)),
        router_noise: (noise == Noise::NoisyTopK).then(|| scaled(v, e * h, h)),
        group_router: (scores == Scores::Hierarchical).then(|| scaled(v, num_groups as usize * h, h)),
        token_table: matches!(selection, Selection::TokenTable { .. })
            .then(|| (0..vocab_size as usize * top_k as usize).map(|n| ((n * 7 + n / 3) % e) as u32).collect()),
        gate_bias: (has_bias && gated).then(|| v.even(weighted * i)),
        up_bias: has_bias.then(|| v.even(weighted * i)),
        down_bias: (v.below(4) == 0).then(|| v.even(weighted * d)),
        latent_in: latent_size.map(|_| scaled(v, d * h, h)),
        latent_out: latent_size.map(|_| scaled(v, h * d, d)),
        router_norm: extras.router_norm.map(|_| norms(v, h)),
        expert_norm: extras.expert_norm.map(|_| norms(v, d)),
        expert_out_norm: extras.expert_out_norm.map(|_| norms(v, d)),
        routed_norm: extras.routed_norm.map(|_| norms(v, h)),
        output_norm: extras.output_norm.map(|_| norms(v, h)),
        output_bias: (v.below(5) == 0).then(|| v.even(h)),
        shared_gate_proj: if shared.is_some_and(|s| s.activation.is_gated()) {
            scaled(v, num_shared * s * h, h)
        } else {
            Vec::new()
        },
        shared_up_proj: scaled(v, num_shared * s * h, h.max(1)),
        shared_down_proj: scaled(v, num_shared * h * s, s.max(1)),
        shared_gate: (config.num_gated_shared() > 0).then(|| scaled(v, config.num_gated_shared() as usize * h, h)),
    };
    let sequences = 1 + v.below(3);
    let tokens = sequences * (1 + v.below(14));
    let num_experts = e as i64;
    let id = |v: &mut Values| if v.below(7) == 0 { -1 } else { (v.next() as i64 % num_experts) as i32 };
    Case {
        x: v.even(tokens * h).into_iter().map(|x| 1.5 * x).collect(),
        token_ids: (0..tokens).map(|_| v.below(vocab_size as usize) as u32).collect(),
        experts: (0..tokens * top_k as usize).map(|_| id(v)).collect(),
        tokens_per_sequence: (v.below(2) == 0).then_some((tokens / sequences) as u32),
        seed: (v.below(2) == 0).then_some(seed),
        config,
        weights,
    }
}

/// Cases whose choices do not hang on rounding.
fn decided_cases(count: usize) -> impl Iterator<Item = (u64, Case)> {
    (0..).map(|seed| (seed, random_case(seed))).filter(|(_, case)| case.is_decided()).take(count)
}

/// `None` if the layer does on the context what the reference does.
fn difference(context: &Context, case: &Case) -> Option<String> {
    let layer = match MoeLayer::new(context, case.config.clone(), &case.weights) {
        Ok(layer) => layer,
        Err(error) => return Some(error.to_string()),
    };
    let expected = reference::moe_forward(&case.config, &case.weights, case.batch());
    let y = match layer.forward_batch(&case.batch()) {
        Ok(y) => y,
        Err(error) => return Some(error.to_string()),
    };
    let routing = layer.routing().expect("a pass ran");
    if routing.topk_experts != expected.router.topk_experts {
        let at = (0..).find(|&a| routing.topk_experts[a] != expected.router.topk_experts[a]).unwrap_or(0);
        return Some(format!(
            "assignment {at} went to {}, expected {}",
            routing.topk_experts[at], expected.router.topk_experts[at]
        ));
    }
    let close = |name: &str, got: &[f32], want: &[f64], bound: f64| {
        let scale = want.iter().fold(1e-30f64, |most, w| most.max(w.abs()));
        let fits = |got: f32, want: f64| (f64::from(got) - want).abs() <= bound * scale; // not if either is NaN
        let at = got.iter().zip(want).position(|(&got, &want)| !fits(got, want));
        (got.len() != want.len() || at.is_some())
            .then(|| format!("{name}[{at:?}] of {}: {:?}", want.len(), at.map(|at| (got[at], want[at]))))
    };
    close("weights", &routing.topk_weights, &expected.router.topk_weights, 1e-5)
        .or_else(|| close("shared weights", &routing.shared_weights, &expected.router.shared_weights, 1e-5))
        .or_else(|| close("logits", &routing.router_logits, &expected.router.router_logits, 1e-5))
        .or_else(|| close("y", &y, &expected.y, 1e-5))
        .or_else(|| {
            (routing.num_dropped != expected.router.topk_experts.iter().filter(|&&e| e == DROPPED).count())
                .then(|| format!("{} dropped", routing.num_dropped))
        })
}

fn check_all(context: &Context, count: usize) {
    let mut failed = Vec::new();
    let only = std::env::var("WGMOE_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    for (seed, case) in decided_cases(count).filter(|(seed, _)| only.is_none_or(|only| only == *seed)) {
        if let Some(difference) = difference(context, &case) {
            println!("seed {seed}: {difference}\n    {:?}", case.config);
            failed.push(seed);
        }
    }
    assert!(failed.is_empty(), "{} of {count} layers differ from the definition: seeds {failed:?}", failed.len());
}

#[test]
fn every_layer_is_what_the_definition_says_on_the_gpu() {
    let Some(context) = gpu_context() else { return };
    check_all(&context, 150);
}

/// The comparison above can fail, for each thing that it compares.
#[test]
fn a_wrong_layer_is_noticed() {
    let context = Context::cpu();
    let (_, mut case) = decided_cases(50).find(|(_, c)| c.config.extras().shared.is_some()).expect("there is one");
    assert_eq!(difference(&context, &case), None);
    let layer = MoeLayer::new(&context, case.config.clone(), &case.weights).expect("valid");
    let right = layer.forward_batch(&case.batch()).expect("it runs");
    case.weights.extras.shared_up_proj.iter_mut().for_each(|w| *w *= 1.001);
    let layer = MoeLayer::new(&context, case.config.clone(), &case.weights).expect("valid");
    let wrong = layer.forward_batch(&case.batch()).expect("it runs");
    assert_ne!(bits(&right), bits(&wrong));
}

#[test]
fn statistics_are_those_of_the_definition() {
    let mut contexts = vec![Context::cpu()];
    contexts.extend(gpu_context());
    for context in contexts {
        for (seed, case) in decided_cases(if context.gpu().is_some() { 12 } else { 60 }) {
            let layer = MoeLayer::new(&context, case.config.clone(), &case.weights).expect("valid");
            layer.forward_batch(&case.batch()).expect("it runs");
            let expected = reference::moe_forward(&case.config, &case.weights, case.batch());
            let sequence = case.tokens_per_sequence.map_or(case.num_tokens(), |n| n as usize);
            let expected = reference::statistics::statistics(&case.config, &expected.router, sequence);
            let got = layer.statistics().expect("a pass ran");
            assert_eq!(got.tokens_per_expert, expected.tokens_per_expert, "seed {seed}");
            assert_eq!(got.num_dropped, expected.num_dropped, "seed {seed}");
            for (name, got, expected) in [
                ("switch loss", got.switch_load_balancing_loss, expected.switch_load_balancing_loss),
                ("loss", got.load_balancing_loss, expected.load_balancing_loss),
                ("z-loss", got.router_z_loss, expected.router_z_loss),
                ("entropy", got.entropy, expected.entropy),
            ] {
                assert!(
                    (got - expected).abs() <= 1e-5 * expected.abs().max(0.1),
                    "seed {seed}: {name} {got} {expected}"
                );
            }
        }
    }
    assert!((log_sum_exp(&[0.0, 0.0]) - 2.0f64.ln()).abs() < 1e-15);
}

#[test]
fn functions_are_their_definitions() {
    for (function, at_one) in [
        (Function::Silu, 0.731_058_578_630_004_9),
        (Function::Gelu, 0.841_344_746_068_543),
        (Function::GeluTanh, 0.841_191_990_608_276_8),
        (Function::GeluQuick, 0.845_795_765_915_829),
        (Function::Relu, 1.0),
        (Function::Relu2, 1.0),
    ] {
        assert!((function.apply(1.0) - at_one).abs() < 1e-9, "{function:?}: {}", function.apply(1.0));
        assert_eq!(function.apply(0.0), 0.0);
    }
    let oss = Activation { form: Form::GptOss { limit: 7.0, alpha: 1.702 }, function: Function::Silu };
    assert!((oss.apply(1.0, 1.0) - 2.0 * 0.845_795_765_915_829).abs() < 1e-7); // 1.702 as f32
}

/// One expert of a case's weights, as a value of its own.
fn expert(case: &Case, id: usize) -> ExpertWeights {
    let c = &case.config;
    let [h, i, d] = [c.hidden_size(), c.intermediate_size(), c.expert_size()].map(|n| n as usize);
    let w = &case.weights;
    let part = |values: &[f32], size: usize| values.get(id * size..(id + 1) * size).unwrap_or_default().to_vec();
    let row = |values: &Option<Vec<f32>>, size| values.as_deref().map(|values| part(values, size));
    let one = |values: &Option<Vec<f32>>, other: f32| values.as_ref().map_or(other, |values| values[id]);
    ExpertWeights {
        gate_proj: part(&w.gate_proj, i * d),
        up_proj: part(&w.up_proj, i * d),
        down_proj: part(&w.down_proj, d * i),
        gate_bias: row(&w.extras.gate_bias, i),
        up_bias: row(&w.extras.up_bias, i),
        down_bias: row(&w.extras.down_bias, d),
        router_row: part(&w.router, h),
        router_bias: one(&w.router_bias, 0.0),
        selection_bias: one(&w.extras.selection_bias, 0.0),
        per_expert_scale: one(&w.extras.per_expert_scale, 1.0),
    }
}

/// A layer without one of its experts, and with it added again, does what layers made anew do; weights in several pages.
#[test]
fn edited_layers_are_those_made_anew() {
    let Some(context) = gpu_context() else { return };
    let mut edited = 0;
    for (seed, case) in decided_cases(400).filter(|(_, case)| {
        let c = &case.config;
        c.num_weighted_experts() > 2 && c.top_k() < c.num_experts() - 1 && !c.routing().is_dense()
    }) {
        let options = LayerOptions { max_binding_bytes: Some(8 << 10), ..LayerOptions::default() };
        let with = |context, config: &MoeConfig, weights: &MoeWeights| {
            MoeLayer::with_options(context, config.clone(), weights, &options)
        };
        let Ok(mut layer) = with(&context, &case.config, &case.weights) else { continue };
        let removed = seed as u32 % case.config.num_weighted_experts();
        let mut weights = case.weights.clone();
        // Groups that would no longer divide, token tables and the like are refused.
        let Ok(config) = weights.remove_expert(&case.config, removed) else {
            assert!(layer.remove_expert(removed).is_err(), "seed {seed}");
            continue;
        };
        layer.remove_expert(removed).expect("the host form can");
        assert_eq!(layer.config(), &config);
        let experts: Vec<i32> = case.experts.iter().map(|&e| e.min(config.num_experts() as i32 - 1)).collect();
        let batch = Batch { experts: Some(&experts), ..case.batch() };
        let anew = with(&context, &config, &weights).and_then(|layer| layer.forward_batch(&batch)).expect("valid");
        assert_eq!(bits(&layer.forward_batch(&batch).expect("it runs")), bits(&anew), "seed {seed}: removed");

        let id = layer.add_expert(&expert(&case, removed as usize)).expect("there was room");
        assert_eq!(id, config.num_weighted_experts());
        let grown = weights.insert_expert(&config, id, &expert(&case, removed as usize)).expect("the same");
        let anew = with(&context, &grown, &weights).and_then(|layer| layer.forward_batch(&batch)).expect("valid");
        assert_eq!(bits(&layer.forward_batch(&batch).expect("it runs")), bits(&anew), "seed {seed}: added");

        layer.replace_expert(0, &expert(&case, removed as usize)).expect("it fits");
        let changed = layer.forward_batch(&batch).expect("it runs");
        layer.replace_expert(0, &expert(&case, usize::from(removed == 0))).expect("it fits");
        assert_ne!((bits(&changed), removed), (bits(&layer.forward_batch(&batch).expect("it runs")), u32::MAX));
        assert!(layer.remove_expert(config.num_experts() + 7).is_err());
        edited += 1;
        if edited == 6 {
            return;
        }
    }
    panic!("only {edited} layers could be edited");
}

/// A last expert that no token wants: every bit stays. In the second layer the logits are a matmul of their own on
/// software drivers, whose matrix has to be made anew.
#[test]
fn an_expert_that_nobody_chooses_changes_no_bits() {
    let mut contexts = vec![Context::cpu()];
    contexts.extend(gpu_context());
    for context in contexts {
        for (scores, [h, i, e]) in [
            (Scores::Softmax, [64, 32, 8]),
            (Scores::SoftmaxSelected, [64, 32, 8]),
            (Scores::Sigmoid, [64, 32, 8]),
            (Scores::Softmax, [512, 8, 250]),
        ] {
            let mut values = Values(5);
            let config = MoeConfig::new(h, i, e, 2, Routing::new(scores, true), Activation::SWIGLU).expect("valid");
            let weights = values.weights(&config);
            let [h, i] = [h as usize, i as usize];
            let x = values.even(40 * h).into_iter().map(|v| v + 1.5).collect::<Vec<f32>>();
            let mut layer = MoeLayer::new(&context, config, &weights).expect("valid");
            let before = layer.forward(&x).expect("it runs");
            let unwanted = ExpertWeights {
                gate_proj: values.even(i * h),
                up_proj: values.even(i * h),
                down_proj: values.even(i * h),
                router_row: vec![-1.0; h], // all x are positive
                ..ExpertWeights::default()
            };
            let id = layer.add_expert(&unwanted).expect("it fits");
            let after = layer.forward(&x).expect("it runs");
            assert_eq!(layer.routing().expect("a pass ran").tokens_per_expert[id as usize], 0);
            assert_eq!(bits(&after), bits(&before), "{scores:?}");
            // The comparison can fail: one that everybody wants changes them.
            layer.replace_expert(id, &ExpertWeights { router_row: vec![1.0; h], ..unwanted }).expect("it fits");
            assert_ne!(bits(&layer.forward(&x).expect("it runs")), bits(&before));
            assert_eq!(layer.routing().expect("a pass ran").tokens_per_expert[id as usize], 40);
        }
    }
}

/// The pass in the caller's encoder, behind a router of the caller's: the bits of the calls that take slices.
#[test]
fn recorded_fronts_are_the_forward_ones() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("it is a GPU context");
    let (device, queue) = (gpu.device(), gpu.queue());
    let buffer = |content: &[u8], usage| {
        let desc = wgpu::BufferDescriptor { label: None, size: content.len() as u64, usage, mapped_at_creation: true };
        let buffer = device.create_buffer(&desc);
        buffer.get_mapped_range_mut(..).expect("mapped at creation").copy_from_slice(content);
        buffer.unmap();
        buffer
    };
    let storage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC;
    let mut values = Values(11);
    for selection in [Selection::TopK, Selection::Given, Selection::TokenTable { vocab_size: 5 }] {
        let routing = Routing { selection, ..Routing::new(Scores::Sigmoid, true) };
        let config = MoeConfig::new(32, 16, 6, 2, routing, Activation::SWIGLU).expect("valid");
        let mut weights = values.weights(&config);
        weights.extras.token_table =
            matches!(selection, Selection::TokenTable { .. }).then(|| vec![0, 1, 2, 3, 4, 5, 0, 2, 1, 5]);
        let layer = MoeLayer::new(&context, config, &weights).expect("valid");
        let tokens = 20u32;
        let x = values.even(tokens as usize * 32);
        let logits = values.even(tokens as usize * 6);
        let experts: Vec<i32> = (0..tokens as i32 * 2).map(|a| if a % 9 == 8 { -1 } else { a * 5 % 6 }).collect();
        let given = values.even(tokens as usize * 2);
        let ids: Vec<u32> = (0..tokens).map(|t| t % 5).collect();

        let [x_buffer, logits_buffer, given_buffer] =
            [&x, &logits, &given].map(|values| buffer(bytemuck::cast_slice(values), storage));
        let experts_buffer = buffer(bytemuck::cast_slice(&experts), storage);
        let ids_buffer = buffer(bytemuck::cast_slice(&ids), storage);
        let y = buffer(&vec![0; x.len() * 4], storage);
        let run = |record: &dyn Fn(&mut wgpu::CommandEncoder) -> wgmoe::Result<()>| {
            let mut encoder = device.create_command_encoder(&Default::default());
            record(&mut encoder)?;
            queue.submit([encoder.finish()]);
            Ok::<_, wgmoe::Error>(bits(&read_buffer(device, queue, &y)))
        };

        let front = Front::Assignments { experts: &experts, weights: &given };
        let expected = layer.forward_batch(&Batch { front, ..Batch::from(&x) }).expect("it runs");
        assert_eq!(expected, layer.forward_with_assignments(&x, &experts, &given).expect("it runs"));
        let both = [&experts_buffer, &given_buffer];
        let got = run(&|encoder| layer.record_with_assignments(encoder, &x_buffer, both, &y, tokens));
        assert_eq!(got.expect("it records"), bits(&expected), "{selection:?}: assignments");
        assert!(layer.statistics().is_err(), "there are no logits to sum up");

        let batch = Batch { token_ids: Some(&ids), experts: Some(&experts), ..Batch::from(&x) };
        let got = run(&|encoder| match selection {
            Selection::TopK => layer.record(encoder, &x_buffer, &y, tokens),
            Selection::Given => layer.record_with_ids(encoder, &x_buffer, &experts_buffer, &y, tokens),
            _ => layer.record_with_ids(encoder, &x_buffer, &ids_buffer, &y, tokens),
        });
        let expected = layer.forward_batch(&batch).expect("it runs");
        assert_eq!(got.expect("it records"), bits(&expected), "{selection:?}: own router");
        if selection == Selection::TopK {
            let expected = layer.forward_with_logits(&x, &logits).expect("it runs");
            let got = run(&|encoder| layer.record_with_logits(encoder, &x_buffer, &logits_buffer, &y, tokens));
            assert_eq!(got.expect("it records"), bits(&expected), "logits");
            assert_eq!(layer.routing().expect("a pass ran").router_logits, logits);
            // Ids where there is nothing to choose by ids, and the other way round, say so.
            assert!(run(&|encoder| layer.record_with_ids(encoder, &x_buffer, &ids_buffer, &y, tokens)).is_err());
        } else {
            assert!(run(&|encoder| layer.record(encoder, &x_buffer, &y, tokens)).is_err());
            assert!(layer.upload(&x).is_err(), "a resident input has no ids");
        }
        let short = buffer(&[0; 16], storage);
        assert!(run(&|encoder| layer.record_with_logits(encoder, &x_buffer, &short, &y, tokens)).is_err());
    }
}

/// Whatever a layer has: once it has seen a batch, it allocates nothing more, and reads nothing back on the way.
#[test]
fn a_steady_state_allocates_nothing() {
    let Some(context) = gpu_context() else { return };
    for (seed, case) in decided_cases(14) {
        let layer = MoeLayer::new(&context, case.config.clone(), &case.weights).expect("valid");
        let first = layer.forward_batch(&case.batch()).expect("it runs");
        let again = layer.forward_batch(&case.batch()).expect("it runs");
        let stats = layer.pass_stats();
        assert_eq!((stats.allocations, stats.readbacks), (0, 0), "seed {seed}");
        assert_eq!(bits(&again), bits(&first), "seed {seed}");
    }
}

/// The most experts, the most choices, groups and a bias: still one router dispatch.
#[test]
fn limited_choice_among_the_most_experts_is_one_dispatch() {
    let Some(context) = gpu_context() else { return };
    let mut values = Values(21);
    for (groups, keep) in [(8, 4), (128, 5), (2, 1)] {
        let groups = Groups { num_groups: groups, keep, score: GroupScore::SumTop2, masked: Masked::NegInfinity };
        let routing = Routing { groups: Some(groups), scale: 2.5, ..Routing::new(Scores::Sigmoid, true) };
        let config = MoeConfig::new(24, 4, 1024, 32, routing, Activation::SWIGLU).expect("valid");
        let mut weights = values.weights(&config);
        weights.router.iter_mut().for_each(|w| *w *= 3.0);
        weights.extras.selection_bias = Some(values.even(1024).into_iter().map(|b| 0.2 * b).collect());
        let x = values.even(21 * 24);
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        let names = |name: &str| layer.plan(21).expect("it fits").names().filter(|n| *n == name).count();
        assert_eq!((names("router"), names("logits")), (1, 0));
        let y = layer.forward(&x).expect("it runs");
        let routing = layer.routing().expect("a pass ran");
        // Among a thousand ranks some are close: the device's own logits decide, and of those it has to be right.
        let experts = routing.router_logits.iter().map(|&l| f64::from(l)).collect();
        let logits = reference::router::Logits { experts, shared: Vec::new() };
        let own = reference::router::route(&config, &weights, logits, &Batch::from(&x));
        let wrong = routing.topk_experts.iter().zip(&own.topk_experts).filter(|(a, b)| a != b).count();
        assert!(wrong <= 2, "{wrong} of {} choices differ", own.topk_experts.len());
        let group = |expert: &u32| expert / (1024 / groups.num_groups);
        for chosen in routing.topk_experts.chunks_exact(32) {
            let mut used: Vec<u32> = chosen.iter().map(group).collect();
            used.sort_unstable();
            used.dedup();
            assert!(used.len() <= keep as usize, "{used:?}");
        }
        let expected = reference::forward_with_routing(&config, &weights, &x, own).y;
        let most = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        let error = y.iter().zip(&expected).fold(0.0f64, |most, (y, e)| most.max((f64::from(*y) - e).abs())) / most;
        assert!(wrong > 0 || error < 1e-5, "{error:e}");
    }
}
