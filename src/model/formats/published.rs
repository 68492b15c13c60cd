//! The layouts that quantised checkpoints are published in, as packed rows. Codes and scales keep their bits: nothing
//! is decoded, and scales of 16 bits are widened to f32.
//!
//! | tensors beside `<base>.` | layout | `quant_method` and more of `quantization_config` |
//! |---|---|---|
//! | `weight_packed`, `weight_scale`, `weight_shape` | [`pack_quantized_rows`] | `compressed-tensors`, `format` `pack-quantized` |
//! | `weight_packed`, `weight_scale`, `weight_global_scale` | [`nvfp4_rows`] | `compressed-tensors`, `format` `nvfp4-pack-quantized` |
//! | `weight`, `weight_scale`, `weight_scale_2` | [`nvfp4_rows`] | `modelopt`, `quant_algo` `NVFP4` |
//! | `qweight`, `scales`, `qzeros`, mostly `g_idx` | [`gptq_rows`] | `gptq`, `checkpoint_format` `gptq` or `gptq_v2` |
//! | `qweight`, `scales`, `qzeros` | [`awq_rows`] | `awq`, `version` `gemm` |
//!
//! Shapes are `[outer, inner]`, `N` is the number of columns of the layer, which are the rows here, `K` that of inputs,
//! and `G` that of groups of a row. An integer of 32 bits holds its first item in its lowest bits. Errors say what is
//! wrong, what was found and what was expected; callers add file and tensor.

use super::small_floats::{E2M1_MAX, E4M3_MAX, e4m3};
use super::{IntGroups, RowLayout, WeightFormat};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Ends of the names of all these tensors.
pub(crate) const SUFFIXES: [&str; 13] = [
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
    "weight_global_scale",
    "weight",
    "weight_scale_2",
    "input_scale",
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
];

/// Layouts that the names of tensors tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// compressed-tensors, integers.
    PackQuantized,
    /// compressed-tensors, NVFP4: the scale of the matrix divides.
    Nvfp4PackQuantized,
    /// ModelOpt, NVFP4: the scale of the matrix multiplies.
    ModelOptNvfp4,
    /// GPTQ or AWQ, which [`qweight`] tells apart.
    Qweight,
}

/// The layout of the tensors `<base>.…`, by those that are present. `None`: none that is known.
pub(crate) fn detect(present: impl Fn(&str) -> bool, base: &str) -> Option<Kind> {
    let all = |suffixes: &[&str]| suffixes.iter().all(|suffix| present(&format!("{base}.{suffix}")));
    // MXFP4 of compressed-tensors also has packed weights and scales, but neither of the third tensors.
    if all(&["weight_packed", "weight_scale", "weight_global_scale"]) {
        Some(Kind::Nvfp4PackQuantized)
    } else if all(&["weight_packed", "weight_scale", "weight_shape"]) {
        Some(Kind::PackQuantized)
    } else if all(&["weight", "weight_scale", "weight_scale_2"]) {
        Some(Kind::ModelOptNvfp4)
    } else if all(&["qweight", "scales"]) {
        Some(Kind::Qweight)
    } else {
        None
    }
}

/// A tensor `<base>.…` that changes what the weights do and has no place in a packed row: factors of the inputs, and
/// low-rank corrections.
pub(crate) fn unsupported(present: impl Fn(&str) -> bool, base: &str) -> Option<&'static str> {
    let suffixes = ["pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b"];
    suffixes.into_iter().find(|suffix| present(&format!("{base}.{suffix}")))
}

/// The layouts with a tensor `qweight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Qweight {
    /// For [`gptq_rows`].
    Gptq {
        /// Bits of a code.
        bits: u32,
    },
    /// For [`awq_rows`].
    Awq,
}

/// The layout of a `qweight` of this shape for a matrix `[rows, inputs]`. That of AWQ's `gemv` can look like GPTQ's, so
/// `version` of the configuration has to be `gemm`.
pub(crate) fn qweight(shape: &[usize], rows: usize, inputs: usize) -> Result<Qweight, String> {
    match shape {
        [outer, inner] if inner.checked_mul(8) == Some(rows) && *outer == inputs => Ok(Qweight::Awq),
        [outer, inner] if *inner == rows && outer.checked_mul(8) == Some(inputs) => Ok(Qweight::Gptq { bits: 4 }),
        [outer, inner] if *inner == rows && outer.checked_mul(4) == Some(inputs) => Ok(Qweight::Gptq { bits: 8 }),
        _ => {
            let (gptq4, gptq8) = (format!("[{inputs}/8, {rows}]"), format!("[{inputs}/4, {rows}]"));
            let expected = format!("{gptq4} or {gptq8} (GPTQ), or [{inputs}, {rows}/8] (AWQ)");
            Err(format!("qweight has shape {shape:?}, expected {expected}"))
        }
    }
}

/// Scales as they are stored, as f32.
pub(crate) fn widened(dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, String> {
    let size = match dtype {
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        other => return Err(format!("scales are {other:?}, expected F32, F16 or BF16")),
    };
    if !bytes.len().is_multiple_of(size) {
        return Err(format!("scales have {} bytes, expected a multiple of {size}", bytes.len()));
    }
    let halves = || bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
    Ok(match dtype {
        Dtype::F16 => halves().map(f16::from_bits).collect::<Vec<_>>().to_f32_vec(),
        Dtype::BF16 => halves().map(bf16::from_bits).collect::<Vec<_>>().to_f32_vec(),
        _ => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    })
}

/// Integers with a scale for each group of inputs, as one of the layouts has them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Integers<'a> {
    /// Columns of the layer.
    pub rows: usize,
    /// Inputs of each.
    pub inputs: usize,
    /// Bits of a code: 4 or 8.
    pub bits: u32,
    /// The tensor of codes, I32.
    pub codes: &'a [u8],
    /// The tensor of scales. How many there are tells the size of groups.
    pub scales: &'a [f32],
    /// The tensor of zero points, I32.
    pub zeros: Option<&'a [u8]>,
    /// The group of each input, I32. Only that of inputs in order is accepted.
    pub group_index: Option<&'a [u8]>,
}

/// How stored groups become those of a packed row.
struct Grouping {
    /// IntGroups of a row, as stored.
    stored: usize,
    /// Packed groups for each of them: wide ones, up to whole rows, are repeated.
    repeats: usize,
    /// Inputs of a packed group.
    size: u32,
}

impl Integers<'_> {
    /// Codes of an integer of 32 bits.
    fn per_word(&self) -> usize {
        (32 / self.bits) as usize
    }

    /// The code of zero without zero points.
    fn middle(&self) -> u8 {
        1 << (self.bits - 1)
    }

    /// What all the layouts have in common.
    fn check(&self) -> Result<Grouping, String> {
        let Self { rows, inputs, bits, .. } = *self;
        if ![4, 8].contains(&bits) {
            return Err(format!("codes have {bits} bits, expected 4 or 8"));
        }
        if rows == 0 || inputs == 0 {
            return Err(format!("the matrix is [{rows}, {inputs}], expected at least one row and one input"));
        }
        let stored = self.scales.len() / rows;
        if stored == 0 || !self.scales.len().is_multiple_of(rows) || !inputs.is_multiple_of(stored) {
            let found = self.scales.len();
            let expected = format!("{rows} rows times a number of groups that divides {inputs} inputs");
            return Err(format!("there are {found} scales, expected {expected}"));
        }
        let group = inputs / stored;
        let mut sizes = IntGroups::SIZES.into_iter().rev();
        let Some(size) = sizes.find(|&size| group.is_multiple_of(size as usize)) else {
            return Err(format!("groups have {group} inputs, expected 16, 32, 64, 128 or a multiple of one of these"));
        };
        // IntGroups are multiples of 16 inputs, so these are whole integers of 32 bits.
        check_bytes("codes", self.codes, rows * inputs * bits as usize / 8)?;
        if let Some(index) = self.group_index {
            check_bytes("the group index", index, inputs * 4)?;
            let group_of = |k: usize| word(index, k) as i32;
            // Where the order of inputs was not touched, some checkpoints have -1 everywhere.
            let unset = (0..inputs).all(|k| group_of(k) == -1);
            if let Some(k) = (0..inputs).find(|&k| !unset && group_of(k) as usize != k / group) {
                let found = format!("the group index has group {} for input {k}", group_of(k));
                return Err(format!("{found}, expected {}: inputs in order, no activation reordering", k / group));
            }
        }
        // The largest difference of two codes, or of a code and a zero point.
        let most = f32::from(u8::MAX >> (8 - bits));
        if let Some(at) = self.scales.par_iter().position_first(|scale| !(scale * most).is_finite()) {
            let expected = format!("finite scales, also times {most}");
            return Err(format!("the scale at element {at} is {}, expected {expected}", self.scales[at]));
        }
        Ok(Grouping { stored, repeats: group / size as usize, size })
    }

    /// Zero points `[rows, groups]`. `item`: the integer of 32 bits, and the item in it, of that of a row and a group.
    fn zero_points(
        &self,
        zeros: &[u8],
        groups: usize,
        item: impl Fn(usize, usize) -> (usize, usize) + Sync,
    ) -> Result<Vec<u8>, String> {
        check_bytes("zero points", zeros, self.rows.div_ceil(self.per_word()) * groups * 4)?;
        let get = |at: usize| {
            let (index, item) = item(at / groups, at % groups);
            (word(zeros, index) >> (item as u32 * self.bits)) as u8 & (u8::MAX >> (8 - self.bits))
        };
        Ok((0..self.rows * groups).into_par_iter().map(get).collect())
    }

    /// Rows of several columns are in one integer of 32 bits: there are no columns beyond the last.
    fn check_rows(&self) -> Result<(), String> {
        if self.rows.is_multiple_of(self.per_word()) {
            return Ok(());
        }
        Err(format!("the matrix has {} rows, expected a multiple of {}", self.rows, self.per_word()))
    }

    /// Packed rows. `codes` writes those of a block of rows, of which it gets the first, into the first bytes of each.
    /// `scale`: the position of that of a row and a group. Zero points are `[rows, groups]`.
    fn pack(
        &self,
        grouping: &Grouping,
        zeros: Option<&[u8]>,
        scale: impl Fn(usize, usize) -> usize + Sync,
        codes: impl Fn(usize, &mut [u8], &RowLayout) + Sync,
    ) -> (WeightFormat, Vec<u8>) {
        let groups = IntGroups { size: grouping.size as u8, zero_points: zeros.is_some() };
        let format = if self.bits == 4 { WeightFormat::Int4(groups) } else { WeightFormat::Int8(groups) };
        let layout = format.layout(self.inputs);
        let mut packed = vec![0; self.rows * layout.bytes];
        packed.par_chunks_mut(BLOCK * layout.bytes).enumerate().for_each(|(block, rows)| {
            codes(block * BLOCK, rows, &layout);
            for (row, n) in rows.chunks_exact_mut(layout.bytes).zip(block * BLOCK..) {
                for item in 0..layout.regions[1].items {
                    let g = item / grouping.repeats;
                    layout.regions[1].set(row, item, self.scales[scale(n, g)].to_bits());
                    if let Some(zeros) = zeros {
                        layout.regions[2].set(row, item, zeros[n * grouping.stored + g].into());
                    }
                }
            }
        });
        (format, packed)
    }
}

/// Rows that are written together: where checkpoints have columns side by side, one item of each is a few cache lines.
const BLOCK: usize = 128;

/// Integer `index` of a tensor I32.
fn word(bytes: &[u8], index: usize) -> u32 {
    let at = 4 * index;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn check_bytes(what: &str, bytes: &[u8], expected: usize) -> Result<(), String> {
    if bytes.len() == expected {
        return Ok(());
    }
    Err(format!("{what} have {} bytes, expected {expected}", bytes.len()))
}

/// compressed-tensors, `pack-quantized`, 4 or 8 bits.
///
/// `weight_packed` I32 `[N, K * bits / 32]` along inputs; `weight_scale` BF16, F16 or F32 `[N, G]`, where `G` is 1 for
/// the strategy `channel`; `weight_zero_point`, where not `symmetric`, I32 `[ceil(N * bits / 32), G]`, packed along
/// columns, with unused bits after the last; `weight_shape` I64 `[2]`, for [`check_shape`]; `weight_g_idx` I32 `[K]`
/// from versions that could reorder inputs. Codes and zero points are signed and stored plus 8 or 128, which their
/// difference does not see: `(code - zero) * scale` with what is stored.
pub(crate) fn pack_quantized_rows(t: &Integers<'_>) -> Result<(WeightFormat, Vec<u8>), String> {
    let grouping = t.check()?;
    let groups = grouping.stored;
    let zeros = match t.zeros {
        Some(zeros) => Some(t.zero_points(zeros, groups, |n, g| (n / t.per_word() * groups + g, n % t.per_word()))?),
        None => None,
    };
    let row_codes = t.inputs * t.bits as usize / 8;
    let codes = |first: usize, rows: &mut [u8], layout: &RowLayout| {
        let stored = t.codes[first * row_codes..].chunks_exact(row_codes);
        rows.chunks_exact_mut(layout.bytes)
            .zip(stored)
            .for_each(|(row, stored)| row[..row_codes].copy_from_slice(stored));
    };
    Ok(t.pack(&grouping, zeros.as_deref(), |n, g| n * groups + g, codes))
}

/// `weight_shape` of compressed-tensors is the matrix's.
pub(crate) fn check_shape(weight_shape: &[u8], rows: usize, inputs: usize) -> Result<(), String> {
    check_bytes("the two numbers of weight_shape", weight_shape, 16)?;
    let expected = [rows, inputs].map(|n| (n as u64).to_le_bytes());
    if weight_shape == expected.as_flattened() {
        return Ok(());
    }
    let number = |at: usize| u64::from(word(weight_shape, at)) | u64::from(word(weight_shape, at + 1)) << 32;
    Err(format!("weight_shape is [{}, {}], expected [{rows}, {inputs}]", number(0) as i64, number(2) as i64))
}

/// How GPTQ stores zero points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GptqZeros {
    /// `checkpoint_format` `gptq`, also where there is none: one less than they are.
    LessOne,
    /// `checkpoint_format` `gptq_v2`: as they are.
    Plain,
}

/// GPTQ, 4 or 8 bits.
///
/// `qweight` I32 `[K * bits / 32, N]`, packed along inputs; `scales` F16 `[G, N]` (or BF16, F32); `qzeros` I32
/// `[G, N * bits / 32]`, packed along columns; `g_idx` I32 `[K]`. `G` is 1 for `group_size` -1.
///
/// With `symmetric`, which is `sym` of the configuration, every zero point has to be the middle, 8 or 128, and rows
/// have none. The largest stored zero point of [`GptqZeros::LessOne`], all bits set, is refused: some readers take it
/// for 0, others for 16, and what wrote it may have borrowed from its neighbour.
pub(crate) fn gptq_rows(
    t: &Integers<'_>,
    stored_zeros: GptqZeros,
    symmetric: bool,
) -> Result<(WeightFormat, Vec<u8>), String> {
    let grouping = t.check()?;
    t.check_rows()?;
    let (groups, words) = (grouping.stored, t.rows / t.per_word());
    let mut zeros = match t.zeros {
        Some(zeros) => t.zero_points(zeros, groups, |n, g| (g * words + n / t.per_word(), n % t.per_word()))?,
        None if symmetric => Vec::new(),
        None => return Err("there are no zero points, expected qzeros, as sym is false".to_owned()),
    };
    let place = |at: usize| format!("the zero point of column {}, group {}", at / groups, at % groups);
    if stored_zeros == GptqZeros::LessOne {
        let largest = u8::MAX >> (8 - t.bits);
        if let Some(at) = zeros.par_iter().position_first(|&zero| zero == largest) {
            let place = place(at);
            return Err(format!("{place} is stored as {largest}, expected less, or checkpoint_format gptq_v2"));
        }
        zeros.par_iter_mut().for_each(|zero| *zero += 1);
    }
    if symmetric && let Some(at) = zeros.par_iter().position_first(|&zero| zero != t.middle()) {
        return Err(format!("{} is {}, expected {}, as sym is true", place(at), zeros[at], t.middle()));
    }
    let codes = |first: usize, rows: &mut [u8], layout: &RowLayout| {
        for k in 0..t.inputs / t.per_word() {
            let stored = t.codes[(k * t.rows + first) * 4..].chunks_exact(4);
            for (row, stored) in rows.chunks_exact_mut(layout.bytes).zip(stored) {
                row[4 * k..][..4].copy_from_slice(stored);
            }
        }
    };
    Ok(t.pack(&grouping, (!symmetric).then_some(&*zeros), |n, g| g * t.rows + n, codes))
}

/// AWQ, the version `gemm`, which has 4 bits.
///
/// `qweight` I32 `[K, N / 8]` and `qzeros` I32 `[G, N / 8]`, both packed along columns: of eight, an integer holds
/// columns 0, 2, 4, 6, 1, 3, 5, 7 from its lowest bits on; `scales` F16 `[G, N]`. Zero points are as they are.
pub(crate) fn awq_rows(t: &Integers<'_>) -> Result<(WeightFormat, Vec<u8>), String> {
    /// Where in an integer each of eight columns is.
    const ITEMS: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

    let grouping = t.check()?;
    t.check_rows()?;
    if t.bits != 4 {
        return Err(format!("codes have {} bits, expected 4", t.bits));
    }
    let Some(zeros) = t.zeros else {
        return Err("there are no zero points, expected qzeros".to_owned());
    };
    let words = t.rows / 8;
    let zeros = t.zero_points(zeros, grouping.stored, |n, g| (g * words + n / 8, ITEMS[n % 8]))?;
    let codes = |first: usize, rows: &mut [u8], layout: &RowLayout| {
        for k in (0..t.inputs).step_by(8) {
            for (columns, w) in rows.chunks_exact_mut(8 * layout.bytes).zip(first / 8..) {
                // Eight inputs of eight columns, from columns side by side to inputs side by side.
                let stored: [u32; 8] = std::array::from_fn(|i| word(t.codes, (k + i) * words + w));
                for (row, item) in columns.chunks_exact_mut(layout.bytes).zip(ITEMS) {
                    let nibble = |i: usize| (stored[i] >> (4 * item) & 15) << (4 * i);
                    let codes = (0..8).map(nibble).fold(0, |codes, nibble| codes | nibble);
                    row[k / 2..][..4].copy_from_slice(&codes.to_le_bytes());
                }
            }
        }
    };
    Ok(t.pack(&grouping, Some(&zeros), |n, g| g * t.rows + n, codes))
}

/// What a matrix of [`Nvfp4`] shares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum MatrixScale {
    /// ModelOpt's `weight_scale_2`.
    Factor(f32),
    /// compressed-tensors' `weight_global_scale`. Rows get its reciprocal, rounded to f32.
    Divisor(f32),
}

/// NVFP4, as both publishers have it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Nvfp4<'a> {
    /// Columns of the layer.
    pub rows: usize,
    /// Inputs of each.
    pub inputs: usize,
    /// The tensor of codes, U8.
    pub codes: &'a [u8],
    /// The tensor of scales, F8_E4M3.
    pub scales: &'a [u8],
    /// The one number of its tensor, F32.
    pub matrix_scale: MatrixScale,
}

/// NVFP4 of ModelOpt and of compressed-tensors.
///
/// `weight` or `weight_packed` U8 `[N, K / 2]`: E2M1, the first of two inputs in the low four bits; `weight_scale`
/// F8_E4M3 `[N, K / 16]`; and an F32 of the matrix, `weight_scale_2` `[]`, which multiplies, or `weight_global_scale`
/// `[1]`, which divides. A reciprocal is one rounding more than the division, which is at most one unit in the last
/// place of an f32 and what inference engines do as well.
pub(crate) fn nvfp4_rows(t: &Nvfp4<'_>) -> Result<(WeightFormat, Vec<u8>), String> {
    let Nvfp4 { rows, inputs, .. } = *t;
    if rows == 0 || inputs == 0 || !inputs.is_multiple_of(16) {
        return Err(format!("the matrix is [{rows}, {inputs}], expected at least one row and a multiple of 16 inputs"));
    }
    check_bytes("codes", t.codes, rows * inputs / 2)?;
    check_bytes("scales", t.scales, rows * inputs / 16)?;
    if let Some(at) = t.scales.par_iter().position_first(|&scale| e4m3(scale).is_nan()) {
        return Err(format!("the scale at element {at} is NaN, expected a number"));
    }
    let scale = match t.matrix_scale {
        MatrixScale::Factor(factor) => factor,
        // An infinite divisor would make zeros of everything.
        MatrixScale::Divisor(divisor) if divisor.is_finite() => 1.0 / divisor,
        MatrixScale::Divisor(_) => f32::NAN,
    };
    if !(scale >= 0.0 && (scale * (E2M1_MAX * E4M3_MAX)).is_finite()) {
        let found = match t.matrix_scale {
            MatrixScale::Factor(factor) => format!("weight_scale_2 is {factor}"),
            MatrixScale::Divisor(divisor) => format!("weight_global_scale is {divisor}"),
        };
        return Err(format!("{found}, expected a positive number of which every weight is finite"));
    }
    let layout = WeightFormat::Nvfp4.layout(inputs);
    let r = &layout.regions;
    let mut packed = vec![0; rows * layout.bytes];
    let stored = t.codes.par_chunks_exact(inputs / 2).zip(t.scales.par_chunks_exact(inputs / 16));
    packed.par_chunks_exact_mut(layout.bytes).zip(stored).for_each(|(row, (codes, scales))| {
        row[r[0].at..][..codes.len()].copy_from_slice(codes);
        r[1].set(row, 0, scale.to_bits());
        row[r[2].at..][..scales.len()].copy_from_slice(scales);
    });
    Ok((WeightFormat::Nvfp4, packed))
}

#[cfg(test)]
mod tests;
