//! Tokens that the router can make nothing of, and what is left of them where they are dropped. Twin of
//! `shaders/drop_rows.wgsl`; that the router marks them is part of `shaders/router.wgsl`.

/// Tokens with a logit that is NaN or infinity, or with no other than minus infinity, ascending.
/// `router_logits [num_tokens, num_experts]`
pub fn broken_tokens(router_logits: &[f64], num_experts: usize) -> Vec<usize> {
    let is_broken = |row: &[f64]| {
        let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        !max.is_finite() || row.iter().any(|logit| logit.is_nan())
    };
    let rows = router_logits.chunks_exact(num_experts).enumerate();
    rows.filter(|(_, row)| is_broken(row)).map(|(token, _)| token).collect()
}

/// Zeros in their rows of `y [num_tokens, hidden_size]`.
pub fn drop_rows(y: &mut [f64], hidden_size: usize, tokens: &[usize]) {
    tokens.iter().for_each(|token| y[token * hidden_size..][..hidden_size].fill(0.0));
}
