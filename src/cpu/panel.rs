//! One panel of an expert, read in the format that it has.

use super::decode::{Codec, Floats, Fp8, Group, Halves, Integers, Q4K, Q6K, Scales, SmallFloats, UpperHalves};
use super::panels::{Line, WIDTH};
use crate::model::formats::{IntGroups, WeightFormat};
use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::{NullaryFnOnce, Simd};
use std::ops::Range;

/// Bytes that a processor gets from memory at a time.
const CACHE_LINE: usize = 64;

/// What is done with a panel once its codec is known.
pub(super) trait WithCodec {
    type Output;
    fn with_codec<C: Codec>(self, codec: C) -> Self::Output;
}

/// Neighbouring lines as the matmul kernel takes them.
#[derive(Clone, Copy)]
pub(super) struct Lines<'a> {
    pub lines: &'a [Line],
    /// Lines whose products are summed by themselves.
    pub span: usize,
    /// What each span's sums are to be multiplied by; empty: by nothing, the lines are weights.
    pub factors: &'a [Line],
}

/// See [`super::panels`].
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    format: WeightFormat,
    regions: &'a [Range<usize>],
    depth: usize,
    bytes: &'a [u8],
}

impl<'a> Panel<'a> {
    /// `bytes` hold `depth` lines, in `regions`.
    pub fn new(format: WeightFormat, regions: &'a [Range<usize>], depth: usize, bytes: &'a [u8]) -> Self {
        Self { format, regions, depth, bytes }
    }

    fn region<T: Pod>(&self, region: usize) -> &'a [T] {
        bytemuck::cast_slice(&self.bytes[self.regions[region].clone()])
    }

    /// Asks for lines that will soon be read and what they share, past the end for those of the next panel. It is a
    /// hint: nothing is read.
    #[inline(always)]
    pub fn prefetch(&self, lines: Range<usize>) {
        self.prefetch_regions(0, lines);
    }

    /// The same without the codes.
    #[inline(always)]
    #[cfg_attr(not(target_arch = "x86_64"), expect(dead_code, reason = "for digits only"))]
    pub fn prefetch_shared(&self, lines: Range<usize>) {
        self.prefetch_regions(1, lines);
    }

    #[inline(always)]
    fn prefetch_regions(&self, first: usize, lines: Range<usize>) {
        for region in &self.regions[first..] {
            let place = |line: usize| region.len() * line / self.depth;
            for at in (place(lines.start)..place(lines.end)).step_by(CACHE_LINE) {
                let at = if at < region.len() { at } else { at - region.len() + self.bytes.len() };
                fetch(self.bytes.as_ptr().wrapping_add(region.start + at));
            }
        }
    }

    /// Its lines have to become f32 before they are multiplied.
    pub fn is_packed(&self) -> bool {
        self.format != WeightFormat::F32
    }

    /// Its lines are f16.
    pub fn is_f16(&self) -> bool {
        self.format == WeightFormat::F16
    }

    /// Calls `then` with the codec of this panel's format.
    pub fn read<T: WithCodec>(&self, then: T) -> T::Output {
        match self.format {
            WeightFormat::F32 => then.with_codec(Floats(self.region(0))),
            WeightFormat::F16 => then.with_codec(Halves(self.region(0))),
            WeightFormat::Bf16 => then.with_codec(UpperHalves(self.region(0))),
            WeightFormat::Int8(groups) => self.read_integers::<8, T>(groups, then),
            WeightFormat::Int4(groups) => self.read_integers::<4, T>(groups, then),
            WeightFormat::Q8_0 => then.with_codec(Integers { is_signed: true, ..self.blocks::<8>() }),
            WeightFormat::Q4_0 => then.with_codec(self.blocks::<4>()),
            WeightFormat::Mxfp4 => {
                then.with_codec(SmallFloats { codes: self.region(0), scales: self.region(1), matrix: None })
            }
            WeightFormat::Nvfp4 => {
                let matrix = self.region(1).first();
                then.with_codec(SmallFloats { codes: self.region(0), scales: self.region(2), matrix })
            }
            WeightFormat::Fp8 => then.with_codec(Fp8 { codes: self.region(0), scales: self.region(1) }),
            WeightFormat::Q4K => then.with_codec(Q4K {
                codes: self.region(0),
                d: self.region(1),
                dmin: self.region(2),
                scales: self.region(3),
                minima: self.region(4),
            }),
            WeightFormat::Q6K => then.with_codec(Q6K {
                low: self.region(0),
                high: self.region(1),
                d: self.region(2),
                scales: self.region(3),
            }),
        }
    }

    fn read_integers<const BITS: usize, T: WithCodec>(&self, groups: IntGroups, then: T) -> T::Output {
        if groups.has_zero_points() {
            then.with_codec(Integers::<BITS, true> { zeros: self.region(2), ..self.integers(groups) })
        } else {
            then.with_codec(self.integers::<BITS, false>(groups))
        }
    }

    fn integers<const BITS: usize, const ZEROS: bool>(&self, groups: IntGroups) -> Integers<'a, BITS, ZEROS> {
        Integers {
            codes: self.region(0),
            scales: Scales::F32(self.region(1)),
            zeros: &[],
            is_signed: false,
            group_lines: groups.size() as usize,
        }
    }

    fn blocks<const BITS: usize>(&self) -> Integers<'a, BITS, false> {
        let scales = Scales::F16(self.region(1));
        Integers { codes: self.region(0), scales, zeros: &[], is_signed: false, group_lines: 32 }
    }

    /// Weights of lines `first_line..` as f32; at most as many as `decoded` holds. That many is a multiple of a group's lines
    /// or a divisor of them, and `first_line` is a multiple of it.
    pub fn weights<S: Simd>(&self, simd: S, first_line: usize, decoded: &'a mut [Line]) -> &'a [Line] {
        self.decode(simd, first_line, decoded, None).lines
    }

    /// The same, or codes with their factors. `factors` has room for those of each span of `decoded`.
    pub fn lines<S: Simd>(
        &self,
        simd: S,
        first_line: usize,
        decoded: &'a mut [Line],
        factors: &'a mut [Line],
    ) -> Lines<'a> {
        self.decode(simd, first_line, decoded, Some(factors))
    }

    fn decode<S: Simd>(
        &self,
        simd: S,
        first_line: usize,
        decoded: &'a mut [Line],
        factors: Option<&'a mut [Line]>,
    ) -> Lines<'a> {
        let num_lines = decoded.len().min(self.depth - first_line);
        let decoded = &mut decoded[..num_lines];
        let lines: &[Line] = match self.format {
            WeightFormat::F32 => &self.region(0)[first_line..][..num_lines],
            WeightFormat::F16 => {
                decode_halves(&self.region(0)[first_line..][..num_lines], decoded);
                decoded
            }
            _ => return self.read(Decode { simd, first_line, decoded, factors }),
        };
        Lines { lines, span: usize::MAX, factors: &[] }
    }
}

/// Brings what is at `place` into the second cache: the first is full of decoded weights. Without an instruction for that,
/// nothing.
#[inline(always)]
#[cfg_attr(any(not(target_arch = "x86_64"), miri), expect(unused_variables, reason = "nothing is done"))]
pub(super) fn fetch(place: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, which takes any address.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(place.cast()) };
    }
}

/// Lines of some panel to f32: codes and factors where there are any and there is room for both.
struct Decode<'a, S> {
    simd: S,
    first_line: usize,
    decoded: &'a mut [Line],
    factors: Option<&'a mut [Line]>,
}

impl<'a, S: Simd> WithCodec for Decode<'a, S> {
    type Output = Lines<'a>;

    fn with_codec<C: Codec>(self, codec: C) -> Lines<'a> {
        self.simd.vectorize(DecodeLines { decode: self, codec })
    }
}

/// The same, with the processor's instructions.
struct DecodeLines<'a, S, C> {
    decode: Decode<'a, S>,
    codec: C,
}

impl<'a, S: Simd, C: Codec> NullaryFnOnce for DecodeLines<'a, S, C> {
    type Output = Lines<'a>;

    #[inline(always)]
    fn call(self) -> Lines<'a> {
        match const { WIDTH / S::F32_LANES } {
            4 => decode::<S, C, 4>(self.decode, self.codec),
            8 => decode::<S, C, 8>(self.decode, self.codec),
            16 => decode::<S, C, 16>(self.decode, self.codec),
            _ => decode::<S, C, WIDTH>(self.decode, self.codec),
        }
    }
}

#[inline(always)]
fn decode<'a, S: Simd, C: Codec, const V: usize>(decode: Decode<'a, S>, codec: C) -> Lines<'a> {
    let Decode { simd, first_line, decoded, factors } = decode;
    let span = codec.span().min(decoded.len());
    match factors {
        Some(factors) if C::HAS_FACTOR => {
            let factors = &mut factors[..decoded.len().div_ceil(span)];
            for (n, (decoded, factor)) in decoded.chunks_mut(span).zip(&mut *factors).enumerate() {
                let group = decode_span::<S, C, V, false>(simd, codec, first_line + n * span, decoded);
                S::as_mut_simd_f32s(&mut factor.0).0.copy_from_slice(&group.factor);
            }
            Lines { lines: decoded, span, factors }
        }
        _ => {
            for (n, decoded) in decoded.chunks_mut(span).enumerate() {
                decode_span::<S, C, V, true>(simd, codec, first_line + n * span, decoded);
            }
            Lines { lines: decoded, span: usize::MAX, factors: &[] }
        }
    }
}

/// Lines from `start` on, of one group, which is returned. `WEIGHTS`: with its factor in them.
#[inline(always)]
fn decode_span<S: Simd, C: Codec, const V: usize, const WEIGHTS: bool>(
    simd: S,
    codec: C,
    start: usize,
    decoded: &mut [Line],
) -> Group<S, V> {
    let group = codec.group::<S, V>(simd, start);
    for (k, lines) in (start..).step_by(C::STEP).zip(decoded.chunks_exact_mut(C::STEP)) {
        // Written out: where a code lies has to be known when this is compiled.
        decode_line::<S, C, V, WEIGHTS>(simd, codec, k, 0, &group, lines);
        if C::STEP > 1 {
            decode_line::<S, C, V, WEIGHTS>(simd, codec, k, 1, &group, lines);
        }
        if C::STEP > 2 {
            decode_line::<S, C, V, WEIGHTS>(simd, codec, k, 2, &group, lines);
            decode_line::<S, C, V, WEIGHTS>(simd, codec, k, 3, &group, lines);
        }
    }
    group
}

#[inline(always)]
fn decode_line<S: Simd, C: Codec, const V: usize, const WEIGHTS: bool>(
    simd: S,
    codec: C,
    k: usize,
    step: usize,
    group: &Group<S, V>,
    lines: &mut [Line],
) {
    let line = S::as_mut_simd_f32s(&mut lines[step].0).0;
    for (v, vector) in line.iter_mut().enumerate() {
        let value = codec.vector(simd, k, step, v, group);
        *vector = if WEIGHTS && C::HAS_FACTOR { simd.mul_f32s(value, group.factor[v]) } else { value };
    }
}

/// f16 to f32. `lines` and `decoded` are equally long.
fn decode_halves(lines: &[[f16; WIDTH]], decoded: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has f16c, and with it avx.
        return unsafe { decode_f16c(lines, decoded) };
    }
    lines.as_flattened().convert_to_f32_slice(bytemuck::cast_slice_mut(decoded));
}

/// The same, in one loop: `half` calls a function for every eight values, which halves the speed of a single token.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn decode_f16c(lines: &[[f16; WIDTH]], decoded: &mut [Line]) {
    use std::arch::x86_64::{__m128i, _mm256_cvtph_ps, _mm256_storeu_ps};
    for (line, decoded) in lines.iter().zip(decoded) {
        for (halves, floats) in line.as_chunks::<8>().0.iter().zip(decoded.0.as_chunks_mut::<8>().0) {
            let halves: __m128i = bytemuck::cast(*halves);
            // SAFETY: eight floats are 256 bits; the store needs no alignment.
            unsafe { _mm256_storeu_ps(floats.as_mut_ptr(), _mm256_cvtph_ps(halves)) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytemuck::Zeroable;

    #[test]
    fn lines_past_the_end_can_be_asked_for() {
        let lines = [Line([2.0; WIDTH]); 3];
        let whole = 0..size_of_val(&lines);
        let panel = Panel::new(WeightFormat::F32, std::slice::from_ref(&whole), 3, bytemuck::cast_slice(&lines));
        for lines in [0..3, 2..40, 1 << 20..(1 << 20) + 9] {
            panel.prefetch(lines);
        }
        // Nor does a place have to exist.
        fetch(std::ptr::null());
        assert_eq!(lines.map(|line| line.0), [[2.0; WIDTH]; 3]);
    }

    #[test]
    fn every_f16_is_decoded_exactly() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let lines = halves.as_chunks::<WIDTH>().0;
        let mut decoded = vec![Line::zeroed(); lines.len()];
        decode_halves(lines, &mut decoded);
        for (half, &got) in halves.iter().zip(bytemuck::cast_slice::<_, f32>(&decoded)) {
            let expected = half.to_f32();
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{half}: {got}");
        }
    }
}
