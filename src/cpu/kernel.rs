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
//! chunk and packed weights are decoded once for all of them; between blocks the accumulators wait in memory, which
//! does not change their bits. While several tiles are computed with one block of packed weights, the next is asked for.
//! A single tile whose accumulators all fit into the registers has no blocks: weights are decoded on their way into the
//! multiplication (`Tile`). Where weights are codes times a factor, codes take the place of weights, and the sums of
//! each span of lines (`Codec::span`) are multiplied by the factor:
//! `acc = sum over the span of x * code; sum = acc * factor + sum`. A multiplication for 32 lines instead of one for each.
//! Where a processor multiplies bytes, activations become whole numbers like the codes ([`super::digits`]).

use super::chunks::{CHUNK_ROWS, Chunk, TILE_ROWS};
use super::decode::{Codec, Group, SPAN};
use super::digits::{Block, Digits, INPUTS, Rows, Vnni};
use super::panel::{Lines, Panel, WithCodec};
use super::panels::{Line, Panels, WIDTH};
use super::widen::has_halves;
use bytemuck::Zeroable;
use pulp::{Arch, NullaryFnOnce, Simd};

/// Lines of weights worked on at a time by several tiles: 32 KiB, about a core's L1 cache.
const DEPTH_BLOCK: usize = 128;
/// The same for a single tile, which reads every line once: short, so that memory does not idle while weights are
/// decoded.
const STREAMED_BLOCK: usize = SPAN;
/// The least that a span can have where it has a factor.
const LEAST_SPAN: usize = 16;

/// One panel of weights and the rows to multiply with it.
#[derive(Clone, Copy)]
pub(super) struct Product<'a> {
    pub weights: &'a Panels,
    pub panel: usize,
    pub chunk: &'a Chunk,
    pub input: Input<'a>,
}

/// All rows of a pass.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    /// Packed: `[num_rows, depth]`
    x: &'a [f32],
    /// The same as digits, if the matrix is multiplied with these.
    digits: Option<(Vnni, &'a [Digits])>,
}

impl<'a> Input<'a> {
    /// As they are.
    pub fn floats(x: &'a [f32]) -> Self {
        Self { x, digits: None }
    }

    /// As `weights` is multiplied. There is room in `digits` for [`digits_for`] of them.
    pub fn new(simd: Arch, weights: &Panels, chunks: &[Chunk], x: &'a [f32], digits: &'a mut [Digits]) -> Self {
        let Some(vnni) = Vnni::for_matrix(simd, weights) else { return Self::floats(x) };
        let num_rows = chunks.last().map_or(0, |chunk| chunk.rows.end);
        let digits = &mut digits[..digits_for(simd, weights, num_rows)];
        vnni.split(chunks, x, digits);
        Self::of_digits(x, vnni, digits)
    }

    /// As digits, which were made of x.
    pub fn of_digits(x: &'a [f32], vnni: Vnni, digits: &'a [Digits]) -> Self {
        Self { x, digits: Some((vnni, digits)) }
    }
}

/// What [`Input::new`] needs for so many rows.
pub(super) fn digits_for(simd: Arch, weights: &Panels, num_rows: usize) -> usize {
    Vnni::for_matrix(simd, weights).map_or(0, |_| num_rows * (weights.depth / INPUTS))
}

impl Product<'_> {
    /// Calls `use_sums(row, sums)` for each row of the chunk; `sums[j] = x[row, :] . w[panel * WIDTH + j, :]`.
    #[inline(always)]
    pub fn for_each_row<S: Simd>(self, simd: S, mut use_sums: impl FnMut(usize, &Line)) {
        let Product { weights, panel, chunk, input } = self;
        let (rows, depth) = (chunk.rows.clone(), weights.depth);
        let panel = weights.panel(chunk.expert, panel);
        // No more than are needed: clearing those of a whole chunk would take as long as a row does.
        let (mut few, mut many);
        let sums: &mut [Line] = if rows.len() <= TILE_ROWS {
            few = [Line::zeroed(); TILE_ROWS];
            &mut few[..rows.len()]
        } else {
            many = [Line::zeroed(); CHUNK_ROWS];
            &mut many[..rows.len()]
        };
        let x = &input.x[rows.start * depth..rows.end * depth];
        if let Some((vnni, digits)) = input.digits {
            let per_row = depth / INPUTS;
            let digits = &digits[rows.start * per_row..rows.end * per_row];
            panel.read(DigitTiles { simd, panel, vnni, rows: Rows { chunk, x, digits, depth }, sums });
        } else if fits_registers::<S>(rows.len()) && (has_halves::<S>() || !panel.is_f16()) {
            panel.read(Tile { simd, depth, x, sums });
        } else {
            let (mut short, mut long);
            let decoded: &mut [Line] = if rows.len() <= TILE_ROWS {
                short = [Line::zeroed(); STREAMED_BLOCK];
                &mut short
            } else {
                long = [Line::zeroed(); DEPTH_BLOCK];
                &mut long
            };
            multiply_blocks(simd, panel, chunk, x, decoded, sums);
        }
        for (row, sums) in rows.zip(&*sums) {
            use_sums(row, sums);
        }
    }
}

/// `sums [rows of the chunk]`, zeros before, by way of digits.
struct DigitTiles<'a, S> {
    simd: S,
    panel: Panel<'a>,
    vnni: Vnni,
    rows: Rows<'a>,
    sums: &'a mut [Line],
}

impl<S: Simd> WithCodec for DigitTiles<'_, S> {
    type Output = ();

    fn with_codec<C: Codec>(self, codec: C) {
        let Self { simd, panel, vnni, rows, sums } = self;
        let Some(codes) = codec.codes() else { unreachable!("digits are made for codes that are bytes") };
        let group_lines = codec.group_lines();
        let mut factors = [Line::zeroed(); DEPTH_BLOCK / INPUTS];
        for first_line in (0..rows.depth).step_by(DEPTH_BLOCK) {
            let lines = first_line..rows.depth.min(first_line + DEPTH_BLOCK);
            let factors = &mut factors[..lines.len() / INPUTS];
            simd.vectorize(Factors { simd, codec, first_line, factors });
            vnni.multiply(&Block { panel, codes, lines, group_lines, factors }, rows, sums);
        }
    }
}

/// The factors of each [`INPUTS`] lines from `first_line` on.
struct Factors<'a, S, C> {
    simd: S,
    codec: C,
    first_line: usize,
    factors: &'a mut [Line],
}

impl<S: Simd, C: Codec> NullaryFnOnce for Factors<'_, S, C> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        match const { WIDTH / S::F32_LANES } {
            4 => self.vectors::<4>(),
            vectors => unreachable!("vectors of 16 floats multiply bytes, not {vectors} of them in a line"),
        }
    }
}

impl<S: Simd, C: Codec> Factors<'_, S, C> {
    #[inline(always)]
    fn vectors<const V: usize>(self) {
        for (line, out) in (self.first_line..).step_by(INPUTS).zip(self.factors) {
            let group = self.codec.group::<S, V>(self.simd, line);
            S::as_mut_simd_f32s(&mut out.0).0.copy_from_slice(&group.factor);
        }
    }
}

/// `sums [rows of the chunk]`, in blocks of as many lines as there are in `decoded`; `x` are the chunk's rows.
#[inline(always)]
fn multiply_blocks<S: Simd>(
    simd: S,
    panel: Panel<'_>,
    chunk: &Chunk,
    x: &[f32],
    decoded: &mut [Line],
    sums: &mut [Line],
) {
    let (depth, first) = (x.len() / chunk.rows.len(), chunk.rows.start);
    let mut factors = [Line::zeroed(); DEPTH_BLOCK / LEAST_SPAN];
    let (block, num_tiles) = (decoded.len(), chunk.tiles().count());
    // A single tile, or tiles that read f32 as they multiply, only wait longer with it.
    let asks = num_tiles > 1 && panel.is_packed();
    for k in (0..depth).step_by(block) {
        let lines = panel.lines(simd, k, decoded, &mut factors);
        for (tile, rows) in chunk.tiles().enumerate() {
            if asks {
                // In parts, so that no tile waits for all of it.
                let part = |tile| k + block + block * tile / num_tiles;
                panel.prefetch(part(tile)..part(tile + 1));
            }
            let rows = rows.start - first..rows.end - first;
            let x = &x[rows.start * depth..rows.end * depth][k * rows.len()..][..lines.lines.len() * rows.len()];
            multiply(simd, lines, x, &mut sums[rows]);
        }
    }
}

/// `sums[r] += sum over k of x[k, r] * lines[k]`; `x [K, R]`, `sums [R]`.
#[inline(always)]
fn multiply<S: Simd>(simd: S, lines: Lines<'_>, x: &[f32], sums: &mut [Line]) {
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
fn multiply_rows<S: Simd, const R: usize>(simd: S, lines: Lines<'_>, x: &[f32], sums: &mut [Line]) {
    if S::REGISTER_COUNT > R * 4 + 4 {
        multiply_vectors::<S, R, 4>(simd, lines, x, sums);
    } else {
        multiply_vectors::<S, R, 2>(simd, lines, x, sums);
    }
}

/// The inner loops. All of `R` and `V` is unrolled, so that the accumulators are registers.
#[inline(always)]
fn multiply_vectors<S: Simd, const R: usize, const V: usize>(simd: S, lines: Lines<'_>, x: &[f32], sums: &mut [Line]) {
    let Lines { lines, span, factors } = lines;
    let (x, _) = x.as_chunks::<R>();
    for first in (0..WIDTH / S::F32_LANES).step_by(V) {
        for (n, (lines, x)) in lines.chunks(span).zip(x.chunks(span)).enumerate() {
            let mut acc = [[simd.splat_f32s(0.0); V]; R];
            let factor = factors.get(n);
            if factor.is_none() {
                for (acc, sums) in acc.iter_mut().zip(&*sums) {
                    acc.copy_from_slice(&S::as_simd_f32s(&sums.0).0[first..first + V]);
                }
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
                let sums = &mut S::as_mut_simd_f32s(&mut sums.0).0[first..first + V];
                match factor {
                    None => sums.copy_from_slice(acc),
                    Some(factor) => add_scaled(simd, acc, &S::as_simd_f32s(&factor.0).0[first..first + V], sums),
                }
            }
        }
    }
}

/// `sums += acc * factor`
#[inline(always)]
fn add_scaled<S: Simd>(simd: S, acc: &[S::f32s], factor: &[S::f32s], sums: &mut [S::f32s]) {
    for ((acc, factor), sum) in acc.iter().zip(factor).zip(sums) {
        *sum = simd.mul_add_e_f32s(*acc, *factor, *sum);
    }
}

/// The accumulators of as many rows, for all of a panel's columns, leave room for weights and what they are made of.
const fn fits_registers<S: Simd>(rows: usize) -> bool {
    rows <= TILE_ROWS && rows * (WIDTH / S::F32_LANES) + 8 <= S::REGISTER_COUNT
}

/// `sums[r] = sum over k of x[k, r] * w[k]`; `x [depth, R]`, `sums [R]`, zeros before.
struct Tile<'a, S> {
    simd: S,
    depth: usize,
    x: &'a [f32],
    sums: &'a mut [Line],
}

impl<S: Simd> WithCodec for Tile<'_, S> {
    type Output = ();

    fn with_codec<C: Codec>(self, codec: C) {
        let simd = self.simd;
        match self.sums.len() {
            1 if const { fits_registers::<S>(1) } => simd.vectorize(TileRows::<S, C, 1> { tile: self, codec }),
            2 if const { fits_registers::<S>(2) } => simd.vectorize(TileRows::<S, C, 2> { tile: self, codec }),
            3 if const { fits_registers::<S>(3) } => simd.vectorize(TileRows::<S, C, 3> { tile: self, codec }),
            4 if const { fits_registers::<S>(4) } => simd.vectorize(TileRows::<S, C, 4> { tile: self, codec }),
            5 if const { fits_registers::<S>(5) } => simd.vectorize(TileRows::<S, C, 5> { tile: self, codec }),
            6 if const { fits_registers::<S>(6) } => simd.vectorize(TileRows::<S, C, 6> { tile: self, codec }),
            rows => unreachable!("{rows} rows do not fit into the registers"),
        }
    }
}

/// The same, with the processor's instructions.
struct TileRows<'a, S, C, const R: usize> {
    tile: Tile<'a, S>,
    codec: C,
}

impl<S: Simd, C: Codec, const R: usize> NullaryFnOnce for TileRows<'_, S, C, R> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        match const { WIDTH / S::F32_LANES } {
            4 => multiply_tile::<S, C, R, 4>(self.tile, self.codec),
            8 => multiply_tile::<S, C, R, 8>(self.tile, self.codec),
            16 => multiply_tile::<S, C, R, 16>(self.tile, self.codec),
            vectors => unreachable!("{vectors} accumulators do not fit into the registers"),
        }
    }
}

/// `sums` are zeros.
#[inline(always)]
fn multiply_tile<S: Simd, C: Codec, const R: usize, const V: usize>(tile: Tile<'_, S>, codec: C) {
    let Tile { simd, depth, x, sums } = tile;
    let (x, _) = x.as_chunks::<R>();
    let span = codec.span().min(depth);
    let mut acc = [[simd.splat_f32s(0.0); V]; R];
    for (start, x) in (0..depth).step_by(span).zip(x.chunks(span)) {
        let group = codec.group::<S, V>(simd, start);
        for (k, x) in (start..).step_by(C::STEP).zip(x.chunks_exact(C::STEP)) {
            // Written out: where a code lies has to be known when this is compiled.
            multiply_line(simd, codec, k, 0, &group, x, &mut acc);
            if C::STEP > 1 {
                multiply_line(simd, codec, k, 1, &group, x, &mut acc);
            }
            if C::STEP > 2 {
                multiply_line(simd, codec, k, 2, &group, x, &mut acc);
                multiply_line(simd, codec, k, 3, &group, x, &mut acc);
            }
        }
        if C::HAS_FACTOR {
            for (acc, sums) in acc.iter().zip(&mut *sums) {
                add_scaled(simd, acc, &group.factor, S::as_mut_simd_f32s(&mut sums.0).0);
            }
            acc = [[simd.splat_f32s(0.0); V]; R];
        }
    }
    if !C::HAS_FACTOR {
        for (acc, sums) in acc.iter().zip(sums) {
            S::as_mut_simd_f32s(&mut sums.0).0.copy_from_slice(acc);
        }
    }
}

/// `acc[r] += x[step, r] * w[k + step]`
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "vectors vary slower than rows, which are the outer index")]
fn multiply_line<S: Simd, C: Codec, const R: usize, const V: usize>(
    simd: S,
    codec: C,
    k: usize,
    step: usize,
    group: &Group<S, V>,
    x: &[[f32; R]],
    acc: &mut [[S::f32s; V]; R],
) {
    for v in 0..V {
        let w = codec.vector(simd, k, step, v, group);
        for r in 0..R {
            acc[r][v] = simd.mul_add_e_f32s(simd.splat_f32s(x[step][r]), w, acc[r][v]);
        }
    }
}
