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
            bits => {
                let per_byte = 8 / bits as usize;
                let places: [usize; N] = std::array::from_fn(|place| order(bits, place));
                let mask = (1u8 << bits) - 1;
                let item_bytes = N / per_byte;
                for (item, packed) in packed.chunks_exact_mut(item_bytes).take(region.items).enumerate() {
                    let (from, shift) = (region.at + item / per_byte, item % per_byte * bits as usize);
                    for (place, &column) in places.iter().enumerate() {
                        if let Some(row) = rows[column] {
                            packed[place / per_byte] |=
                                (row[from] >> shift & mask) << (place % per_byte * bits as usize);
                        }
                    }
                }
            }
        }
    }
}

/// Items of whole bytes.
fn whole<const N: usize, const BYTES: usize>(
    at: usize,
    items: usize,
    rows: [Option<&[u8]>; N],
    order: ColumnOrder,
    packed: &mut [u8],
) {
    for place in 0..N {
        let Some(row) = rows[order(8 * BYTES as u32, place)] else { continue };
        let (items, _) = row[at..][..items * BYTES].as_chunks::<BYTES>();
        for (to, item) in packed.as_chunks_mut::<BYTES>().0[place..].iter_mut().step_by(N).zip(items) {
            *to = *item;
        }
    }
}
