//! Matrices as checkpoints store them, as packed rows `[out, in]`. What fits a weight format is not decoded.

use crate::model::formats::small_floats::{e4m3, e8m0};
use crate::model::formats::{self, WeightFormat};
use rayon::prelude::*;

/// Columns that share a scale in MXFP4.
pub(crate) const FP4_BLOCK: usize = 32;
/// Rows and columns that share a scale in the usual fp8.
const FP8_BLOCK: usize = 128;

/// One matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct PackedMatrix {
    pub format: WeightFormat,
    /// Inputs of a row.
    pub inputs: usize,
    /// Rows, one after the other.
    pub bytes: Vec<u8>,
}

impl PackedMatrix {
    pub fn of_f32(inputs: usize, values: &[f32]) -> Self {
        Self { format: WeightFormat::F32, inputs, bytes: bytemuck::cast_slice(values).to_vec() }
    }

    pub fn to_f32(&self) -> Vec<f32> {
        if self.format == WeightFormat::F32 {
            return bytemuck::pod_collect_to_vec(&self.bytes);
        }
        formats::decode_matrix(self.format, self.inputs, &self.bytes)
    }

    /// The first weight that is not finite.
    pub fn not_finite(&self) -> Option<(usize, f32)> {
        let layout = self.format.layout(self.inputs);
        let rows = self.bytes.par_chunks(layout.bytes.max(1)).enumerate();
        let find = |(n, row): (usize, &[u8])| {
            // Decoding a large file to look at it would take longer than to read it.
            formats::may_not_be_finite(self.format, &layout, row).then_some(())?;
            let values = formats::decode(self.format, self.inputs, row);
            let at = values.iter().position(|v| !v.is_finite())?;
            Some((n * self.inputs + at, values[at]))
        };
        rows.filter_map(find).min_by_key(|(at, _)| *at)
    }
}

/// Items of `SIZE` bytes, `[rows, columns]` to `[columns, rows]`.
pub(crate) fn transpose<const SIZE: usize>(bytes: &[u8], rows: usize, columns: usize) -> Vec<u8> {
    let (items, _) = bytes.as_chunks::<SIZE>();
    let mut transposed = vec![0u8; items.len() * SIZE];
    // A few rows of the result at a time, so that what is read with them stays in the cache.
    transposed.par_chunks_mut((rows * SIZE * 16).max(1)).enumerate().for_each(|(block, out)| {
        let out = out.as_chunks_mut::<SIZE>().0;
        let width = out.len() / rows.max(1);
        for r in 0..rows {
            for (c, item) in items[r * columns + block * 16..][..width].iter().enumerate() {
                out[c * rows + r] = *item;
            }
        }
    });
    transposed
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
        Some(Self { count, size: size.max(1) })
    }
}

/// E4M3 `codes [rows, columns]` with `scales [down.count, across.count]`, stored `[in, out]` where `transposed`.
pub(crate) fn fp8(
    codes: Vec<u8>,
    columns: usize,
    scales: &[f32],
    [down, across]: [Blocks; 2],
    transposed: bool,
) -> PackedMatrix {
    let rows = codes.len() / columns.max(1);
    let (inputs, outputs) = if transposed { (rows, columns) } else { (columns, rows) };
    // [down, across] of the stored matrix by (output, input)
    let scale = |n: usize, k: usize| {
        let (r, c) = if transposed { (k, n) } else { (n, k) };
        scales[r / down.size * across.count + c / across.size]
    };
    let codes = if transposed { transpose::<1>(&codes, rows, columns) } else { codes };
    let along = if transposed { down } else { across };
    if along.count > 1 && along.size != FP8_BLOCK {
        // Each input has a scale of its own, which no packed row has.
        let value = |(at, &code): (usize, &u8)| e4m3(code) * scale(at / inputs, at % inputs);
        let values: Vec<f32> = codes.par_iter().enumerate().map(value).collect();
        return PackedMatrix::of_f32(inputs, &values);
    }
    let layout = WeightFormat::Fp8.layout(inputs);
    let mut bytes = vec![0; outputs * layout.bytes];
    bytes.par_chunks_exact_mut(layout.bytes.max(1)).enumerate().for_each(|(n, row)| {
        row[..inputs].copy_from_slice(&codes[n * inputs..][..inputs]);
        for block in 0..layout.regions[1].items {
            layout.regions[1].set(row, block, scale(n, block * FP8_BLOCK).to_bits());
        }
    });
    PackedMatrix { format: WeightFormat::Fp8, inputs, bytes }
}

/// Scales of E2M1 numbers.
pub(crate) enum Fp4Scales {
    /// E8M0, one for each 32.
    Exponents(Vec<u8>),
    /// The same as floats.
    Floats(Vec<f32>),
}

/// E2M1 codes, two in a byte, low half first: `[rows, columns / 2]` with a scale for each 32 columns.
pub(crate) fn fp4(codes: &[u8], columns: usize, scales: Fp4Scales) -> PackedMatrix {
    let exponents = match scales {
        Fp4Scales::Exponents(exponents) => exponents,
        Fp4Scales::Floats(scales) => {
            // Powers of two are exponents; of other floats there is no packed row.
            let exponent = |scale: &f32| {
                let exponent = (scale.to_bits() >> 23) as u8;
                (e8m0(exponent).to_bits() == scale.to_bits()).then_some(exponent)
            };
            match scales.iter().map(exponent).collect() {
                Some(exponents) => exponents,
                None => {
                    let pairs = codes.iter().flat_map(|&byte| [byte & 15, byte >> 4]).enumerate();
                    let value = |(at, code)| formats::small_floats::e2m1(code) * scales[at / FP4_BLOCK];
                    return PackedMatrix::of_f32(columns, &pairs.map(value).collect::<Vec<f32>>());
                }
            }
        }
    };
    let (codes, exponents) = (codes.chunks_exact(columns / 2), exponents.chunks_exact(columns / FP4_BLOCK));
    let bytes = codes.zip(exponents).flat_map(|(codes, exponents)| [codes, exponents].concat()).collect();
    PackedMatrix { format: WeightFormat::Mxfp4, inputs: columns, bytes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_and_exponents_are_mxfp4() {
        let matrix = fp4(&[0x72; 16], 32, Fp4Scales::Exponents(vec![128]));
        assert_eq!((matrix.format, &matrix.to_f32()[..4]), (WeightFormat::Mxfp4, &[2.0, 12.0, 2.0, 12.0][..]));
        assert_eq!(fp4(&[0x9f; 16], 32, Fp4Scales::Floats(vec![0.5])).to_f32()[..2], [-3.0, -0.25]);
        let odd = fp4(&[0x9f; 16], 32, Fp4Scales::Floats(vec![3.0]));
        assert_eq!((odd.format, &odd.to_f32()[..2]), (WeightFormat::F32, &[-18.0, -1.5][..]));
        let nan = fp4(&[0x72; 32], 32, Fp4Scales::Exponents(vec![127, 255]));
        assert!(nan.not_finite().is_some_and(|(at, value)| at == 32 && value.is_nan()));
    }

    #[test]
    fn fp8_scales_are_those_of_their_blocks() {
        // Rows of 130 columns: the last block is partial. Codes of 1.
        let blocks = [Blocks::new(1, 2), Blocks::new(2, 130)].map(|blocks| blocks.expect("fits"));
        let values = fp8(vec![0x38; 260], 130, &[2.0, 3.0], blocks, false);
        assert_eq!(values.format, WeightFormat::Fp8);
        let values = values.to_f32();
        assert_eq!((values[127], values[128], values[129], values[130]), (2.0, 3.0, 3.0, 2.0));
        let transposed = fp8(vec![0x38; 260], 130, &[2.0, 3.0], blocks, true);
        assert_eq!((transposed.inputs, transposed.format), (2, WeightFormat::Fp8));
        assert_eq!(transposed.to_f32()[2 * 127..2 * 129], [2.0, 2.0, 3.0, 3.0]);
        // A scale for each input.
        let blocks = [Blocks::new(1, 2), Blocks::new(130, 130)].map(|blocks| blocks.expect("fits"));
        let scales: Vec<f32> = (0..130u8).map(f32::from).collect();
        let each = fp8(vec![0x38; 260], 130, &scales, blocks, false);
        assert_eq!((each.format, each.to_f32()[130 + 7]), (WeightFormat::F32, 7.0));
        assert_eq!(Blocks::new(3, 130), None);
    }

    #[test]
    fn a_transposed_matrix_has_its_columns_as_rows() {
        let (rows, columns) = (37, 41);
        let items: Vec<u16> = (0..rows * columns).map(|v| v as u16).collect();
        let out: Vec<u16> = bytemuck::pod_collect_to_vec(&transpose::<2>(bytemuck::cast_slice(&items), rows, columns));
        for (at, &item) in out.iter().enumerate() {
            assert_eq!(usize::from(item), at % rows * columns + at / rows);
        }
    }

    #[test]
    fn what_is_not_finite_is_found_where_it_is() {
        let mut values = vec![1.0f32; 3 * 64];
        values[130] = f32::NEG_INFINITY;
        let matrix = PackedMatrix::of_f32(64, &values);
        assert_eq!(matrix.not_finite(), Some((130, f32::NEG_INFINITY)));
        let bytes: Vec<u8> = values.iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        let mut matrix = PackedMatrix { format: WeightFormat::Bf16, inputs: 64, bytes };
        assert_eq!(matrix.not_finite(), Some((130, f32::NEG_INFINITY)));
        matrix.bytes[2 * 130..2 * 130 + 2].copy_from_slice(&half::bf16::MAX.to_le_bytes());
        assert_eq!(matrix.not_finite(), None);
    }

    /// For every exponent and half.
    #[test]
    fn scales_that_are_not_finite_are_found() {
        for (format, inputs, region) in [
            (WeightFormat::Mxfp4, 32, 1),
            (WeightFormat::Q4_0, 32, 1),
            (WeightFormat::Q8_0, 32, 1),
            (WeightFormat::Q4K, 256, 1),
            (WeightFormat::Q4K, 256, 2),
            (WeightFormat::Q6K, 256, 2),
        ] {
            let layout = format.layout(inputs);
            let scale = layout.regions[region];
            for item in 0..1u32 << scale.bits {
                // The largest integers, and scales of integers.
                let mut row = vec![if format == WeightFormat::Mxfp4 { 0x77 } else { 0x7f }; layout.bytes];
                row[scale.at..][..scale.bytes()].fill(0);
                scale.set(&mut row, 0, item);
                let finite = formats::decode(format, inputs, &row).iter().all(|v| v.is_finite());
                let matrix = PackedMatrix { format, inputs, bytes: row };
                assert_eq!(matrix.not_finite().is_none(), finite, "{format}: {item:#x}");
            }
        }
    }
}
