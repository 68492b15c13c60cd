//! How a panel's lines become vectors of f32, one codec for each way of storing them.
//!
//! Every weight has the bits that [`crate::model::formats::decode`] gives it: what a group shares is computed first,
//! in the same order, and whatever is done differently here is exact. Where a weight is a code times a factor that a group
//! shares, the matmul kernel takes the codes, and multiplies their sums by the factor.

use super::digits::{Codes, Kind};
use super::panels::{Line, WIDTH};
use super::widen;
use super::words::{Field, POWER_23, Words, byte, bytes, shl, shr, split_halves};
use half::f16;
use pulp::Simd;

/// What the lines of a group share, for `V` vectors of columns.
pub(super) struct Group<S: Simd, const V: usize> {
    pub factor: [S::f32s; V],
    /// What is subtracted: before the factor or after it, as the format has it.
    less: [S::f32s; V],
}

/// A panel that can be read. Nothing in here is a closure: the compiler might not inline it where the processor's
/// instructions may be used.
pub(super) trait Codec: Copy {
    /// Lines whose codes share words: 1, 2 or 4. Where one of them has its codes is known when this is compiled only if
    /// its place among them is.
    const STEP: usize = 1;

    /// Vectors are codes, which the group's factor makes weights. Else they are weights.
    const HAS_FACTOR: bool = false;

    /// Lines of a group, a multiple of `STEP`. Divides 128, or is more than any panel has.
    fn group_lines(&self) -> usize;

    /// What the group of line k shares, for a line of `V` vectors.
    fn group<S: Simd, const V: usize>(&self, simd: S, k: usize) -> Group<S, V>;

    /// Vector v of line `k + step`, `k` a multiple of `STEP`.
    fn vector<S: Simd, const V: usize>(&self, simd: S, k: usize, step: usize, v: usize, group: &Group<S, V>)
    -> S::f32s;

    /// Its codes, if they can be multiplied as bytes.
    fn codes(&self) -> Option<Codes<'_>> {
        None
    }

    /// Lines whose products are summed before anything else happens to them: no more than a group has, and no more than
    /// [`SPAN`] where the sum is to be multiplied by a factor.
    #[inline(always)]
    fn span(&self) -> usize {
        if Self::HAS_FACTOR { self.group_lines().min(SPAN) } else { self.group_lines() }
    }
}

/// Codes of so many lines are summed by themselves: the least number of lines that are decoded at a time.
pub(super) const SPAN: usize = 32;

/// f32
#[derive(Clone, Copy)]
pub(super) struct Floats<'a>(pub &'a [Line]);

impl Codec for Floats<'_> {
    #[inline(always)]
    fn group_lines(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, _: usize) -> Group<S, V> {
        nothing(simd)
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(&self, _: S, k: usize, step: usize, v: usize, _: &Group<S, V>) -> S::f32s {
        S::as_simd_f32s(&self.0[k + step].0).0[v]
    }
}

/// f16, for vectors of which [`widen::has_halves`] is true.
#[derive(Clone, Copy)]
pub(super) struct Halves<'a>(pub &'a [[f16; WIDTH]]);

impl Codec for Halves<'_> {
    #[inline(always)]
    fn group_lines(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, _: usize) -> Group<S, V> {
        nothing(simd)
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(&self, simd: S, k: usize, step: usize, v: usize, _: &Group<S, V>) -> S::f32s {
        let line = &self.0[k + step];
        widen::vector_of_halves(simd, line, v)
    }
}

/// bf16: the upper half of word w is column w + 32, the lower one column w.
#[derive(Clone, Copy)]
pub(super) struct UpperHalves<'a>(pub &'a [[u32; WIDTH / 2]]);

impl Codec for UpperHalves<'_> {
    #[inline(always)]
    fn group_lines(&self) -> usize {
        usize::MAX
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, _: usize) -> Group<S, V> {
        nothing(simd)
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(&self, simd: S, k: usize, step: usize, v: usize, _: &Group<S, V>) -> S::f32s {
        let words = S::as_simd_u32s(&self.0[k + step]).0;
        let (word, is_upper) = (v % words.len(), v >= words.len());
        let bits = if is_upper {
            simd.and_u32s(words[word], simd.splat_u32s(0xffff_0000))
        } else {
            shl(simd, words[word], 16)
        };
        simd.transmute_f32s_u32s(bits)
    }
}

/// Scales of groups.
#[derive(Clone, Copy)]
pub(super) enum Scales<'a> {
    F32(&'a [Line]),
    /// Split as [`UpperHalves`].
    F16(&'a [[u32; WIDTH / 2]]),
}

/// `(code - zero) * scale`, codes of 8 or 4 bits. The zero is that of the group, if `ZEROS`; else the middle of the codes.
#[derive(Clone, Copy)]
pub(super) struct Integers<'a, const BITS: usize, const ZEROS: bool> {
    pub codes: &'a [Words],
    pub scales: Scales<'a>,
    /// Of each group, if `ZEROS`.
    pub zeros: &'a [Words],
    /// Codes are in two's complement: flipping the highest bit moves their zero to the middle, too.
    pub is_signed: bool,
    pub group_lines: usize,
}

impl<const BITS: usize, const ZEROS: bool> Codec for Integers<'_, BITS, ZEROS> {
    const STEP: usize = 8 / BITS;
    const HAS_FACTOR: bool = true;

    #[inline(always)]
    fn group_lines(&self) -> usize {
        self.group_lines
    }

    fn codes(&self) -> Option<Codes<'_>> {
        let kind = match BITS {
            4 => Kind::Nibbles,
            _ if self.is_signed => Kind::SignedBytes,
            _ => Kind::Bytes,
        };
        Some(Codes { kind, words: self.codes, zeros: ZEROS.then_some(self.zeros) })
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, k: usize) -> Group<S, V> {
        let g = k / self.group_lines;
        let factor = match self.scales {
            Scales::F32(scales) => load(simd, &scales[g]),
            Scales::F16(scales) => split_halves::<S, V>(simd, &scales[g]),
        };
        let mut less = [simd.splat_f32s((1 << (BITS - 1)) as f32); V];
        if ZEROS {
            less = bytes(simd, &self.zeros[g]);
        }
        for (v, less) in less.iter_mut().enumerate() {
            let field = Field::of::<S>(BITS, 0, v);
            *less = simd.add_f32s(*less, simd.splat_f32s(f32::from_bits(field.power())));
        }
        Group { factor, less }
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(
        &self,
        simd: S,
        k: usize,
        step: usize,
        v: usize,
        group: &Group<S, V>,
    ) -> S::f32s {
        let words = &self.codes[k / Self::STEP];
        let field = Field::of::<S>(BITS, step, v);
        if BITS == 4 && !ZEROS {
            let code = shr(simd, S::as_simd_u32s(words).0[field.vector], field.at + field.shift);
            if let Some(code) = widen::nibble_less_8(simd, code) {
                return code;
            }
        }
        let flip = if self.is_signed { 1 << (BITS - 1) << field.at } else { 0 };
        let code = simd.and_u32s(field.words(simd, words), simd.splat_u32s(field.mask(BITS)));
        let raised = simd.xor_u32s(code, simd.splat_u32s(field.power() ^ flip));
        simd.sub_f32s(simd.transmute_f32s_u32s(raised), group.less[v])
    }
}

/// Q4_K: `d * scale * code - dmin * least`, factors for each 256 lines and both others for each 32.
#[derive(Clone, Copy)]
pub(super) struct Q4K<'a> {
    pub codes: &'a [Words],
    pub d: &'a [[u32; WIDTH / 2]],
    pub dmin: &'a [[u32; WIDTH / 2]],
    pub scales: &'a [Words],
    pub minima: &'a [Words],
}

impl Codec for Q4K<'_> {
    const STEP: usize = 2;

    #[inline(always)]
    fn group_lines(&self) -> usize {
        32
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, k: usize) -> Group<S, V> {
        let mut factor = split_halves::<S, V>(simd, &self.d[k / 256]);
        let mut less = split_halves::<S, V>(simd, &self.dmin[k / 256]);
        let scales: [S::f32s; V] = bytes(simd, &self.scales[k / 32]);
        let minima: [S::f32s; V] = bytes(simd, &self.minima[k / 32]);
        for v in 0..V {
            factor[v] = simd.mul_f32s(factor[v], scales[v]);
            less[v] = simd.mul_f32s(less[v], minima[v]);
        }
        Group { factor, less }
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(
        &self,
        simd: S,
        k: usize,
        step: usize,
        v: usize,
        group: &Group<S, V>,
    ) -> S::f32s {
        let words = &self.codes[k / Self::STEP];
        let field = Field::of::<S>(4, step, v);
        let power = simd.splat_u32s(field.power());
        let code = simd.and_u32s(field.words(simd, words), simd.splat_u32s(field.mask(4)));
        let raised = simd.transmute_f32s_u32s(simd.or_u32s(code, power));
        let code = simd.sub_f32s(raised, simd.transmute_f32s_u32s(power));
        simd.sub_f32s(simd.mul_f32s(group.factor[v], code), group.less[v])
    }
}

/// Q6_K: `d * scale * (code - 32)`, a factor for each 256 lines and a scale for each 16.
#[derive(Clone, Copy)]
pub(super) struct Q6K<'a> {
    /// Lower four bits of codes.
    pub low: &'a [Words],
    /// Upper two.
    pub high: &'a [Words],
    pub d: &'a [[u32; WIDTH / 2]],
    pub scales: &'a [Words],
}

impl Codec for Q6K<'_> {
    const STEP: usize = 4;
    const HAS_FACTOR: bool = true;

    #[inline(always)]
    fn group_lines(&self) -> usize {
        16
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, k: usize) -> Group<S, V> {
        let mut factor = split_halves::<S, V>(simd, &self.d[k / 256]);
        let mut less = [simd.splat_f32s(0.0); V];
        for v in 0..V {
            let scale = byte(simd, &self.scales[k / 16], v);
            let raised = simd.xor_u32s(scale, simd.splat_u32s(POWER_23 ^ 128));
            let scale = simd.sub_f32s(simd.transmute_f32s_u32s(raised), simd.splat_f32s(8_388_608.0 + 128.0));
            factor[v] = simd.mul_f32s(factor[v], scale);
            less[v] = simd.splat_f32s(f32::from_bits(Field::of::<S>(4, 0, v).power()) + 32.0);
        }
        Group { factor, less }
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(
        &self,
        simd: S,
        k: usize,
        step: usize,
        v: usize,
        group: &Group<S, V>,
    ) -> S::f32s {
        let (low, high) = (&self.low[k / 2 + step / 2], &self.high[k / 4]);
        let field = Field::of::<S>(4, step % 2, v);
        let code = simd.and_u32s(field.words(simd, low), simd.splat_u32s(field.mask(4)));
        // The upper bits move to where the lower ones end.
        let upper = Field::of::<S>(2, step, v);
        let (from, to) = (upper.at + upper.shift, field.at + 4);
        let words = S::as_simd_u32s(high).0[upper.vector];
        let words = if from < to { shl(simd, words, to - from) } else { shr(simd, words, from - to) };
        let upper = simd.and_u32s(words, simd.splat_u32s(3 << to));
        let raised = simd.or_u32s(code, simd.or_u32s(upper, simd.splat_u32s(field.power())));
        simd.sub_f32s(simd.transmute_f32s_u32s(raised), group.less[v])
    }
}

/// E2M1 with scales of 8 bits.
#[derive(Clone, Copy)]
pub(super) struct SmallFloats<'a> {
    pub codes: &'a [Words],
    /// Of each 16 lines E4M3, to be multiplied by the matrix's own scale, if there is one; else of each 32 lines E8M0.
    pub scales: &'a [Words],
    pub matrix: Option<&'a Line>,
}

impl Codec for SmallFloats<'_> {
    const STEP: usize = 2;
    const HAS_FACTOR: bool = true;

    #[inline(always)]
    fn group_lines(&self) -> usize {
        if self.matrix.is_some() { 16 } else { 32 }
    }

    fn codes(&self) -> Option<Codes<'_>> {
        Some(Codes { kind: Kind::SmallFloats, words: self.codes, zeros: None })
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, k: usize) -> Group<S, V> {
        let mut factor = [simd.splat_f32s(0.0); V];
        match self.matrix {
            Some(matrix) => {
                let matrix: [S::f32s; V] = load(simd, matrix);
                for v in 0..V {
                    let scale = shl(simd, byte(simd, &self.scales[k / 16], v), 24);
                    factor[v] = simd.mul_f32s(widen::e4m3(simd, scale), matrix[v]);
                }
            }
            None => {
                for (v, factor) in factor.iter_mut().enumerate() {
                    *factor = widen::e8m0(simd, byte(simd, &self.scales[k / 32], v));
                }
            }
        }
        Group { factor, ..nothing(simd) }
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(&self, simd: S, k: usize, step: usize, v: usize, _: &Group<S, V>) -> S::f32s {
        let words = &self.codes[k / Self::STEP];
        let field = Field::of::<S>(4, step, v);
        let words = S::as_simd_u32s(words).0[field.vector];
        let code = shr(simd, words, field.at + field.shift);
        widen::e2m1(simd, code)
    }
}

/// E4M3 with a scale for each 128 lines.
#[derive(Clone, Copy)]
pub(super) struct Fp8<'a> {
    pub codes: &'a [Words],
    pub scales: &'a [Line],
}

impl Codec for Fp8<'_> {
    #[inline(always)]
    fn group_lines(&self) -> usize {
        128
    }

    #[inline(always)]
    fn group<S: Simd, const V: usize>(&self, simd: S, k: usize) -> Group<S, V> {
        Group { factor: load(simd, &self.scales[k / 128]), ..nothing(simd) }
    }

    #[inline(always)]
    fn vector<S: Simd, const V: usize>(
        &self,
        simd: S,
        k: usize,
        step: usize,
        v: usize,
        group: &Group<S, V>,
    ) -> S::f32s {
        let words = &self.codes[k + step];
        let field = Field::of::<S>(8, 0, v);
        let code = shl(simd, S::as_simd_u32s(words).0[field.vector], 24 - field.at - field.shift);
        simd.mul_f32s(widen::e4m3(simd, code), group.factor[v])
    }
}

#[inline(always)]
fn nothing<S: Simd, const V: usize>(simd: S) -> Group<S, V> {
    Group { factor: [simd.splat_f32s(0.0); V], less: [simd.splat_f32s(0.0); V] }
}

#[inline(always)]
fn load<S: Simd, const V: usize>(simd: S, line: &Line) -> [S::f32s; V] {
    let mut out = [simd.splat_f32s(0.0); V];
    out.copy_from_slice(&S::as_simd_f32s(&line.0).0[..V]);
    out
}
