//! How a token chooses its experts and what weight each choice gets.

use serde::{Deserialize, Serialize};

/// How logits become scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scores {
    /// Softmax over all experts.
    #[default]
    Softmax,
}

/// How a token's choices are weighted. Selection is top-k by score; on a tie the lowest expert index wins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Routing {
    /// How logits become scores.
    pub scores: Scores,
    /// Divide the weights of the chosen experts by their sum. There is no default: families differ.
    pub renormalize: bool,
}

/// Who got which expert in a pass. Index vectors are row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct RoutingDecision {
    /// Tokens of the pass.
    pub num_tokens: usize,
    /// Chosen experts, best first: `[num_tokens, top_k]`.
    pub topk_experts: Vec<u32>,
    /// Weight of each choice: `[num_tokens, top_k]`.
    pub topk_weights: Vec<f32>,
    /// Raw router scores: `[num_tokens, num_experts]`.
    pub router_logits: Vec<f32>,
    /// Assignments of each expert: `[num_experts]`.
    pub tokens_per_expert: Vec<u32>,
}
