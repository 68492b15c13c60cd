//! The reference for what packed rows mean. Each weight is computed in f32 in the order in which the kernels do it: what
//! a group shares first, then its product with the code. So theirs have the same bits.

use super::small_floats::{e2m1, e4m3, e8m0};
use super::{IntGroups, RowLayout, WeightFormat};

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

/// The weights of one packed row.
pub(crate) fn decode_row(format: WeightFormat, layout: &RowLayout, row: &[u8], values: &mut [f32]) {
    let r = &layout.regions;
    // Item of region n that belongs to input k.
    let at = |n: usize, k: usize| r[n].get(row, k / r[n].per as usize);
    let float = |n: usize, k: usize| f32::from_bits(at(n, k));
    let half = |n: usize, k: usize| half::f16::from_bits(at(n, k) as u16).to_f32();
    let mut each = |weight: &dyn Fn(usize) -> f32| values.iter_mut().enumerate().for_each(|(k, v)| *v = weight(k));
    match format {
        WeightFormat::F32 => each(&|k| float(0, k)),
        WeightFormat::F16 => each(&|k| half(0, k)),
        WeightFormat::Bf16 => each(&|k| f32::from_bits(at(0, k) << 16)),
        WeightFormat::Int8(groups) | WeightFormat::Int4(groups) => {
            let middle = middle(format);
            each(&|k| {
                let zero = if groups.has_zero_points() { at(2, k) as f32 } else { middle };
                (at(0, k) as f32 - zero) * float(1, k)
            });
        }
        WeightFormat::Mxfp4 => each(&|k| e2m1(at(0, k) as u8) * e8m0(at(1, k) as u8)),
        WeightFormat::Nvfp4 => each(&|k| e2m1(at(0, k) as u8) * (e4m3(at(2, k) as u8) * float(1, k))),
        WeightFormat::Fp8 => each(&|k| e4m3(at(0, k) as u8) * float(1, k)),
        WeightFormat::Q4_0 => each(&|k| (at(0, k) as f32 - 8.0) * half(1, k)),
        WeightFormat::Q8_0 => each(&|k| f32::from(at(0, k) as u8 as i8) * half(1, k)),
        WeightFormat::Q4K => each(&|k| {
            let (scale, least) = (half(1, k) * at(3, k) as f32, half(2, k) * at(4, k) as f32);
            scale * at(0, k) as f32 - least
        }),
        WeightFormat::Q6K => each(&|k| {
            let code = at(0, k) | at(1, k) << 4;
            half(2, k) * f32::from(at(3, k) as u8 as i8) * (code as f32 - 32.0)
        }),
    }
}

/// The code of zero where there are no zero points.
pub(crate) fn middle(format: WeightFormat) -> f32 {
    if let WeightFormat::Int8(IntGroups { .. }) = format { 128.0 } else { 8.0 }
}
