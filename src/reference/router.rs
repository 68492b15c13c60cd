//! Stage 1: which experts each token gets, and with which weight. Twin of `shaders/router.wgsl`.

use super::dot;
use crate::model::activation::sigmoid;
use crate::model::batch::Batch;
use crate::model::config::{MoeConfig, SharedGate};
use crate::model::noise;
use crate::model::routing::{DROPPED, GroupScore, Groups, Masked, Noise, RankBy, Renormalize, Scores, Selection};
use crate::model::weights::MoeWeights;

/// What the router decides.
#[derive(Clone, Debug, Default)]
pub struct Router {
    /// After scale, cap and noise: `[num_tokens, num_experts]`
    pub router_logits: Vec<f64>,
    /// Scores of all experts: `[num_tokens, num_experts]`
    pub router_probs: Vec<f64>,
    /// Best first, `DROPPED` where nobody computes: `[num_tokens, top_k]`
    pub topk_experts: Vec<u32>,
    /// `[num_tokens, top_k]`
    pub topk_weights: Vec<f64>,
    /// Weights of the shared experts if the router gates them: `[num_tokens, num_shared]`
    pub shared_weights: Vec<f64>,
    /// Score of each token's first choice, before any scaling: `[num_tokens]`
    pub first_scores: Vec<f64>,
}

/// Logits of the experts and of the other rows of the router.
#[derive(Clone, Debug, Default)]
pub struct Logits {
    /// `[num_tokens, num_experts]`
    pub experts: Vec<f64>,
    /// `[num_tokens, num_shared]` if the router gates them
    pub shared: Vec<f64>,
}

/// Logits, scores, selection, weights: everything but capacity. `x [num_tokens, hidden_size]`, after the router's norm.
pub fn router(config: &MoeConfig, weights: &MoeWeights, batch: &Batch<'_>) -> Router {
    route(config, weights, router_logits(config, weights, batch), batch)
}

/// `logits[t, e] = cap((sum over h of x[t, h] * router[e, h] + bias[e]) * logit_scale)`, and noise if there is a seed.
pub fn router_logits(config: &MoeConfig, weights: &MoeWeights, batch: &Batch<'_>) -> Logits {
    let hidden_size = config.hidden_size() as usize;
    let routing = config.routing();
    let key = batch.seed.map(noise::key);
    let mut logits = Logits::default();
    for (t, token) in batch.x.chunks_exact(hidden_size).enumerate() {
        let seen = |h: usize| {
            let v = f64::from(token[h]);
            match (routing.noise, key) {
                (Noise::Jitter { epsilon }, Some(key)) => {
                    let uniform = f64::from(noise::uniform(key, t as u32, h as u32));
                    v * (1.0 + f64::from(epsilon) * (2.0 * uniform - 1.0))
                }
                _ => v,
            }
        };
        let times =
            |rows: &[f32], row: usize| dot((0..hidden_size).map(seen), &rows[row * hidden_size..][..hidden_size]);
        let mut row = Vec::new();
        for e in 0..config.num_experts() as usize {
            let bias = weights.router_bias.as_ref().map_or(0.0, |bias| f64::from(bias[e]));
            let mut logit = (times(&weights.router, e) + bias) * f64::from(routing.logit_scale);
            if let Some(cap) = routing.logit_softcap.map(f64::from) {
                logit = cap * (logit / cap).tanh();
            }
            if let (Some(rows), Some(key)) = (&weights.extras.router_noise, key) {
                logit += noise::normal(key, t as u32, e as u32) * softplus(times(rows, e));
            }
            row.push(logit);
        }
        if let (Some(rows), Some(groups)) = (&weights.extras.group_router, routing.groups) {
            let group_logits: Vec<f64> = (0..groups.num_groups as usize).map(|g| times(rows, g)).collect();
            row = hierarchical_logits(&row, &group_logits);
        }
        logits.experts.extend(row);
        if let Some(rows) = &weights.extras.shared_gate {
            logits.shared.extend((0..config.num_gated_shared() as usize).map(|row| times(rows, row)));
        }
    }
    logits
}

/// Logits whose softmax over all experts is softmax over groups times softmax within the group.
fn hierarchical_logits(logits: &[f64], group_logits: &[f64]) -> Vec<f64> {
    let size = logits.len() / group_logits.len();
    let mut flat = Vec::new();
    for (group, group_logit) in logits.chunks_exact(size).zip(group_logits) {
        let total = log_sum_exp(group);
        flat.extend(group.iter().map(|logit| logit - total + group_logit));
    }
    flat
}

/// Scores, selection and weights of given logits.
pub fn route(config: &MoeConfig, weights: &MoeWeights, logits: Logits, batch: &Batch<'_>) -> Router {
    route_with(config, weights, logits, None, batch)
}

/// As [`route`], but `choices [num_tokens, top_k]`, if there are any, are taken instead of its own: for comparing with
/// a device that chose differently in a near-tie.
pub fn route_with(
    config: &MoeConfig,
    weights: &MoeWeights,
    logits: Logits,
    choices: Option<&[u32]>,
    batch: &Batch<'_>,
) -> Router {
    let (num_experts, top_k) = (config.num_experts() as usize, config.top_k() as usize);
    let routing = config.routing();
    let mut result = Router::default();
    let num_tokens = logits.experts.len() / num_experts;
    let num_shared = logits.shared.len().checked_div(num_tokens).unwrap_or(0);
    for (t, row) in logits.experts.chunks_exact(num_experts).enumerate() {
        let scores = scores(routing.scores, row);
        let own = || match routing.selection {
            Selection::TopK | Selection::Sparsemixer { .. } => {
                // No score falls where its logit rises: alone they rank alike, but scores saturate and logits do not.
                let masks = routing.groups.is_some_and(|groups| groups.keep < groups.num_groups);
                let alone = weights.extras.selection_bias.is_none() && !masks;
                let by_logits = alone || routing.rank_by == RankBy::Logits || routing.scores == Scores::SoftmaxSelected;
                let mut ranks = if by_logits { row.to_vec() } else { scores.clone() };
                if let Some(bias) = &weights.extras.selection_bias {
                    ranks.iter_mut().zip(bias).for_each(|(rank, &bias)| *rank += f64::from(bias));
                }
                if let Some(groups) = routing.groups {
                    mask_groups(&mut ranks, groups);
                }
                top_k_indices(&ranks, top_k).into_iter().map(|e| e as u32).collect()
            }
            Selection::Dense | Selection::ExpertChoice => (0..num_experts as u32).collect(),
            Selection::TokenTable { .. } => {
                let id = batch.token_ids.map_or(0, |ids| ids[t] as usize);
                weights.extras.token_table.as_ref().map_or_else(Vec::new, |table| table[id * top_k..][..top_k].to_vec())
            }
            Selection::Given => {
                let given = batch.experts.map_or(&[][..], |experts| &experts[t * top_k..][..top_k]);
                given.iter().map(|&e| u32::try_from(e).unwrap_or(DROPPED)).collect()
            }
        };
        let chosen: Vec<u32> = choices.map_or_else(own, |choices| choices[t * top_k..][..top_k].to_vec());
        let shared = &logits.shared[t * num_shared..][..num_shared];
        weigh(config, weights, row, &scores, shared, t, chosen, batch, &mut result);
        result.router_probs.extend(scores);
    }
    result.router_logits = logits.experts;
    result
}

/// Weights of one token's choices and of its shared experts, appended to `result`.
#[expect(clippy::too_many_arguments, reason = "one token of everything")]
fn weigh(
    config: &MoeConfig,
    weights: &MoeWeights,
    logits: &[f64],
    scores: &[f64],
    shared_logits: &[f64],
    t: usize,
    mut chosen: Vec<u32>,
    batch: &Batch<'_>,
    result: &mut Router,
) {
    let routing = config.routing();
    let mut w: Vec<f64> = match (routing.selection, routing.scores) {
        (Selection::Sparsemixer { jitter }, _) => sparsemixer_weights(logits, &chosen, f64::from(jitter)),
        (_, Scores::SoftmaxSelected) => {
            let selected: Vec<f64> =
                chosen.iter().map(|&e| logits.get(e as usize).copied().unwrap_or(f64::NEG_INFINITY)).collect();
            // Nobody chosen, or only masked experts: no weight at all.
            softmax(&selected).into_iter().map(|w| if w.is_nan() { 0.0 } else { w }).collect()
        }
        _ => chosen.iter().map(|&e| scores.get(e as usize).copied().unwrap_or(0.0)).collect(),
    };
    result.first_scores.push(w[0]);
    let gate = config.extras().shared.map_or(SharedGate::None, |shared| shared.gate);
    let mut shared: Vec<f64> = match gate {
        SharedGate::Joint => shared_logits.iter().map(|&l| self::scores(routing.scores, &[l])[0]).collect(),
        _ => shared_logits.iter().map(|&l| sigmoid(l)).collect(),
    };
    let before = routing.capacity.is_none_or(|capacity| !capacity.renormalize_after);
    if let Some(renormalize) = routing.renormalize.filter(|_| before) {
        let joint = if gate == SharedGate::Joint { &shared[..] } else { &[] };
        let norm = norm(renormalize, w.iter().chain(joint));
        w.iter_mut().for_each(|w| *w /= norm);
        if gate == SharedGate::Joint {
            shared.iter_mut().for_each(|w| *w /= norm);
        }
    }
    if gate == SharedGate::Joint {
        shared.iter_mut().for_each(|w| *w *= f64::from(routing.scale));
    }
    for (w, &e) in w.iter_mut().zip(&chosen) {
        let own = weights.extras.per_expert_scale.as_ref().and_then(|scale| scale.get(e as usize));
        *w *= f64::from(routing.scale) * own.map_or(1.0, |&own| f64::from(own));
        if gate == SharedGate::Mix {
            *w *= 1.0 - shared[0];
        }
    }
    if let (Noise::RandomSecond, Some(seed), true) = (routing.noise, batch.seed, chosen.len() > 1)
        && 2.0 * w[1] <= f64::from(noise::uniform(noise::key(seed), t as u32, 0))
    {
        chosen[1] = DROPPED;
    }
    result.topk_experts.extend(chosen);
    result.topk_weights.extend(w);
    result.shared_weights.extend(shared);
}

/// What weights are divided by: 1 if they are all zero, which they then stay.
pub(super) fn norm<'a>(by: Renormalize, weights: impl Iterator<Item = &'a f64>) -> f64 {
    let p = f64::from(by.p);
    let sum: f64 = weights.map(|w| w.abs().powf(p)).sum();
    let norm = (sum.powf(1.0 / p) + f64::from(by.epsilon)).max(f64::from(by.floor));
    if norm == 0.0 { 1.0 } else { norm }
}

/// Choice j is weighted by a softmax over the experts that are left and close to it.
fn sparsemixer_weights(logits: &[f64], chosen: &[u32], jitter: f64) -> Vec<f64> {
    let weight = |j: usize| {
        let Some(&s) = logits.get(chosen[j] as usize).filter(|s| **s > f64::NEG_INFINITY) else { return 0.0 };
        // 0 / 0, a NaN, is not far either.
        let far = |l: f64| (s - l) / l.abs().max(s) > 2.0 * jitter;
        let left = (0..logits.len()).filter(|e| !chosen[..j].contains(&(*e as u32)));
        let total: f64 = left.map(|e| logits[e]).filter(|&l| !far(l)).map(|l| (l - s).exp()).sum();
        1.0 / total
    };
    (0..chosen.len()).map(weight).collect()
}

/// Scores of one token's experts.
fn scores(function: Scores, logits: &[f64]) -> Vec<f64> {
    match function {
        // hierarchical logits are such that their softmax is the product of both
        Scores::Softmax | Scores::SoftmaxSelected | Scores::Hierarchical => softmax(logits),
        Scores::Sigmoid => logits.iter().map(|&l| sigmoid(l)).collect(),
        Scores::SqrtSoftplus => logits.iter().map(|&l| softplus(l).sqrt()).collect(),
        Scores::Raw => logits.to_vec(),
    }
}

/// Ranks of experts outside the best groups become minus infinity or zero. Ties: the group with the lowest index.
fn mask_groups(ranks: &mut [f64], groups: Groups) {
    let size = ranks.len() / groups.num_groups as usize;
    let group_score = |group: &[f64]| {
        let best = top_k_indices(group, 2);
        match groups.score {
            GroupScore::Max => group[best[0]],
            GroupScore::SumTop2 => best.iter().map(|&e| group[e]).sum(),
        }
    };
    let group_scores: Vec<f64> = ranks.chunks_exact(size).map(group_score).collect();
    let kept = top_k_indices(&group_scores, groups.keep as usize);
    for (_, group) in ranks.chunks_exact_mut(size).enumerate().filter(|(g, _)| !kept.contains(g)) {
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
pub fn log_sum_exp(values: &[f64]) -> f64 {
    let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + values.iter().map(|v| (v - max).exp()).sum::<f64>().ln()
}

/// `exp(l - max) / sum exp(l - max)`; the largest logit is subtracted so that nothing overflows.
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let exps: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|e| e / sum).collect()
}

/// Indices of the `k` largest values, largest first. Equal values: lowest index first. NaN ranks below everything,
/// and -0 equals +0.
pub fn top_k_indices(values: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    let rank = |v: f64| if v.is_nan() { (0, 0.0) } else { (1, v + 0.0) };
    order.sort_by(|&a, &b| rank(values[b]).partial_cmp(&rank(values[a])).unwrap_or(std::cmp::Ordering::Equal));
    order.truncate(k);
    order
}
