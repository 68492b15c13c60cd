//! The blocks that GGUF files keep rows in, as packed rows. Nothing is decoded.

use super::WeightFormat;

/// How a GGUF type cuts rows.
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
        let blocks = |format, inputs, bytes, name| Some(Self { format, inputs, bytes, name });
        match number {
            0 => blocks(WeightFormat::F32, 1, 4, "F32"),
            1 => blocks(WeightFormat::F16, 1, 2, "F16"),
            2 => blocks(WeightFormat::Q4_0, 32, 18, "Q4_0"),
            8 => blocks(WeightFormat::Q8_0, 32, 34, "Q8_0"),
            12 => blocks(WeightFormat::Q4K, 256, 144, "Q4_K"),
            14 => blocks(WeightFormat::Q6K, 256, 210, "Q6_K"),
            30 => blocks(WeightFormat::Bf16, 1, 2, "BF16"),
            39 => blocks(WeightFormat::Mxfp4, 32, 17, "MXFP4"),
            _ => None,
        }
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
