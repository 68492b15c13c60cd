//! Weights as the matmul kernel reads them.
//!
//! A matrix `[N, K]` is cut into panels of [`WIDTH`] columns of its output; a panel is `K` lines, and line `k` holds
//! `w[n, k]` for the panel's columns n side by side: `[ceil(N / WIDTH), K, WIDTH]`, zeros past the last column.
//! A task streams one panel from beginning to end.

use crate::error::{Error, Result};
use crate::model::formats::WeightFormat;
use bytemuck::Zeroable;
use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Output columns in a panel.
pub(super) const WIDTH: usize = 64;

/// One value for each column of a panel. Aligned so that no vector load crosses a cache line.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(128))]
pub(super) struct Line(pub [f32; WIDTH]);

/// The same as f16.
#[derive(Clone, Copy, Debug, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(128))]
struct HalfLine([f16; WIDTH]);

#[derive(Debug)]
enum Lines {
    F32(Vec<Line>),
    F16(Vec<HalfLine>),
}

/// The panels of one matrix `[N, K]` for each expert.
#[derive(Debug)]
pub(super) struct Panels {
    lines: Lines,
    /// N: columns of the output.
    pub columns: usize,
    /// K: lines of a panel.
    pub depth: usize,
    /// What is added to the output's columns: a line for each panel of each expert.
    bias: Option<Vec<Line>>,
}

impl Panels {
    /// Packs `num_experts` matrices `[columns, depth]`. `row(e, n)` is `w[n, :]` of expert e, or None for zeros.
    pub fn pack<'a>(
        format: WeightFormat,
        num_experts: usize,
        [columns, depth]: [usize; 2],
        row: impl Fn(usize, usize) -> Option<&'a [f32]> + Sync,
    ) -> Result<Self> {
        let lines = match format {
            WeightFormat::F32 => Lines::F32(pack(num_experts, columns, depth, row, |line: &mut Line, j, w| {
                line.0[j] = w;
            })?),
            WeightFormat::F16 => Lines::F16(pack(num_experts, columns, depth, row, |line: &mut HalfLine, j, w| {
                line.0[j] = f16::from_f32(w);
            })?),
            other => {
                let by = "by the CPU engine".to_owned();
                return Err(Error::Unsupported { what: other.name(), by, hint: "use f32 or f16".to_owned() });
            }
        };
        Ok(Self { lines, columns, depth, bias: None })
    }

    /// The same with `bias(e, n)` added to column n of expert e's output, where `is_there`.
    pub fn with_bias(mut self, is_there: bool, bias: impl Fn(usize, usize) -> f32) -> Self {
        let width = self.per_expert() * WIDTH;
        let num_experts = self.num_lines().checked_div(self.lines_per_expert()).unwrap_or(0);
        self.bias = is_there.then(|| {
            let line = |first: usize| {
                let mut line = Line::zeroed();
                for (j, value) in line.0.iter_mut().enumerate().take_while(|(j, _)| first % width + j < self.columns) {
                    *value = bias(first / width, first % width + j);
                }
                line
            };
            (0..num_experts * width).step_by(WIDTH).map(line).collect()
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

    fn lines_per_expert(&self) -> usize {
        self.per_expert() * self.depth
    }

    fn num_lines(&self) -> usize {
        match &self.lines {
            Lines::F32(lines) => lines.len(),
            Lines::F16(lines) => lines.len(),
        }
    }

    /// Makes room for one more expert, so that [`Panels::splice`] cannot fail.
    pub fn reserve_one(&mut self) -> Result<()> {
        let (additional, panels) = (self.lines_per_expert(), self.per_expert());
        match &mut self.lines {
            Lines::F32(lines) => lines.try_reserve_exact(additional),
            Lines::F16(lines) => lines.try_reserve_exact(additional),
        }
        .and_then(|()| self.bias.as_mut().map_or(Ok(()), |bias| bias.try_reserve_exact(panels)))
        .map_err(|_| Error::OutOfMemory { during: "making room for an expert".to_owned() })
    }

    /// Takes `removed` experts out at `at` and puts those of `inserted`, which has the same shape, format and bias, in
    /// their place. Nobody else's lines change.
    pub fn splice(&mut self, at: usize, removed: usize, inserted: Option<Self>) {
        fn splice<T>(values: &mut Vec<T>, size: usize, at: usize, removed: usize, inserted: Vec<T>) {
            values.splice(at * size..(at + removed) * size, inserted);
        }
        let (lines, panels) = (self.lines_per_expert(), self.per_expert());
        let (new_lines, new_bias) = inserted.map_or((None, None), |panels| (Some(panels.lines), panels.bias));
        match (&mut self.lines, new_lines) {
            (Lines::F32(old), Some(Lines::F32(new))) => splice(old, lines, at, removed, new),
            (Lines::F16(old), Some(Lines::F16(new))) => splice(old, lines, at, removed, new),
            (Lines::F32(old), None) => splice(old, lines, at, removed, Vec::new()),
            (Lines::F16(old), None) => splice(old, lines, at, removed, Vec::new()),
            (Lines::F32(_), Some(Lines::F16(_))) | (Lines::F16(_), Some(Lines::F32(_))) => {
                unreachable!("a layer has one format")
            }
        }
        if let Some(old) = &mut self.bias {
            splice(old, panels, at, removed, new_bias.unwrap_or_default());
        }
    }

    /// The matrix `[columns, depth]` of one expert, with the values that are stored.
    pub fn unpack(&self, expert: usize) -> Vec<f32> {
        let mut rows = vec![0.0; self.columns * self.depth];
        let mut decoded = vec![Line::zeroed(); self.depth];
        for (panel, rows) in rows.chunks_mut(WIDTH * self.depth).enumerate() {
            let lines = self.lines(expert, panel, 0, &mut decoded);
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

    /// Lines `first_line..` of an expert's panel, as f32; at most as many as `decoded` holds.
    pub fn lines<'a>(&'a self, expert: usize, panel: usize, first_line: usize, decoded: &'a mut [Line]) -> &'a [Line] {
        let num_lines = decoded.len().min(self.depth - first_line);
        let start = (expert * self.per_expert() + panel) * self.depth + first_line;
        match &self.lines {
            Lines::F32(lines) => &lines[start..][..num_lines],
            Lines::F16(lines) => {
                let decoded = &mut decoded[..num_lines];
                decode(&lines[start..][..num_lines], decoded);
                decoded
            }
        }
    }
}

/// f16 to f32, which is exact. `lines` and `decoded` are equally long.
fn decode(lines: &[HalfLine], decoded: &mut [Line]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the processor has f16c, and with it avx.
        return unsafe { decode_f16c(lines, decoded) };
    }
    let halves: &[f16] = bytemuck::cast_slice(lines);
    halves.convert_to_f32_slice(bytemuck::cast_slice_mut(decoded));
}

/// The same, in one loop: `half` calls a function for every eight values, which halves the speed of a single token.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx,f16c")]
fn decode_f16c(lines: &[HalfLine], decoded: &mut [Line]) {
    use std::arch::x86_64::{__m128i, _mm256_cvtph_ps, _mm256_storeu_ps};
    for (line, decoded) in lines.iter().zip(decoded) {
        for (halves, floats) in line.0.as_chunks::<8>().0.iter().zip(decoded.0.as_chunks_mut::<8>().0) {
            let halves: __m128i = bytemuck::cast(*halves);
            // SAFETY: eight floats are 256 bits; the store needs no alignment.
            unsafe { _mm256_storeu_ps(floats.as_mut_ptr(), _mm256_cvtph_ps(halves)) };
        }
    }
}

/// `set(line k of the panel, column in the panel, w[n, k])` for every element.
fn pack<'a, L: Zeroable + Clone + Send>(
    num_experts: usize,
    columns: usize,
    depth: usize,
    row: impl Fn(usize, usize) -> Option<&'a [f32]> + Sync,
    set: impl Fn(&mut L, usize, f32) + Sync,
) -> Result<Vec<L>> {
    let panels = columns.div_ceil(WIDTH);
    let len = num_experts * panels * depth;
    let mut lines = Vec::new();
    lines.try_reserve_exact(len).map_err(|_| Error::OutOfMemory { during: "packing the weights".to_owned() })?;
    lines.resize(len, L::zeroed());
    lines.par_chunks_exact_mut(depth).enumerate().for_each(|(index, lines)| {
        let (expert, first) = (index / panels, index % panels * WIDTH);
        for n in first..columns.min(first + WIDTH) {
            for (line, &w) in lines.iter_mut().zip(row(expert, n).unwrap_or_default()) {
                set(line, n - first, w);
            }
        }
    });
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_f16_is_decoded_exactly() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let lines: Vec<HalfLine> = halves.as_chunks().0.iter().map(|&line| HalfLine(line)).collect();
        let mut decoded = vec![Line::zeroed(); lines.len()];
        decode(&lines, &mut decoded);
        for (half, &got) in halves.iter().zip(bytemuck::cast_slice::<_, f32>(&decoded)) {
            let expected = half.to_f32();
            assert!(got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan(), "{half}: {got}");
        }
    }

    #[test]
    fn a_panel_holds_its_columns_side_by_side_and_then_zeros() {
        let w: Vec<f32> = (0..2 * 65 * 3).map(|v| v as f32).collect();
        let row = |e, n| Some(&w[(e * 65 + n) * 3..][..3]);
        for format in [WeightFormat::F32, WeightFormat::F16] {
            let panels = Panels::pack(format, 2, [65, 3], row).expect("the memory is there");
            assert_eq!(panels.per_expert(), 2);
            let mut decoded = [Line::zeroed(); 8];
            let lines = panels.lines(1, 1, 1, &mut decoded);
            assert_eq!(lines.len(), 2, "lines 1 and 2 of 3");
            assert_eq!(lines[0].0[..2], [w[(65 + 64) * 3 + 1], 0.0]);
            assert_eq!(panels.lines(0, 0, 0, &mut decoded)[2].0[..2], [w[2], w[5]]);
        }
    }
}
