//! How a token chooses its experts and what weight each choice gets.
//!
//! One value of [`Routing`] says all of it. In the order in which it happens:
//!
//! ```text
//! logits    x . router^T + bias, times logit_scale, capped by logit_softcap
//! scores    a function of the logits: softmax, sigmoid, ...
//! ranks     scores or logits, plus a selection bias, with the weaker groups masked
//! choices   the top_k best ranks; or all experts, or given by the token
//! weights   scores at the choices, divided by their sum, times scale, times a scale of each expert
//! capacity  choices beyond what an expert takes are dropped
//! ```

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// The expert of an assignment that nobody computes: dropped by capacity, or given as -1 by the caller.
pub const DROPPED: u32 = u32::MAX;
/// Most groups of experts.
pub const MAX_GROUPS: u32 = 128;

/// How logits become scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scores {
    /// Softmax over all experts.
    #[default]
    Softmax,
    /// Softmax over the chosen experts only: they are chosen by their logits.
    SoftmaxSelected,
    /// `1 / (1 + exp(-logit))`, each expert for itself (DeepSeek-V3).
    Sigmoid,
    /// `sqrt(ln(1 + exp(logit)))` (DeepSeek-V4).
    #[serde(alias = "sqrtsoftplus")]
    SqrtSoftplus,
    /// The logit itself.
    Raw,
    /// Softmax over groups times softmax within each group: a mixture of mixtures (Jordan and Jacobs 1994). The
    /// groups are those of [`Routing::groups`]; a router row for each group gives the first softmax.
    Hierarchical,
}

impl Scores {
    /// The name used in files.
    pub fn name(self) -> &'static str {
        match self {
            Scores::Softmax => "softmax",
            Scores::SoftmaxSelected => "softmax_selected",
            Scores::Sigmoid => "sigmoid",
            Scores::SqrtSoftplus => "sqrt_softplus",
            Scores::Raw => "raw",
            Scores::Hierarchical => "hierarchical",
        }
    }
}

/// What experts are ranked by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RankBy {
    /// Their scores.
    #[default]
    Scores,
    /// Their logits, before any score function.
    Logits,
}

/// Who is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Selection {
    /// The experts with the best ranks, best first; on a tie the lowest index.
    #[default]
    TopK,
    /// One after the other. The weight of each choice is a softmax over the experts that are left and close to it:
    /// those with `(s - s_j) / max(|s_j|, s) <= 2 * jitter`, `s` the chosen logit (Phi-3.5-MoE, "sparsemixer" at
    /// inference). Weights do not sum to one.
    Sparsemixer {
        /// Half the width of what counts as close.
        jitter: f32,
    },
    /// Row `token id` of a table `[vocab_size, top_k]` (DeepSeek-V4's hash layers). Weights are the scores there.
    TokenTable {
        /// Rows of the table.
        vocab_size: u32,
    },
    /// The caller says who, token by token. Weights are the scores there.
    Given,
    /// Every expert (Jacobs, Jordan, Nowlan and Hinton 1991): `top_k` is `num_experts`, choice j is expert j.
    Dense,
    /// Each expert takes the tokens that score highest for it, as many as its [`Capacity`] (Zhou et al. 2022).
    /// `top_k` is `num_experts`; choice j is expert j, or dropped.
    ExpertChoice,
}

/// How a group of experts is scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// By its best rank (DeepSeek-V2).
    #[default]
    Max,
    /// By the sum of its two best ranks (DeepSeek-V3).
    SumTop2,
}

/// What the rank of an expert in a weaker group becomes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Masked {
    /// Minus infinity: never chosen.
    #[default]
    NegInfinity,
    /// Zero: chosen before an expert whose biased score is negative.
    Zero,
}

/// Experts in equal runs, of which a token may only use the best few.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Groups {
    /// Groups; divides `num_experts`.
    pub num_groups: u32,
    /// Groups that a token keeps.
    pub keep: u32,
    /// How groups are scored.
    pub score: GroupScore,
    /// What becomes of the others.
    pub masked: Masked,
}

/// Dividing a token's weights by their norm: `w / max(norm + epsilon, floor)`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Renormalize {
    /// 1: the sum of absolute values. 2: their Euclidean norm. And so on.
    pub p: f32,
    /// Added to the norm.
    pub epsilon: f32,
    /// The norm is not less than this.
    pub floor: f32,
}

impl Default for Renormalize {
    fn default() -> Self {
        Self { p: 1.0, epsilon: 0.0, floor: 0.0 }
    }
}

/// How many assignments an expert takes.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CapacityLimit {
    /// This many.
    Number(u32),
    /// This share of the tokens, rounded up (or down), but at least `minimum`.
    Fraction {
        /// Of the tokens. A capacity factor f is the fraction `f * top_k / num_experts`.
        fraction: f64,
        /// Round up; otherwise down.
        round_up: bool,
        /// At least this many.
        minimum: u32,
    },
}

/// Who goes first when an expert cannot take everyone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Earlier tokens, all of a token's choices together.
    #[default]
    Position,
    /// All first choices before all second choices, earlier tokens first within them (GShard).
    Choice,
    /// As `Choice`, but within them the tokens with the largest weight for their first choice go first
    /// ("batch-prioritised", Riquelme et al. 2021).
    Score,
}

/// A bound on the assignments of each expert; those beyond it are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Capacity {
    /// How many.
    pub limit: CapacityLimit,
    /// Count within each sequence of the batch instead of the whole batch.
    pub per_sequence: bool,
    /// Who goes first.
    pub priority: Priority,
    /// Renormalise after dropping, over what is left, instead of before.
    pub renormalize_after: bool,
    /// A dropped assignment contributes its token, times its weight, instead of zero.
    pub pass_through: bool,
}

impl Capacity {
    /// Assignments that each expert takes of `num_tokens` tokens.
    pub fn of_tokens(&self, num_tokens: u32) -> u32 {
        match self.limit {
            CapacityLimit::Number(number) => number,
            CapacityLimit::Fraction { fraction, round_up, minimum } => {
                let exact = fraction * f64::from(num_tokens);
                // A factor such as 0.1 has no exact value: what is meant to be whole stays whole.
                let whole = exact.round();
                let number = if (exact - whole).abs() < 1e-9 * whole.max(1.0) {
                    whole
                } else if round_up {
                    exact.ceil()
                } else {
                    exact.floor()
                };
                (number as u32).max(minimum) // saturates
            }
        }
    }
}

/// Randomness of a router, which is there for training: without a seed in the [`Batch`](crate::Batch) nothing of it
/// happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Noise {
    /// None.
    #[default]
    None,
    /// What the router sees of each input element is multiplied by a uniform number from `1 - epsilon` to
    /// `1 + epsilon` (Fedus et al. 2021).
    Jitter {
        /// Half the width.
        epsilon: f32,
    },
    /// `logit + normal * softplus(x . router_noise)` (Shazeer et al. 2017).
    NoisyTopK,
    /// The second choice is kept with probability `min(1, 2 * weight)` (Lepikhin et al. 2020).
    RandomSecond,
}

/// Everything about who computes for a token, and with which weight. See the [module](self) for the order of things.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Routing {
    /// How logits become scores.
    pub scores: Scores,
    /// What experts are ranked by.
    pub rank_by: RankBy,
    /// Who is chosen.
    pub selection: Selection,
    /// Only the best groups of experts take part.
    pub groups: Option<Groups>,
    /// Divide the weights of the chosen experts by their norm. There is no default: families differ.
    pub renormalize: Option<Renormalize>,
    /// Factor of every weight, after that.
    pub scale: f32,
    /// Factor of every logit. The bias is added before.
    pub logit_scale: f32,
    /// `cap * tanh(logit / cap)`, after the factor.
    pub logit_softcap: Option<f32>,
    /// The weight multiplies what the expert reads instead of what it writes (Llama-4).
    pub weigh_input: bool,
    /// Bound on each expert's assignments.
    pub capacity: Option<Capacity>,
    /// Randomness.
    pub noise: Noise,
}

impl Routing {
    /// Softmax over all experts, top-k; `renormalize`: the chosen weights sum to one.
    pub const fn softmax(renormalize: bool) -> Self {
        Self::new(Scores::Softmax, renormalize)
    }

    /// Top-k of these scores, and nothing else.
    pub const fn new(scores: Scores, renormalize: bool) -> Self {
        let sum = Renormalize { p: 1.0, epsilon: 0.0, floor: 0.0 };
        Self {
            scores,
            rank_by: RankBy::Scores,
            selection: Selection::TopK,
            groups: None,
            renormalize: if renormalize { Some(sum) } else { None },
            scale: 1.0,
            logit_scale: 1.0,
            logit_softcap: None,
            weigh_input: false,
            capacity: None,
            noise: Noise::None,
        }
    }

    /// The choices do not depend on the logits.
    pub fn choices_are_given(&self) -> bool {
        matches!(self.selection, Selection::TokenTable { .. } | Selection::Given)
    }

    /// Each token is scored against all experts, and choice j is expert j.
    pub fn is_dense(&self) -> bool {
        matches!(self.selection, Selection::Dense | Selection::ExpertChoice)
    }

    /// Some assignments may be computed by nobody.
    pub fn may_drop(&self) -> bool {
        self.capacity.is_some() || self.selection == Selection::Given || self.noise == Noise::RandomSecond
    }

    /// What contradicts itself or the number of experts.
    pub(crate) fn check(&self, num_experts: u32, top_k: u32) -> Result<()> {
        let number = |field, value: f32, what: &str| {
            if value.is_finite() { Ok(()) } else { Err(Error::config(field, value, what)) }
        };
        number("scale", self.scale, "a finite number")?;
        number("logit_scale", self.logit_scale, "a finite number")?;
        if let Some(cap) = self.logit_softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return Err(Error::config("logit_softcap", cap, "a positive number"));
        }
        if let Some(Renormalize { p, epsilon, floor }) = self.renormalize {
            if !(p.is_finite() && p >= 1.0) {
                return Err(Error::config("renormalize.p", p, "a number from 1 up"));
            }
            for (field, value) in [("renormalize.epsilon", epsilon), ("renormalize.floor", floor)] {
                if !(value.is_finite() && value >= 0.0) {
                    return Err(Error::config(field, value, "a number from 0 up"));
                }
            }
        }
        if let Selection::Sparsemixer { jitter } = self.selection
            && !(jitter.is_finite() && jitter >= 0.0)
        {
            return Err(Error::config("selection.jitter", jitter, "a number from 0 up"));
        }
        if matches!(self.selection, Selection::TokenTable { vocab_size: 0 }) {
            return Err(Error::config("vocab_size", 0, "at least 1"));
        }
        if self.is_dense() && top_k != num_experts {
            return Err(Error::config("top_k", top_k, format!("num_experts, {num_experts}: every expert is a choice")));
        }
        if matches!(self.noise, Noise::Jitter { epsilon } if !(0.0..=1.0).contains(&epsilon)) {
            return Err(Error::config("noise.jitter", format!("{:?}", self.noise), "epsilon from 0 to 1"));
        }
        self.check_groups(num_experts, top_k)?;
        self.check_capacity()
    }

    fn check_groups(&self, num_experts: u32, top_k: u32) -> Result<()> {
        let Some(Groups { num_groups, keep, score, .. }) = self.groups else {
            return match self.scores {
                Scores::Hierarchical => Err(Error::config("groups", "none", "groups, for hierarchical scores")),
                _ => Ok(()),
            };
        };
        if num_groups == 0 || num_groups > MAX_GROUPS || !num_experts.is_multiple_of(num_groups) {
            let expected = format!("1 to {MAX_GROUPS}, a divisor of num_experts, {num_experts}");
            return Err(Error::config("num_groups", num_groups, expected));
        }
        if keep == 0 || keep > num_groups {
            return Err(Error::config("keep_groups", keep, format!("1 to num_groups, {num_groups}")));
        }
        let group_size = num_experts / num_groups;
        if keep < num_groups && score == GroupScore::SumTop2 && group_size < 2 {
            return Err(Error::config("group_score", "sum_top2", "max, as each group has one expert"));
        }
        if self.selection == Selection::TopK && top_k > keep * group_size {
            let expected = format!("at most {}: {keep} groups of {group_size} experts", keep * group_size);
            return Err(Error::config("top_k", top_k, expected));
        }
        if keep < num_groups && self.selection != Selection::TopK {
            return Err(Error::config("keep_groups", keep, format!("num_groups, {num_groups}, unless top-k selects")));
        }
        Ok(())
    }

    fn check_capacity(&self) -> Result<()> {
        let Some(capacity) = self.capacity else {
            return match self.selection {
                Selection::ExpertChoice => Err(Error::config("capacity", "none", "a capacity, for expert choice")),
                _ => Ok(()),
            };
        };
        match capacity.limit {
            CapacityLimit::Number(0) => {
                Err(Error::config("capacity", 0, "at least 1, or no capacity for no limit: 0 would drop every token"))
            }
            CapacityLimit::Fraction { fraction, .. } if !(fraction.is_finite() && fraction > 0.0) => {
                Err(Error::config("capacity", fraction, "a positive factor or fraction"))
            }
            _ if capacity.renormalize_after && self.renormalize.is_none() => {
                Err(Error::config("renormalize_after", true, "a renormalize setting that it can be about"))
            }
            _ => Ok(()),
        }
    }
}

/// What becomes of a token whose router logits, or the weights made of them, are NaN or infinite. A logit of minus
/// infinity masks its expert, and is none of this unless all are. No policy lets such a token touch another's row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NonFinite {
    /// The pass is an error that counts such tokens, as is NaN or infinity in its input. What is recorded into a caller's
    /// encoder cannot fail: there it is as `Propagate`, and [`MoeLayer::status`](crate::MoeLayer::status) counts them.
    #[default]
    Error,
    /// They get no expert, and zeros as their output; they take no expert's capacity.
    Drop,
    /// They get experts, all different, and NaN as their output.
    Propagate,
}

impl NonFinite {
    /// What the output of such a token is filled with, where that is no error.
    pub(crate) fn row_value(self) -> Option<f32> {
        match self {
            NonFinite::Error => None,
            NonFinite::Drop => Some(0.0),
            NonFinite::Propagate => Some(f32::NAN),
        }
    }
}

/// What a pass counted on the device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PassStatus {
    /// Tokens whose logits or weights were not finite ([`NonFinite`]).
    pub non_finite_tokens: u32,
    /// Assignments beyond their expert's capacity.
    pub over_capacity: u32,
}

/// Who got which expert in a pass. Index vectors are row-major.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoutingDecision {
    /// Tokens of the pass.
    pub num_tokens: usize,
    /// Chosen experts, best first, [`DROPPED`] where nobody computes: `[num_tokens, top_k]`.
    pub topk_experts: Vec<u32>,
    /// Weight of each choice, also of dropped ones: `[num_tokens, top_k]`.
    pub topk_weights: Vec<f32>,
    /// Weight of each shared expert where the router gates them: `[num_tokens, num_shared]`, otherwise empty.
    pub shared_weights: Vec<f32>,
    /// Logits after scale and cap: `[num_tokens, num_experts]`.
    pub router_logits: Vec<f32>,
    /// Assignments of each expert, dropped ones not counted: `[num_experts]`.
    pub tokens_per_expert: Vec<u32>,
    /// Assignments that nobody computes.
    pub num_dropped: usize,
    /// Of those, assignments beyond their expert's capacity.
    #[serde(default)]
    pub over_capacity: u32,
    /// Tokens whose logits or weights were not finite, ascending ([`NonFinite`]).
    #[serde(default)]
    pub non_finite_tokens: Vec<u32>,
}
