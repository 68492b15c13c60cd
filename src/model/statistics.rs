//! Auxiliary values of a router: how evenly tokens are spread over the experts, and how sure of itself it is.

/// Sums over the tokens of one sequence. "Probability" is the softmax over all experts, whatever the router's scores.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SequenceSums {
    /// Tokens.
    pub num_tokens: usize,
    /// Tokens whose largest logit is this expert's: `[num_experts]`
    pub best: Vec<u32>,
    /// Assignments to this expert that it computes: `[num_experts]`
    pub assigned: Vec<u32>,
    /// Sum of this expert's probabilities: `[num_experts]`
    pub probability: Vec<f64>,
    /// Assignments that nobody computes.
    pub dropped: u32,
    /// Sum of the squared logarithms of the sum of exponentials of the logits.
    pub squared_log_sum_exp: f64,
    /// Sum of the entropies of the probabilities, in nats.
    pub entropy: f64,
}

impl SequenceSums {
    /// Nothing yet.
    pub fn new(num_tokens: usize, num_experts: usize) -> Self {
        Self {
            num_tokens,
            best: vec![0; num_experts],
            assigned: vec![0; num_experts],
            probability: vec![0.0; num_experts],
            ..Self::default()
        }
    }
}

/// What a pass says about its router.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Statistics {
    /// Tokens of the pass.
    pub num_tokens: usize,
    /// Assignments that each expert computed: `[num_experts]`
    pub tokens_per_expert: Vec<u32>,
    /// Assignments that nobody computed.
    pub num_dropped: u32,
    /// Mean over the sequences of `num_experts * sum over e of (share of tokens whose best expert is e) * (mean
    /// probability of e)` (Fedus et al. 2021, equation 4, without its coefficient). 1 if perfectly even.
    pub switch_load_balancing_loss: f64,
    /// `num_experts * sum over e of (assignments of e / num_tokens) * (mean probability of e)` over the whole batch,
    /// as transformers computes it for Mixtral and Qwen. `top_k` if perfectly even. Without dropped assignments.
    pub load_balancing_loss: f64,
    /// Mean over the tokens of `ln(sum exp(logits))^2` (Zoph et al. 2022, ST-MoE, equation 5).
    pub router_z_loss: f64,
    /// Mean entropy of the probabilities, in nats: 0 if always certain, `ln(num_experts)` if never.
    pub entropy: f64,
    /// The sums that all of this is made of, by sequence.
    pub sequences: Vec<SequenceSums>,
}

impl Statistics {
    /// From the sums of each sequence.
    pub fn new(sequences: Vec<SequenceSums>) -> Self {
        let num_tokens: usize = sequences.iter().map(|s| s.num_tokens).sum();
        let num_experts = sequences.first().map_or(0, |s| s.best.len());
        if num_tokens == 0 {
            return Self { sequences, ..Self::default() };
        }
        let tokens = num_tokens as f64;
        let assigned = |e: usize| sequences.iter().map(|s| s.assigned[e]).sum::<u32>();
        let tokens_per_expert: Vec<u32> = (0..num_experts).map(assigned).collect();
        let probability = |e: usize| sequences.iter().map(|s| s.probability[e]).sum::<f64>() / tokens;
        let switch = |s: &SequenceSums| {
            let n = s.num_tokens as f64;
            let terms = s.best.iter().zip(&s.probability).map(|(&best, p)| f64::from(best) / n * p / n);
            terms.sum::<f64>() * num_experts as f64
        };
        Self {
            num_tokens,
            num_dropped: sequences.iter().map(|s| s.dropped).sum(),
            switch_load_balancing_loss: sequences.iter().map(switch).sum::<f64>() / sequences.len() as f64,
            load_balancing_loss: num_experts as f64
                * (0..num_experts).map(|e| f64::from(tokens_per_expert[e]) / tokens * probability(e)).sum::<f64>(),
            router_z_loss: sequences.iter().map(|s| s.squared_log_sum_exp).sum::<f64>() / tokens,
            entropy: sequences.iter().map(|s| s.entropy).sum::<f64>() / tokens,
            tokens_per_expert,
            sequences,
        }
    }
}
