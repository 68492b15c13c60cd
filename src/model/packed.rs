//! Numbers of eight and four bits, and the scales that belong to them, as f32.

/// Columns that share a scale in MXFP4.
pub(crate) const FP4_BLOCK: usize = 32;
/// Rows and columns that share a scale in the usual fp8.
const FP8_BLOCK: usize = 128;

/// 1 sign bit, 4 exponent bits of bias 7, 3 fraction bits; no infinities, one NaN for each sign.
pub(crate) fn fp8_e4m3(bits: u8) -> f32 {
    let magnitude = match (bits >> 3 & 15, f32::from(bits & 7)) {
        (15, 7.0) => f32::NAN,
        (0, fraction) => fraction / 512.0,
        (exponent, fraction) => (1.0 + fraction / 8.0) * 2f32.powi(i32::from(exponent) - 7),
    };
    if bits & 128 == 0 { magnitude } else { -magnitude }
}

/// An exponent of two with bias 127; 255 is NaN.
pub(crate) fn e8m0(bits: u8) -> f32 {
    if bits == 255 { f32::NAN } else { 2f64.powi(i32::from(bits) - 127) as f32 }
}

/// 1 sign bit, 2 exponent bits, 1 fraction bit.
fn fp4_e2m1(bits: u8) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let magnitude = MAGNITUDES[usize::from(bits & 7)];
    if bits & 8 == 0 { magnitude } else { -magnitude }
}

/// Two numbers in a byte, low half first; one scale for each 32.
pub(crate) fn unpack_fp4(bytes: &[u8], scales: &[f32]) -> Vec<f32> {
    let pairs = bytes.iter().flat_map(|&byte| [fp4_e2m1(byte & 15), fp4_e2m1(byte >> 4)]);
    pairs.enumerate().map(|(at, v)| v * scales[at / FP4_BLOCK]).collect()
}

/// How the rows or the columns of a matrix share scales.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Blocks {
    /// Scales.
    pub count: usize,
    /// Rows or columns of each.
    size: usize,
}

impl Blocks {
    /// `count` scales for `length` rows or columns: one for all, one for each, or one for each 128.
    pub fn new(count: usize, length: usize) -> Option<Self> {
        let size = match count {
            1 => length,
            _ if count == length.div_ceil(FP8_BLOCK) => FP8_BLOCK,
            _ if count == length => 1,
            _ => return None,
        };
        Some(Self { count, size })
    }
}

/// `values [rows, columns]` times the scales of their blocks, `[down.count, across.count]`.
pub(crate) fn scale_blocks(values: &mut [f32], columns: usize, scales: &[f32], [down, across]: [Blocks; 2]) {
    for (r, row) in values.chunks_exact_mut(columns).enumerate() {
        let scales = &scales[r / down.size * across.count..][..across.count];
        for (values, scale) in row.chunks_mut(across.size).zip(scales) {
            values.iter_mut().for_each(|v| *v *= scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_have_their_published_values() {
        for (bits, expected) in [(0, 0.0), (1, 1.0 / 512.0), (0x38, 1.0), (0xb8, -1.0), (0x7e, 448.0), (8, 1.0 / 64.0)]
        {
            assert_eq!(fp8_e4m3(bits), expected);
        }
        assert!(fp8_e4m3(0x7f).is_nan() && fp8_e4m3(0xff).is_nan());
        assert_eq!((e8m0(127), e8m0(130), e8m0(0)), (1.0, 8.0, 2f32.powi(-127)));
        assert_eq!(unpack_fp4(&[0x72; 16], &[2.0])[..4], [2.0, 12.0, 2.0, 12.0]);
        assert_eq!(unpack_fp4(&[0x9f; 16], &[1.0])[..2], [-6.0, -0.5]);
    }

    #[test]
    fn the_last_block_may_be_partial() {
        let blocks = [Blocks::new(1, 2), Blocks::new(2, 130)].map(|blocks| blocks.expect("fits"));
        let mut values = vec![1.0; 260];
        scale_blocks(&mut values, 130, &[2.0, 3.0], blocks);
        assert_eq!((values[127], values[128], values[129], values[130]), (2.0, 3.0, 3.0, 2.0));
        assert_eq!(Blocks::new(3, 130), None);
    }
}
