// statistics_params: the uniform of the statistics. No entry point. Rust side: src/kernels/params.rs.

struct StatisticsParams {
    num_tokens: u32,
    tokens_per_sequence: u32,
    num_experts: u32,
    top_k: u32,
}

struct TokenStatistics {
    log_sum_exp: f32, // of its logits
    entropy: f32,     // of their softmax, in nats
    best: u32,        // expert with the largest logit
}
