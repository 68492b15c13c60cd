//! The matmul kernel: one panel of weights times the rows of one chunk.
//!
//! The idea:
//!
//! ```text
//! for each tile of rows, for each two vectors of the panel's columns:
//!     acc[row][2 vectors] = 0                     in registers
//!     for k ascending:
//!         acc[row] += x[row, k] * w[k, columns]   x broadcast, w loaded once for all rows
//! ```
//!
//! Departures from it: `k` advances in blocks, so that a block of weights stays in the L1 cache for all tiles of the
//! chunk and f16 weights are decoded once for all of them; between blocks the accumulators wait in memory, which
//! does not change their bits.

use super::chunks::{CHUNK_TILES, Chunk};
use super::panels::{Line, Panels, WIDTH};
use bytemuck::Zeroable;
use pulp::{Arch, Simd, WithSimd};

/// Lines of weights worked on at a time by several tiles: 16 KiB, a third to a half of a core's L1 cache.
const DEPTH_BLOCK: usize = 128;
/// The same for a single tile, which reads every line once: short, so that memory does not idle while f16 weights
/// are decoded.
const STREAMED_BLOCK: usize = 32;
/// Most rows in a tile, of any processor.
const MOST_ROWS: usize = 12;

/// Most rows in a tile: two accumulators for each, and registers left for two vectors of weights and a broadcast.
pub(super) fn rows_per_tile(simd: Arch) -> usize {
    struct Rows;
    impl WithSimd for Rows {
        type Output = usize;
        fn with_simd<S: Simd>(self, _: S) -> usize {
            if S::REGISTER_COUNT >= 32 { MOST_ROWS } else { 6 }
        }
    }
    simd.dispatch(Rows)
}

/// One panel of weights and the rows to multiply with it.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub weights: &'a Panels,
    pub panel: usize,
    pub chunk: &'a Chunk,
    /// All rows of the pass, packed: `[num_rows, weights.depth]`
    pub x: &'a [f32],
    pub tile: usize,
}

impl Product<'_> {
    /// Calls `use_sums(row, sums)` for each row of the chunk; `sums[j] = x[row, :] . w[panel * WIDTH + j, :]`.
    #[inline(always)]
    pub fn for_each_row<S: Simd>(self, simd: S, mut use_sums: impl FnMut(usize, &Line)) {
        let Product { weights, panel, chunk, x, tile } = self;
        let depth = weights.depth;
        let mut sums = [Line::zeroed(); CHUNK_TILES * MOST_ROWS];
        let mut decoded = [Line::zeroed(); DEPTH_BLOCK];
        let block = if chunk.rows.len() > tile { DEPTH_BLOCK } else { STREAMED_BLOCK };
        for k in (0..depth).step_by(block) {
            let lines = weights.lines(chunk.expert, panel, k, &mut decoded[..block]);
            for rows in chunk.tiles(tile) {
                let x = &x[rows.start * depth..rows.end * depth][k * rows.len()..][..lines.len() * rows.len()];
                let sums = &mut sums[rows.start - chunk.rows.start..][..rows.len()];
                multiply(simd, lines, x, sums);
            }
        }
        for (row, sums) in chunk.rows.clone().zip(&sums) {
            use_sums(row, sums);
        }
    }
}

/// `sums[r] += sum over k of x[k, r] * lines[k]`; `x [K, R]`, `sums [R]`.
#[inline(always)]
fn multiply<S: Simd>(simd: S, lines: &[Line], x: &[f32], sums: &mut [Line]) {
    match sums.len() {
        1 => multiply_rows::<S, 1>(simd, lines, x, sums),
        2 => multiply_rows::<S, 2>(simd, lines, x, sums),
        3 => multiply_rows::<S, 3>(simd, lines, x, sums),
        4 => multiply_rows::<S, 4>(simd, lines, x, sums),
        5 => multiply_rows::<S, 5>(simd, lines, x, sums),
        6 => multiply_rows::<S, 6>(simd, lines, x, sums),
        7 => multiply_rows::<S, 7>(simd, lines, x, sums),
        8 => multiply_rows::<S, 8>(simd, lines, x, sums),
        9 => multiply_rows::<S, 9>(simd, lines, x, sums),
        10 => multiply_rows::<S, 10>(simd, lines, x, sums),
        11 => multiply_rows::<S, 11>(simd, lines, x, sums),
        12 => multiply_rows::<S, 12>(simd, lines, x, sums),
        rows => unreachable!("a tile has 1 to {MOST_ROWS} rows, not {rows}"),
    }
}

/// The inner loops. All of `R` is unrolled, so that the accumulators are registers.
#[inline(always)]
fn multiply_rows<S: Simd, const R: usize>(simd: S, lines: &[Line], x: &[f32], sums: &mut [Line]) {
    let (x, _) = x.as_chunks::<R>();
    for pair in 0..WIDTH / S::F32_LANES / 2 {
        let mut low = [simd.splat_f32s(0.0); R];
        let mut high = [simd.splat_f32s(0.0); R];
        for r in 0..R {
            let (sums, _) = S::as_simd_f32s(&sums[r].0);
            (low[r], high[r]) = (sums[2 * pair], sums[2 * pair + 1]);
        }
        for (line, x) in lines.iter().zip(x) {
            let (line, _) = S::as_simd_f32s(&line.0);
            let (w_low, w_high) = (line[2 * pair], line[2 * pair + 1]);
            for r in 0..R {
                let x = simd.splat_f32s(x[r]);
                low[r] = simd.mul_add_e_f32s(x, w_low, low[r]);
                high[r] = simd.mul_add_e_f32s(x, w_high, high[r]);
            }
        }
        for r in 0..R {
            let (sums, _) = S::as_mut_simd_f32s(&mut sums[r].0);
            (sums[2 * pair], sums[2 * pair + 1]) = (low[r], high[r]);
        }
    }
}
