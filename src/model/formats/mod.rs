//! How weights are stored: formats, what a packed row of each looks like, and how rows become what devices read.
//!
//! A **packed row** holds the weights of one output column, `K` inputs long, as one region after the other: the codes
//! first, then what a group of inputs shares (scales, zero points). `WeightFormat::regions` is the one description of
//! it. Checkpoints are turned into packed rows without decoding them, [`encode`] makes them from f32, [`decode`] is the
//! reference for what they mean, and `interleave` puts those of several columns side by side for a device.

mod blocks;
mod decode;
mod encode;
mod interleave;
pub(crate) mod published;
pub(crate) mod small_floats;

pub(crate) use blocks::{GgmlBlocks, GgmlType, ggml_row};
pub use decode::decode;
pub(crate) use decode::{decode_matrix, may_not_be_finite};
pub use encode::{Unrepresentable, encode};
pub(crate) use interleave::{ColumnOrder, interleave, interleaved_regions};

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How a device stores expert weights. Sums are f32 whatever the storage.
/// Router weights are always f32: they decide who computes.
///
/// Names, as files and the command line have them: `f32`, `f16`, `bf16`, `int8`, `int4`, `mxfp4`, `nvfp4`, `fp8`,
/// `q4_0`, `q8_0`, `q4_k`, `q6_k`; integers also with a group size and with zero points: `int4:g128`, `int8:g64:zp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[non_exhaustive]
pub enum WeightFormat {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit IEEE floats.
    F16,
    /// The upper half of an f32.
    Bf16,
    /// 8-bit integers, `(code - zero) * scale`, with an f32 scale for each group of inputs.
    Int8(IntGroups),
    /// 4-bit integers, as [`WeightFormat::Int8`].
    Int4(IntGroups),
    /// Microscaling FP4: E2M1 with an E8M0 scale for each 32 inputs (OCP MX 1.0).
    Mxfp4,
    /// E2M1 with an E4M3 scale for each 16 inputs and an f32 scale for each matrix.
    Nvfp4,
    /// E4M3 with an f32 scale for each block of 128 columns and 128 inputs.
    Fp8,
    /// GGUF: 4-bit integers with an f16 scale for each 32 inputs.
    Q4_0,
    /// GGUF: 8-bit integers with an f16 scale for each 32 inputs.
    Q8_0,
    /// GGUF: 4-bit integers with 6-bit scales and minima for each 32 inputs, and f16 factors of those for each 256.
    Q4K,
    /// GGUF: 6-bit integers with 8-bit scales for each 16 inputs, and an f16 factor of those for each 256.
    Q6K,
}

/// What the integers of a group of inputs share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct IntGroups {
    size: u8,
    zero_points: bool,
}

impl IntGroups {
    /// Sizes of groups.
    pub const SIZES: [u32; 4] = [16, 32, 64, 128];

    /// IntGroups of `size` inputs: 16, 32, 64 or 128. Without zero points, codes are around the middle of their range.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for another size.
    pub fn new(size: u32, zero_points: bool) -> Result<Self> {
        if Self::SIZES.contains(&size) {
            Ok(Self { size: size as u8, zero_points })
        } else {
            Err(Error::config("group size", size, "16, 32, 64 or 128"))
        }
    }

    const fn symmetric(size: u8) -> Self {
        Self { size, zero_points: false }
    }

    /// Inputs that share a scale.
    pub fn size(self) -> u32 {
        self.size.into()
    }

    /// Each group has a zero point of its own.
    pub fn has_zero_points(self) -> bool {
        self.zero_points
    }
}

/// One part of a packed row: `items` numbers of `bits` bits, low bits first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// 2, 4, 8, 16 or 32.
    pub bits: u32,
    /// Inputs that share an item.
    pub per: u32,
    /// How many there are.
    pub items: usize,
    /// Where they start, in bytes.
    pub at: usize,
}

impl Region {
    pub fn bytes(&self) -> usize {
        (self.items * self.bits as usize).div_ceil(8)
    }

    /// Item `index` of a row.
    pub fn get(&self, row: &[u8], index: usize) -> u32 {
        let at = self.at + index * self.bits as usize / 8;
        match self.bits {
            32 => u32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]]),
            16 => u16::from_le_bytes([row[at], row[at + 1]]).into(),
            8 => row[at].into(),
            bits => u32::from(row[at]) >> (index as u32 * bits % 8) & ((1 << bits) - 1),
        }
    }

    /// Items from `first` on, of at most eight bits. As many items as a byte holds divide `first`.
    pub fn take(&self, row: &[u8], first: usize, items: &mut [u8]) {
        let bytes = &row[self.at + first * self.bits as usize / 8..];
        match self.bits {
            8 => items.copy_from_slice(&bytes[..items.len()]),
            bits => {
                let mask = (1u8 << bits) - 1;
                for (items, &byte) in items.chunks_mut(8 / bits as usize).zip(bytes) {
                    items.iter_mut().enumerate().for_each(|(n, item)| *item = byte >> (n as u32 * bits) & mask);
                }
            }
        }
    }

    /// Sets items from `first` on, as [`Region::take`] reads them. What of the last byte is beyond them becomes zero.
    pub fn put(&self, row: &mut [u8], first: usize, items: &[u8]) {
        let bytes = &mut row[self.at + first * self.bits as usize / 8..];
        match self.bits {
            8 => bytes[..items.len()].copy_from_slice(items),
            bits => {
                for (items, byte) in items.chunks(8 / bits as usize).zip(bytes) {
                    *byte = items.iter().rev().fold(0, |byte, &item| byte << bits | item);
                }
            }
        }
    }

    /// Sets item `index` of a row that was zero there.
    pub fn set(&self, row: &mut [u8], index: usize, item: u32) {
        let at = self.at + index * self.bits as usize / 8;
        match self.bits {
            32 => row[at..at + 4].copy_from_slice(&item.to_le_bytes()),
            16 => row[at..at + 2].copy_from_slice(&(item as u16).to_le_bytes()),
            8 => row[at] = item as u8,
            bits => row[at] |= ((item & ((1 << bits) - 1)) << (index as u32 * bits % 8)) as u8,
        }
    }
}

/// The regions of a packed row of some length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowLayout {
    pub regions: Vec<Region>,
    /// Bytes of a row.
    pub bytes: usize,
}

/// All inputs of a row.
const ROW: u32 = u32::MAX;

impl WeightFormat {
    /// Integers of eight bits in groups of 32.
    pub const INT8: WeightFormat = WeightFormat::Int8(IntGroups::symmetric(32));
    /// Integers of four bits in groups of 32.
    pub const INT4: WeightFormat = WeightFormat::Int4(IntGroups::symmetric(32));

    /// Every format, integers in groups of 32 without zero points.
    pub const ALL: &'static [WeightFormat] = &[
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::Bf16,
        WeightFormat::INT8,
        WeightFormat::INT4,
        WeightFormat::Mxfp4,
        WeightFormat::Nvfp4,
        WeightFormat::Fp8,
        WeightFormat::Q4_0,
        WeightFormat::Q8_0,
        WeightFormat::Q4K,
        WeightFormat::Q6K,
    ];

    /// Those of [`WeightFormat::ALL`], and integers in groups of every other size and with zero points.
    pub fn every() -> Vec<WeightFormat> {
        let groups = IntGroups::SIZES.iter().flat_map(|&size| [false, true].map(|zp| (size, zp)));
        let others = groups.filter(|&group| group != (32, false));
        let others = others.filter_map(|(size, zero_points)| IntGroups::new(size, zero_points).ok());
        let others = others.flat_map(|groups| [WeightFormat::Int8(groups), WeightFormat::Int4(groups)]);
        Self::ALL.iter().copied().chain(others).collect()
    }

    /// The name used in files and on the command line.
    pub fn name(self) -> String {
        let integers = |name: &str, groups: IntGroups| {
            let size = if groups.size == 32 { String::new() } else { format!(":g{}", groups.size) };
            format!("{name}{size}{}", if groups.zero_points { ":zp" } else { "" })
        };
        match self {
            WeightFormat::Int8(groups) => integers("int8", groups),
            WeightFormat::Int4(groups) => integers("int4", groups),
            other => other.family().to_owned(),
        }
    }

    /// The name without a group size: what the format's WGSL file is called by.
    pub fn family(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
            WeightFormat::Bf16 => "bf16",
            WeightFormat::Int8(_) => "int8",
            WeightFormat::Int4(_) => "int4",
            WeightFormat::Mxfp4 => "mxfp4",
            WeightFormat::Nvfp4 => "nvfp4",
            WeightFormat::Fp8 => "fp8",
            WeightFormat::Q4_0 => "q4_0",
            WeightFormat::Q8_0 => "q8_0",
            WeightFormat::Q4K => "q4_k",
            WeightFormat::Q6K => "q6_k",
        }
    }

    /// Bits, and inputs that share each, of the regions of a row.
    fn regions(self) -> Vec<(u32, u32)> {
        let integers = |bits: u32, groups: IntGroups| {
            let mut regions = vec![(bits, 1), (32, groups.size())];
            regions.extend(groups.zero_points.then_some((8, groups.size())));
            regions
        };
        match self {
            WeightFormat::F32 => vec![(32, 1)],
            WeightFormat::F16 | WeightFormat::Bf16 => vec![(16, 1)],
            WeightFormat::Int8(groups) => integers(8, groups),
            WeightFormat::Int4(groups) => integers(4, groups),
            WeightFormat::Mxfp4 => vec![(4, 1), (8, 32)],
            WeightFormat::Nvfp4 => vec![(4, 1), (32, ROW), (8, 16)],
            WeightFormat::Fp8 => vec![(8, 1), (32, 128)],
            WeightFormat::Q4_0 => vec![(4, 1), (16, 32)],
            WeightFormat::Q8_0 => vec![(8, 1), (16, 32)],
            // codes, d, dmin, scales, minima
            WeightFormat::Q4K => vec![(4, 1), (16, 256), (16, 256), (8, 32), (8, 32)],
            // low four bits, high two, d, scales
            WeightFormat::Q6K => vec![(4, 1), (2, 1), (16, 256), (8, 16)],
        }
    }

    /// Inputs that are packed together: the length of a row has to be a multiple of this.
    pub fn block(self) -> u32 {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 | WeightFormat::Fp8 => 1,
            WeightFormat::Int8(groups) | WeightFormat::Int4(groups) => groups.size(),
            WeightFormat::Mxfp4 | WeightFormat::Q4_0 | WeightFormat::Q8_0 => 32,
            WeightFormat::Nvfp4 => 16,
            WeightFormat::Q4K | WeightFormat::Q6K => 256,
        }
    }

    /// Inputs whose scales are read together by the kernels; `None`: there are none.
    pub fn scaled_inputs(self) -> Option<u32> {
        match self {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => None,
            WeightFormat::Int8(groups) | WeightFormat::Int4(groups) => Some(groups.size()),
            WeightFormat::Nvfp4 | WeightFormat::Q6K => Some(16),
            WeightFormat::Mxfp4 | WeightFormat::Q4_0 | WeightFormat::Q8_0 | WeightFormat::Q4K => Some(32),
            WeightFormat::Fp8 => Some(128),
        }
    }

    /// A packed row of `inputs` inputs.
    pub(crate) fn layout(self, inputs: usize) -> RowLayout {
        let mut bytes = 0;
        let mut regions = Vec::new();
        for (bits, per) in self.regions() {
            let items = if per == ROW { 1 } else { inputs.div_ceil(per as usize) };
            let region = Region { bits, per, items, at: bytes };
            bytes += region.bytes();
            regions.push(region);
        }
        RowLayout { regions, bytes }
    }

    /// Bytes of `columns` interleaved rows of `inputs` inputs: each region padded to a multiple of 4 inputs, all of it
    /// to a multiple of 32 bytes.
    pub(crate) fn interleaved_bytes(self, columns: u64, inputs: u32) -> u64 {
        let region = |(bits, per): (u32, u32)| {
            let items = if per == ROW { 1 } else { u64::from(inputs.next_multiple_of(4).div_ceil(per)) };
            (items * columns * u64::from(bits)).div_ceil(8)
        };
        self.regions().into_iter().map(region).sum::<u64>().next_multiple_of(32)
    }

    /// Bytes of four columns of `inputs` inputs on a GPU.
    pub fn quad_bytes(self, inputs: u32) -> u64 {
        self.interleaved_bytes(4, inputs)
    }

    /// Bits of one weight of a row of `inputs` inputs on a GPU, with its part of the scales.
    pub fn bits_per_weight(self, inputs: u32) -> f64 {
        (self.quad_bytes(inputs) * 2) as f64 / f64::from(inputs)
    }

    /// Rows of `inputs` inputs can be stored.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] where the length is no multiple of the format's blocks.
    pub fn check_inputs(self, tensor: &'static str, inputs: u32) -> Result<()> {
        if inputs.is_multiple_of(self.block()) {
            return Ok(());
        }
        let expected = format!("a multiple of {} inputs, which {self} packs together; or another format", self.block());
        Err(Error::config(tensor, format!("{inputs} inputs wide"), expected))
    }
}

/// The formats of a layer's expert matrices. A checkpoint may keep them differently.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerFormats {
    /// First projections of routed experts.
    pub gate_up: WeightFormat,
    /// Second projections of routed experts.
    pub down: WeightFormat,
    /// First projections of shared experts.
    pub shared_gate_up: WeightFormat,
    /// Second projections of shared experts.
    pub shared_down: WeightFormat,
}

impl From<WeightFormat> for LayerFormats {
    fn from(format: WeightFormat) -> Self {
        Self { gate_up: format, down: format, shared_gate_up: format, shared_down: format }
    }
}

impl LayerFormats {
    /// The format of routed experts, `gate_up+down` where they differ.
    pub fn name(&self) -> String {
        if self.gate_up == self.down { self.gate_up.name() } else { format!("{}+{}", self.gate_up, self.down) }
    }

    /// Rows of the layer's lengths can be stored.
    ///
    /// # Errors
    /// Those of [`WeightFormat::check_inputs`].
    pub fn check(&self, config: &MoeConfig) -> Result<()> {
        self.gate_up.check_inputs("gate_up_proj", config.expert_size())?;
        self.down.check_inputs("down_proj", config.intermediate_size())?;
        if let Some(shared) = config.extras().shared {
            self.shared_gate_up.check_inputs("shared_gate_up_proj", config.hidden_size())?;
            self.shared_down.check_inputs("shared_down_proj", shared.intermediate_size)?;
        }
        Ok(())
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.name())
    }
}

impl From<WeightFormat> for String {
    fn from(format: WeightFormat) -> String {
        format.name()
    }
}

impl TryFrom<String> for WeightFormat {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        name.parse()
    }
}

impl FromStr for WeightFormat {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let unknown = || {
            let names: Vec<String> = WeightFormat::ALL.iter().map(|format| format.name()).collect();
            let groups = "int4 and int8 also as int4:g16, :g64, :g128, and with zero points as int4:g32:zp";
            Error::config("weight format", name, format!("one of {}; {groups}", names.join(", ")))
        };
        let mut parts = name.split(':');
        let family = parts.next().unwrap_or_default();
        let format = WeightFormat::ALL.iter().copied().find(|format| format.family() == family).ok_or_else(unknown)?;
        let (mut size, mut zero_points) = (None, false);
        for part in parts {
            match part.strip_prefix('g').map(str::parse::<u32>) {
                Some(Ok(group)) if size.is_none() && !zero_points => size = Some(group),
                None if part == "zp" && !zero_points => zero_points = true,
                _ => return Err(unknown()),
            }
        }
        let groups = IntGroups::new(size.unwrap_or(32), zero_points)?;
        match format {
            WeightFormat::Int8(_) => Ok(WeightFormat::Int8(groups)),
            WeightFormat::Int4(_) => Ok(WeightFormat::Int4(groups)),
            format if size.is_none() && !zero_points => Ok(format),
            _ => Err(unknown()),
        }
    }
}

#[cfg(test)]
mod tests;
