//! One panel of an expert, read in the format that it has.

use super::decode::{Codec, Floats, Fp8, Group, Halves, Integers, Q4K, Q6K, Scales, SmallFloats, UpperHalves};
use super::panels::{Line, WIDTH};
use crate::model::formats::{IntGroups, WeightFormat};
use bytemuck::Pod;
use half::f16;
use half::slice::HalfFloatSliceExt;
use pulp::{NullaryFnOnce, Simd};
use std::ops::Range;

/// What is done with a panel once its codec is known.
pub(super) trait WithCodec {
    fn with_codec<C: Codec>(self, codec: C);
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

    /// Its lines are f16.
    pub fn is_f16(&self) -> bool {
        self.format == WeightFormat::F16
    }

    /// Calls `then` with the codec of this panel's format.
    pub fn read(&self, then: impl WithCodec) {
        match self.format {
            WeightFormat::F32 => then.with_codec(Floats(self.region(0))),
            WeightFormat::F16 => then.with_codec(Halves(self.region(0))),
            WeightFormat::Bf16 => then.with_codec(UpperHalves(self.region(0))),
            WeightFormat::Int8(groups) => then.with_codec(self.integers::<8>(groups)),
            WeightFormat::Int4(groups) => then.with_codec(self.integers::<4>(groups)),
            WeightFormat::Q8_0 => then.with_codec(Integers { is_signed: true, ..self.blocks::<8>() }),
            WeightFormat::Q4_0 => then.with_codec(self.blocks::<4>()),
            WeightFormat::Mxfp4 => {
                then.with_codec(SmallFloats { codes: self.region(0), scales: self.region(1), matrix: None });
            }
            WeightFormat::Nvfp4 => {
                let matrix = self.region(1).first();
                then.with_codec(SmallFloats { codes: self.region(0), scales: self.region(2), matrix });
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

    fn integers<const BITS: usize>(&self, groups: IntGroups) -> Integers<'a, BITS> {
        Integers {
            codes: self.region(0),
            scales: Scales::F32(self.region(1)),
            zeros: groups.has_zero_points().then(|| self.region(2)),
            is_signed: false,
            group_lines: groups.size() as usize,
        }
    }

    fn blocks<const BITS: usize>(&self) -> Integers<'a, BITS> {
        let scales = Scales::F16(self.region(1));
        Integers { codes: self.region(0), scales, zeros: None, is_signed: false, group_lines: 32 }
    }

    /// Lines `first_line..` as f32; at most as many as `decoded` holds. That many is a multiple of a group's lines or a
    /// divisor of them, and `first_line` is a multiple of it.
    pub fn lines<S: Simd>(&self, simd: S, first_line: usize, decoded: &'a mut [Line]) -> &'a [Line] {
        let num_lines = decoded.len().min(self.depth - first_line);
        let decoded = &mut decoded[..num_lines];
        match self.format {
            WeightFormat::F32 => return &self.region(0)[first_line..][..num_lines],
            WeightFormat::F16 => decode_halves(&self.region(0)[first_line..][..num_lines], decoded),
            _ => self.read(Decode { simd, first_line, decoded: &mut *decoded }),
        }
        decoded
    }
}

/// Lines of some panel to f32.
struct Decode<'a, S> {
    simd: S,
    first_line: usize,
    decoded: &'a mut [Line],
}

impl<S: Simd> WithCodec for Decode<'_, S> {
    fn with_codec<C: Codec>(self, codec: C) {
        self.simd.vectorize(DecodeLines { decode: self, codec });
    }
}

/// The same, with the processor's instructions.
struct DecodeLines<'a, S, C> {
    decode: Decode<'a, S>,
    codec: C,
}

impl<S: Simd, C: Codec> NullaryFnOnce for DecodeLines<'_, S, C> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Decode { simd, first_line, decoded } = self.decode;
        match const { WIDTH / S::F32_LANES } {
            4 => decode::<S, C, 4>(simd, self.codec, first_line, decoded),
            8 => decode::<S, C, 8>(simd, self.codec, first_line, decoded),
            16 => decode::<S, C, 16>(simd, self.codec, first_line, decoded),
            _ => decode::<S, C, WIDTH>(simd, self.codec, first_line, decoded),
        }
    }
}

#[inline(always)]
fn decode<S: Simd, C: Codec, const V: usize>(simd: S, codec: C, first_line: usize, decoded: &mut [Line]) {
    let group_lines = codec.group_lines().min(decoded.len());
    for (n, decoded) in decoded.chunks_mut(group_lines).enumerate() {
        let start = first_line + n * group_lines;
        let group = codec.group::<S, V>(simd, start);
        for (k, lines) in (start..).step_by(C::STEP).zip(decoded.chunks_exact_mut(C::STEP)) {
            // Written out: where a code lies has to be known when this is compiled.
            decode_line(simd, codec, k, 0, &group, lines);
            if C::STEP > 1 {
                decode_line(simd, codec, k, 1, &group, lines);
            }
            if C::STEP > 2 {
                decode_line(simd, codec, k, 2, &group, lines);
                decode_line(simd, codec, k, 3, &group, lines);
            }
        }
    }
}

#[inline(always)]
fn decode_line<S: Simd, C: Codec, const V: usize>(
    simd: S,
    codec: C,
    k: usize,
    step: usize,
    group: &Group<S, V>,
    lines: &mut [Line],
) {
    let line = S::as_mut_simd_f32s(&mut lines[step].0).0;
    for (v, vector) in line.iter_mut().enumerate() {
        *vector = codec.vector(simd, k, step, v, group);
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
