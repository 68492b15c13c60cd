//! Stage 1: which experts each token gets, and with which weight. See `shaders/router.wgsl`.

use super::{Access, Input, Kernel, Part, Stage, bind, wgsl};
use crate::model::config::{MoeConfig, SharedGate};
use crate::model::routing::{GroupScore, Noise, Priority, RankBy, Renormalize, Scores, Selection};

/// Tokens of one workgroup.
pub const TOKENS: u32 = 4;
/// Experts whose logits one lane computes at a time.
const EXPERTS: u32 = 4;
/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;
/// Lanes of one workgroup where lanes are not worth their barriers.
pub const FEW_LANES: u32 = 8;

/// Where the router's dot products come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Products {
    /// Made in the kernel, from an input of this kind.
    Fused(Input),
    /// Made before, by the grouped matmul.
    Ready,
}

/// Who routes; the kinds of [`Front`](crate::Front).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum FrontKind {
    /// The layer's own router.
    #[default]
    Router,
    /// Logits are given.
    Logits,
    /// Choices and weights are given.
    Assignments,
}

/// Whether this front needs the router kernel at all.
pub fn runs(config: &MoeConfig, front: FrontKind) -> bool {
    front != FrontKind::Assignments || config.num_gated_shared() > 0
}

/// Experts are ranked by something that is stored first, not by their logits alone.
pub fn stores_ranks(config: &MoeConfig, has_selection_bias: bool) -> bool {
    let routing = config.routing();
    let limited = routing.groups.is_some_and(|groups| groups.keep < groups.num_groups);
    matches!(routing.selection, Selection::TopK | Selection::Sparsemixer { .. }) && (limited || has_selection_bias)
}

/// Capacity asks for the score of each token's first choice.
pub fn stores_first_scores(config: &MoeConfig) -> bool {
    config.routing().capacity.is_some_and(|capacity| capacity.priority == Priority::Score)
}

/// Rows of the router's weights: experts, gated shared experts, groups, noise.
pub fn num_rows(config: &MoeConfig) -> u32 {
    let routing = config.routing();
    let groups = match (routing.scores, routing.groups) {
        (Scores::Hierarchical, Some(groups)) => groups.num_groups,
        _ => 0,
    };
    let noise = if routing.noise == Noise::NoisyTopK { config.num_experts() } else { 0 };
    config.num_experts() + config.num_gated_shared() + groups + noise
}

/// The router of `config`. `k_lanes` lanes share a dot product; `noise`: the pass has a seed.
pub fn kernel(
    config: &MoeConfig,
    has_selection_bias: bool,
    front: FrontKind,
    noise: bool,
    products: Products,
    workgroup_size: u32,
    k_lanes: u32,
) -> Kernel {
    let routing = config.routing();
    let given = front == FrontKind::Assignments;
    let (scores, scores_name) = scores_override(config, has_selection_bias);
    let mut overrides = vec![("WG_SIZE", workgroup_size), ("K_LANES", k_lanes), ("SCORES", scores)];
    let mut label = "router".to_owned();
    let mut parts = vec![wgsl!("router_params"), wgsl!("reduce")];
    match products {
        Products::Fused(input) => {
            parts.extend([wgsl!("step"), input.part(), wgsl!("products_fused")]);
            label.push_str(input.suffix());
        }
        Products::Ready => {
            parts.push(wgsl!("products_ready"));
            label.push_str(".ready");
        }
    }
    let mut add = |part: Part, name: &str| {
        parts.push(part);
        if !name.is_empty() {
            label.push('.');
            label.push_str(name);
        }
    };

    add(wgsl!("scores"), scores_name);
    let noise = if noise { routing.noise } else { Noise::None };
    if noise != Noise::None {
        add(wgsl!("noise"), "noise");
    }
    match (noise, products) {
        (_, Products::Ready) => {} // nothing of x is seen here
        (Noise::Jitter { .. }, _) => add(wgsl!("seen_jitter"), "jitter"),
        _ => add(wgsl!("seen_plain"), ""),
    }
    if routing.logit_scale == 1.0 && routing.logit_softcap.is_none() {
        add(wgsl!("logits_plain"), "");
    } else {
        add(wgsl!("logits_scaled"), "scaled");
    }
    match (front, noise, routing.scores) {
        (FrontKind::Router, Noise::NoisyTopK, _) => add(wgsl!("adjust_noise"), "noisy"),
        (FrontKind::Router, _, Scores::Hierarchical) => add(wgsl!("adjust_hierarchical"), "hierarchical"),
        _ => add(wgsl!("adjust_none"), ""),
    }
    let ranked = matches!(routing.selection, Selection::TopK | Selection::Sparsemixer { .. }) && !given;
    if !ranked {
        add(wgsl!("ranks_none"), "");
    } else if stores_ranks(config, has_selection_bias) {
        add(wgsl!("ranks_scores"), "ranks");
        let by_logits = routing.rank_by == RankBy::Logits || routing.scores == Scores::SoftmaxSelected;
        overrides.push(("RANK_BY_LOGITS", by_logits.into()));
        match routing.groups.filter(|groups| groups.keep < groups.num_groups) {
            Some(groups) => {
                overrides.push(("SUM_TOP2", (groups.score == GroupScore::SumTop2).into()));
                add(wgsl!("groups_limited"), "groups");
            }
            None => add(wgsl!("groups_all"), ""),
        }
    } else {
        add(wgsl!("ranks_logits"), "");
    }
    match routing.selection {
        _ if given => add(wgsl!("choose_given"), "assigned"),
        Selection::TopK | Selection::Sparsemixer { .. } => add(wgsl!("choose_top_k"), ""),
        Selection::Dense | Selection::ExpertChoice => add(wgsl!("choose_all"), "all"),
        Selection::TokenTable { .. } | Selection::Given => add(wgsl!("choose_given"), "given"),
    }
    match routing.selection {
        _ if given => add(wgsl!("weigh_given"), ""),
        Selection::Sparsemixer { .. } => add(wgsl!("weigh_sparsemixer"), "sparsemixer"),
        _ => add(wgsl!("weigh_scores"), ""),
    }
    overrides.extend([("FIRST_SCORES", stores_first_scores(config).into()), ("DROP_BROKEN", 0)]);
    add(wgsl!("finish_weights"), "");
    match noise {
        Noise::RandomSecond => add(wgsl!("drop_second"), "second"),
        _ => add(wgsl!("drop_none"), ""),
    }
    let gate = config.extras().shared.map_or(SharedGate::None, |shared| shared.gate);
    match gate {
        SharedGate::None => add(wgsl!("gates_none"), ""),
        SharedGate::Sigmoid | SharedGate::Joint | SharedGate::Mix => {
            let (number, name) = match gate {
                SharedGate::Joint => (1, "joint"),
                SharedGate::Mix => (2, "mix"),
                _ => (0, "shared"),
            };
            overrides.push(("GATE", number));
            add(wgsl!("gates_shared"), name);
        }
    }
    add(wgsl!("router"), "");

    let mut bindings = vec![
        bind(0, "params", Access::Uniform),
        bind(3, "router_vectors", Access::Read), // [3, num_experts]
        bind(4, "router_logits", Access::Write), // [num_tokens, num_experts], and more
        bind(7, "status", Access::Write),        // [4], then [num_tokens] if broken tokens are dropped
    ];
    match products {
        Products::Fused(_) => bindings.extend([
            bind(1, "router_weights", Access::Read), // [num_rows, hidden_size padded to 4]
            bind(2, "x", Access::Read),              // [num_tokens, hidden_size]
        ]),
        Products::Ready => bindings.push(bind(2, "products", Access::Read)), // [num_tokens, num_rows padded to 4]
    }
    if !given {
        bindings.push(bind(5, "topk_experts", Access::Write)); // [num_tokens, top_k]
        bindings.push(bind(6, "topk_weights", Access::Write)); // [num_tokens, top_k]
    }
    if gate != SharedGate::None {
        bindings.push(bind(8, "shared_weights", Access::Write)); // [num_tokens, num_shared]
    }
    Kernel { stage: Stage::Router, label, parts, bindings, overrides, workgroup_size, needs_subgroups: false }
}

/// The same router for [`NonFinite::Drop`](crate::NonFinite::Drop).
pub fn dropping(mut kernel: Kernel) -> Kernel {
    kernel.label.push_str(".dropping");
    kernel.overrides.iter_mut().filter(|(name, _)| *name == "DROP_BROKEN").for_each(|(_, value)| *value = 1);
    kernel
}

/// A softmax whose weights are divided by their sum needs only the chosen logits, and then they do not depend on the
/// others to the last bit.
fn only_chosen(config: &MoeConfig, has_selection_bias: bool) -> bool {
    matches!(config.routing().scores, Scores::Softmax | Scores::Hierarchical)
        && config.routing().renormalize == Some(Renormalize::default())
        && !stores_ranks(config, has_selection_bias)
        && !stores_first_scores(config)
        && !renormalizes_late(config)
}

/// The number of the scores in `shaders/scores.wgsl`, and their name.
fn scores_override(config: &MoeConfig, has_selection_bias: bool) -> (u32, &'static str) {
    let routing = config.routing();
    match routing.scores {
        Scores::Softmax | Scores::Hierarchical if only_chosen(config, has_selection_bias) => (1, "softmax_selected"),
        Scores::Softmax | Scores::Hierarchical => (0, "softmax"),
        Scores::SoftmaxSelected => (1, "softmax_selected"),
        Scores::Sigmoid => (2, "sigmoid"),
        Scores::SqrtSoftplus => (3, "sqrt_softplus"),
        Scores::Raw => (4, "raw"),
    }
}

/// Weights are divided by their norm after capacity has dropped some.
pub fn renormalizes_late(config: &MoeConfig) -> bool {
    config.routing().capacity.is_some_and(|capacity| capacity.renormalize_after)
}

/// The norm that the router divides by, unless a softmax over the choices has done so.
pub fn renormalize(config: &MoeConfig, has_selection_bias: bool) -> Option<Renormalize> {
    let is_done = renormalizes_late(config) || only_chosen(config, has_selection_bias);
    config.routing().renormalize.filter(|_| !is_done)
}

/// As many lanes share a dot product as are left when every group of experts has one.
/// Depends on the layer alone, never on the batch, so that a token's logits do not either.
pub fn k_lanes(num_experts: u32) -> u32 {
    (WG_SIZE / num_experts.div_ceil(EXPERTS).next_power_of_two().min(WG_SIZE)).clamp(1, 32)
}

/// Rounds of a lane's loops over the inputs, all its rows together.
pub fn rounds(num_rows: u32, hidden_size: u32, k_lanes: u32) -> u64 {
    let blocks = num_rows.div_ceil(EXPERTS * (WG_SIZE / k_lanes));
    u64::from(blocks) * u64::from(hidden_size.div_ceil(4).div_ceil(k_lanes))
}

/// Workgroups for `num_tokens` tokens.
pub fn workgroups(num_tokens: u32) -> u64 {
    u64::from(num_tokens.div_ceil(TOKENS))
}
