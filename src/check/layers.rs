//! Whole layers that between them use every kind of router, expert and surrounding: what one stage at a time does not
//! show is whether the stages fit together.

use crate::bench::workload::Workload;
use crate::context::Context;
use crate::error::Result;
use crate::golden;
use crate::layer::MoeLayer;
use crate::model::activation::{Activation, Form, Function};
use crate::model::batch::Batch;
use crate::model::config::{LayerExtras, MoeConfig, Norm, SharedExperts, SharedGate, SpecialKind};
use crate::model::routing::{
    Capacity, CapacityLimit, GroupScore, Groups, Masked, Priority, Renormalize, Routing, Scores, Selection,
};
use crate::model::weights::MoeWeights;
use crate::reference;

use super::verdict::{compare, nmse};
use super::{CheckKind, KernelCheck};

/// Tokens of each check; two sequences.
const TOKENS: u32 = 38;

/// Number of layers.
pub(super) fn count() -> usize {
    layers().len()
}

/// Runs every layer on the context. `begin(name)` is called before each.
pub(super) fn check(context: &Context, mut begin: impl FnMut(&str)) -> Result<Vec<KernelCheck>> {
    let mut checks = Vec::new();
    for (index, (name, config)) in layers().into_iter().enumerate() {
        begin(name);
        let config = config?;
        let workload = Workload::without_surroundings(config.clone(), 0.5, 31 + index as u64)?;
        let weights = complete(workload.weights.clone(), &config, index as u32);
        let x = workload.input(TOKENS)?;
        let token_ids: Vec<u32> = (0..TOKENS).map(|t| t * 7 % 11).collect();
        let experts: Vec<i32> = (0..TOKENS * config.top_k())
            .map(|a| if a % 5 == 4 { -1 } else { (a * 3 % config.num_experts()) as i32 })
            .collect();
        let batch = Batch {
            x: &x,
            tokens_per_sequence: Some(TOKENS / 2),
            token_ids: Some(&token_ids),
            experts: Some(&experts),
            ..Batch::default()
        };
        let expected = reference::moe_forward(&config, &weights, batch);
        let layer = MoeLayer::new(context, config.clone(), &weights)?;
        let y = layer.forward_batch(&batch)?;
        let routing = layer.routing()?;
        let most = expected.y.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        let mut verdict = compare(&y, &expected.y, nmse::LAYER, |_| golden::TOLERANCE * most);
        if let Some(at) =
            (0..routing.topk_experts.len()).find(|&a| routing.topk_experts[a] != expected.router.topk_experts[a])
        {
            let (got, want) = (routing.topk_experts[at], expected.router.topk_experts[at]);
            verdict.reason = Some(format!("assignment {at} went to expert {got}, expected {want}"));
        }
        let [h, i, e, k] = [config.hidden_size(), config.intermediate_size(), config.num_experts(), config.top_k()];
        let shape = format!("t{TOKENS} h{h} i{i} e{e} k{k} f32");
        checks.push(KernelCheck::new(CheckKind::Layer, format!("layer.{name}"), shape, verdict));
    }
    Ok(checks)
}

/// Name and layer.
fn layers() -> Vec<(&'static str, Result<MoeConfig>)> {
    let sum = Some(Renormalize { epsilon: 1e-20, ..Renormalize::default() });
    let sigmoid = Routing { renormalize: sum, scale: 2.5, ..Routing::new(Scores::Sigmoid, true) };
    let groups = Groups { num_groups: 4, keep: 2, score: GroupScore::SumTop2, masked: Masked::NegInfinity };
    let norm = Some(Norm { epsilon: 1e-6, scale_first: false });
    let silu = |form| Activation { form, function: Function::Silu };
    let swiglu = Activation::SWIGLU;
    let shared = |gate, activation| {
        let num = if gate == SharedGate::Joint { 2 } else { 1 };
        LayerExtras {
            shared: Some(SharedExperts { num, intermediate_size: 40, activation, gate, average: false }),
            ..LayerExtras::default()
        }
    };
    let layer = |routing, activation, top_k, extras: LayerExtras| {
        MoeConfig::new(64, 48, 16, top_k, routing, activation).and_then(|config| config.with_extras(extras))
    };
    let capacity = Capacity {
        limit: CapacityLimit::Fraction { fraction: 1.25 / 16.0, round_up: true, minimum: 1 },
        per_sequence: true,
        priority: Priority::Position,
        renormalize_after: false,
        pass_through: false,
    };
    // Enough experts for the logits to be a matmul of their own on software drivers.
    let many = |routing, extras: LayerExtras| {
        MoeConfig::new(512, 8, 256, 8, routing, swiglu).and_then(|config| config.with_extras(extras))
    };
    let plain = LayerExtras::default;
    let relu = Activation::plain(Function::Relu);
    vec![
        ("many_experts", many(Routing::softmax(true), plain())),
        (
            "many_experts_limited",
            many(Routing { groups: Some(groups), ..sigmoid }, shared(SharedGate::Sigmoid, swiglu)),
        ),
        (
            "deepseek_v3",
            layer(Routing { groups: Some(groups), ..sigmoid }, swiglu, 4, shared(SharedGate::None, swiglu)),
        ),
        (
            "deepseek_v4_hash",
            layer(
                Routing {
                    selection: Selection::TokenTable { vocab_size: 11 },
                    scores: Scores::SqrtSoftplus,
                    ..sigmoid
                },
                silu(Form::Clamped { limit: 0.75 }),
                3,
                shared(SharedGate::None, silu(Form::Clamped { limit: 0.75 })),
            ),
        ),
        ("qwen2_moe", layer(Routing::softmax(false), swiglu, 4, shared(SharedGate::Sigmoid, swiglu))),
        (
            "gpt_oss",
            layer(
                Routing::new(Scores::SoftmaxSelected, false),
                silu(Form::GptOss { limit: 1.0, alpha: 1.702 }),
                4,
                plain(),
            ),
        ),
        (
            "llama4",
            layer(
                Routing { weigh_input: true, ..Routing::new(Scores::Sigmoid, false) },
                swiglu,
                1,
                shared(SharedGate::None, swiglu),
            ),
        ),
        (
            "phimoe",
            layer(
                Routing { selection: Selection::Sparsemixer { jitter: 0.3 }, ..Routing::softmax(false) },
                swiglu,
                2,
                plain(),
            ),
        ),
        (
            "gemma4",
            layer(
                Routing::softmax(true),
                Activation::gated(Function::GeluTanh),
                4,
                LayerExtras { router_norm: norm, expert_norm: norm, routed_norm: norm, ..plain() },
            ),
        ),
        (
            "nemotron_latent",
            layer(
                sigmoid,
                Activation::plain(Function::Relu2),
                3,
                LayerExtras { latent_size: Some(36), ..shared(SharedGate::None, Activation::plain(Function::Relu2)) },
            ),
        ),
        (
            "kimi_k3",
            layer(
                sigmoid,
                silu(Form::SoftCapped { gate: 4.0, up: 25.0 }),
                4,
                LayerExtras { latent_size: Some(32), output_norm: norm, ..plain() },
            ),
        ),
        (
            "inkling",
            layer(
                Routing { renormalize: Some(Renormalize::default()), ..sigmoid },
                swiglu,
                3,
                shared(SharedGate::Joint, swiglu),
            ),
        ),
        (
            "longcat_flash",
            layer(
                Routing { scale: 2.5, ..Routing::softmax(false) },
                swiglu,
                4,
                LayerExtras { special_experts: 4, special_kind: SpecialKind::Identity, ..plain() },
            ),
        ),
        (
            "muse_spark",
            layer(
                Routing { logit_scale: 0.7, logit_softcap: Some(8.0), ..sigmoid },
                swiglu,
                3,
                LayerExtras {
                    expert_out_norm: Some(Norm { epsilon: 1e-8, scale_first: true }),
                    routed_scale: 1.5,
                    ..plain()
                },
            ),
        ),
        ("switch", layer(Routing { capacity: Some(capacity), ..Routing::softmax(false) }, relu, 1, plain())),
        (
            "nllb",
            layer(
                Routing {
                    capacity: Some(Capacity {
                        priority: Priority::Score,
                        renormalize_after: true,
                        per_sequence: false,
                        ..capacity
                    }),
                    ..Routing::softmax(true)
                },
                relu,
                2,
                plain(),
            ),
        ),
        (
            "expert_choice",
            layer(
                Routing { selection: Selection::ExpertChoice, capacity: Some(capacity), ..Routing::softmax(false) },
                Activation::gated(Function::Gelu),
                16,
                plain(),
            ),
        ),
        (
            "hierarchical",
            layer(
                Routing {
                    scores: Scores::Hierarchical,
                    groups: Some(Groups { keep: 4, ..groups }),
                    selection: Selection::Dense,
                    ..Routing::softmax(false)
                },
                Activation::gated(Function::GeluQuick),
                16,
                plain(),
            ),
        ),
        (
            "given",
            layer(Routing { selection: Selection::Given, ..sigmoid }, swiglu, 2, shared(SharedGate::Mix, swiglu)),
        ),
    ]
}

/// The tensors that the configuration asks for beside those of every layer, and biases where there may be some.
fn complete(mut weights: MoeWeights, config: &MoeConfig, index: u32) -> MoeWeights {
    let [h, i, d, e] = [config.hidden_size(), config.intermediate_size(), config.expert_size(), config.num_experts()]
        .map(|n| n as usize);
    let weighted = config.num_weighted_experts() as usize;
    let mut state = index.wrapping_mul(0x9e37_79b9) | 1;
    // Multiples of 2^-8 from -1 to 1: sums of them are exact for a while, and every format holds them.
    let mut values = |len: usize, scale: f32| -> Vec<f32> {
        let next = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 23) as f32 / 256.0 - 1.0) * scale
        };
        (0..len).map(next).collect()
    };
    let fan = |n: usize| 1.5 / (n as f32).sqrt();
    // The workload's matrices are those of a layer without surroundings.
    weights.gate_proj = if config.activation().is_gated() { values(weighted * i * d, fan(d)) } else { Vec::new() };
    weights.up_proj = values(weighted * i * d, fan(d));
    weights.down_proj = values(weighted * d * i, fan(i));
    let extras = config.extras();
    let norm = |there: bool, values: &mut dyn FnMut(usize, f32) -> Vec<f32>, len| {
        there.then(|| values(len, 0.5).into_iter().map(|v| 1.0 + v).collect::<Vec<f32>>())
    };
    let x = &mut weights.extras;
    let selects = matches!(config.routing().selection, Selection::TopK);
    x.selection_bias = (selects && index.is_multiple_of(2)).then(|| values(e, 0.25));
    x.per_expert_scale = (index % 3 == 1).then(|| values(e, 0.25).into_iter().map(|v| 1.0 + v).collect());
    if index.is_multiple_of(3) {
        x.gate_bias = config.activation().is_gated().then(|| values(weighted * i, 0.5));
        x.up_bias = Some(values(weighted * i, 0.5));
        x.down_bias = Some(values(weighted * d, 0.5));
    }
    x.output_bias = (index % 4 == 2).then(|| values(h, 0.5));
    x.router_norm = norm(extras.router_norm.is_some(), &mut values, h);
    x.expert_norm = norm(extras.expert_norm.is_some(), &mut values, d);
    x.expert_out_norm = norm(extras.expert_out_norm.is_some(), &mut values, d);
    x.routed_norm = norm(extras.routed_norm.is_some(), &mut values, h);
    x.output_norm = norm(extras.output_norm.is_some(), &mut values, h);
    if extras.latent_size.is_some() {
        x.latent_in = Some(values(d * h, fan(h)));
        x.latent_out = Some(values(h * d, fan(d)));
    }
    if config.routing().scores == Scores::Hierarchical {
        let groups = config.routing().groups.map_or(0, |groups| groups.num_groups) as usize;
        x.group_router = Some(values(groups * h, fan(h)));
    }
    if let Some(rows) = config.vocab_size() {
        let entries = 0..rows * config.top_k();
        x.token_table = Some(entries.map(|n| (n * 5 + n / 3) % config.num_experts()).collect());
    }
    if let Some(shared) = extras.shared {
        let [n, s] = [shared.num, shared.intermediate_size].map(|n| n as usize);
        x.shared_gate_proj = if shared.activation.is_gated() { values(n * s * h, fan(h)) } else { Vec::new() };
        x.shared_up_proj = values(n * s * h, fan(h));
        x.shared_down_proj = values(n * h * s, fan(s));
        x.shared_gate = (shared.gate != SharedGate::None).then(|| values(n * h, fan(h)));
    }
    weights
}
