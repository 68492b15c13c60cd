//! The matmul kernel: one panel of weights times the rows of one chunk.
//!
//! The idea:
//!
//! ```text
//! for each tile of rows, for each two or four vectors of the panel's columns:
//!     acc[row][vector] = 0                                      in registers
//!     for k ascending:
//!         acc[row][vector] += x[row, k] * w[k, vector]          x broadcast, w loaded once for all rows
//! ```
//!
//! Departures from it: `k` advances in blocks, so that a block of weights stays in the L1 cache for all tiles of the
//! chunk and f16 weights are decoded once for all of them; between blocks the accumulators wait in memory, which
//! does not change their bits.

use super::chunks::{CHUNK_ROWS, Chunk, TILE_ROWS};
use super::panels::{Line, Panels, WIDTH};
use bytemuck::Zeroable;
use pulp::Simd;

/// Lines of weights worked on at a time by several tiles: 32 KiB, about a core's L1 cache.
const DEPTH_BLOCK: usize = 128;
/// The same for a single tile, which reads every line once: short, so that memory does not idle while f16 weights
/// are decoded.
const STREAMED_BLOCK: usize = 32;
/// One panel of weights and the rows to multiply with it.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub weights: &'a Panels,
    pub panel: usize,
    pub chunk: &'a Chunk,
    /// All rows of the pass, packed: `[num_rows, weights.depth]`
    pub x: &'a [f32],
}

impl Product<'_> {
    /// Calls `use_sums(row, sums)` for each row of the chunk; `sums[j] = x[row, :] . w[panel * WIDTH + j, :]`.
    #[inline(always)]
    pub fn for_each_row<S: Simd>(self, simd: S, mut use_sums: impl FnMut(usize, &Line)) {
        let Product { weights, panel, chunk, x } = self;
        let depth = weights.depth;
        let mut sums = [Line::zeroed(); CHUNK_ROWS];
        let mut decoded = [Line::zeroed(); DEPTH_BLOCK];
        let block = if chunk.rows.len() > TILE_ROWS { DEPTH_BLOCK } else { STREAMED_BLOCK };
        for k in (0..depth).step_by(block) {
            let lines = weights.lines(chunk.expert, panel, k, &mut decoded[..block]);
            for rows in chunk.tiles() {
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
        rows => unreachable!("a tile has 1 to {TILE_ROWS} rows, not {rows}"),
    }
}

/// Four vectors of columns at a time, if the accumulators, four vectors of weights and a broadcast fit into the
/// registers; else two.
#[inline(always)]
fn multiply_rows<S: Simd, const R: usize>(simd: S, lines: &[Line], x: &[f32], sums: &mut [Line]) {
    if S::REGISTER_COUNT > R * 4 + 4 {
        multiply_vectors::<S, R, 4>(simd, lines, x, sums);
    } else {
        multiply_vectors::<S, R, 2>(simd, lines, x, sums);
    }
}

/// The inner loops. All of `R` and `V` is unrolled, so that the accumulators are registers.
#[inline(always)]
fn multiply_vectors<S: Simd, const R: usize, const V: usize>(simd: S, lines: &[Line], x: &[f32], sums: &mut [Line]) {
    let (x, _) = x.as_chunks::<R>();
    for first in (0..WIDTH / S::F32_LANES).step_by(V) {
        let mut acc = [[simd.splat_f32s(0.0); V]; R];
        for (acc, sums) in acc.iter_mut().zip(&*sums) {
            acc.copy_from_slice(&S::as_simd_f32s(&sums.0).0[first..first + V]);
        }
        for (line, x) in lines.iter().zip(x) {
            let w = &S::as_simd_f32s(&line.0).0[first..first + V];
            for r in 0..R {
                let x = simd.splat_f32s(x[r]);
                for v in 0..V {
                    acc[r][v] = simd.mul_add_e_f32s(x, w[v], acc[r][v]);
                }
            }
        }
        for (acc, sums) in acc.iter().zip(&mut *sums) {
            S::as_mut_simd_f32s(&mut sums.0).0[first..first + V].copy_from_slice(acc);
        }
    }
}
