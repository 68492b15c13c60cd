//! Stage 1, after its matmul: scores, selection, weights. Few values, and they scale everything that follows: f64.

use super::panels::Panels;
use crate::error::{Error, Result};
use crate::model::activation::sigmoid;
use crate::model::batch::Batch;
use crate::model::config::{MoeConfig, SharedGate};
use crate::model::noise;
use crate::model::routing::{
    DROPPED, GroupScore, Groups, Masked, Noise, NonFinite, Priority, RankBy, Renormalize, Routing, RoutingDecision,
    Scores, Selection,
};
use crate::model::weights::MoeWeights;
use rayon::prelude::*;

/// A router's weights. Matrices are f32 whatever the storage of the experts.
#[derive(Debug)]
pub(super) struct Router {
    /// `[num_experts, hidden_size]`
    pub logits: Panels,
    /// `[num_experts, hidden_size]`, read only if there is a seed.
    pub noise: Option<Panels>,
    /// Rows of the shared experts' gates, then rows of the groups: `[_, hidden_size]`
    pub gates: Option<Panels>,
    pub bias: Option<Vec<f32>>,
    pub selection_bias: Option<Vec<f32>>,
    pub per_expert_scale: Option<Vec<f32>>,
    token_table: Option<Vec<u32>>,
}

impl Router {
    pub fn pack(config: &MoeConfig, weights: &MoeWeights) -> Result<Self> {
        let extras = &weights.extras;
        let matrix = |rows: &[f32]| Panels::of_rows(rows, config.hidden_size() as usize);
        let parts = [&extras.shared_gate, &extras.group_router];
        let gates: Vec<f32> = parts.into_iter().flatten().flatten().copied().collect();
        Ok(Self {
            logits: matrix(&weights.router)?,
            noise: extras.router_noise.as_deref().map(matrix).transpose()?,
            gates: if gates.is_empty() { None } else { Some(matrix(&gates)?) },
            bias: weights.router_bias.clone(),
            selection_bias: extras.selection_bias.clone(),
            per_expert_scale: extras.per_expert_scale.clone(),
            token_table: extras.token_table.clone(),
        })
    }
}

/// What the router's matrices make of a pass.
#[derive(Default)]
pub(super) struct Logits {
    /// `[num_tokens, num_experts]`
    pub experts: Vec<f32>,
    /// The caller gave them: no bias, factor, cap or noise.
    pub are_final: bool,
    /// `[num_tokens, num_experts]`, or empty
    pub noise: Vec<f32>,
    /// `[num_tokens, shared experts with a gate + groups with a router]`, or empty
    pub gates: Vec<f32>,
}

/// Chooses each token's experts, before any capacity.
/// Also returns what the capacity goes by, if it does: `[num_tokens, top_k]` exact weights for expert choice,
/// `[num_tokens]` scores of the first choices for that priority, otherwise nothing.
///
/// Broken is a token whose logits hold NaN, or whose largest logit is infinite, or whose weights overflow; `non_finite`
/// says what becomes of it. A single logit of minus infinity is fine: it masks its expert.
pub(super) fn route(
    config: &MoeConfig,
    router: &Router,
    mut logits: Logits,
    batch: &Batch<'_>,
    non_finite: NonFinite,
) -> Result<(RoutingDecision, Vec<f64>)> {
    let [e, top_k] = [config.num_experts(), config.top_k()].map(|n| n as usize);
    let routing = config.routing();
    let num_tokens = logits.experts.len() / e;
    let num_shared = config.num_gated_shared() as usize;
    let rank_size = match (routing.selection, routing.capacity) {
        (Selection::ExpertChoice, _) => top_k,
        (_, Some(capacity)) if capacity.priority == Priority::Score => 1,
        _ => 0,
    };
    let mut router_logits = std::mem::take(&mut logits.experts);
    let mut topk_experts = vec![0; num_tokens * top_k];
    let mut topk_weights = vec![0.0; num_tokens * top_k];
    let mut shared_weights = vec![0.0; num_tokens * num_shared];
    let mut ranks = vec![0.0; num_tokens * rank_size];

    let pass = Pass {
        config,
        routing,
        router,
        batch,
        logits: &logits,
        gates: logits.gates.len().checked_div(num_tokens).unwrap_or(0),
        key: batch.seed.map(noise::key),
    };
    let mut tokens = Vec::with_capacity(num_tokens);
    let choices = topk_experts.chunks_exact_mut(top_k).zip(topk_weights.chunks_exact_mut(top_k));
    let (mut all_shared, mut all_ranks) = (&mut shared_weights[..], &mut ranks[..]);
    for (logits, (chosen, weights)) in router_logits.chunks_exact_mut(e).zip(choices) {
        let (shared, ranks);
        (shared, all_shared) = all_shared.split_at_mut(num_shared);
        (ranks, all_ranks) = all_ranks.split_at_mut(rank_size);
        tokens.push(Token { logits, chosen, weights, shared, ranks });
    }
    let non_finite_tokens: Vec<u32> = tokens
        .into_par_iter()
        .enumerate()
        .map_init(Scratch::default, |scratch, (t, token)| {
            (!pass.route_token(t, token, scratch, non_finite)).then_some(t as u32)
        })
        .flatten()
        .collect();
    if non_finite == NonFinite::Error && !non_finite_tokens.is_empty() {
        return Err(Error::NonFiniteLogits { num_tokens: non_finite_tokens.len() as u32 });
    }
    let decision = RoutingDecision {
        num_tokens,
        topk_experts,
        topk_weights,
        shared_weights,
        router_logits,
        non_finite_tokens,
        ..RoutingDecision::default()
    };
    Ok((decision, ranks))
}

/// The caller's choices and weights as a decision. Nobody looked at the router: there are no logits.
pub(super) fn assigned(
    config: &MoeConfig,
    gates: &[f32],
    num_tokens: usize,
    experts: &[i32],
    weights: &[f32],
    non_finite: NonFinite,
) -> Result<RoutingDecision> {
    let num_shared = config.num_gated_shared() as usize;
    let width = gates.len().checked_div(num_tokens).unwrap_or(0).max(1);
    let shared = || gates.chunks_exact(width).map(|gates| &gates[..num_shared]);
    let bad = |gates: &[f32]| gates.iter().any(|l| l.is_nan());
    let non_finite_tokens: Vec<u32> = (0..).zip(shared()).filter(|(_, gates)| bad(gates)).map(|(t, _)| t).collect();
    if non_finite == NonFinite::Error && !non_finite_tokens.is_empty() {
        return Err(Error::NonFiniteLogits { num_tokens: non_finite_tokens.len() as u32 });
    }
    Ok(RoutingDecision {
        num_tokens,
        topk_experts: experts.iter().map(|&e| expert_id(e)).collect(),
        topk_weights: weights.to_vec(),
        shared_weights: shared().flatten().map(|&gate| sigmoid(f64::from(gate)) as f32).collect(),
        non_finite_tokens,
        ..RoutingDecision::default()
    })
}

/// Counts of the assignments, once they are final.
pub(super) fn count(config: &MoeConfig, decision: &mut RoutingDecision) {
    decision.tokens_per_expert = vec![0; config.num_experts() as usize];
    decision.num_dropped = 0;
    for &expert in &decision.topk_experts {
        match decision.tokens_per_expert.get_mut(expert as usize) {
            Some(count) => *count += 1,
            None => decision.num_dropped += 1,
        }
    }
}

fn expert_id(given: i32) -> u32 {
    u32::try_from(given).unwrap_or(DROPPED)
}

/// One token's part of everything.
struct Token<'a> {
    logits: &'a mut [f32],
    chosen: &'a mut [u32],
    weights: &'a mut [f32],
    shared: &'a mut [f32],
    ranks: &'a mut [f64],
}

/// A thread's memory from token to token.
#[derive(Default)]
struct Scratch {
    ranks: Vec<f64>,
    group_scores: Vec<f64>,
    weights: Vec<f64>,
    shared: Vec<f64>,
}

/// What is the same for all tokens.
struct Pass<'a> {
    config: &'a MoeConfig,
    routing: Routing,
    router: &'a Router,
    batch: &'a Batch<'a>,
    logits: &'a Logits,
    /// Width of `logits.gates`.
    gates: usize,
    key: Option<u32>,
}

impl Pass<'_> {
    /// Whether it went well. If not, and that is no error, its choices are what `non_finite` says.
    fn route_token(&self, t: usize, token: Token<'_>, scratch: &mut Scratch, non_finite: NonFinite) -> bool {
        let Pass { routing, router, .. } = self;
        let Token { logits, chosen, weights, shared, ranks } = token;
        if !self.logits.are_final {
            self.finish_logits(t, logits);
        }
        let groups = routing.groups.filter(|groups| groups.keep < groups.num_groups);
        let ranked = matches!(routing.selection, Selection::TopK | Selection::Sparsemixer { .. });
        // No score falls where its logit rises, so that logits rank like scores, but with fewer ties.
        let as_logits = ranked && groups.is_none() && router.selection_bias.is_none();
        let max = if as_logits {
            top_k_indices(logits, chosen);
            logits[chosen[0] as usize]
        } else {
            logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
        };
        let broken = !max.is_finite() || logits.iter().any(|l| l.is_nan());
        if broken && non_finite == NonFinite::Error {
            return false;
        }

        let of_chosen = self.softmax_of_chosen();
        let by_logits = routing.rank_by == RankBy::Logits || routing.scores == Scores::SoftmaxSelected;
        let needs_scores = !of_chosen || ranked && !as_logits && !by_logits;
        let scorer = Scorer::new(routing.scores, if needs_scores { logits } else { &[] }, max);
        match routing.selection {
            _ if as_logits => {}
            Selection::TopK | Selection::Sparsemixer { .. } => {
                let score = |&logit: &f32| if by_logits { f64::from(logit) } else { scorer.score(logit) };
                scratch.ranks.clear();
                scratch.ranks.extend(logits.iter().map(score));
                for (rank, &bias) in scratch.ranks.iter_mut().zip(router.selection_bias.iter().flatten()) {
                    *rank += f64::from(bias);
                }
                if let Some(groups) = groups {
                    mask_groups(&mut scratch.ranks, groups, &mut scratch.group_scores);
                }
                top_k_indices(&scratch.ranks, chosen);
            }
            Selection::Dense | Selection::ExpertChoice => (0..).zip(chosen.iter_mut()).for_each(|(e, c)| *c = e),
            Selection::TokenTable { .. } => {
                let row = self.batch.token_ids.map_or(0, |ids| ids[t] as usize) * chosen.len();
                chosen.iter_mut().zip(router.token_table.iter().flatten().skip(row)).for_each(|(c, &id)| *c = id);
            }
            Selection::Given => {
                let given = self.batch.experts.unwrap_or_default().iter().skip(t * chosen.len());
                chosen.iter_mut().zip(given).for_each(|(c, &id)| *c = expert_id(id));
            }
        }

        let w = &mut scratch.weights;
        w.clear();
        match routing.selection {
            Selection::Sparsemixer { jitter } => sparsemixer_weights(logits, chosen, f64::from(jitter), w),
            _ if of_chosen => softmax_over_chosen(logits, chosen, w),
            _ => w.extend(chosen.iter().map(|&e| logits.get(e as usize).map_or(0.0, |&l| scorer.score(l)))),
        }
        if let [first] = ranks {
            *first = w[0];
        }
        scratch.shared.clear();
        let gate_logits = &self.logits.gates[t * self.gates..][..shared.len()];
        self.weigh(t, chosen, gate_logits, w, &mut scratch.shared);
        if ranks.len() == w.len() && routing.selection == Selection::ExpertChoice {
            ranks.copy_from_slice(w);
        }
        weights.iter_mut().zip(w).for_each(|(to, w)| *to = *w as f32);
        shared.iter_mut().zip(&scratch.shared).for_each(|(to, w)| *to = *w as f32);
        if !broken && weights.iter().chain(&*shared).all(|w| w.is_finite()) {
            return true;
        }
        ranks.fill(f64::NEG_INFINITY);
        if non_finite == NonFinite::Drop {
            chosen.fill(DROPPED);
            weights.fill(0.0);
        } else {
            weights.fill(f32::NAN);
        }
        false
    }

    /// The weights are a softmax over the chosen experts, whatever the others are: because the layer says so, or
    /// because dividing by the sum makes it so.
    fn softmax_of_chosen(&self) -> bool {
        let Routing { scores, capacity, renormalize, .. } = self.routing;
        let softmax_then_sum = scores == Scores::Softmax
            && renormalize == Some(Renormalize::default())
            && capacity.is_none_or(|capacity| !capacity.renormalize_after && capacity.priority != Priority::Score);
        scores == Scores::SoftmaxSelected || softmax_then_sum
    }

    /// Bias, factor, cap, noise, groups.
    fn finish_logits(&self, t: usize, logits: &mut [f32]) {
        let Routing { logit_scale, logit_softcap, groups, .. } = self.routing;
        if let Some(bias) = &self.router.bias {
            logits.iter_mut().zip(bias).for_each(|(logit, bias)| *logit += bias);
        }
        if logit_scale != 1.0 {
            logits.iter_mut().for_each(|logit| *logit *= logit_scale);
        }
        if let Some(cap) = logit_softcap.map(f64::from) {
            logits.iter_mut().for_each(|logit| *logit = (cap * (f64::from(*logit) / cap).tanh()) as f32);
        }
        if let (Some(key), false) = (self.key, self.logits.noise.is_empty()) {
            let widths = &self.logits.noise[t * logits.len()..];
            for (e, (logit, &width)) in (0..).zip(logits.iter_mut().zip(widths)) {
                let noise = noise::normal(key, t as u32, e) * softplus(f64::from(width));
                *logit = (f64::from(*logit) + noise) as f32;
            }
        }
        if let (Some(groups), Scores::Hierarchical) = (groups, self.routing.scores) {
            let group_logits = &self.logits.gates[t * self.gates..][..self.gates];
            let group_logits = &group_logits[self.gates - groups.num_groups as usize..];
            for (group, &group_logit) in logits.chunks_exact_mut(logits.len() / group_logits.len()).zip(group_logits) {
                // Such that softmax over all experts is softmax over groups times softmax within the group.
                let offset = f64::from(group_logit) - log_sum_exp(group);
                group.iter_mut().for_each(|logit| *logit = (f64::from(*logit) + offset) as f32);
            }
        }
    }

    /// From scores to weights: `w [top_k]` in place, `shared` filled. May drop the second choice.
    fn weigh(&self, t: usize, chosen: &mut [u32], gate_logits: &[f32], w: &mut [f64], shared: &mut Vec<f64>) {
        let routing = &self.routing;
        let gate = self.config.extras().shared.map_or(SharedGate::None, |shared| shared.gate);
        let joint = gate == SharedGate::Joint;
        shared.extend(gate_logits.iter().map(|&logit| match joint {
            true => Scorer::new(routing.scores, &[], 0.0).score(logit),
            false => sigmoid(f64::from(logit)),
        }));
        let before = routing.capacity.is_none_or(|capacity| !capacity.renormalize_after);
        let done = routing.scores == Scores::Softmax && self.softmax_of_chosen() && !self.is_sparsemixer();
        if let Some(renormalize) = routing.renormalize.filter(|_| before && !done) {
            let together = if joint { &shared[..] } else { &[] };
            let norm = norm(renormalize, w.iter().chain(together).copied());
            w.iter_mut().for_each(|w| *w /= norm);
            if joint {
                shared.iter_mut().for_each(|w| *w /= norm);
            }
        }
        if joint {
            shared.iter_mut().for_each(|w| *w *= f64::from(routing.scale));
        }
        let rest = if gate == SharedGate::Mix { 1.0 - shared[0] } else { 1.0 };
        for (w, &e) in w.iter_mut().zip(&*chosen) {
            let own = self.router.per_expert_scale.as_ref().and_then(|scale| scale.get(e as usize));
            *w *= f64::from(routing.scale) * own.map_or(1.0, |&own| f64::from(own)) * rest;
        }
        if let (Noise::RandomSecond, Some(key), true) = (routing.noise, self.key, chosen.len() > 1)
            && 2.0 * w[1] <= f64::from(noise::uniform(key, t as u32, 0))
        {
            chosen[1] = DROPPED;
        }
    }

    fn is_sparsemixer(&self) -> bool {
        matches!(self.routing.selection, Selection::Sparsemixer { .. })
    }
}

/// Scores of one token's logits.
struct Scorer {
    scores: Scores,
    max: f64,
    /// Of `exp(logit - max)`.
    sum: f64,
}

impl Scorer {
    /// `max` and the sum over `logits` are only for a softmax.
    fn new(scores: Scores, logits: &[f32], max: f32) -> Self {
        let max = f64::from(max);
        let softmax = matches!(scores, Scores::Softmax | Scores::SoftmaxSelected | Scores::Hierarchical);
        let sum = if softmax { logits.iter().map(|&l| (f64::from(l) - max).exp()).sum() } else { 1.0 };
        Self { scores, max, sum }
    }

    fn score(&self, logit: f32) -> f64 {
        let logit = f64::from(logit);
        match self.scores {
            // hierarchical logits are such that their softmax is the product of both
            Scores::Softmax | Scores::SoftmaxSelected | Scores::Hierarchical => (logit - self.max).exp() / self.sum,
            Scores::Sigmoid => sigmoid(logit),
            Scores::SqrtSoftplus => softplus(logit).sqrt(),
            Scores::Raw => logit,
        }
    }
}

/// Softmax over the chosen logits; zero for those that are masked or nobody's.
fn softmax_over_chosen(logits: &[f32], chosen: &[u32], weights: &mut Vec<f64>) {
    let logit = |&e: &u32| logits.get(e as usize).map_or(f64::NEG_INFINITY, |&l| f64::from(l));
    let max = chosen.iter().map(logit).fold(f64::NEG_INFINITY, f64::max);
    if max == f64::NEG_INFINITY {
        return weights.resize(chosen.len(), 0.0);
    }
    weights.extend(chosen.iter().map(|e| (logit(e) - max).exp()));
    let sum: f64 = weights.iter().sum();
    weights.iter_mut().for_each(|w| *w /= sum);
}

/// Choice j is weighted by a softmax over the experts that are left and close to it.
fn sparsemixer_weights(logits: &[f32], chosen: &[u32], jitter: f64, weights: &mut Vec<f64>) {
    for (j, &e) in chosen.iter().enumerate() {
        let s = f64::from(logits[e as usize]);
        // NaN, where the quotient is 0 / 0 or infinite over infinite, is close.
        let far = |l: f64| (s - l) / l.abs().max(s) > 2.0 * jitter;
        let left = (0..).zip(logits).filter(|(e, _)| !chosen[..j].contains(e)).map(|(_, &l)| f64::from(l));
        let total: f64 = left.filter(|&l| !far(l)).map(|l| (l - s).exp()).sum();
        // A masked expert weighs nothing.
        weights.push(if s == f64::NEG_INFINITY { 0.0 } else { 1.0 / total });
    }
}

/// What weights are divided by: 1 if they are all zero, which they then stay.
pub(super) fn norm(by: Renormalize, weights: impl Iterator<Item = f64>) -> f64 {
    let p = f64::from(by.p);
    let norm = if by.p == 1.0 {
        weights.map(f64::abs).sum()
    } else {
        weights.map(|w| w.abs().powf(p)).sum::<f64>().powf(1.0 / p)
    };
    let norm = (norm + f64::from(by.epsilon)).max(f64::from(by.floor));
    if norm == 0.0 { 1.0 } else { norm }
}

/// Ranks of experts outside the best groups become minus infinity or zero. Ties: the group with the lowest index.
fn mask_groups(ranks: &mut [f64], groups: Groups, group_scores: &mut Vec<f64>) {
    let size = ranks.len() / groups.num_groups as usize;
    group_scores.clear();
    group_scores.extend(ranks.chunks_exact(size).map(|group| match groups.score {
        GroupScore::Max => group.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        GroupScore::SumTop2 => {
            let mut best = [0; 2];
            top_k_indices(group, &mut best);
            best.iter().map(|&e| group[e as usize]).sum()
        }
    }));
    let mut kept = [0; crate::model::routing::MAX_GROUPS as usize];
    let kept = &mut kept[..groups.keep as usize];
    top_k_indices(group_scores, kept);
    for (_, group) in (0..).zip(ranks.chunks_exact_mut(size)).filter(|(g, _)| !kept.contains(g)) {
        group.fill(match groups.masked {
            Masked::NegInfinity => f64::NEG_INFINITY,
            Masked::Zero => 0.0,
        });
    }
}

/// `ln(1 + exp(v))`
fn softplus(v: f64) -> f64 {
    v.max(0.0) + (-v.abs()).exp().ln_1p()
}

/// `ln(sum exp(v))`; the largest is subtracted first so that nothing overflows.
pub(super) fn log_sum_exp(values: &[f32]) -> f64 {
    let max = f64::from(values.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    max + values.iter().map(|&v| (f64::from(v) - max).exp()).sum::<f64>().ln()
}

/// Fills `chosen` with the indices of the largest values, largest first. Equal values (and -0 equals +0): lowest
/// index first. NaN ranks below everything. `chosen` is at most as long as `values`.
#[expect(clippy::eq_op, reason = "only NaN differs from itself")]
fn top_k_indices<T: Copy + PartialOrd>(values: &[T], chosen: &mut [u32]) {
    let better = |a: T, b: T| a > b || (b != b && a == a);
    let mut len = 0;
    for (index, &value) in values.iter().enumerate() {
        // The place after every chosen value that is at least as good; most values find none.
        let mut place = len;
        while place > 0 && better(value, values[chosen[place - 1] as usize]) {
            place -= 1;
        }
        if place < chosen.len() {
            len = (len + 1).min(chosen.len());
            chosen.copy_within(place..len - 1, place + 1);
            chosen[place] = index as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Routing, reference};

    fn config(num_experts: u32, top_k: u32, renormalize: bool) -> MoeConfig {
        let routing = Routing::softmax(renormalize);
        MoeConfig::new(1, 1, num_experts, top_k, routing, Activation::SWIGLU).expect("the sizes are valid")
    }

    /// A small generator, so that the test needs no crate.
    fn next(state: &mut u32) -> u32 {
        *state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *state >> 8
    }

    #[test]
    fn selection_is_that_of_the_reference_for_any_values() {
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, -1.0, f32::MAX, f32::MIN, 1e-45];
        let mut state = 1;
        for case in 0..20_000 {
            let e = 1 + next(&mut state) as usize % if case % 100 == 0 { 1024 } else { 40 };
            let k = 1 + next(&mut state) as usize % e.min(32);
            let values: Vec<f32> = (0..e).map(|_| special[next(&mut state) as usize % special.len()]).collect();
            let mut chosen = vec![0; k];
            top_k_indices(&values, &mut chosen);
            let values: Vec<f64> = values.iter().map(|&v| f64::from(v)).collect();
            let expected = reference::router::top_k_indices(&values, k);
            assert!(chosen.iter().map(|&c| c as usize).eq(expected.iter().copied()), "{values:?}: {chosen:?}");
        }
    }

    /// The router's last step for these logits.
    fn decide(config: &MoeConfig, logits: Vec<f32>, bias: Option<&[f32]>) -> Result<RoutingDecision> {
        let weights = MoeWeights {
            router: vec![0.0; config.num_experts() as usize],
            router_bias: bias.map(<[f32]>::to_vec),
            ..MoeWeights::default()
        };
        let router = Router::pack(config, &weights)?;
        let logits = Logits { experts: logits, ..Logits::default() };
        let (mut decision, _) = route(config, &router, logits, &Batch::default(), NonFinite::Error)?;
        count(config, &mut decision);
        Ok(decision)
    }

    #[test]
    fn weights_are_those_of_the_reference() {
        let mut state = 7;
        for scale in [0.0, 1.0, 1e4, 1e38] {
            for (e, k, renormalize) in [(1, 1, true), (8, 8, false), (257, 32, true), (257, 3, false)] {
                let config = config(e, k, renormalize);
                let logits: Vec<f32> =
                    (0..3 * e).map(|_| (next(&mut state) as f32 / (1 << 23) as f32 - 1.0) * scale).collect();
                let experts = logits.iter().map(|&l| f64::from(l)).collect();
                let exact = reference::router::Logits { experts, shared: Vec::new() };
                let expected = reference::router::route(&config, &MoeWeights::default(), exact, &Batch::default());
                let got = decide(&config, logits, None).expect("the logits are finite");
                assert_eq!(got.topk_experts, expected.topk_experts);
                for (got, expected) in got.topk_weights.iter().zip(expected.topk_weights) {
                    assert!((f64::from(*got) - expected).abs() <= 1e-7 * expected + 1e-45, "{got} {expected}");
                }
            }
        }
    }

    #[test]
    fn logits_that_are_no_numbers_are_errors() {
        let (inf, nan) = (f32::INFINITY, f32::NAN);
        let cases = [([nan, 0.0], 1), ([0.0, nan], 1), ([inf, 0.0], 1), ([-inf, -inf], 1), ([-inf, 0.0], 0)];
        for (logits, bad) in cases {
            for top_k in [1, 2] {
                match decide(&config(2, top_k, true), logits.to_vec(), None) {
                    Ok(_) => assert_eq!(bad, 0, "{logits:?}"),
                    Err(Error::NonFiniteLogits { num_tokens }) => assert_eq!(num_tokens, bad, "{logits:?}"),
                    Err(error) => panic!("{error}"),
                }
            }
        }
    }

    #[test]
    fn a_masked_expert_weighs_nothing() {
        let got = decide(&config(2, 2, false), vec![f32::NEG_INFINITY, 0.0], None).expect("one logit is finite");
        assert_eq!((got.topk_experts, got.topk_weights), (vec![1, 0], vec![1.0, 0.0]));
    }

    #[test]
    fn bias_decides() {
        let got = decide(&config(2, 1, true), vec![1.0, 0.0], Some(&[0.0, 2.0])).expect("the logits are finite");
        assert_eq!((got.topk_experts, got.router_logits), (vec![1], vec![1.0, 2.0]));
    }

    /// In f32, and soon in f64, the sigmoids of these logits are all 1.
    #[test]
    fn saturated_scores_rank_by_their_logits() {
        let routing = Routing::new(Scores::Sigmoid, true);
        let config = MoeConfig::new(1, 1, 3, 2, routing, Activation::SWIGLU).expect("the sizes are valid");
        let got = decide(&config, vec![50.0, 40.0, 60.0], None).expect("the logits are finite");
        assert_eq!((got.topk_experts, got.topk_weights), (vec![2, 0], vec![0.5; 2]));
    }
}
