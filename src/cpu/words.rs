//! Words that hold codes, and numbers in them.
//!
//! Codes of 8, 4 and 2 bits are read as 16 words of 32 bits. Word w holds columns w, w + 16, w + 32 and
//! w + 48 of one line, of two lines or of four, the first line and the first column lowest. So a plain load and the
//! same shift in every lane separate them, whatever the width of a vector.
//!
//! **Whole numbers.** A code stays where it lies in its word and becomes part of the fraction of a float, 2^n + code,
//! whose n makes the code's lowest bit count 1. Subtracting 2^n + zero is exact, and cheaper than to shift the code
//! down and to convert it.

use super::panels::WIDTH;
use super::widen;
use pulp::Simd;

/// Columns that lie side by side in the words of a line.
pub(super) const LANES: usize = 16;

/// Codes of one, two or four lines; or a number of 8 bits for each column, which is the same.
pub(super) type Words = [u32; LANES];

/// Where the codes of a vector lie.
#[derive(Clone, Copy)]
pub(super) struct Field {
    /// Which vector of the words.
    pub vector: usize,
    /// How far the words are shifted right: by nothing or by half a word.
    pub shift: usize,
    /// The code's lowest bit after that; all of it is in the lower half.
    pub at: usize,
}

impl Field {
    /// Of vector `v` of the line in place `step` of those that share words.
    #[inline(always)]
    pub fn of<S: Simd>(bits: usize, step: usize, v: usize) -> Self {
        let vectors = LANES / S::U32_LANES;
        let bit = bits * (4 * step + v / vectors);
        Self { vector: v % vectors, shift: bit / 16 * 16, at: bit % 16 }
    }

    /// The bits of a code.
    #[inline(always)]
    pub fn mask(self, bits: usize) -> u32 {
        ((1 << bits) - 1) << self.at
    }

    /// The float 2^n in whose fraction the code's lowest bit counts 1.
    #[inline(always)]
    pub fn power(self) -> u32 {
        POWER_23 - ((self.at as u32) << 23)
    }

    #[inline(always)]
    pub fn words<S: Simd>(self, simd: S, words: &Words) -> S::u32s {
        shr(simd, S::as_simd_u32s(words).0[self.vector], self.shift)
    }
}

/// 2^23, whose fraction counts ones.
pub(super) const POWER_23: u32 = (127 + 23) << 23;

#[inline(always)]
pub(super) fn shl<S: Simd>(simd: S, words: S::u32s, by: usize) -> S::u32s {
    if by == 0 { words } else { simd.wrapping_dyn_shl_u32s(words, simd.splat_u32s(by as u32)) }
}

#[inline(always)]
pub(super) fn shr<S: Simd>(simd: S, words: S::u32s, by: usize) -> S::u32s {
    if by == 0 { words } else { simd.wrapping_dyn_shr_u32s(words, simd.splat_u32s(by as u32)) }
}

/// One number of 8 bits for each column.
#[inline(always)]
pub(super) fn byte<S: Simd>(simd: S, words: &Words, v: usize) -> S::u32s {
    let field = Field::of::<S>(8, 0, v);
    let words = shr(simd, S::as_simd_u32s(words).0[field.vector], field.at + field.shift);
    simd.and_u32s(words, simd.splat_u32s(255))
}

/// The same as floats.
#[inline(always)]
pub(super) fn bytes<S: Simd, const V: usize>(simd: S, words: &Words) -> [S::f32s; V] {
    let mut out = [simd.splat_f32s(0.0); V];
    for (v, out) in out.iter_mut().enumerate() {
        let raised = simd.or_u32s(byte(simd, words, v), simd.splat_u32s(POWER_23));
        *out = simd.sub_f32s(simd.transmute_f32s_u32s(raised), simd.splat_f32s(8_388_608.0));
    }
    out
}

/// f16 numbers that lie as [`super::decode::UpperHalves`].
#[inline(always)]
pub(super) fn split_halves<S: Simd, const V: usize>(simd: S, words: &[u32; WIDTH / 2]) -> [S::f32s; V] {
    let words = S::as_simd_u32s(words).0;
    let mut out = [simd.splat_f32s(0.0); V];
    for (v, out) in out.iter_mut().enumerate() {
        let word = words[v % words.len()];
        let half = if v < words.len() { shl(simd, word, 16) } else { word };
        *out = widen::half(simd, half);
    }
    out
}
