//! The reference for what packed rows mean. Each weight is computed in f32 in the order in which the kernels do it: what
//! a group shares first, then its product with the code. So theirs have the same bits.

use super::small_floats::{e2m1, e4m3, e8m0};
use super::{IntGroups, Region, RowLayout, WeightFormat};
use rayon::prelude::*;

/// The weights of packed rows `[rows, inputs]` of one matrix, as f32.
///
/// # Panics
/// If `packed` is not whole rows.
pub fn decode(format: WeightFormat, inputs: usize, packed: &[u8]) -> Vec<f32> {
    let layout = format.layout(inputs);
    assert_eq!(packed.len() % layout.bytes.max(1), 0, "whole rows");
    let mut values = vec![0.0; packed.len() / layout.bytes.max(1) * inputs];
    for (row, values) in packed.chunks_exact(layout.bytes.max(1)).zip(values.chunks_exact_mut(inputs.max(1))) {
        decode_row(format, &layout, row, values);
    }
    values
}

/// As [`decode`], in parallel.
pub(crate) fn decode_matrix(format: WeightFormat, inputs: usize, packed: &[u8]) -> Vec<f32> {
    let row_bytes = format.layout(inputs).bytes.max(1);
    let mut values = vec![0.0; packed.len() / row_bytes * inputs];
    let rows = packed.par_chunks(row_bytes * ROWS_AT_A_TIME);
    rows.zip(values.par_chunks_mut(inputs.max(1) * ROWS_AT_A_TIME)).for_each(|(rows, values)| {
        values.copy_from_slice(&decode(format, inputs, rows));
    });
    values
}

/// Rows decoded by one task.
const ROWS_AT_A_TIME: usize = 16;

/// The weights of one packed row.
pub(crate) fn decode_row(format: WeightFormat, layout: &RowLayout, row: &[u8], values: &mut [f32]) {
    let r = &layout.regions;
    let item = |n: usize, at: usize| r[n].get(row, at);
    let float = |n: usize, at: usize| f32::from_bits(item(n, at));
    let half = |n: usize, at: usize| half::f16::from_bits(item(n, at) as u16).to_f32();
    match format {
        WeightFormat::F32 => values.iter_mut().enumerate().for_each(|(k, v)| *v = float(0, k)),
        WeightFormat::F16 => values.iter_mut().enumerate().for_each(|(k, v)| *v = half(0, k)),
        WeightFormat::Bf16 => values.iter_mut().enumerate().for_each(|(k, v)| *v = f32::from_bits(item(0, k) << 16)),
        WeightFormat::Int8(groups) | WeightFormat::Int4(groups) => {
            let middle = middle(format);
            by_group(&r[0], row, groups.size(), values, |g, codes, values| {
                let (scale, zero) = (float(1, g), if groups.has_zero_points() { item(2, g) as f32 } else { middle });
                each(codes, values, |code| (f32::from(code) - zero) * scale);
            });
        }
        WeightFormat::Mxfp4 => by_group(&r[0], row, 32, values, |g, codes, values| {
            let scale = e8m0(item(1, g) as u8);
            each(codes, values, |code| e2m1(code) * scale);
        }),
        WeightFormat::Nvfp4 => by_group(&r[0], row, 16, values, |g, codes, values| {
            let scale = e4m3(item(2, g) as u8) * float(1, 0);
            each(codes, values, |code| e2m1(code) * scale);
        }),
        WeightFormat::Fp8 => by_group(&r[0], row, 128, values, |g, codes, values| {
            let scale = float(1, g);
            each(codes, values, |code| e4m3(code) * scale);
        }),
        WeightFormat::Q4_0 => by_group(&r[0], row, 32, values, |g, codes, values| {
            let scale = half(1, g);
            each(codes, values, |code| (f32::from(code) - 8.0) * scale);
        }),
        WeightFormat::Q8_0 => by_group(&r[0], row, 32, values, |g, codes, values| {
            let scale = half(1, g);
            each(codes, values, |code| f32::from(code as i8) * scale);
        }),
        WeightFormat::Q4K => by_group(&r[0], row, 32, values, |g, codes, values| {
            let scale = half(1, g / 8) * item(3, g) as f32;
            let least = half(2, g / 8) * item(4, g) as f32;
            each(codes, values, |code| scale * f32::from(code) - least);
        }),
        WeightFormat::Q6K => {
            let mut high = [0; MOST];
            by_group(&r[0], row, 16, values, |g, low, values| {
                let scale = half(2, g / 16) * f32::from(item(3, g) as u8 as i8);
                r[1].take(row, g * 16, &mut high[..low.len()]);
                for ((value, &low), &high) in values.iter_mut().zip(low).zip(&high) {
                    *value = scale * (f32::from(low | high << 4) - 32.0);
                }
            });
        }
    }
}

/// Most inputs of a group.
const MOST: usize = 128;

/// `decode(group, codes, values)` for each `size` inputs of a row.
fn by_group(
    region: &Region,
    row: &[u8],
    size: u32,
    values: &mut [f32],
    mut decode: impl FnMut(usize, &[u8], &mut [f32]),
) {
    let (mut codes, size) = ([0; MOST], size as usize);
    for (g, values) in values.chunks_mut(size).enumerate() {
        let codes = &mut codes[..values.len()];
        region.take(row, g * size, codes);
        decode(g, codes, values);
    }
}

fn each(codes: &[u8], values: &mut [f32], weight: impl Fn(u8) -> f32) {
    values.iter_mut().zip(codes).for_each(|(value, &code)| *value = weight(code));
}

/// A packed row may hold a weight that is NaN or infinite: of floats one that is, of the others a scale that is, or
/// that the largest code could make so. `false` is certain.
pub(crate) fn may_not_be_finite(format: WeightFormat, layout: &RowLayout, row: &[u8]) -> bool {
    let bytes = |n: usize| &row[layout.regions[n].at..][..layout.regions[n].bytes()];
    let words = |n: usize| bytes(n).as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b));
    let halves = |n: usize| bytes(n).as_chunks::<2>().0.iter().map(|&b| u16::from_le_bytes(b));
    // As bits, floats ascend, and what is not finite is above all others.
    let too_large = |n: usize| words(n).any(|bits| bits & 0x7fff_ffff > (f32::MAX / 4096.0).to_bits());
    match format {
        WeightFormat::F32 => words(0).any(|bits| bits & 0x7f80_0000 == 0x7f80_0000),
        WeightFormat::F16 => halves(0).any(|bits| bits & 0x7c00 == 0x7c00),
        WeightFormat::Bf16 => halves(0).any(|bits| bits & 0x7f80 == 0x7f80),
        WeightFormat::Int8(_) | WeightFormat::Int4(_) => too_large(1),
        // 6 * 2^126 is infinite, and 255 is NaN.
        WeightFormat::Mxfp4 => bytes(1).iter().any(|&exponent| exponent > 252),
        WeightFormat::Nvfp4 => too_large(1) || bytes(2).iter().any(|&scale| scale & 127 == 127),
        WeightFormat::Fp8 => too_large(1) || bytes(0).iter().any(|&code| code & 127 == 127),
        // With whole scales and codes of at most eight bits, no finite f16 makes anything infinite.
        WeightFormat::Q4_0 | WeightFormat::Q8_0 => halves(1).any(|bits| bits & 0x7c00 == 0x7c00),
        WeightFormat::Q4K => halves(1).chain(halves(2)).any(|bits| bits & 0x7c00 == 0x7c00),
        WeightFormat::Q6K => halves(2).any(|bits| bits & 0x7c00 == 0x7c00),
    }
}

/// The code of zero where there are no zero points.
pub(crate) fn middle(format: WeightFormat) -> f32 {
    if let WeightFormat::Int8(IntGroups { .. }) = format { 128.0 } else { 8.0 }
}
