//! What follows from the choices alone: loads, entropies, weights, pairs, and what a capacity would do.

use super::{BINS, CapacityWhatIf, Distribution, HOT, Load};
use crate::model::routing::RoutingDecision;

/// Each assignment that somebody computes: (token, rank, expert, weight).
fn assignments(routing: &RoutingDecision) -> impl Iterator<Item = (usize, usize, usize, f32)> + '_ {
    let top_k = top_k(routing);
    let num_experts = routing.tokens_per_expert.len();
    let each = routing.topk_experts.iter().zip(&routing.topk_weights).enumerate();
    each.map(move |(a, (&expert, &weight))| (a / top_k, a % top_k, expert as usize, weight))
        .filter(move |&(_, _, expert, _)| expert < num_experts)
}

fn top_k(routing: &RoutingDecision) -> usize {
    (routing.topk_experts.len() / routing.num_tokens.max(1)).max(1)
}

/// How the assignments are spread.
pub fn load(routing: &RoutingDecision) -> Load {
    let tokens = &routing.tokens_per_expert;
    let experts = tokens.len().max(1) as f64;
    let sum: f64 = tokens.iter().copied().map(f64::from).sum();
    let mean = sum / experts;
    let squares: f64 = tokens.iter().map(|&n| (f64::from(n) - mean).powi(2)).sum();
    let by_mean = |value: f64| if mean > 0.0 { value / mean } else { 0.0 };
    let mut hot: Vec<u32> = (0..tokens.len() as u32).filter(|&e| tokens[e as usize] > 0).collect();
    hot.retain(|&e| f64::from(tokens[e as usize]) >= HOT * mean);
    hot.sort_by_key(|&e| (std::cmp::Reverse(tokens[e as usize]), e));
    Load {
        tokens_per_expert: tokens.clone(),
        dropped: routing.num_dropped as u32,
        mean,
        max_over_mean: by_mean(tokens.iter().copied().max().unwrap_or(0).into()),
        coefficient_of_variation: by_mean((squares / experts).sqrt()),
        entropy: entropy(tokens.iter().copied().map(f64::from)),
        max_entropy: experts.log2(),
        dead: (0..tokens.len() as u32).filter(|&e| tokens[e as usize] == 0).collect(),
        hot,
    }
}

/// Of shares in proportion to these numbers, in bits. Signs do not count; nothing at all has none.
pub fn entropy(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let sum: f64 = values.clone().map(f64::abs).sum();
    let shares = values.map(|value| value.abs() / sum).filter(|&share| share > 0.0);
    // Of one share of 1 it is 0, and not -0.
    0.0 - shares.map(|share| share * share.log2()).sum::<f64>()
}

/// Entropy of the weights of each token: `[num_tokens]`
pub fn token_entropies(routing: &RoutingDecision) -> Vec<f64> {
    let mut weights = vec![Vec::new(); routing.num_tokens];
    assignments(routing).for_each(|(t, _, _, weight)| weights[t].push(f64::from(weight)));
    weights.iter().map(|weights| entropy(weights.iter().copied())).collect()
}

/// The weights of the first choices, of the second, and so on: `[top_k]`
pub fn weights_by_rank(routing: &RoutingDecision) -> Vec<Distribution> {
    let mut weights = vec![Vec::new(); top_k(routing)];
    assignments(routing).for_each(|(_, rank, _, weight)| weights[rank].push(f64::from(weight)));
    // One scale for all, so that ranks can be compared.
    let all = || weights.iter().flatten().copied();
    let (from, to) = (all().fold(0.0, f64::min), all().fold(f64::MIN_POSITIVE, f64::max));
    weights.iter().map(|weights| distribution(weights, from, to)).collect()
}

/// Of numbers between `from` and `to`.
pub fn distribution(values: &[f64], from: f64, to: f64) -> Distribution {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len();
    // The smallest number that at least this share is no larger than.
    let quantile = |q: f64| match count {
        0 => 0.0,
        _ => sorted[((q * count as f64).ceil() as usize).clamp(1, count) - 1],
    };
    let mut histogram = vec![0; BINS];
    for value in &sorted {
        let bin = (value - from) / (to - from) * BINS as f64; // saturates, and NaN is 0
        histogram[(bin as usize).min(BINS - 1)] += 1;
    }
    Distribution {
        count,
        mean: sorted.iter().sum::<f64>() / count.max(1) as f64,
        min: quantile(0.0),
        p10: quantile(0.1),
        median: quantile(0.5),
        p90: quantile(0.9),
        max: quantile(1.0),
        histogram,
        histogram_from: from,
        histogram_to: to,
    }
}

/// Tokens that two experts have in common: `[num_experts][num_experts]`
pub fn coactivation(routing: &RoutingDecision) -> Vec<Vec<u32>> {
    let num_experts = routing.tokens_per_expert.len();
    let mut together = vec![vec![0; num_experts]; num_experts];
    let all: Vec<_> = assignments(routing).map(|(t, _, expert, _)| (t, expert)).collect();
    for of_token in all.chunk_by(|a, b| a.0 == b.0) {
        for &(_, a) in of_token {
            of_token.iter().for_each(|&(_, b)| together[a][b] += 1);
        }
    }
    together
}

/// Tokens of each expert, those with the largest weight first: `[num_experts][..]`
pub fn tokens_of_expert(routing: &RoutingDecision) -> Vec<Vec<u32>> {
    let mut tokens = vec![Vec::new(); routing.tokens_per_expert.len()];
    assignments(routing).for_each(|(t, _, expert, weight)| tokens[expert].push((t as u32, weight)));
    let by_weight = |mut tokens: Vec<(u32, f32)>| {
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        tokens.into_iter().map(|(t, _)| t).collect()
    };
    tokens.into_iter().map(by_weight).collect()
}

/// What a capacity of `factor` times the mean load of all experts would drop, were it asked of these choices: earlier
/// tokens go first.
pub fn capacity(routing: &RoutingDecision, factor: f64) -> CapacityWhatIf {
    let num_experts = routing.tokens_per_expert.len().max(1);
    let even = routing.topk_experts.len() as f64 / num_experts as f64;
    // What is meant to be whole stays whole.
    let capacity = (factor * even - 1e-9).ceil().max(0.0) as u32;
    let mut taken = vec![0u32; num_experts];
    let mut kept = vec![0u32; routing.num_tokens];
    let mut had = vec![0u32; routing.num_tokens];
    let mut dropped_per_expert = vec![0u32; num_experts];
    for (t, _, expert, _) in assignments(routing) {
        had[t] += 1;
        if taken[expert] < capacity {
            taken[expert] += 1;
            kept[t] += 1;
        } else {
            dropped_per_expert[expert] += 1;
        }
    }
    let dropped: u32 = dropped_per_expert.iter().sum();
    let all: u32 = had.iter().sum();
    let most = routing.tokens_per_expert.iter().copied().max().unwrap_or(0);
    CapacityWhatIf {
        factor,
        capacity,
        dropped,
        dropped_per_expert,
        share: f64::from(dropped) / f64::from(all.max(1)),
        tokens_without_expert: kept.iter().zip(&had).filter(|(kept, had)| **kept == 0 && **had > 0).count() as u32,
        factor_without_drops: f64::from(most) / even.max(f64::MIN_POSITIVE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::routing::DROPPED;

    /// 4 tokens, 2 of 5 experts; the last token has one expert, and expert 4 nobody.
    fn routing() -> RoutingDecision {
        RoutingDecision {
            num_tokens: 4,
            topk_experts: vec![0, 1, 0, 2, 3, 0, 0, DROPPED],
            topk_weights: vec![0.75, 0.25, 0.5, 0.5, 1.0, 0.0, 1.0, 0.3],
            tokens_per_expert: vec![4, 1, 1, 1, 0],
            num_dropped: 1,
            ..RoutingDecision::default()
        }
    }

    #[test]
    fn load_counted_by_hand() {
        let load = load(&routing());
        assert_eq!((load.dropped, load.mean, load.dead, load.hot), (1, 1.4, vec![4], vec![0]));
        assert_eq!(load.max_over_mean, 4.0 / 1.4);
        // Squared distances from 1.4: 6.76, three times 0.16, 1.96.
        assert!((load.coefficient_of_variation - (9.2f64 / 5.0).sqrt() / 1.4).abs() < 1e-12);
        let entropy = -(4.0 / 7.0 * (4.0f64 / 7.0).log2() + 3.0 / 7.0 * (1.0f64 / 7.0).log2());
        assert!((load.entropy - entropy).abs() < 1e-12 && load.max_entropy == 5f64.log2());
    }

    #[test]
    fn weights_and_entropies_counted_by_hand() {
        let quarter = 2.0 - 0.75 * 3f64.log2();
        let entropies = token_entropies(&routing());
        assert!((entropies[0] - quarter).abs() < 1e-12);
        assert_eq!(entropies[1..], [1.0, 0.0, 0.0]);
        let [first, second] = &weights_by_rank(&routing())[..] else { panic!("top 2") };
        assert_eq!((first.count, first.min, first.median, first.max, first.mean), (4, 0.5, 0.75, 1.0, 0.8125));
        // What nobody computes has no weight.
        assert_eq!((second.count, second.p10, second.p90), (3, 0.0, 0.5));
        assert_eq!((first.histogram[10], first.histogram[15], first.histogram[19]), (1, 1, 2));
        assert_eq!((first.histogram_from, first.histogram_to), (0.0, 1.0));
    }

    #[test]
    fn pairs_and_tokens_counted_by_hand() {
        let together = coactivation(&routing());
        assert_eq!(together[0], [4, 1, 1, 1, 0]);
        assert_eq!(together[1], [1, 1, 0, 0, 0]);
        assert_eq!(together[4], [0; 5]);
        assert_eq!(tokens_of_expert(&routing()), [vec![3, 0, 1, 2], vec![0], vec![1], vec![2], vec![]]);
    }

    #[test]
    fn a_capacity_drops_later_tokens() {
        // 8 assignments over 5 experts: 1.6 each; 1.6 rounds up to 2, of 4.
        let even = capacity(&routing(), 1.0);
        assert_eq!((even.capacity, even.dropped, even.tokens_without_expert), (2, 2, 1));
        assert_eq!(even.dropped_per_expert, [2, 0, 0, 0, 0]);
        assert_eq!((even.share, even.factor_without_drops), (2.0 / 7.0, 2.5));
        assert_eq!(capacity(&routing(), 2.5).dropped, 0);
        assert_eq!(capacity(&routing(), 1e-6).capacity, 1);
    }

    #[test]
    fn nothing_at_all_is_no_division_by_zero() {
        let nothing = RoutingDecision { tokens_per_expert: vec![0, 0], ..RoutingDecision::default() };
        let load = load(&nothing);
        assert_eq!((load.max_over_mean, load.entropy, load.dead, load.hot), (0.0, 0.0, vec![0, 1], vec![]));
        assert!(weights_by_rank(&nothing).iter().all(|weights| weights.count == 0 && weights.mean == 0.0));
        assert_eq!((capacity(&nothing, 1.0).dropped, capacity(&nothing, 1.0).share), (0, 0.0));
    }
}
