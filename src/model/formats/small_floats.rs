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
    nearest(value, 0x7e, e4m3) | sign(value) << 7
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
    nearest(value, 7, e2m1) | sign(value) << 3
}

fn sign(value: f32) -> u8 {
    value.is_sign_negative().into()
}

/// The code in `0..=most` whose value is nearest to |value|. Values ascend with codes, and neighbours of which one has
/// an even code tie to it.
fn nearest(value: f32, most: u8, decode: impl Fn(u8) -> f32) -> u8 {
    let magnitude = value.abs();
    let (mut low, mut high) = (0, most);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if decode(middle) <= magnitude { low = middle } else { high = middle }
    }
    let (below, above) = (magnitude - decode(low), decode(high) - magnitude);
    if below < above || (below == above && low % 2 == 0) { low } else { high }
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
