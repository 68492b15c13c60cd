//! Stage 2: assignments sorted by expert, and their tokens gathered in that order.

use super::chunks::Chunk;
use crate::model::routing::RoutingDecision;
use rayon::prelude::*;

/// Where each assignment went, as in [`crate::reference::permute::Permutation`].
pub(super) struct Rows {
    /// Expert e owns rows `expert_offsets[e]..expert_offsets[e + 1]`: `[num_experts + 1]`
    pub expert_offsets: Vec<usize>,
    /// `[num_rows]`
    pub assignment_of_row: Vec<usize>,
    /// `[num_tokens, top_k]`
    pub row_of_assignment: Vec<usize>,
}

/// Stable counting sort of the assignments by expert.
pub(super) fn permute(decision: &RoutingDecision) -> Rows {
    let mut expert_offsets = vec![0];
    expert_offsets.extend(decision.tokens_per_expert.iter().scan(0, |end, &count| {
        *end += count as usize;
        Some(*end)
    }));
    let mut next_row = expert_offsets.clone();
    let mut assignment_of_row = vec![0; decision.topk_experts.len()];
    let mut row_of_assignment = Vec::with_capacity(decision.topk_experts.len());
    for (a, &expert) in decision.topk_experts.iter().enumerate() {
        let row = next_row[expert as usize];
        next_row[expert as usize] += 1;
        assignment_of_row[row] = a;
        row_of_assignment.push(row);
    }
    Rows { expert_offsets, assignment_of_row, row_of_assignment }
}

/// Packs rows tile by tile (see [`super::chunks`]). `chunks` cover all rows in order, `row_of(r)` is row r,
/// `packed [num_rows, width of a row]`.
pub(super) fn pack<'a>(chunks: &[Chunk], packed: &mut [f32], row_of: impl Fn(usize) -> &'a [f32] + Sync) {
    let num_rows = chunks.last().map_or(0, |chunk| chunk.rows.end);
    let Some(width) = packed.len().checked_div(num_rows) else { return };
    let mut rest = packed;
    let mut pieces = Vec::with_capacity(chunks.len());
    for rows in chunks.iter().flat_map(|chunk| chunk.tiles()) {
        let (piece, after) = rest.split_at_mut(rows.len() * width);
        rest = after;
        pieces.push((rows, piece));
    }
    pieces.into_par_iter().for_each(|(rows, piece)| {
        let stride = rows.len();
        for (r, row) in rows.enumerate() {
            for (to, &from) in piece[r..].iter_mut().step_by(stride).zip(row_of(row)) {
                *to = from;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn the_sort_is_that_of_the_reference() {
        let topk_experts = vec![3, 1, 1, 0, 3, 1];
        let decision = RoutingDecision {
            num_tokens: 3,
            topk_weights: vec![0.5; 6],
            router_logits: vec![0.0; 15],
            tokens_per_expert: vec![1, 3, 0, 2, 0],
            topk_experts,
        };
        let rows = permute(&decision);
        let expected = reference::permute::permute(&decision.topk_experts, 5);
        let equal = |got: &[usize], expected: &[u32]| got.iter().copied().eq(expected.iter().map(|&n| n as usize));
        assert!(equal(&rows.expert_offsets, &expected.expert_offsets));
        assert!(equal(&rows.assignment_of_row, &expected.assignment_of_row));
        assert!(equal(&rows.row_of_assignment, &expected.row_of_assignment));
    }

    #[test]
    fn a_tile_is_packed_with_its_rows_side_by_side() {
        let x = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]];
        let mut packed = [0.0; 9];
        pack(&[Chunk { expert: 0, rows: 0..2 }, Chunk { expert: 1, rows: 2..3 }], &mut packed, |r| &x[r]);
        assert_eq!(packed, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0, 7.0, 8.0, 9.0]);
    }
}
