//! Stage 2: assignments sorted by expert, order kept within an expert. Twin of `shaders/permute.wgsl`.

use crate::kernels::permute::tile_height;
use crate::model::routing::DROPPED;

/// Where each assignment went. `x_of_y`: index by y, get x.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permutation {
    /// Expert e owns rows `expert_offsets[e]..expert_offsets[e + 1]`: `[num_experts + 1]`
    pub expert_offsets: Vec<u32>,
    /// `[num_rows]`
    pub assignment_of_row: Vec<u32>,
    /// [`DROPPED`] for an assignment of no such expert: `[num_tokens, top_k]`
    pub row_of_assignment: Vec<u32>,
}

/// Stable counting sort of `topk_experts [num_tokens, top_k]` by expert.
pub fn permute(topk_experts: &[u32], num_experts: u32) -> Permutation {
    let mut expert_offsets = vec![0u32];
    let mut assignment_of_row = Vec::new();
    let mut row_of_assignment = vec![DROPPED; topk_experts.len()];
    for e in 0..num_experts {
        for (a, _) in topk_experts.iter().enumerate().filter(|&(_, &chosen)| chosen == e) {
            row_of_assignment[a] = assignment_of_row.len() as u32;
            assignment_of_row.push(a as u32);
        }
        expert_offsets.push(assignment_of_row.len() as u32);
    }
    Permutation { expert_offsets, assignment_of_row, row_of_assignment }
}

/// The rows that one workgroup of the grouped matmul works on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Whose weights.
    pub expert: u32,
    /// First row.
    pub first_row: u32,
    /// Rows, at most the tile height.
    pub num_rows: u32,
}

/// Every expert's rows cut into as few tiles of at most `tile_m` as will do, about as high as each other, experts
/// ascending.
pub fn tiles(expert_offsets: &[u32], tile_m: u32) -> Vec<Tile> {
    let mut tiles = Vec::new();
    for (expert, range) in expert_offsets.windows(2).enumerate() {
        let height = tile_height(range[1] - range[0], tile_m);
        for first_row in (range[0]..range[1]).step_by(height as usize) {
            tiles.push(Tile { expert: expert as u32, first_row, num_rows: height.min(range[1] - first_row) });
        }
    }
    tiles
}

impl Permutation {
    /// The expert that owns `row`.
    pub fn expert_of_row(&self, row: usize) -> usize {
        self.expert_offsets.partition_point(|&end| end as usize <= row) - 1
    }
}
