//! From f32 to packed rows: round to nearest, scales by the largest magnitude.

use super::decode::{decode_row, middle};
use super::small_floats::{E2M1_MAX, E4M3_MAX, e4m3, to_e2m1, to_e4m3};
use super::{Region, RowLayout, WeightFormat};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// A weight that a format cannot hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Unrepresentable {
    /// Position in the matrix, in elements.
    pub index: usize,
    /// The weight.
    pub value: f32,
}

/// Rows of fp8 that share scales.
const FP8_BLOCK: usize = 128;

/// Packed rows of one matrix `[rows, inputs]` of finite values; `inputs` is a multiple of the format's block.
///
/// # Errors
/// The first weight whose stored value would not be finite.
pub fn encode(format: WeightFormat, inputs: usize, values: &[f32]) -> Result<Vec<u8>, Unrepresentable> {
    let layout = format.layout(inputs);
    let rows = values.len().checked_div(inputs).unwrap_or(0);
    let mut packed = vec![0u8; rows * layout.bytes];
    if packed.is_empty() {
        return Ok(packed);
    }
    // What the whole matrix, or some rows of it, share.
    let matrix_scale = match format {
        WeightFormat::Nvfp4 => positive(largest(values) / (E2M1_MAX * E4M3_MAX)),
        _ => 0.0,
    };
    let block_rows = if format == WeightFormat::Fp8 { FP8_BLOCK } else { 1 };
    let encode_rows = |(block, (packed, values)): (usize, (&mut [u8], &[f32]))| {
        let scales = match format {
            WeightFormat::Fp8 => fp8_scales(values, inputs),
            _ => vec![matrix_scale],
        };
        let rows = packed.chunks_exact_mut(layout.bytes).zip(values.chunks_exact(inputs)).enumerate();
        rows.map(|(r, (row, values))| (r, encode_row(format, &layout, values, &scales, row)))
            .find_map(|(r, failed)| Some((r, failed.err()?)))
            .map(|(r, k)| (block * block_rows + r) * inputs + k)
    };
    let packed_blocks = packed.par_chunks_mut(block_rows * layout.bytes);
    let failed = packed_blocks.zip(values.par_chunks(block_rows * inputs)).enumerate().filter_map(encode_rows).min();
    match failed {
        None => Ok(packed),
        Some(index) => Err(Unrepresentable { index, value: values[index] }),
    }
}

/// `Err`: the first input that cannot be stored.
fn encode_row(
    format: WeightFormat,
    layout: &RowLayout,
    values: &[f32],
    shared: &[f32],
    row: &mut [u8],
) -> Result<(), usize> {
    let r = &layout.regions;
    let codes = r[0];
    match format {
        WeightFormat::F32 => each(values, |k, v| codes.set(row, k, v.to_bits())),
        WeightFormat::F16 => {
            let mut stored = vec![f16::ZERO; values.len()];
            stored.convert_from_f32_slice(values);
            stored.iter().position(|v| !v.is_finite()).map_or(Ok(()), Err)?;
            row.copy_from_slice(bytemuck::cast_slice(&stored));
        }
        WeightFormat::Bf16 => {
            let mut stored = vec![bf16::ZERO; values.len()];
            stored.convert_from_f32_slice(values);
            stored.iter().position(|v| !v.is_finite()).map_or(Ok(()), Err)?;
            row.copy_from_slice(bytemuck::cast_slice(&stored));
        }
        WeightFormat::Int8(groups) | WeightFormat::Int4(groups) => {
            let most = (1u32 << codes.bits) as f32 - 1.0;
            for (g, values) in values.chunks(groups.size() as usize).enumerate() {
                let (scale, zero) = if groups.has_zero_points() {
                    let (low, high) = values.iter().fold((0f32, 0f32), |(low, high), &v| (low.min(v), high.max(v)));
                    // Halves, as the difference may be more than f32 can hold.
                    let scale = positive((high / 2.0 - low / 2.0) / most * 2.0);
                    (scale, round(-low / scale).clamp(0.0, most))
                } else {
                    (positive(largest(values) / (middle(format) - 1.0)), middle(format))
                };
                r[1].set(row, g, scale.to_bits());
                if groups.has_zero_points() {
                    r[2].set(row, g, zero as u32);
                }
                let code = |v: f32| (round(v / scale) + zero).clamp(0.0, most) as u8;
                put(codes, row, g * groups.size() as usize, values, code);
            }
        }
        WeightFormat::Mxfp4 => {
            for (g, values) in values.chunks(32).enumerate() {
                let exponent = exponent(largest(values)).saturating_sub(2).clamp(-127, 127);
                r[1].set(row, g, (exponent + 127) as u32);
                let scale = 2f64.powi(exponent);
                put(codes, row, g * 32, values, |v| to_e2m1((f64::from(v) / scale) as f32));
            }
        }
        WeightFormat::Nvfp4 => {
            let matrix_scale = shared[0];
            r[1].set(row, 0, matrix_scale.to_bits());
            for (g, values) in values.chunks(16).enumerate() {
                let scale = to_e4m3(largest(values) / E2M1_MAX / matrix_scale);
                r[2].set(row, g, scale.into());
                let scale = positive(e4m3(scale) * matrix_scale);
                put(codes, row, g * 16, values, |v| to_e2m1(v / scale));
            }
        }
        WeightFormat::Fp8 => {
            for (g, values) in values.chunks(FP8_BLOCK).enumerate() {
                let scale = shared[g];
                r[1].set(row, g, scale.to_bits());
                put(codes, row, g * FP8_BLOCK, values, |v| to_e4m3(v / scale));
            }
        }
        WeightFormat::Q4_0 => {
            for (g, values) in values.chunks(32).enumerate() {
                let scale = f16::from_f32(extreme(values) / -8.0);
                r[1].set(row, g, finite(scale, g * 32)?);
                let scale = nonzero(scale.to_f32());
                put(codes, row, g * 32, values, |v| (round(v / scale) + 8.0).clamp(0.0, 15.0) as u8);
            }
        }
        WeightFormat::Q8_0 => {
            for (g, values) in values.chunks(32).enumerate() {
                let scale = f16::from_f32(largest(values) / 127.0);
                r[1].set(row, g, finite(scale, g * 32)?);
                let scale = nonzero(scale.to_f32());
                let code = |v: f32| round(v / scale).clamp(-127.0, 127.0) as i8 as u8;
                put(codes, row, g * 32, values, code);
            }
        }
        WeightFormat::Q4K => {
            for (b, values) in values.chunks(256).enumerate() {
                let bounds = |values: &[f32]| {
                    let (low, high) = values.iter().fold((0f32, f32::MIN), |(low, high), &v| (low.min(v), high.max(v)));
                    ((high / 2.0 - low / 2.0) / 15.0 * 2.0, -low)
                };
                let bounds: Vec<(f32, f32)> = values.chunks(32).map(bounds).collect();
                let most = |of: fn(&(f32, f32)) -> f32| bounds.iter().map(of).fold(0.0, f32::max);
                let (d, dmin) = (f16::from_f32(most(|b| b.0) / 63.0), f16::from_f32(most(|b| b.1) / 63.0));
                r[1].set(row, b, finite(d, b * 256)?);
                r[2].set(row, b, finite(dmin, b * 256)?);
                let (d, dmin) = (d.to_f32(), dmin.to_f32());
                for (g, (values, (scale, least))) in values.chunks(32).zip(bounds).enumerate() {
                    let part = |v: f32, unit: f32| round(v / nonzero(unit)).clamp(0.0, 63.0);
                    let (scale, least) = (part(scale, d), part(least, dmin));
                    r[3].set(row, b * 8 + g, scale as u32);
                    r[4].set(row, b * 8 + g, least as u32);
                    let (scale, least) = (nonzero(d * scale), dmin * least);
                    let code = |v: f32| round((v + least) / scale).clamp(0.0, 15.0) as u8;
                    put(codes, row, b * 256 + g * 32, values, code);
                }
            }
        }
        WeightFormat::Q6K => {
            for (b, values) in values.chunks(256).enumerate() {
                let scales: Vec<f32> = values.chunks(16).map(|values| extreme(values) / -32.0).collect();
                let d = f16::from_f32(extreme(&scales) / -128.0);
                r[2].set(row, b, finite(d, b * 256)?);
                let d = d.to_f32();
                for (g, (values, scale)) in values.chunks(16).zip(scales).enumerate() {
                    let scale = round(scale / nonzero(d)).clamp(-128.0, 127.0);
                    r[3].set(row, b * 16 + g, (scale as i8 as u8).into());
                    let scale = nonzero(d * scale);
                    let code = |v: f32| (round(v / scale) + 32.0).clamp(0.0, 63.0) as u8;
                    let first = b * 256 + g * 16;
                    put(codes, row, first, values, |v| code(v) & 15);
                    put(r[1], row, first, values, |v| code(v) >> 4);
                }
            }
        }
    }
    // The largest code times a scale that was rounded up may be beyond f32.
    if largest(values) > f32::MAX / 16.0 {
        let mut stored = vec![0.0; values.len()];
        decode_row(format, layout, row, &mut stored);
        return stored.iter().position(|v| !v.is_finite()).map_or(Ok(()), Err);
    }
    Ok(())
}

fn each(values: &[f32], mut set: impl FnMut(usize, f32)) {
    values.iter().enumerate().for_each(|(k, &v)| set(k, v));
}

/// To the nearest whole number, ties to even, of numbers that are far below 2^22, which codes are. By an addition,
/// because a processor without a rounding instruction calls a function.
fn round(value: f32) -> f32 {
    const UNITS_LAST: f32 = 12_582_912.0; // 1.5 * 2^23
    (value + UNITS_LAST) - UNITS_LAST
}

/// The codes of a group of at most 128 weights.
fn put(region: Region, row: &mut [u8], first: usize, values: &[f32], code: impl Fn(f32) -> u8) {
    let mut codes = [0; FP8_BLOCK];
    let codes = &mut codes[..values.len()];
    codes.iter_mut().zip(values).for_each(|(c, &v)| *c = code(v));
    region.put(row, first, codes);
}

fn finite(scale: f16, k: usize) -> Result<u32, usize> {
    if scale.is_finite() { Ok(scale.to_bits().into()) } else { Err(k) }
}

fn largest(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most, v| most.max(v.abs()))
}

/// The value of the largest magnitude, with its sign.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |most: f32, &v| if v.abs() > most.abs() { v } else { most })
}

/// A scale that can be divided by. Where all is zero, any will do.
fn positive(scale: f32) -> f32 {
    if scale > 0.0 { scale } else { 1.0 }
}

fn nonzero(scale: f32) -> f32 {
    if scale == 0.0 { 1.0 } else { scale }
}

/// `floor(log2(value))`, the least exponent for 0.
fn exponent(value: f32) -> i32 {
    if value == 0.0 { i32::MIN } else { f64::from(value).log2().floor() as i32 }
}

/// One scale for each 128 columns of up to 128 rows.
fn fp8_scales(values: &[f32], inputs: usize) -> Vec<f32> {
    let mut scales = vec![0f32; inputs.div_ceil(FP8_BLOCK)];
    for row in values.chunks_exact(inputs) {
        for (scale, values) in scales.iter_mut().zip(row.chunks(FP8_BLOCK)) {
            *scale = scale.max(largest(values));
        }
    }
    scales.into_iter().map(|largest| positive(largest / E4M3_MAX)).collect()
}
