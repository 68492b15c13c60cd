//! Small floats as f32, a vector of them at a time. All of it is exact. NaN is not looked for: nothing that holds one
//! becomes a layer.

use super::panels::WIDTH;
use super::words::{shl, shr};
use half::f16;
use pulp::Simd;

/// f16 numbers in the upper half of each word; the lower one is not looked at.
#[inline(always)]
pub(super) fn half<S: Simd>(simd: S, code: S::u32s) -> S::f32s {
    if let Some(value) = special::half(simd, code) {
        return value;
    }
    let sign = simd.and_u32s(code, simd.splat_u32s(1 << 31));
    let magnitude = simd.and_u32s(shr(simd, code, 3), simd.splat_u32s(0x0fff_e000));
    let normal = simd.transmute_f32s_u32s(simd.add_u32s(magnitude, simd.splat_u32s((127 - 15) << 23)));
    let value = without_exponent(simd, normal, 1.0 / 16384.0);
    simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(value), sign))
}

/// E4M3 numbers in the highest 8 bits; the others are not looked at.
#[inline(always)]
pub(super) fn e4m3<S: Simd>(simd: S, code: S::u32s) -> S::f32s {
    let sign = simd.and_u32s(code, simd.splat_u32s(1 << 31));
    let magnitude = simd.and_u32s(shr(simd, code, 4), simd.splat_u32s(0x07f0_0000));
    let normal = simd.transmute_f32s_u32s(simd.add_u32s(magnitude, simd.splat_u32s((127 - 7) << 23)));
    let value = without_exponent(simd, normal, 1.0 / 64.0);
    simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(value), sign))
}

/// Exponents of two, numbers below 256.
#[inline(always)]
pub(super) fn e8m0<S: Simd>(simd: S, code: S::u32s) -> S::f32s {
    let power = simd.transmute_f32s_u32s(shl(simd, code, 23));
    let is_least = simd.less_than_u32s(code, simd.splat_u32s(1));
    simd.select_f32s(is_least, simd.splat_f32s(f32::from_bits(1 << 22)), power)
}

/// E2M1 numbers in the lowest 4 bits; the others are not looked at.
#[inline(always)]
pub(super) fn e2m1<S: Simd>(simd: S, code: S::u32s) -> S::f32s {
    if let Some(value) = special::e2m1(simd, code) {
        return value;
    }
    let sign = simd.and_u32s(shl(simd, code, 28), simd.splat_u32s(1 << 31));
    let magnitude = simd.and_u32s(shl(simd, code, 22), simd.splat_u32s(7 << 22));
    let normal = simd.transmute_f32s_u32s(simd.add_u32s(magnitude, simd.splat_u32s((127 - 1) << 23)));
    let value = without_exponent(simd, normal, 1.0);
    simd.transmute_f32s_u32s(simd.or_u32s(simd.transmute_u32s_f32s(value), sign))
}

/// Small floats whose exponent is 0 have another meaning: `least / 2 (1 + fraction)` stands for `least * fraction`.
/// That is the lesser of both formulas exactly where the first one is below `least`.
#[inline(always)]
fn without_exponent<S: Simd>(simd: S, normal: S::f32s, least: f32) -> S::f32s {
    // Fused or not: twice a float is exact.
    simd.min_f32s(normal, simd.mul_add_e_f32s(normal, simd.splat_f32s(2.0), simd.splat_f32s(-least)))
}

pub(super) use special::{has_halves, nibble_less_8};

/// Vector `v` of a line of f16.
#[inline(always)]
pub(super) fn vector_of_halves<S: Simd>(simd: S, line: &[f16; WIDTH], v: usize) -> S::f32s {
    if let Some(value) = special::halves(simd, line, v) {
        return value;
    }
    // Nobody comes here: see `has_halves`.
    let mut out = [0.0; WIDTH];
    for (out, half) in out.iter_mut().zip(line) {
        *out = half.to_f32();
    }
    S::as_simd_f32s(&out).0[v]
}

/// What the generic vectors have no name for. Which vectors they are is known when this is compiled, and nothing is
/// left of the question.
#[cfg(target_arch = "x86_64")]
mod special {
    use super::super::words::shl;
    use super::WIDTH;
    use half::f16;
    use pulp::Simd;
    use pulp::x86::{V3, V4};
    use std::any::{Any, TypeId};
    use std::arch::x86_64::{__m256, __m256i, __m512, __m512i};

    /// An instruction widens f16 to vectors like this.
    #[inline(always)]
    pub fn has_halves<S: Simd>() -> bool {
        TypeId::of::<S>() == TypeId::of::<V4>()
    }

    #[inline(always)]
    pub fn half<S: Simd>(simd: S, code: S::u32s) -> Option<S::f32s> {
        let v4 = (&simd as &dyn Any).downcast_ref::<V4>()?;
        let code: __m512i = bytemuck::cast(code);
        let halves = v4.avx512f._mm512_cvtepi32_epi16(v4.avx512f._mm512_srli_epi32::<16>(code));
        Some(bytemuck::cast(v4.avx512f._mm512_cvtph_ps(halves)))
    }

    #[inline(always)]
    pub fn e2m1<S: Simd>(simd: S, code: S::u32s) -> Option<S::f32s> {
        const VALUES: [f32; 16] =
            [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];
        const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        if let Some(value) = look_up(simd, VALUES, code) {
            return Some(value);
        }
        if let Some(v3) = (&simd as &dyn Any).downcast_ref::<V3>() {
            let sign = simd.and_u32s(shl(simd, code, 28), simd.splat_u32s(1 << 31));
            let (magnitudes, code): (__m256, __m256i) = (bytemuck::cast(MAGNITUDES), bytemuck::cast(code));
            let magnitude = bytemuck::cast(v3.avx2._mm256_permutevar8x32_ps(magnitudes, code));
            return Some(simd.transmute_f32s_u32s(simd.or_u32s(magnitude, sign)));
        }
        None
    }

    /// The lowest 4 bits less 8, where an instruction looks numbers up in a table of 16; the others are not looked at.
    #[inline(always)]
    pub fn nibble_less_8<S: Simd>(simd: S, code: S::u32s) -> Option<S::f32s> {
        const VALUES: [f32; 16] =
            [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        look_up(simd, VALUES, code)
    }

    /// The value for each code's lowest 4 bits.
    #[inline(always)]
    fn look_up<S: Simd>(simd: S, values: [f32; 16], code: S::u32s) -> Option<S::f32s> {
        let v4 = (&simd as &dyn Any).downcast_ref::<V4>()?;
        let (values, code): (__m512, __m512i) = (bytemuck::cast(values), bytemuck::cast(code));
        Some(bytemuck::cast(v4.avx512f._mm512_permutexvar_ps(code, values)))
    }

    #[inline(always)]
    pub fn halves<S: Simd>(simd: S, line: &[f16; WIDTH], v: usize) -> Option<S::f32s> {
        let v4 = (&simd as &dyn Any).downcast_ref::<V4>()?;
        let halves: __m256i = bytemuck::cast(line.as_chunks::<16>().0[v]);
        Some(bytemuck::cast(v4.avx512f._mm512_cvtph_ps(halves)))
    }
}

/// Other processors have nothing of it.
#[cfg(not(target_arch = "x86_64"))]
mod special {
    use super::WIDTH;
    use half::f16;
    use pulp::Simd;

    #[inline(always)]
    pub fn has_halves<S: Simd>() -> bool {
        false
    }

    #[inline(always)]
    pub fn half<S: Simd>(_: S, _: S::u32s) -> Option<S::f32s> {
        None
    }

    #[inline(always)]
    pub fn e2m1<S: Simd>(_: S, _: S::u32s) -> Option<S::f32s> {
        None
    }

    #[inline(always)]
    pub fn nibble_less_8<S: Simd>(_: S, _: S::u32s) -> Option<S::f32s> {
        None
    }

    #[inline(always)]
    pub fn halves<S: Simd>(_: S, _: &[f16; WIDTH], _: usize) -> Option<S::f32s> {
        None
    }
}
