//! How rows are cut for the matmul, and how packed activations lie in memory.
//!
//! Rows of one expert form chunks (what one task works on), a chunk's rows form tiles (what fits into registers).
//! Both cuts are even: 7 rows in tiles of at most 6 become 3 + 4.
//!
//! **Packed activations** keep each tile's rows side by side: the tile with rows `a..b` of width `K` occupies
//! `a * K..b * K`, as `[K, b - a]`. The kernel then reads one stream, and a single row is just a row.

use std::ops::Range;

/// Most rows in a tile.
pub(super) const TILE_ROWS: usize = 6;
/// Most rows in a chunk: bounds a task's accumulators, and keeps its activations in a core's L2 cache.
pub(super) const CHUNK_ROWS: usize = 20 * TILE_ROWS;

/// Rows of one expert, for one task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    pub expert: usize,
    pub rows: Range<usize>,
}

impl Chunk {
    /// The tiles, as ranges of rows.
    pub fn tiles(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        even(self.rows.clone(), TILE_ROWS)
    }
}

/// Chunks of all experts, ascending. Expert e owns rows `expert_offsets[e]..expert_offsets[e + 1]`.
pub(super) fn chunks(expert_offsets: &[usize]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    for (expert, range) in expert_offsets.windows(2).enumerate() {
        chunks.extend(even(range[0]..range[1], CHUNK_ROWS).map(|rows| Chunk { expert, rows }));
    }
    chunks
}

/// The tiles of all chunks, which cover all rows in order, each with its part of `rows [num_rows, width]`.
pub(super) fn cut<'a, T>(chunks: &[Chunk], rows: &'a mut [T], width: usize) -> Vec<(Range<usize>, &'a mut [T])> {
    let mut rest = rows;
    let mut pieces = Vec::with_capacity(chunks.len());
    for tile in chunks.iter().flat_map(Chunk::tiles) {
        let (piece, after) = rest.split_at_mut(tile.len() * width);
        rest = after;
        pieces.push((tile, piece));
    }
    pieces
}

/// `range` in as few pieces of at most `most` as possible, lengths differing by at most one.
fn even(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let pieces = range.len().div_ceil(most);
    let cut = move |piece: usize| range.start + range.len() * piece / pieces;
    (0..pieces).map(move |piece| cut(piece)..cut(piece + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_cover_the_range_once_and_evenly() {
        for len in 0..400 {
            for most in [1, 2, 6, 12, 120] {
                let pieces: Vec<_> = even(7..7 + len, most).collect();
                assert_eq!(pieces.len(), len.div_ceil(most));
                assert!(pieces.iter().flat_map(Clone::clone).eq(7..7 + len));
                let lengths = || pieces.iter().map(ExactSizeIterator::len);
                assert!(lengths().max().unwrap_or(0) <= most);
                assert!(lengths().max().unwrap_or(0) - lengths().min().unwrap_or(0) <= 1);
            }
        }
    }

    #[test]
    fn experts_without_rows_have_no_chunk() {
        let [one, two] = [Chunk { expert: 1, rows: 0..3 }, Chunk { expert: 3, rows: 3..4 }];
        assert_eq!(chunks(&[0, 0, 3, 3, 4]), [one, two]);
    }
}
