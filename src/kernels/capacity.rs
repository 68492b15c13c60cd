//! Between router and permute, where experts take a limited number of assignments. See `shaders/capacity.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};
use crate::model::routing::{Capacity, Priority, Selection};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 256;

/// Drops what is beyond the capacity.
pub fn kernel(capacity: &Capacity, selection: Selection) -> Kernel {
    let (priority, name) = match (selection, capacity.priority) {
        (Selection::ExpertChoice, _) => (3, "by_weight"),
        (_, Priority::Position) => (0, "by_position"),
        (_, Priority::Choice) => (1, "by_choice"),
        (_, Priority::Score) => (2, "by_score"),
    };
    Kernel {
        stage: Stage::Capacity,
        label: format!("capacity.{name}"),
        parts: vec![wgsl!("capacity")],
        bindings: vec![
            bind(0, "params", Access::Uniform),
            bind(1, "topk_experts", Access::Read),  // [num_tokens, top_k]
            bind(2, "keys", Access::Read),          // [num_tokens] or [num_tokens, top_k], from keys_at on
            bind(3, "kept_experts", Access::Write), // [num_tokens, top_k]
            bind(4, "status", Access::Write),       // [2]
        ],
        overrides: vec![("WG_SIZE", WG_SIZE), ("PRIORITY", priority)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}

/// Rounds of all loops of one lane, at most.
pub fn rounds(capacity: &Capacity, selection: Selection, tokens: u32, top_k: u32) -> u64 {
    let per_choice = u64::from(tokens.div_ceil(WG_SIZE)) + 8;
    let passes = match (selection, capacity.priority) {
        (Selection::ExpertChoice, _) => 35 * per_choice,
        (_, Priority::Position) => {
            u64::from((u64::from(tokens) * u64::from(top_k)).div_ceil(u64::from(WG_SIZE)) as u32) * 9
        }
        (_, Priority::Choice) => u64::from(top_k) * (10 * per_choice),
        (_, Priority::Score) => u64::from(top_k) * (44 * per_choice),
    };
    passes + u64::from(tokens) * u64::from(top_k) / u64::from(WG_SIZE)
}
