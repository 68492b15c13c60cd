//! Stage 2: assignments sorted by expert, and their tokens gathered in that order. Assignments that nobody computes,
//! and those of experts without weights, get no row.

use super::chunks::{Chunk, cut};
use crate::model::routing::RoutingDecision;
use rayon::prelude::*;

/// Instead of a row, for an assignment that has none.
pub(super) const NO_ROW: usize = usize::MAX;

/// Where each assignment went, as in [`crate::reference::permute::Permutation`].
pub(super) struct Rows {
    /// Expert e owns rows `expert_offsets[e]..expert_offsets[e + 1]`: `[num_weighted_experts + 1]`
    pub expert_offsets: Vec<usize>,
    /// `[num_rows]`
    pub assignment_of_row: Vec<usize>,
    /// `[num_tokens, top_k]`, [`NO_ROW`] where there is none.
    pub row_of_assignment: Vec<usize>,
}

/// Stable counting sort of the assignments by expert.
pub(super) fn permute(decision: &RoutingDecision, num_weighted_experts: usize) -> Rows {
    let mut next_row = Vec::with_capacity(num_weighted_experts);
    let mut num_rows = 0;
    for &count in &decision.tokens_per_expert[..num_weighted_experts] {
        next_row.push(num_rows);
        num_rows += count as usize;
    }
    let mut expert_offsets = next_row.clone();
    expert_offsets.push(num_rows);
    let mut assignment_of_row = vec![0; num_rows];
    let mut row_of_assignment = Vec::with_capacity(decision.topk_experts.len());
    for (a, &expert) in decision.topk_experts.iter().enumerate() {
        row_of_assignment.push(next_row.get_mut(expert as usize).map_or(NO_ROW, |next| {
            let row = *next;
            *next += 1;
            assignment_of_row[row] = a;
            row
        }));
    }
    Rows { expert_offsets, assignment_of_row, row_of_assignment }
}

/// Packs rows tile by tile (see [`super::chunks`]). `chunks` cover all rows in order, `row_of(r)` is row r,
/// `packed [num_rows, width of a row]`.
pub(super) fn pack<'a>(chunks: &[Chunk], packed: &mut [f32], row_of: impl Fn(usize) -> &'a [f32] + Sync) {
    let num_rows = chunks.last().map_or(0, |chunk| chunk.rows.end);
    let Some(width) = packed.len().checked_div(num_rows) else { return };
    cut(chunks, packed, width).into_par_iter().for_each(|(rows, piece)| {
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
    use crate::model::routing::DROPPED;
    use crate::reference;

    #[test]
    fn the_sort_is_that_of_the_reference() {
        let topk_experts = vec![3, 1, 1, 0, 3, 1, DROPPED, 4];
        let decision = RoutingDecision {
            num_tokens: 4,
            tokens_per_expert: vec![1, 3, 0, 2, 1],
            topk_experts,
            ..RoutingDecision::default()
        };
        for num_weighted in [5, 4, 2] {
            let rows = permute(&decision, num_weighted as usize);
            let expected = reference::permute::permute(&decision.topk_experts, num_weighted);
            let index = |n: u32| if n == DROPPED { NO_ROW } else { n as usize };
            let equal = |got: &[usize], expected: &[u32]| got.iter().copied().eq(expected.iter().map(|&n| index(n)));
            assert!(equal(&rows.expert_offsets, &expected.expert_offsets));
            assert!(equal(&rows.assignment_of_row, &expected.assignment_of_row));
            assert!(equal(&rows.row_of_assignment, &expected.row_of_assignment));
        }
    }

    #[test]
    fn a_tile_is_packed_with_its_rows_side_by_side() {
        let x = [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]];
        let mut packed = [0.0; 9];
        pack(&[Chunk { expert: 0, rows: 0..2 }, Chunk { expert: 1, rows: 2..3 }], &mut packed, |r| &x[r]);
        assert_eq!(packed, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0, 7.0, 8.0, 9.0]);
    }
}
