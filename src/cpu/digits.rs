//! Activations as whole numbers of 24 bits, for codes that are whole numbers: their products are, too.
//!
//! The idea:
//!
//! ```text
//! for each 32 inputs of a row:
//!     unit = the power of two for which x / unit fits 24 bits
//!     round(x / unit) = digit[0] + 256 digit[1] + 65536 digit[2]         digits from -128 to 127
//! sum over k of x[k] * code[k] = unit * sum over p of 256^p * (sum over k of digit[p][k] * code[k])
//! ```
//!
//! One instruction (`vpdpbusd`) multiplies 64 codes by as many digits and adds them up in fours, exactly: three of it do
//! what takes four multiply-adds of floats, and codes become bytes in a fraction of the operations that make them floats.
//! Inputs of the binade of the largest are exact; a smaller one loses as many bits as it is binades smaller. Where that
//! could show, what rounding took away is multiplied as well ([`margin`]).
//!
//! Processors without this instruction use none of it, nor do other formats: [`Vnni::for_matrix`].

use super::chunks::{Chunk, cut};
use super::panel::Panel;
use super::panels::{Line, Panels};
use super::words::Words;
use crate::model::formats::WeightFormat;
use pulp::Arch;
use rayon::prelude::*;
use std::ops::Range;

/// Inputs that share a unit. Each 32 lines of the matrices share a factor.
pub(super) const INPUTS: usize = 32;

/// So many neighbouring inputs of a row.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable)]
#[repr(C, align(16))]
pub(super) struct Digits {
    /// `words[j][p]`: digit p of inputs 4j, 4j + 2, 4j + 1 and 4j + 3, in the order that codes have; the fourth is zeros.
    words: [[u32; 4]; INPUTS / 4],
    /// The sum of each digit over the inputs.
    sums: [i32; 3],
    /// What the numbers count, NaN if an input is not finite.
    unit: f32,
    /// What rounding took away could show, see [`margin`].
    has_rest: bool,
}

/// How many times as large as another an input may be, as a distance between the bits of floats. Where at least half of a
/// block's inputs, zeros left out, are smaller than that, they could lose too much of a product in which the code of
/// the largest is zero: an input's error is half a unit, the product's up to some 20 (random signs, 4 sigma), and
/// `4 sqrt(depth) 2^-24` of the sum of all magnitudes is what is allowed.
fn margin(depth: usize) -> u32 {
    (16.0 * (depth as f32 / INPUTS as f32).sqrt()).to_bits() - 1f32.to_bits()
}

/// Codes as the panels of a matrix hold them.
#[derive(Clone, Copy)]
pub(super) struct Codes<'a> {
    pub kind: Kind,
    /// Two lines in each, or one of codes of eight bits.
    pub words: &'a [Words],
    /// Of each group of lines, what is subtracted from its codes. Without them it is their middle.
    pub zeros: Option<&'a [Words]>,
}

/// What codes are.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    /// Four bits.
    Nibbles,
    /// E2M1 numbers.
    SmallFloats,
    /// Eight bits.
    Bytes,
    /// Eight bits in two's complement.
    SignedBytes,
}

/// Neighbouring lines of a panel.
pub(super) struct Block<'a> {
    pub panel: Panel<'a>,
    pub codes: Codes<'a>,
    /// Both ends are multiples of [`INPUTS`].
    pub lines: Range<usize>,
    /// Lines that share a zero.
    pub group_lines: usize,
    /// Of each [`INPUTS`] lines: what codes count.
    pub factors: &'a [Line],
}

/// Rows of one chunk.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub chunk: &'a Chunk,
    /// Packed: `[rows, depth]`
    pub x: &'a [f32],
    /// `[rows, depth / INPUTS]`
    pub digits: &'a [Digits],
    pub depth: usize,
}

/// Proof that this processor has the instructions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Vnni(imp::Proof);

impl Vnni {
    /// For matrices that are multiplied like this. With a factor for each 16 lines it would be slower than with floats.
    pub fn for_matrix(simd: Arch, weights: &Panels) -> Option<Self> {
        let is_fit = match weights.format() {
            WeightFormat::Int4(groups) | WeightFormat::Int8(groups) => groups.size() as usize >= INPUTS,
            WeightFormat::Mxfp4 | WeightFormat::Q4_0 | WeightFormat::Q8_0 => true,
            _ => false,
        };
        if is_fit { imp::proof(simd).map(Self) } else { None }
    }

    /// `digits [rows, depth / INPUTS]` of packed `x [rows, depth]`, in parallel.
    pub fn split(self, chunks: &[Chunk], x: &[f32], digits: &mut [Digits]) {
        let Some(num_rows) = chunks.last().map(|chunk| chunk.rows.end) else { return };
        let depth = x.len() / num_rows;
        cut(chunks, digits, depth / INPUTS).into_par_iter().for_each(|(rows, digits)| {
            imp::split(self.0, &x[rows.start * depth..rows.end * depth], rows.len(), digits);
        });
    }

    /// `sums[r] += sum over the block's lines of x[r, k] * w[k]`
    pub fn multiply(self, block: &Block<'_>, rows: Rows<'_>, sums: &mut [Line]) {
        imp::multiply(self.0, block, rows, sums);
    }
}

#[cfg(target_arch = "x86_64")]
mod imp {
    use super::{Block, Digits, INPUTS, Kind, Line, Rows, margin};
    use crate::cpu::panel::fetch;
    use crate::cpu::words::Words;
    use bytemuck::Zeroable;
    use pulp::Arch;
    use std::arch::x86_64::*;
    use std::ops::Range;

    #[derive(Clone, Copy, Debug)]
    pub struct Proof(());

    pub fn proof(simd: Arch) -> Option<Proof> {
        (matches!(simd, Arch::V4(_)) && is_x86_feature_detected!("avx512vnni")).then_some(Proof(()))
    }

    pub fn split(_: Proof, x: &[f32], rows: usize, digits: &mut [Digits]) {
        // SAFETY: there is a proof that the processor has these instructions.
        unsafe { split_tile(x, rows, digits) }
    }

    pub fn multiply(_: Proof, block: &Block<'_>, rows: Rows<'_>, sums: &mut [Line]) {
        let codes = block.codes;
        // SAFETY: the same.
        unsafe {
            match (codes.kind, codes.zeros.is_some()) {
                (Kind::Nibbles, false) => multiply_rows::<NIBBLES, false>(block, rows, sums),
                (Kind::Nibbles, true) => multiply_rows::<NIBBLES, true>(block, rows, sums),
                (Kind::SmallFloats, _) => multiply_rows::<SMALL_FLOATS, false>(block, rows, sums),
                (Kind::Bytes, false) => multiply_rows::<BYTES, false>(block, rows, sums),
                (Kind::Bytes, true) => multiply_rows::<BYTES, true>(block, rows, sums),
                (Kind::SignedBytes, _) => multiply_rows::<SIGNED_BYTES, false>(block, rows, sums),
            }
        }
    }

    const NIBBLES: u8 = Kind::Nibbles as u8;
    const SMALL_FLOATS: u8 = Kind::SmallFloats as u8;
    const BYTES: u8 = Kind::Bytes as u8;
    const SIGNED_BYTES: u8 = Kind::SignedBytes as u8;

    /// The bits of infinity: magnitudes that are not finite have these or more.
    const INFINITY: u32 = 0x7f80_0000;
    /// Digits from 0 to 255 instead of -128 to 127 are those of a number that is larger by this.
    const MIDDLE: i32 = 0x0080_8080;

    /// The largest magnitude, as bits: more than those of infinity for NaN.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn largest(x: &[__m512; 2]) -> u32 {
        let [a, b] = magnitudes(x);
        _mm512_reduce_max_epu32(_mm512_max_epu32(a, b))
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn magnitudes(x: &[__m512; 2]) -> [__m512i; 2] {
        let magnitude = _mm512_set1_epi32(i32::MAX);
        [_mm512_and_si512(_mm512_castps_si512(x[0]), magnitude), _mm512_and_si512(_mm512_castps_si512(x[1]), magnitude)]
    }

    /// The unit is 2^(this - 149), for magnitudes up to `largest`: the exponent of a number a 128th larger, so that the
    /// highest digit does not become 128.
    fn exponent(largest: u32) -> u32 {
        (f32::from_bits(largest) * (1.0 + 1.0 / 128.0)).to_bits() >> 23
    }

    /// 2^(exponent - 149)
    fn unit(exponent: u32) -> f32 {
        f32::from_bits(if exponent > 22 { (exponent - 22) << 23 } else { 1 << exponent })
    }

    /// `round(x / unit)`
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn whole(x: __m512, exponent: u32) -> __m512i {
        _mm512_cvtps_epi32(_mm512_scalef_ps(x, _mm512_set1_ps(149.0 - exponent as f32)))
    }

    /// Digits of what is finite.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn digits(x: &[__m512; 2], exponent: u32) -> Digits {
        // In each quarter of a vector the lowest byte of inputs 0, 2, 1 and 3, then the next and the next.
        const ORDER: [u8; 16] = [0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 128, 128, 128, 128];
        const MIDDLES: [i32; 4] = [!0x7f7f_7f7f, !0x7f7f_7f7f, !0x7f7f_7f7f, 0];
        let order = _mm512_broadcast_i32x4(bytemuck::cast(ORDER));
        let middles = _mm512_broadcast_i32x4(bytemuck::cast(MIDDLES));
        let mut words = [_mm512_setzero_si512(); 2];
        let mut fours = _mm512_setzero_si512();
        for (half, x) in x.iter().enumerate() {
            let raised = _mm512_add_epi32(whole(*x, exponent), _mm512_set1_epi32(MIDDLE));
            words[half] = _mm512_xor_si512(_mm512_shuffle_epi8(raised, order), middles);
            fours = _mm512_dpbusd_epi32(fours, _mm512_set1_epi8(1), words[half]);
        }
        let [a, b, c, d]: [__m128i; 4] = bytemuck::cast(fours);
        let [s0, s1, s2, _]: [i32; 4] = bytemuck::cast(_mm_add_epi32(_mm_add_epi32(a, b), _mm_add_epi32(c, d)));
        let sums = [s0, s1, s2];
        Digits { words: bytemuck::cast(words), sums, unit: unit(exponent), has_rest: false }
    }

    /// Inputs of one row of a tile from `INPUTS * n` on; `x [depth, rows]`.
    #[inline(always)]
    fn inputs(x: &[f32], rows: usize, row: usize, n: usize) -> [f32; INPUTS] {
        let x = &x[n * INPUTS * rows..][..INPUTS * rows];
        let mut out = [0.0; INPUTS];
        if rows == 1 {
            out.copy_from_slice(x);
        } else {
            out.iter_mut().zip(x[row..].iter().step_by(rows)).for_each(|(out, x)| *out = *x);
        }
        out
    }

    /// `digits [rows, depth / INPUTS]` of a tile `x [depth, rows]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn split_tile(x: &[f32], rows: usize, digits: &mut [Digits]) {
        let margin = margin(x.len() / rows);
        let per_row = digits.len() / rows;
        for (row, digits) in digits.chunks_exact_mut(per_row).enumerate() {
            for (n, digits) in digits.iter_mut().enumerate() {
                *digits = split_inputs(&inputs(x, rows, row, n), margin);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn split_inputs(x: &[f32; INPUTS], margin: u32) -> Digits {
        let x: [__m512; 2] = bytemuck::cast(*x);
        let largest = largest(&x);
        if largest >= INFINITY {
            return Digits { unit: f32::NAN, ..Digits::zeroed() };
        }
        let least = _mm512_set1_epi32(largest.saturating_sub(margin).cast_signed());
        let (mut small, mut nonzero) = (0, 0);
        for magnitude in magnitudes(&x) {
            let is_nonzero = _mm512_test_epi32_mask(magnitude, magnitude);
            small += (is_nonzero & _mm512_cmplt_epu32_mask(magnitude, least)).count_ones();
            nonzero += is_nonzero.count_ones();
        }
        Digits { has_rest: small > 0 && 2 * small >= nonzero, ..digits(&x, exponent(largest)) }
    }

    /// What rounding took from inputs, which are finite.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn rest(x: &[f32; INPUTS]) -> [f32; INPUTS] {
        let mut x: [__m512; 2] = bytemuck::cast(*x);
        let exponent = exponent(largest(&x));
        let unit = _mm512_set1_ps(unit(exponent));
        for x in &mut x {
            // Exact: no more than half a unit, of the bits that x has.
            *x = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(whole(*x, exponent)), unit, *x);
        }
        bytemuck::cast(x)
    }

    /// Vectors in a line.
    const VECTORS: usize = 4;

    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn multiply_rows<const KIND: u8, const ZEROS: bool>(block: &Block<'_>, rows: Rows<'_>, sums: &mut [Line]) {
        let num_rows = rows.chunk.rows.len();
        let next = |part: usize| block.lines.end + block.lines.len() * part / num_rows;
        for tile in rows.chunk.tiles() {
            let first = tile.start - rows.chunk.rows.start;
            let tile = first..first + tile.len();
            for at in tile.clone().step_by(2) {
                let few = 2.min(tile.end - at);
                if few == num_rows {
                    block.panel.prefetch_shared(next(0)..next(num_rows));
                } else {
                    // In parts, so that no row waits for all of it.
                    block.panel.prefetch(next(at)..next(at + few));
                }
                match few {
                    2 => multiply_few::<2, KIND, ZEROS>(block, rows, &tile, at, sums),
                    _ => multiply_few::<1, KIND, ZEROS>(block, rows, &tile, at, sums),
                }
            }
        }
    }

    /// Rows `at..at + R` of the chunk, which are in `tile`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn multiply_few<const R: usize, const KIND: u8, const ZEROS: bool>(
        block: &Block<'_>,
        rows: Rows<'_>,
        tile: &Range<usize>,
        at: usize,
        sums: &mut [Line],
    ) {
        let Rows { chunk, x, digits, depth } = rows;
        let per_row = depth / INPUTS;
        let (sums, _) = sums[at..].as_chunks_mut::<R>();
        let sums = &mut sums[0];
        // Nobody else reads these lines: the next ones can come while these are multiplied.
        let asks = chunk.rows.len() == R;
        for (part, input) in (block.lines.start / INPUTS..block.lines.end / INPUTS).enumerate() {
            let mut of_rows = [&digits[at * per_row + input]; R];
            for (r, of_row) in of_rows.iter_mut().enumerate() {
                *of_row = &digits[(at + r) * per_row + input];
            }
            add_products::<R, KIND, ZEROS>(block, part, asks, of_rows, sums);
            for r in 0..R {
                if of_rows[r].has_rest {
                    let x = &x[tile.start * depth..tile.end * depth];
                    let x = inputs(x, tile.len(), at + r - tile.start, input);
                    add_rest::<KIND, ZEROS>(block, part, x, margin(depth), &mut sums[r]);
                }
            }
        }
    }

    /// What rounding took from `x` times the part's lines. Each time around it is less than 2^-23 of what it was.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline(never)]
    fn add_rest<const KIND: u8, const ZEROS: bool>(
        block: &Block<'_>,
        part: usize,
        mut x: [f32; INPUTS],
        margin: u32,
        sum: &mut Line,
    ) {
        loop {
            x = rest(&x);
            let digits = split_inputs(&x, margin);
            add_products::<1, KIND, ZEROS>(block, part, false, [&digits], std::array::from_mut(sum));
            if !digits.has_rest {
                break;
            }
        }
    }

    /// `sums[r] += sum over the part's lines of x[r, k] * w[k]`; `asks` for the codes of the next block on the way.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline]
    #[expect(clippy::needless_range_loop, reason = "digits vary slower than rows, which are the outer index")]
    fn add_products<const R: usize, const KIND: u8, const ZEROS: bool>(
        block: &Block<'_>,
        part: usize,
        asks: bool,
        x: [&Digits; R],
        sums: &mut [Line; R],
    ) {
        let Block { codes, lines, group_lines, factors, .. } = block;
        let line = lines.start + part * INPUTS;
        // Words of four lines.
        let fours = if KIND == BYTES || KIND == SIGNED_BYTES { 4 } else { 2 };
        let words = &codes.words[line / 4 * fours..][..INPUTS / 4 * fours];
        let zeros = if ZEROS { codes.zeros.map(|zeros| &zeros[line / group_lines]) } else { None };
        let zero = zero_of::<KIND>(zeros);
        let mut acc = [[[_mm512_setzero_si512(); VECTORS]; 3]; R];
        for r in 0..R {
            for p in 0..3 {
                for v in 0..VECTORS {
                    acc[r][p][v] = _mm512_mullo_epi32(_mm512_set1_epi32(-x[r].sums[p]), zero[v]);
                }
            }
        }
        for (j, words) in words.chunks_exact(fours).enumerate() {
            if asks {
                for word in words {
                    fetch(std::ptr::from_ref(word).wrapping_add(lines.len() / 4 * fours).cast());
                }
            }
            let codes = bytes_of::<KIND>(words);
            for r in 0..R {
                for p in 0..3 {
                    let x = _mm512_set1_epi32(x[r].words[j][p].cast_signed());
                    for v in 0..VECTORS {
                        acc[r][p][v] = _mm512_dpbusd_epi32(acc[r][p][v], codes[v], x);
                    }
                }
            }
        }
        let mut factor: [__m512; VECTORS] = bytemuck::cast(factors[part].0);
        if KIND == SMALL_FLOATS {
            for factor in &mut factor {
                *factor = _mm512_mul_ps(*factor, _mm512_set1_ps(0.5));
            }
        }
        for r in 0..R {
            let unit = _mm512_set1_ps(x[r].unit);
            for v in 0..VECTORS {
                // At most 2^25 for codes of 4 bits, 2^29 for those of 8.
                let low = _mm512_add_epi32(_mm512_slli_epi32::<8>(acc[r][1][v]), acc[r][0][v]);
                let high = _mm512_cvtepi32_ps(acc[r][2][v]);
                let all = _mm512_fmadd_ps(high, _mm512_set1_ps(65536.0), _mm512_cvtepi32_ps(low));
                let sum = &mut sums[r].0.as_chunks_mut::<16>().0[v];
                *sum = bytemuck::cast(_mm512_fmadd_ps(_mm512_mul_ps(all, unit), factor[v], bytemuck::cast(*sum)));
            }
        }
    }

    /// Codes of four lines as bytes (E2M1: twice the number plus 12; two's complement: plus 128): those of each column side by
    /// side, the lines in the order 0, 2, 1, 3.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline]
    fn bytes_of<const KIND: u8>(words: &[Words]) -> [__m512i; VECTORS] {
        const DOUBLES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
        let load = |n: usize| bytemuck::cast(words[n]);
        if KIND == NIBBLES || KIND == SMALL_FLOATS {
            let [low, high] = join::<8>(load(0), load(1));
            let mut codes = [low, _mm512_srli_epi32::<4>(low), high, _mm512_srli_epi32::<4>(high)];
            for codes in &mut codes {
                *codes = _mm512_and_si512(*codes, _mm512_set1_epi8(15));
                if KIND == SMALL_FLOATS {
                    *codes = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(bytemuck::cast(DOUBLES)), *codes);
                }
            }
            codes
        } else {
            let [even, odd] = join::<8>(load(0), load(2));
            let [next_even, next_odd] = join::<8>(load(1), load(3));
            let ([a, c], [b, d]) = (join::<16>(even, next_even), join::<16>(odd, next_odd));
            let mut codes = [a, b, c, d];
            if KIND == SIGNED_BYTES {
                for codes in &mut codes {
                    *codes = _mm512_xor_si512(*codes, _mm512_set1_epi8(i8::MIN));
                }
            }
            codes
        }
    }

    /// Every other field of `BITS` bits, 8 or 16, those of `a` and `b` in turn: from the lowest on, and from the second.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline]
    fn join<const BITS: u32>(a: __m512i, b: __m512i) -> [__m512i; 2] {
        // Of the second where the mask is, else of the third.
        let mask = _mm512_set1_epi32(if BITS == 8 { 0x00ff_00ff } else { 0x0000_ffff });
        [
            _mm512_ternarylogic_epi32::<0xca>(mask, a, _mm512_slli_epi32::<BITS>(b)),
            _mm512_ternarylogic_epi32::<0xca>(mask, _mm512_srli_epi32::<BITS>(a), b),
        ]
    }

    /// What stands for 0.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    #[inline]
    fn zero_of<const KIND: u8>(zeros: Option<&Words>) -> [__m512i; VECTORS] {
        match zeros {
            None => {
                let middle = match KIND {
                    NIBBLES => 8,
                    SMALL_FLOATS => 12,
                    _ => 128,
                };
                [_mm512_set1_epi32(middle); VECTORS]
            }
            Some(zeros) => {
                let zeros: __m512i = bytemuck::cast(*zeros);
                let byte = _mm512_set1_epi32(255);
                [
                    _mm512_and_si512(zeros, byte),
                    _mm512_and_si512(_mm512_srli_epi32::<8>(zeros), byte),
                    _mm512_and_si512(_mm512_srli_epi32::<16>(zeros), byte),
                    _mm512_srli_epi32::<24>(zeros),
                ]
            }
        }
    }
}

/// Other processors have other instructions.
#[cfg(not(target_arch = "x86_64"))]
mod imp {
    use super::{Block, Digits, Line, Rows};
    use pulp::Arch;
    use std::convert::Infallible;

    pub type Proof = Infallible;

    pub fn proof(_: Arch) -> Option<Proof> {
        None
    }

    pub fn split(proof: Proof, _: &[f32], _: usize, _: &mut [Digits]) {
        match proof {}
    }

    pub fn multiply(proof: Proof, _: &Block<'_>, _: Rows<'_>, _: &mut [Line]) {
        match proof {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::activate::instruction_sets;
    use crate::cpu::chunks::chunks;
    use crate::cpu::experts::project;
    use crate::cpu::kernel::Input;
    use crate::cpu::permute::pack;
    use crate::cpu::tests::values;
    use crate::model::formats;
    use bytemuck::Zeroable;

    /// Matrices `[WIDTH, 32 * blocks]` of each format that is multiplied like this, with the weights that are stored.
    fn matrices(blocks: usize, seed: u32) -> Vec<(Panels, Vec<f32>)> {
        let depth = INPUTS * blocks;
        let w = values(64 * depth, seed);
        let formats = ["int4", "int4:zp", "int4:g128", "q4_0", "mxfp4", "int8", "int8:zp", "q8_0"]
            .map(|name| name.parse().expect("a format"));
        let fitting = formats.into_iter().filter(|format: &WeightFormat| depth.is_multiple_of(format.block() as usize));
        fitting
            .map(|format| {
                let packed = formats::encode(format, depth, &w).expect("moderate values");
                let row_bytes = format.layout(depth).bytes;
                let mut weights = Panels::new(format, [64, depth]);
                weights.push(|n| packed.get(n * row_bytes..(n + 1) * row_bytes)).expect("the memory is there");
                (weights, formats::decode(format, depth, &packed))
            })
            .collect()
    }

    /// `[rows, 64]` by way of digits that `change` may spoil, or None where the processor has no instruction for them.
    fn product(weights: &Panels, x: &[f32], change: impl Fn(&mut Digits)) -> Option<Vec<f32>> {
        let simd = instruction_sets()[0];
        let Some(vnni) = Vnni::for_matrix(simd, weights) else {
            eprintln!("not tested: this processor has no vpdpbusd");
            return None;
        };
        let rows = x.len() / weights.depth;
        let chunks = chunks(&[0, rows]);
        let (mut packed, mut out) = (vec![0.0; x.len()], vec![f32::NAN; rows * 64]);
        pack(&chunks, &mut packed, |r| &x[r * weights.depth..][..weights.depth]);
        let mut digits = vec![Digits::zeroed(); x.len() / INPUTS];
        vnni.split(&chunks, &packed, &mut digits);
        digits.iter_mut().for_each(change);
        project(simd, weights, &chunks, Input::of_digits(&packed, vnni, &digits), &mut out);
        Some(out)
    }

    /// The largest difference from the exact product, in those that are allowed: `4 sqrt(K) 2^-24 sum |x w|`.
    fn worst(weights: &Panels, w: &[f32], x: &[f32], out: &[f32]) -> f64 {
        let depth = weights.depth;
        let of = |(at, &got): (usize, &f32)| {
            let (x, w) = (&x[at / 64 * depth..][..depth], &w[at % 64 * depth..][..depth]);
            let products = || x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
            let allowed = 4.0 * (depth as f64).sqrt() / 16_777_216.0 * products().map(f64::abs).sum::<f64>();
            let difference = (f64::from(got) - products().sum::<f64>()).abs();
            if difference == 0.0 { 0.0 } else { difference / allowed }
        };
        out.iter().enumerate().map(of).fold(0.0, f64::max)
    }

    /// Whatever their sizes: alike, from all of f32's binades, or a few that are far larger than the others, of whose
    /// codes some are zeros.
    #[test]
    fn products_are_within_the_bound_of_floats() {
        let mut without_rest = 0.0f64;
        for blocks in [1, 2, 4, 12] {
            for (weights, w) in matrices(blocks, 11) {
                let mut all = Vec::new();
                for size in -40..=40 {
                    let mut x = values(3 * weights.depth, (size + 100) as u32);
                    for (k, x) in x.iter_mut().enumerate() {
                        if k % INPUTS == 5 || size > 20 && k % INPUTS == 17 {
                            *x *= f32::powi(2.0, size);
                        }
                    }
                    let Some(out) = product(&weights, &x, |_| ()) else { return };
                    let worst_here = worst(&weights, &w, &x, &out);
                    assert!(
                        worst_here <= 1.0,
                        "{}: {blocks} blocks, outliers of 2^{size}: {worst_here}",
                        weights.format()
                    );
                    let spoiled = product(&weights, &x, |digits| digits.has_rest = false);
                    without_rest = without_rest.max(worst(&weights, &w, &x, &spoiled.expect("they are used")));
                    all.extend(x);
                }
                for size in [-148, -140, -120, -80, 80, 110] {
                    let x: Vec<f32> =
                        all.iter().map(|x| x * f32::powi(2.0, size / 2) * f32::powi(2.0, size / 2)).collect();
                    let (x, _) = x.split_at(30 * 3 * weights.depth);
                    let out = product(&weights, x, |_| ()).expect("they are used");
                    assert!(out.iter().all(|v| v.is_finite()));
                    // Below 2^-126 floats have fewer bits.
                    if size >= -80 {
                        let worst_here = worst(&weights, &w, x, &out);
                        assert!(
                            worst_here <= 1.0,
                            "{}: {blocks} blocks, times 2^{size}: {worst_here}",
                            weights.format()
                        );
                    }
                }
            }
        }
        assert!(without_rest > 100.0, "what rounding takes away does not show: {without_rest}");
    }

    /// The bound is one that wrong digits of one input in 32 exceed; that of the lowest, which is within it, shows in bits.
    #[test]
    fn a_wrong_digit_shows() {
        for (weights, w) in matrices(4, 13) {
            let x = values(5 * weights.depth, 17);
            let Some(expected) = product(&weights, &x, |_| ()) else { return };
            assert!(worst(&weights, &w, &x, &expected) < 1.0);
            for (p, by) in [(0, 1), (1, 16), (2, 1)] {
                let out = product(&weights, &x, |digits| digits.words[3][p] ^= by << 8).expect("they are used");
                assert!(p == 0 || worst(&weights, &w, &x, &out) > 1.0, "{}: digit {p}", weights.format());
                let wrong = out.iter().zip(&expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert!(wrong > out.len() / 2, "{}: digit {p}", weights.format());
            }
        }
    }

    /// What the module's documentation says, one product after the other.
    fn by_definition(x: &[f32], codes: &[i32], factors: &[f32]) -> f32 {
        let mut sum = 0.0f32;
        for ((x, codes), factor) in x.chunks(INPUTS).zip(codes.chunks(INPUTS)).zip(factors) {
            let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
            let unit = f32::powi(2.0, (largest * (129.0 / 128.0)).log2().floor() as i32 + 1 - 23);
            let mut sums = [0; 3];
            for (x, code) in x.iter().zip(codes) {
                let whole = (x / unit).round_ties_even() as i32;
                let low = i32::from(whole as i8);
                let middle = i32::from(((whole - low) >> 8) as i8);
                let high = (whole - low - (middle << 8)) >> 16;
                assert!(high == i32::from(high as i8) && (high << 16) + (middle << 8) + low == whole);
                for (sum, digit) in sums.iter_mut().zip([low, middle, high]) {
                    *sum += digit * code;
                }
            }
            let all = (sums[2] as f32).mul_add(65536.0, (sums[1] * 256 + sums[0]) as f32);
            sum = (all * unit).mul_add(*factor, sum);
        }
        sum
    }

    #[test]
    fn products_have_the_bits_of_their_definition_whatever_is_beside_them() {
        for (weights, w) in matrices(12, 37) {
            let depth = weights.depth;
            let (mut decoded, mut factors) = (vec![Line::zeroed(); depth], vec![Line::zeroed(); depth / INPUTS]);
            let lines = weights.panel(0, 0).lines(pulp::Scalar, 0, &mut decoded, &mut factors);
            let halves = if weights.format() == WeightFormat::Mxfp4 { 2.0 } else { 1.0 };
            let code = |k: usize, n: usize| lines.lines[k].0[n] * halves;
            for rows in [1, 2, 3, 6, 7, 13, 121] {
                let x = values(rows * depth, 41);
                let Some(out) = product(&weights, &x, |_| ()) else { return };
                for (at, got) in out.iter().enumerate() {
                    let (row, n) = (at / 64, at % 64);
                    let codes: Vec<i32> = (0..depth).map(|k| code(k, n) as i32).collect();
                    assert!(
                        (0..depth)
                            .all(|k| code(k, n) * (lines.factors[k / lines.span].0[n] / halves) == w[n * depth + k])
                    );
                    let factors: Vec<f32> = (0..depth / INPUTS)
                        .map(|block| lines.factors[block * INPUTS / lines.span].0[n] / halves)
                        .collect();
                    let expected = by_definition(&x[row * depth..][..depth], &codes, &factors);
                    assert!(
                        got.to_bits() == expected.to_bits(),
                        "{}: row {row} of {rows}, column {n}: {got} instead of {expected}",
                        weights.format()
                    );
                }
            }
        }
    }

    #[test]
    fn whole_numbers_are_multiplied_exactly() {
        // Factors of MXFP4 are powers of two.
        for (weights, w) in matrices(4, 19).into_iter().filter(|of| of.0.format() == WeightFormat::Mxfp4) {
            let x: Vec<f32> = values(7 * weights.depth, 23).iter().map(|x| (x * 1000.0).round()).collect();
            let Some(out) = product(&weights, &x, |_| ()) else { return };
            for (at, got) in out.iter().enumerate() {
                let (x, w) = (&x[at / 64 * weights.depth..], &w[at % 64 * weights.depth..][..weights.depth]);
                let exact: f64 = x.iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
                assert_eq!(f64::from(*got), exact, "row {}, column {}", at / 64, at % 64);
            }
        }
    }

    #[test]
    fn inputs_that_are_not_finite_make_their_row_nan_and_no_other() {
        for (weights, _) in matrices(4, 29) {
            let good = values(7 * weights.depth, 31);
            let Some(expected) = product(&weights, &good, |_| ()) else { return };
            for value in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut x = good.clone();
                x[2 * weights.depth + 77] = value;
                let out = product(&weights, &x, |_| ()).expect("they are used");
                for (row, (got, expected)) in out.chunks(64).zip(expected.chunks(64)).enumerate() {
                    if row == 2 {
                        assert!(got.iter().all(|v| v.is_nan()), "{value}");
                    } else {
                        assert!(
                            got.iter().zip(expected).all(|(a, b)| a.to_bits() == b.to_bits()),
                            "{value}, row {row}"
                        );
                    }
                }
            }
        }
    }
}
