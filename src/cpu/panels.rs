//! Weights as the matmul kernel reads them.
//!
//! A matrix `[N, K]` is cut into panels of [`WIDTH`] columns of its output; a panel is `K` lines, and line `k` holds
//! `w[n, k]` for the panel's columns n side by side, zeros past the last column. A task streams one panel from
//! beginning to end.
//!
//! Lines stay as their format packs them: a panel is what [`interleave`] makes of the packed rows of its columns, the
//! codes of all lines first, then what groups of them share. [`super::words`] says in which order columns lie.

use super::panel::Panel;
use super::words::{LANES, Words};
use crate::error::{Error, Result};
use crate::model::formats::{ColumnOrder, WeightFormat, interleave, interleaved_regions};
use bytemuck::Zeroable;
use pulp::Simd;
use rayon::prelude::*;
use std::ops::Range;

/// Output columns in a panel.
pub(super) const WIDTH: usize = 64;

/// One value for each column of a panel. Aligned so that no vector load crosses a cache line.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(128))]
pub(super) struct Line(pub [f32; WIDTH]);

/// What panels are made of: every region of one begins at a multiple of this.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(128))]
struct Unit([u8; 128]);

/// The panels of one matrix `[N, K]` for each expert.
#[derive(Debug)]
pub(super) struct Panels {
    format: WeightFormat,
    /// Bytes of a panel that each region takes.
    regions: Vec<Range<usize>>,
    /// Units of a panel.
    panel_units: usize,
    /// Panels, one after the other, of each expert.
    experts: Vec<Vec<Unit>>,
    /// N: columns of the output.
    pub columns: usize,
    /// K: lines of a panel.
    pub depth: usize,
    /// What is added to the output's columns: a line for each panel of each expert.
    bias: Option<Vec<Line>>,
}

impl Panels {
    /// Panels of no experts, whose matrices will be `[columns, depth]`.
    pub fn new(format: WeightFormat, [columns, depth]: [usize; 2]) -> Self {
        let mut end = 0;
        let mut regions = Vec::new();
        for (_, bytes) in interleaved_regions(format, depth, WIDTH) {
            regions.push(end..end + bytes);
            end += bytes;
        }
        let panel_units = end.div_ceil(size_of::<Unit>());
        Self { format, regions, panel_units, experts: Vec::new(), columns, depth, bias: None }
    }

    /// Panels of one matrix of f32 rows `[_, width]`.
    pub fn of_rows(rows: &[f32], width: usize) -> Result<Self> {
        let mut panels = Self::new(WeightFormat::F32, [rows.len() / width, width]);
        panels.push(|n| rows.get(n * width..(n + 1) * width).map(bytemuck::cast_slice))?;
        Ok(panels)
    }

    /// Packs one more expert. `row(n)` is packed row n of its matrix, None for zeros.
    pub fn push<'a>(&mut self, row: impl Fn(usize) -> Option<&'a [u8]> + Sync) -> Result<()> {
        let mut units = Vec::new();
        let len = self.per_expert() * self.panel_units;
        let reserved = units.try_reserve_exact(len).and_then(|()| self.experts.try_reserve(1));
        reserved.map_err(|_| Error::OutOfMemory {
            during: format!("packing {} bytes of an expert", len * size_of::<Unit>()),
        })?;
        units.resize(len, Unit::zeroed());
        let items = interleaved_regions(self.format, self.depth, WIDTH);
        units.par_chunks_exact_mut(self.panel_units.max(1)).enumerate().for_each(|(panel, units)| {
            let columns = std::array::from_fn(|j| panel * WIDTH + j);
            let rows = columns.map(|n| if n < self.columns { row(n) } else { None });
            let bytes = bytemuck::cast_slice_mut(units);
            interleave::<WIDTH>(self.format, self.depth, rows, place(self.format), bytes);
            for (region, (item, _)) in self.regions.iter().zip(&items) {
                join_lines(item.bits, &mut bytes[region.clone()]);
            }
        });
        self.experts.push(units);
        Ok(())
    }

    /// The same with `bias(e, n)` added to column n of expert e's output, where `is_there`.
    pub fn with_bias(mut self, is_there: bool, bias: impl Fn(usize, usize) -> f32) -> Self {
        let width = self.per_expert() * WIDTH;
        self.bias = is_there.then(|| {
            let line = |first: usize| {
                let mut line = Line::zeroed();
                for (j, value) in line.0.iter_mut().enumerate().take_while(|(j, _)| first % width + j < self.columns) {
                    *value = bias(first / width, first % width + j);
                }
                line
            };
            (0..self.experts.len() * width).step_by(WIDTH).map(line).collect()
        });
        self
    }

    /// What is added to the columns of an expert's panel.
    pub fn bias(&self, expert: usize, panel: usize) -> Option<&Line> {
        self.bias.as_ref().map(|lines| &lines[expert * self.per_expert() + panel])
    }

    /// There is something to add.
    pub fn has_bias(&self) -> bool {
        self.bias.is_some()
    }

    /// How weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Bytes of a packed row.
    pub fn row_bytes(&self) -> usize {
        self.format.layout(self.depth).bytes
    }

    /// Bytes that an expert takes.
    pub fn expert_bytes(&self) -> u64 {
        (self.per_expert() * self.panel_units * size_of::<Unit>()) as u64
    }

    /// Bytes of all experts.
    pub fn bytes(&self) -> u64 {
        self.expert_bytes() * self.experts.len() as u64
    }

    /// Makes room for one more expert, so that [`Panels::splice`] cannot fail.
    pub fn reserve_one(&mut self) -> Result<()> {
        let panels = self.per_expert();
        let reserved = self.experts.try_reserve(1);
        reserved
            .and_then(|()| self.bias.as_mut().map_or(Ok(()), |bias| bias.try_reserve(panels)))
            .map_err(|_| Error::OutOfMemory { during: "making room for an expert".to_owned() })
    }

    /// Takes `removed` experts out at `at` and puts those of `inserted`, which has the same shape, format and bias, in
    /// their place. Nobody else's lines change.
    pub fn splice(&mut self, at: usize, removed: usize, inserted: Option<Self>) {
        let panels = self.per_expert();
        let (experts, lines) = inserted.map_or((Vec::new(), None), |panels| (panels.experts, panels.bias));
        self.experts.splice(at..at + removed, experts);
        if let Some(old) = &mut self.bias {
            old.splice(at * panels..(at + removed) * panels, lines.unwrap_or_default());
        }
    }

    /// The matrix `[columns, depth]` of one expert, with the values that are stored.
    pub fn unpack<S: Simd>(&self, simd: S, expert: usize) -> Vec<f32> {
        let mut rows = vec![0.0; self.columns * self.depth];
        let mut decoded = vec![Line::zeroed(); self.depth];
        for (panel, rows) in rows.chunks_mut(WIDTH * self.depth).enumerate() {
            let lines = self.panel(expert, panel).weights(simd, 0, &mut decoded);
            for (j, row) in rows.chunks_exact_mut(self.depth).enumerate() {
                row.iter_mut().zip(lines).for_each(|(value, line)| *value = line.0[j]);
            }
        }
        rows
    }

    /// Panels of one expert.
    pub fn per_expert(&self) -> usize {
        self.columns.div_ceil(WIDTH)
    }

    /// One panel of an expert.
    pub fn panel(&self, expert: usize, panel: usize) -> Panel<'_> {
        let units = &self.experts[expert][panel * self.panel_units..][..self.panel_units];
        Panel::new(self.format, &self.regions, self.depth, bytemuck::cast_slice(units))
    }
}

/// Which column stands in which place of a line, as codecs expect them.
fn place(format: WeightFormat) -> ColumnOrder {
    match format {
        WeightFormat::F32 | WeightFormat::F16 => |_, place| place,
        _ => |bits, place| match bits {
            32 => place,
            16 => WIDTH / 2 * (place % 2) + place / 2,
            _ => LANES * (place % 4) + place / 4,
        },
    }
}

/// Codes of 4 and 2 bits: each word gets its columns of two or four lines, which lie one after the other before.
fn join_lines(bits: u32, region: &mut [u8]) {
    match bits {
        4 => join::<2>(region),
        2 => join::<1>(region),
        _ => {}
    }
}

/// The same, `BYTES` for each line and word.
fn join<const BYTES: usize>(region: &mut [u8]) {
    for joined in region.as_chunks_mut::<{ size_of::<Words>() }>().0 {
        let lines = *joined;
        for (n, part) in lines.as_chunks::<BYTES>().0.iter().enumerate() {
            let (line, word) = (n / LANES, n % LANES);
            joined[word * 4 + line * BYTES..][..BYTES].copy_from_slice(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::activate::instruction_sets;
    use crate::model::formats;
    use pulp::WithSimd;

    /// A vector of any width, or none.
    struct Unpack<'a>(&'a Panels, usize);
    impl WithSimd for Unpack<'_> {
        type Output = Vec<f32>;
        fn with_simd<S: Simd>(self, simd: S) -> Vec<f32> {
            self.0.unpack(simd, self.1)
        }
    }

    fn bits(values: &[f32]) -> Vec<u32> {
        values.iter().map(|v| v.to_bits()).collect()
    }

    /// Packed rows of two experts of random bytes, which have codes and scales that encoding never makes, and their
    /// panels. Weights that are not finite never become a layer: their codes, or else their rows, are zeros instead.
    fn random(format: WeightFormat, columns: usize, depth: usize, seed: u32) -> ([Vec<u8>; 2], Panels) {
        let mut state = seed;
        let mut byte = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        let row_bytes = format.layout(depth).bytes;
        let mut panels = Panels::new(format, [columns, depth]);
        let experts = [(); 2].map(|()| {
            let mut rows: Vec<u8> = (0..columns * row_bytes).map(|_| byte()).collect();
            let codes = format.layout(depth).regions[0];
            for row in rows.chunks_exact_mut(row_bytes) {
                for (k, value) in formats::decode(format, depth, row).into_iter().enumerate() {
                    if !value.is_finite() && codes.bits >= 8 {
                        codes.set(row, k, 0);
                    }
                }
                if formats::decode(format, depth, row).iter().any(|v| !v.is_finite()) {
                    row.fill(0);
                }
            }
            panels.push(|n| rows.get(n * row_bytes..(n + 1) * row_bytes)).expect("the memory is there");
            rows
        });
        (experts, panels)
    }

    fn depths(format: WeightFormat) -> Vec<usize> {
        match format.block() {
            1 => vec![1, 3, 129, 300],
            block => [1, 3, 8].iter().map(|n| n * block as usize).filter(|&depth| depth <= 768).collect(),
        }
    }

    #[test]
    fn every_weight_has_the_bits_of_the_reference() {
        for format in WeightFormat::every() {
            let mut nonzero = 0;
            for (case, columns) in [1, 63, 64, 65, 140].into_iter().enumerate() {
                for depth in depths(format) {
                    let (experts, panels) = random(format, columns, depth, case as u32 + 1);
                    for (e, rows) in experts.iter().enumerate() {
                        let expected = formats::decode(format, depth, rows);
                        nonzero += expected.iter().filter(|&&v| v != 0.0).count();
                        for simd in instruction_sets() {
                            let got = simd.dispatch(Unpack(&panels, e));
                            assert!(bits(&got) == bits(&expected), "{format}: {columns} columns of {depth}, {simd:?}");
                        }
                    }
                }
            }
            assert!(nonzero > 100_000, "{format}: only {nonzero} weights are not 0");
        }
    }

    /// The comparison above has to see a single code that changed.
    #[test]
    fn one_wrong_bit_shows() {
        for format in WeightFormat::every() {
            let depth = format.block().max(32) as usize;
            let (experts, mut panels) = random(format, 70, depth, 9);
            // Code 0 of the last column, whichever place it has: a row of its own tells.
            let row_bytes = format.layout(depth).bytes;
            let mut rows = experts[1].clone();
            let code = &mut rows[69 * row_bytes];
            *code ^= 1;
            panels.experts.truncate(1);
            panels.push(|n| rows.get(n * row_bytes..(n + 1) * row_bytes)).expect("the memory is there");
            let expected = formats::decode(format, depth, &experts[1]);
            let got = panels.unpack(pulp::Scalar, 1);
            let wrong: Vec<usize> = (0..got.len()).filter(|&at| got[at].to_bits() != expected[at].to_bits()).collect();
            assert_eq!(wrong, [69 * depth], "{format}");
        }
    }

    #[test]
    fn past_the_last_column_there_are_zeros() {
        for format in WeightFormat::every() {
            let depth = format.block().max(4) as usize;
            let (_, panels) = random(format, 65, depth, 5);
            let mut decoded = vec![Line::zeroed(); depth];
            for line in panels.panel(1, 1).weights(pulp::Scalar, 0, &mut decoded) {
                assert!(line.0[1..].iter().all(|&v| v == 0.0), "{format}");
            }
        }
    }

    #[test]
    fn lines_can_be_read_from_any_block_on() {
        for format in WeightFormat::every() {
            let depth = 512;
            let (_, panels) = random(format, 64, depth, 7);
            let whole = &mut [Line::zeroed(); 512];
            let whole = panels.panel(0, 0).weights(pulp::Scalar, 0, whole);
            for (start, len) in [(0, 32), (32, 32), (480, 32), (128, 128), (448, 64)] {
                let mut decoded = [Line::zeroed(); 128];
                let lines = panels.panel(0, 0).weights(pulp::Scalar, start, &mut decoded[..len]);
                assert_eq!(lines.len(), len.min(depth - start));
                let lines = bytemuck::cast_slice(lines);
                assert!(bits(lines) == bits(bytemuck::cast_slice(&whole[start..][..lines.len() / WIDTH])), "{format}");
            }
        }
    }

    #[test]
    fn a_panel_takes_as_many_bytes_as_its_format_says() {
        for format in WeightFormat::every() {
            let (_, panels) = random(format, 130, 512, 11);
            let packed = 3 * format.interleaved_bytes(WIDTH as u64, 512);
            assert_eq!(panels.expert_bytes(), packed.next_multiple_of(128), "{format}");
            assert_eq!(panels.bytes(), 2 * panels.expert_bytes());
        }
    }
}
