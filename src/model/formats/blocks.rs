//! The types of GGUF tensors, and the blocks that they keep rows in, as packed rows. Nothing is decoded.

use super::WeightFormat;

/// A type of GGUF tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GgmlType {
    /// In the file.
    pub number: u32,
    pub name: &'static str,
    /// Numbers of a block: rows are whole blocks.
    pub inputs: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

/// Every type that was published, whether it is read or not: sizes tell where a tensor ends. Numbers 31 to 33 and 36 to
/// 38 were rows of Q4_0 and IQ4_NL in another order, as large; 4 and 5 were gone before GGUF.
const TYPES: [GgmlType; 41] = {
    const fn of(number: u32, name: &'static str, inputs: u64, bytes: u64) -> GgmlType {
        GgmlType { number, name, inputs, bytes }
    }
    [
        of(0, "F32", 1, 4),
        of(1, "F16", 1, 2),
        of(2, "Q4_0", 32, 18),
        of(3, "Q4_1", 32, 20),
        of(6, "Q5_0", 32, 22),
        of(7, "Q5_1", 32, 24),
        of(8, "Q8_0", 32, 34),
        of(9, "Q8_1", 32, 36),
        of(10, "Q2_K", 256, 84),
        of(11, "Q3_K", 256, 110),
        of(12, "Q4_K", 256, 144),
        of(13, "Q5_K", 256, 176),
        of(14, "Q6_K", 256, 210),
        of(15, "Q8_K", 256, 292),
        of(16, "IQ2_XXS", 256, 66),
        of(17, "IQ2_XS", 256, 74),
        of(18, "IQ3_XXS", 256, 98),
        of(19, "IQ1_S", 256, 50),
        of(20, "IQ4_NL", 32, 18),
        of(21, "IQ3_S", 256, 110),
        of(22, "IQ2_S", 256, 82),
        of(23, "IQ4_XS", 256, 136),
        of(24, "I8", 1, 1),
        of(25, "I16", 1, 2),
        of(26, "I32", 1, 4),
        of(27, "I64", 1, 8),
        of(28, "F64", 1, 8),
        of(29, "IQ1_M", 256, 56),
        of(30, "BF16", 1, 2),
        of(31, "Q4_0_4_4", 32, 18),
        of(32, "Q4_0_4_8", 32, 18),
        of(33, "Q4_0_8_8", 32, 18),
        of(34, "TQ1_0", 256, 54),
        of(35, "TQ2_0", 256, 66),
        of(36, "IQ4_NL_4_4", 32, 18),
        of(37, "IQ4_NL_4_8", 32, 18),
        of(38, "IQ4_NL_8_8", 32, 18),
        of(39, "MXFP4", 32, 17),
        of(40, "NVFP4", 64, 36),
        of(41, "Q1_0", 128, 18),
        of(42, "Q2_0", 64, 18),
    ]
};

impl GgmlType {
    /// By its number in the file. `None`: newer than this list.
    pub fn of_number(number: u32) -> Option<Self> {
        TYPES.iter().copied().find(|known| known.number == number)
    }

    /// Names of the types whose rows become packed rows, for messages.
    pub fn readable() -> String {
        let names: Vec<&str> =
            TYPES.iter().filter(|known| GgmlBlocks::of_type(known.number).is_some()).map(|known| known.name).collect();
        names.join(", ")
    }
}

/// How a GGUF type that is read cuts rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GgmlBlocks {
    /// The format that holds the same numbers.
    pub format: WeightFormat,
    /// Inputs of a block.
    pub inputs: usize,
    /// Bytes of a block.
    pub bytes: usize,
    /// The type's name.
    pub name: &'static str,
}

impl GgmlBlocks {
    /// By the type's number in the file. `None`: it is not read.
    pub fn of_type(number: u32) -> Option<Self> {
        let format = match number {
            0 => WeightFormat::F32,
            1 => WeightFormat::F16,
            2 => WeightFormat::Q4_0,
            8 => WeightFormat::Q8_0,
            12 => WeightFormat::Q4K,
            14 => WeightFormat::Q6K,
            30 => WeightFormat::Bf16,
            39 => WeightFormat::Mxfp4,
            _ => return None,
        };
        let GgmlType { name, inputs, bytes, .. } = GgmlType::of_number(number)?;
        Some(Self { format, inputs: inputs as usize, bytes: bytes as usize, name })
    }
}

/// One row of blocks as a packed row, which is zero before. Nibbles of a block (or of a part of it) come as all the low
/// halves of its bytes, then all the high ones.
pub(crate) fn ggml_row(blocks: &GgmlBlocks, row: &[u8], packed: &mut [u8]) {
    let inputs = row.len() / blocks.bytes * blocks.inputs;
    let layout = blocks.format.layout(inputs);
    let r = &layout.regions;
    for (b, block) in row.chunks_exact(blocks.bytes).enumerate() {
        let first = b * blocks.inputs;
        let half = |at: usize| u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
        let mut nibbles = |bytes: &[u8], first: usize| {
            for (j, &byte) in bytes.iter().enumerate() {
                r[0].set(packed, first + j, (byte & 15).into());
                r[0].set(packed, first + bytes.len() + j, (byte >> 4).into());
            }
        };
        match blocks.format {
            WeightFormat::Q4_0 => {
                nibbles(&block[2..18], first);
                r[1].set(packed, b, half(0));
            }
            WeightFormat::Mxfp4 => {
                nibbles(&block[1..17], first);
                r[1].set(packed, b, block[0].into());
            }
            WeightFormat::Q8_0 => {
                block[2..34].iter().enumerate().for_each(|(k, &code)| r[0].set(packed, first + k, code.into()));
                r[1].set(packed, b, half(0));
            }
            WeightFormat::Q4K => {
                for (part, bytes) in block[16..144].chunks_exact(32).enumerate() {
                    nibbles(bytes, first + 64 * part);
                }
                r[1].set(packed, b, half(0));
                r[2].set(packed, b, half(2));
                let s = &block[4..16];
                for j in 0..8 {
                    // Six bits each: the last four scales and minima have their upper two bits in the first four's.
                    let (scale, least) = if j < 4 {
                        (s[j] & 63, s[j + 4] & 63)
                    } else {
                        (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
                    };
                    r[3].set(packed, b * 8 + j, scale.into());
                    r[4].set(packed, b * 8 + j, least.into());
                }
            }
            WeightFormat::Q6K => {
                let (low, high) = (&block[..128], &block[128..192]);
                for k in 0..256 {
                    // Of 128 inputs: 64 bytes of nibbles, 32 of pairs of bits.
                    let (part, k128) = (k / 128, k % 128);
                    let nibble = low[part * 64 + k128 % 64] >> (k128 / 64 * 4) & 15;
                    let pair = high[part * 32 + k128 % 32] >> (k128 / 32 * 2) & 3;
                    r[0].set(packed, first + k, nibble.into());
                    r[1].set(packed, first + k, pair.into());
                }
                r[2].set(packed, b, half(208));
                block[192..208].iter().enumerate().for_each(|(j, &s)| r[3].set(packed, b * 16 + j, s.into()));
            }
            _ => packed[first * blocks.bytes..][..blocks.bytes].copy_from_slice(block),
        }
    }
}
