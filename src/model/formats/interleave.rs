//! Packed rows of several columns side by side, as devices read them: region after region, in each the items in the
//! order of the inputs, and for each item those of all columns.

use super::{ROW, Region, WeightFormat};

/// Which column stands in which place of an item's `columns`, given its bits: places in the order of their bits.
pub(crate) type ColumnOrder = fn(bits: u32, place: usize) -> usize;

/// The regions of `columns` interleaved rows of `inputs` inputs, each with its bytes: padded to a multiple of 4 inputs.
pub(crate) fn interleaved_regions(format: WeightFormat, inputs: usize, columns: usize) -> Vec<(Region, usize)> {
    let bytes = |region: Region| {
        let items = if region.per == ROW { 1 } else { inputs.next_multiple_of(4).div_ceil(region.per as usize) };
        (region, items * columns * region.bits as usize / 8)
    };
    format.layout(inputs).regions.into_iter().map(bytes).collect()
}

/// Interleaves `rows`, one for each column, `None` for zeros, each of `inputs` inputs. `packed` has
/// [`WeightFormat::interleaved_bytes`] and is overwritten.
pub(crate) fn interleave<const N: usize>(
    format: WeightFormat,
    inputs: usize,
    rows: [Option<&[u8]>; N],
    order: ColumnOrder,
    packed: &mut [u8],
) {
    packed.fill(0);
    let mut rest = packed;
    for (region, bytes) in interleaved_regions(format, inputs, N) {
        let Some((packed, after)) = rest.split_at_mut_checked(bytes) else { return };
        rest = after;
        match region.bits {
            32 => whole::<N, 4>(region.at, region.items, rows, order, packed),
            16 => whole::<N, 2>(region.at, region.items, rows, order, packed),
            8 => whole::<N, 1>(region.at, region.items, rows, order, packed),
            4 => parts::<N, 4, 2>(region.at, region.items, rows, order, packed),
            _ => parts::<N, 2, 4>(region.at, region.items, rows, order, packed),
        }
    }
}

/// Bytes or items of a row that are copied before those of the next row: what they are copied to stays in a cache.
const BLOCK: usize = 64;

/// Items of whole bytes.
fn whole<const N: usize, const BYTES: usize>(
    at: usize,
    items: usize,
    rows: [Option<&[u8]>; N],
    order: ColumnOrder,
    packed: &mut [u8],
) {
    let row = |place| rows[order(8 * BYTES as u32, place)].map_or(&[][..], |row| &row[at..][..items * BYTES]);
    let rows: [&[u8]; N] = std::array::from_fn(row);
    for (block, packed) in packed.chunks_mut(BLOCK * BYTES * N).enumerate() {
        for (place, row) in rows.iter().enumerate() {
            let items = row.get(block * BLOCK * BYTES..).unwrap_or_default().as_chunks::<BYTES>().0;
            for (to, item) in packed.as_chunks_mut::<BYTES>().0[place..].iter_mut().step_by(N).zip(items) {
                *to = *item;
            }
        }
    }
}

/// Items of `BITS` bits, `PER_BYTE` in a byte. As many inputs lie in a byte of a row as columns in a packed byte: bytes
/// of so many rows become so many packed bytes.
fn parts<const N: usize, const BITS: usize, const PER_BYTE: usize>(
    at: usize,
    items: usize,
    rows: [Option<&[u8]>; N],
    order: ColumnOrder,
    packed: &mut [u8],
) {
    let (item_bytes, row_bytes) = (N / PER_BYTE, (items * BITS).div_ceil(8));
    for (block, packed) in packed.chunks_mut(BLOCK * PER_BYTE * item_bytes).enumerate() {
        let mut columns = [[0u8; N]; BLOCK];
        for place in 0..N {
            let row = rows[order(BITS as u32, place)].map_or(&[][..], |row| &row[at..][..row_bytes]);
            for (columns, &byte) in columns.iter_mut().zip(row.get(block * BLOCK..).unwrap_or_default()) {
                columns[place] = byte;
            }
        }
        for (columns, packed) in columns.iter().zip(packed.chunks_mut(PER_BYTE * item_bytes)) {
            for (item, packed) in packed.chunks_exact_mut(item_bytes).enumerate() {
                for (to, columns) in packed.iter_mut().zip(columns.as_chunks::<PER_BYTE>().0) {
                    let mut byte = 0;
                    for (n, from) in columns.iter().enumerate() {
                        byte |= (from >> (item * BITS) & ((1 << BITS) - 1)) << (n * BITS);
                    }
                    *to = byte;
                }
            }
        }
    }
}
