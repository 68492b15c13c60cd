//! Floats of 16, 8 and 4 bits, and exponents, as f32 and back. Rounding is to the nearest, ties to even.

/// 1 sign bit, 4 exponent bits of bias 7, 3 fraction bits; no infinities, one NaN for each sign.
pub(crate) fn e4m3(bits: u8) -> f32 {
    let magnitude = match (bits >> 3 & 15, f32::from(bits & 7)) {
        (15, 7.0) => f32::NAN,
        (0, fraction) => fraction / 512.0,
        (exponent, fraction) => (1.0 + fraction / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    };
    if bits & 128 == 0 { magnitude } else { -magnitude }
}

/// The largest finite E4M3.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// The nearest E4M3; what is too large becomes the largest.
pub(crate) fn to_e4m3(value: f32) -> u8 {
    let magnitude = value.abs().min(E4M3_MAX);
    let code = if magnitude < 1.0 / 64.0 {
        // Without exponent the fraction counts 1/512; rounding up to 8 of them gives the least with an exponent.
        (magnitude * 512.0).round_ties_even() as u32
    } else {
        // An f32 with another bias, rounded to three bits of its fraction.
        let bits = magnitude.to_bits();
        ((bits + 0x7_ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3)
    };
    code as u8 | sign(value) << 7
}

/// An exponent of two with bias 127; 255 is NaN.
pub(crate) fn e8m0(bits: u8) -> f32 {
    if bits == 255 { f32::NAN } else { 2f64.powi(i32::from(bits) - 127) as f32 }
}

/// 1 sign bit, 2 exponent bits, 1 fraction bit.
pub(crate) fn e2m1(bits: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(bits & 7)];
    if bits & 8 == 0 { magnitude } else { -magnitude }
}

/// The largest E2M1.
pub(crate) const E2M1_MAX: f32 = 6.0;

/// The nearest E2M1; what is too large becomes the largest.
pub(crate) fn to_e2m1(value: f32) -> u8 {
    let m = value.abs();
    // Halfway between neighbours the even code wins.
    let below = [m > 0.25, m >= 0.75, m > 1.25, m >= 1.75, m > 2.5, m >= 3.5, m > 5.0];
    below.into_iter().map(u8::from).sum::<u8>() | sign(value) << 3
}

fn sign(value: f32) -> u8 {
    value.is_sign_negative().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_have_their_published_values() {
        for (bits, expected) in [(0, 0.0), (1, 1.0 / 512.0), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (8, 1.0 / 64.0)]
        {
            assert_eq!(e4m3(bits), expected);
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
        assert_eq!((e8m0(127), e8m0(130), e8m0(0)), (1.0, 8.0, 2f32.powi(-127)));
        assert_eq!((e2m1(2), e2m1(7), e2m1(9), e2m1(15)), (1.0, 6.0, -0.5, -6.0));
    }

    /// Against a look at every code.
    #[test]
    fn no_other_value_is_nearer() {
        let nearest = |magnitude: f32, most: u8, decode: fn(u8) -> f32| {
            let distance = |code: &u8| (f64::from(decode(*code)) - f64::from(magnitude)).abs();
            // The first of those that are equally near, or the second if that is even.
            (0..=most).min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a % 2).cmp(&(b % 2)))).expect("some")
        };
        let between = |decode: fn(u8) -> f32, most: u8| {
            let halfway = (0..most).map(move |code| (decode(code) + decode(code + 1)) / 2.0);
            halfway.flat_map(|m| [m, f32::from_bits(m.to_bits() + 1), f32::from_bits(m.to_bits() - 1), m * 1.01])
        };
        for m in between(e4m3, 0x7e) {
            assert_eq!((to_e4m3(m), to_e4m3(-m)), (nearest(m, 0x7e, e4m3), nearest(m, 0x7e, e4m3) | 128), "{m}");
        }
        for m in between(e2m1, 7) {
            assert_eq!((to_e2m1(m), to_e2m1(-m)), (nearest(m, 7, e2m1), nearest(m, 7, e2m1) | 8), "{m}");
        }
    }

    #[test]
    fn every_value_is_its_own_nearest_and_ties_go_to_even_codes() {
        for bits in (0..=255u8).filter(|bits| bits & 127 != 127) {
            assert_eq!(to_e4m3(e4m3(bits)), bits);
        }
        for bits in 0..16 {
            assert_eq!(to_e2m1(e2m1(bits)), bits);
        }
        assert_eq!([0.25, 0.75, 2.5, 5.0, -5.0, 9.0].map(|v| e2m1(to_e2m1(v))), [0.0, 1.0, 2.0, 4.0, -4.0, 6.0]);
        assert_eq!([1.0625, 1.1875, 1e9, -1e9].map(|v| e4m3(to_e4m3(v))), [1.0, 1.25, 448.0, -448.0]);
    }
}
