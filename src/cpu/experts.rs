//! Stages 3 and 4: the projections of experts, and others that have the same shape.

use super::activate::activate;
use super::chunks::Chunk;
use super::kernel::{Input, Product, digits_for};
use super::panels::{Line, Panels, WIDTH};
use super::shared::SharedSlice;
use crate::error::{Error, Result};
use crate::model::activation::Activation;
use crate::model::formats::WeightFormat;
use crate::model::source::{PackedRows, Projection};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Gates in a panel of the first projections, and ups, where there are both.
pub(super) const PAIRS: usize = WIDTH / 2;

/// Experts of one shape.
#[derive(Debug)]
pub(super) struct Experts {
    activation: Activation,
    pub intermediate_size: usize,
    /// With a gate, the first half of each panel's columns are gates and the second half are the ups of the same place,
    /// so that one pass over the rows leaves both in the same accumulators. Without one, all are ups.
    pub first: Panels,
    /// Matrices `[output width, intermediate_size]`.
    pub down: Panels,
}

/// What is added to their projections, shapes as in [`crate::MoeWeights`].
#[derive(Clone, Copy, Default)]
pub(super) struct Biases<'a> {
    pub gate: Option<&'a [f32]>,
    pub up: Option<&'a [f32]>,
    pub down: Option<&'a [f32]>,
}

impl Experts {
    /// None yet. They will read and write rows of `size`; `formats` are those of the first and second projections.
    pub fn new(activation: Activation, [size, intermediate_size]: [usize; 2], formats: [WeightFormat; 2]) -> Self {
        let columns = match activation.is_gated() {
            true => intermediate_size.div_ceil(PAIRS) * WIDTH,
            false => intermediate_size,
        };
        let first = Panels::new(formats[0], [columns, size]);
        let down = Panels::new(formats[1], [size, intermediate_size]);
        Self { activation, intermediate_size, first, down }
    }

    /// Adds one projection of one more expert.
    pub fn push(&mut self, projection: Projection, rows: &PackedRows) -> Result<()> {
        let is_first = projection == Projection::First;
        let num_rows = if is_first { self.intermediate_size } else { self.down.columns };
        let row_bytes = if is_first { self.first.row_bytes() } else { self.down.row_bytes() };
        let gate = rows.1.as_ref().map(|_| &rows.0);
        let up = rows.1.as_ref().unwrap_or(&rows.0);
        for bytes in gate.into_iter().chain([up]) {
            if bytes.len() != num_rows * row_bytes {
                return Err(Error::LengthMismatch {
                    tensor: if is_first { "the first projection of an expert" } else { "down_proj of an expert" },
                    shape: format!("[{num_rows}, {row_bytes}] bytes"),
                    expected: num_rows * row_bytes,
                    found: bytes.len(),
                });
            }
        }
        fn row(bytes: &[u8], n: usize, row_bytes: usize) -> Option<&[u8]> {
            bytes.get(n * row_bytes..(n + 1) * row_bytes)
        }
        match (is_first, gate) {
            (true, Some(gate)) if self.activation.is_gated() => self.first.push(|column| {
                let (is_gate, n) = place(column);
                row(if is_gate { gate } else { up }, n, row_bytes)
            }),
            (true, _) => self.first.push(|n| row(up, n, row_bytes)),
            (false, _) => self.down.push(|n| row(up, n, row_bytes)),
        }
    }

    /// The same with something to add.
    pub fn with_biases(self, biases: Biases<'_>) -> Self {
        let Self { activation, intermediate_size: i, first, down } = self;
        let first = first.with_bias(biases.up.is_some(), |expert, column| {
            let (is_gate, n) = if activation.is_gated() { place(column) } else { (false, column) };
            let bias = if is_gate { biases.gate } else { biases.up };
            bias.filter(|_| n < i).map_or(0.0, |bias| bias[expert * i + n])
        });
        let size = down.columns;
        let down = down.with_bias(biases.down.is_some(), |expert, n| biases.down.map_or(0.0, |b| b[expert * size + n]));
        Self { activation, intermediate_size: i, first, down }
    }

    /// Bytes of all their matrices.
    pub fn bytes(&self) -> u64 {
        self.first.bytes() + self.down.bytes()
    }

    /// Bytes of one projection of an expert.
    pub fn bytes_of(&self, projection: Projection) -> u64 {
        match projection {
            Projection::First => self.first.expert_bytes(),
            Projection::Down => self.down.expert_bytes(),
        }
    }

    /// Digits that rows of the first and second projections need at most, see [`Input::new`].
    pub fn digits_for(&self, simd: Arch, num_rows: usize) -> usize {
        digits_for(simd, &self.first, num_rows).max(digits_for(simd, &self.down, num_rows))
    }

    /// Makes room for one more, so that [`Experts::splice`] cannot fail.
    pub fn reserve_one(&mut self) -> Result<()> {
        self.first.reserve_one()?;
        self.down.reserve_one()
    }

    /// Takes `removed` experts out at `at` and puts `inserted`, packed alike, in their place.
    pub fn splice(&mut self, at: usize, removed: usize, inserted: Option<Self>) {
        let (first, down) = inserted.map_or((None, None), |experts| (Some(experts.first), Some(experts.down)));
        self.first.splice(at, removed, first);
        self.down.splice(at, removed, down);
    }
}

/// Whether a column of the first panels, where there are gates, is one, and which one of its matrix it is.
fn place(column: usize) -> (bool, usize) {
    let (panel, j) = (column / WIDTH, column % WIDTH);
    (j < PAIRS, panel * PAIRS + j % PAIRS)
}

/// `intermediate[r, i] = act(s * x[r, :] . gate_proj[expert, i] + gate_bias, s * x[r, :] . up_proj[expert, i] + up_bias)`
/// The input's x `[num_rows, size]` and `intermediate [num_rows, intermediate_size]` are packed; `factors [num_rows]` are
/// the s, 1 if there are none.
pub(super) fn gate_up(
    simd: Arch,
    experts: &Experts,
    chunks: &[Chunk],
    input: Input<'_>,
    factors: Option<&[f32]>,
    intermediate: &mut [f32],
) {
    let intermediate = &SharedSlice::new(intermediate);
    for_each_product(&experts.first, chunks, input, |product| {
        simd.dispatch(GateUp { product, experts, factors, intermediate });
    });
}

/// `out[r, n] = x[r, :] . w[expert, n, :] + bias[expert, n]`; the input's x `[num_rows, K]` is packed, `out [num_rows, N]` is
/// not.
pub(super) fn project(simd: Arch, weights: &Panels, chunks: &[Chunk], input: Input<'_>, out: &mut [f32]) {
    let out = &SharedSlice::new(out);
    for_each_product(weights, chunks, input, |product| simd.dispatch(Project { product, out }));
}

/// Every chunk of rows with every panel of its expert, in parallel. Panels vary faster, so that a thread keeps a
/// chunk's rows in its cache.
fn for_each_product<'a>(weights: &'a Panels, chunks: &'a [Chunk], input: Input<'a>, run: impl Fn(Product<'a>) + Sync) {
    let panels = weights.per_expert();
    (0..chunks.len() * panels).into_par_iter().for_each(|task| {
        run(Product { weights, panel: task % panels, chunk: &chunks[task / panels], input });
    });
}

struct Project<'a> {
    product: Product<'a>,
    out: &'a SharedSlice<'a>,
}

impl WithSimd for Project<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Project { product, out } = self;
        let columns = product.weights.columns;
        let first = product.panel * WIDTH;
        let width = WIDTH.min(columns - first);
        let bias = product.weights.bias(product.chunk.expert, product.panel);
        product.for_each_row(simd, |row, sums| {
            let at = row * columns + first;
            // SAFETY: only this task has this row and this panel, and the piece ends with this iteration.
            let out = unsafe { out.piece(at..at + width) };
            match bias {
                None => out.copy_from_slice(&sums.0[..width]),
                Some(bias) => {
                    out.iter_mut().zip(&sums.0).zip(&bias.0).for_each(|((out, sum), bias)| *out = sum + bias);
                }
            }
        });
    }
}

struct GateUp<'a> {
    product: Product<'a>,
    experts: &'a Experts,
    factors: Option<&'a [f32]>,
    intermediate: &'a SharedSlice<'a>,
}

impl WithSimd for GateUp<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let GateUp { product, experts, factors, intermediate } = self;
        let Experts { activation, intermediate_size, .. } = *experts;
        let per_panel = if activation.is_gated() { PAIRS } else { WIDTH };
        let first = product.panel * per_panel;
        let width = per_panel.min(intermediate_size - first);
        let bias = product.weights.bias(product.chunk.expert, product.panel);
        let mut tiles = product.chunk.tiles();
        let mut tile = 0..0;
        product.for_each_row(simd, |row, sums| {
            if row >= tile.end {
                tile = tiles.next().unwrap_or(row..row + 1);
            }
            let mut adjusted;
            let mut sums = sums;
            if factors.is_some() || bias.is_some() {
                adjusted = *sums;
                adjust(&mut adjusted, factors.map_or(1.0, |factors| factors[row]), bias);
                sums = &adjusted;
            }
            let mut values = [0.0; WIDTH];
            activate(simd, activation, &sums.0, &mut values);
            // The tile is packed [intermediate_size, rows]: this task's columns of it lie together.
            let at = tile.start * intermediate_size + first * tile.len();
            // SAFETY: only this task has this tile and these columns, and the piece ends with this iteration.
            let columns = unsafe { intermediate.piece(at..at + width * tile.len()) };
            for (column, value) in columns.chunks_exact_mut(tile.len()).zip(values) {
                column[row - tile.start] = value;
            }
        });
    }
}

/// `sums = factor * sums + bias`
#[inline(always)]
fn adjust(sums: &mut Line, factor: f32, bias: Option<&Line>) {
    sums.0.iter_mut().for_each(|sum| *sum *= factor);
    if let Some(bias) = bias {
        sums.0.iter_mut().zip(&bias.0).for_each(|(sum, bias)| *sum += bias);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::activate::instruction_sets;
    use crate::cpu::chunks::{CHUNK_ROWS, TILE_ROWS, chunks};
    use crate::cpu::permute::pack;
    use crate::model::formats;
    use bytemuck::Zeroable;

    /// Both stages' matmul, element by element, for every number of rows in a tile and around every block length.
    #[test]
    fn products_are_within_the_bound_of_their_depth() {
        let mut state = 3u32;
        let mut value = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        for simd in instruction_sets() {
            let depths = [1, 2, 31, 32, 33, 127, 128, 129, 300];
            for (case, rows) in (1..=2 * TILE_ROWS).chain([CHUNK_ROWS, CHUNK_ROWS + 1, 2 * CHUNK_ROWS + 29]).enumerate()
            {
                let (depth, columns) = (depths[case % depths.len()], [1, 63, 64, 65, 140][case % 5]);
                let w: Vec<f32> = (0..2 * columns * depth).map(|_| value()).collect();
                let x: Vec<f32> = (0..rows * depth).map(|_| value()).collect();
                let mut weights = Panels::new(WeightFormat::F32, [columns, depth]);
                for w in w.chunks_exact(columns * depth) {
                    let row = |n: usize| w.get(n * depth..(n + 1) * depth).map(bytemuck::cast_slice);
                    weights.push(row).expect("the memory is there");
                }
                let offsets = [0, rows / 3, rows];
                let chunks = chunks(&offsets);
                let (mut packed, mut out) = (vec![f32::NAN; x.len()], vec![f32::NAN; rows * columns]);
                pack(&chunks, &mut packed, |r| &x[r * depth..][..depth]);
                project(simd, &weights, &chunks, Input::floats(&packed), &mut out);
                for (at, &got) in out.iter().enumerate() {
                    let (r, n) = (at / columns, at % columns);
                    let w = &w[(usize::from(r >= offsets[1]) * columns + n) * depth..][..depth];
                    let products = || x[r * depth..].iter().zip(w).map(|(&x, &w)| f64::from(x) * f64::from(w));
                    let bound = 4.0 * (depth as f64).sqrt() / 16_777_216.0 * products().map(f64::abs).sum::<f64>();
                    let difference = (f64::from(got) - products().sum::<f64>()).abs();
                    assert!(difference <= bound, "{rows} rows, depth {depth}, row {r}, column {n}: {difference}");
                }
            }
        }
    }

    /// Every output is one chain of multiply-adds over ascending inputs, or one for each span of inputs, whose sums are
    /// chained times their factors: whatever the format, the rows beside it and the way that weights take into the
    /// multiplication.
    #[test]
    fn products_are_chains_of_multiply_adds_in_every_format() {
        let mut state = 5u32;
        let mut value = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        let columns = 70;
        let mut with_factors = Vec::new();
        for format in WeightFormat::every() {
            let depth = if format.block() == 1 { 301 } else { 512 };
            let w: Vec<f32> = (0..columns * depth).map(|_| value()).collect();
            let packed = formats::encode(format, depth, &w).expect("moderate values");
            let stored = formats::decode(format, depth, &packed);
            let row_bytes = format.layout(depth).bytes;
            let mut weights = Panels::new(format, [columns, depth]);
            weights.push(|n| packed.get(n * row_bytes..(n + 1) * row_bytes)).expect("the memory is there");
            let (mut decoded, mut factors) = (vec![Line::zeroed(); depth], vec![Line::zeroed(); depth]);
            let mut codes = vec![0.0; columns * depth];
            let (mut span, mut of_span) = (depth, Vec::new());
            for panel in 0..weights.per_expert() {
                let lines = weights.panel(0, panel).lines(pulp::Scalar, 0, &mut decoded, &mut factors);
                span = lines.span.min(depth);
                of_span.push(lines.factors.to_vec());
                for n in panel * WIDTH..columns.min((panel + 1) * WIDTH) {
                    for k in 0..depth {
                        let code = lines.lines[k].0[n % WIDTH];
                        let weight = lines.factors.get(k / span).map_or(code, |factor| code * factor.0[n % WIDTH]);
                        assert_eq!(
                            weight.to_bits(),
                            stored[n * depth + k].to_bits(),
                            "{format}: column {n}, input {k}"
                        );
                        codes[n * depth + k] = code;
                    }
                }
            }
            if !of_span[0].is_empty() {
                with_factors.push(format.to_string());
            }
            for rows in (1..=TILE_ROWS + 1).chain([2 * TILE_ROWS]) {
                let x: Vec<f32> = (0..rows * depth).map(|_| value()).collect();
                let chunks = chunks(&[0, rows]);
                let mut packed = vec![f32::NAN; x.len()];
                pack(&chunks, &mut packed, |r| &x[r * depth..][..depth]);
                for simd in instruction_sets() {
                    let multiply_add = |sum: f32, x: f32, w: f32| {
                        if matches!(simd, Arch::Scalar) { x * w + sum } else { x.mul_add(w, sum) }
                    };
                    let chain = |r: usize, n: usize| {
                        let (x, codes) = (&x[r * depth..][..depth], &codes[n * depth..][..depth]);
                        let spans = x.chunks(span).zip(codes.chunks(span)).map(|(x, codes)| {
                            x.iter().zip(codes).fold(0.0, |sum, (x, code)| multiply_add(sum, *x, *code))
                        });
                        match of_span[n / WIDTH].as_slice() {
                            [] => spans.sum::<f32>(),
                            factors => spans
                                .zip(factors)
                                .fold(0.0, |sum, (span, factor)| multiply_add(sum, span, factor.0[n % WIDTH])),
                        }
                    };
                    let mut out = vec![f32::NAN; rows * columns];
                    project(simd, &weights, &chunks, Input::floats(&packed), &mut out);
                    for r in 0..rows {
                        for n in [0, 15, 16, 31, 32, 47, 63, 64, 69] {
                            let (got, expected) = (out[r * columns + n], chain(r, n));
                            assert!(
                                got.to_bits() == expected.to_bits(),
                                "{format}, {simd:?}: row {r} of {rows}, column {n}: {got} instead of {expected}"
                            );
                        }
                    }
                }
            }
        }
        for format in ["int8", "int4", "int4:g128", "int4:zp", "mxfp4", "nvfp4", "q4_0", "q8_0", "q6_k"] {
            assert!(with_factors.iter().any(|with| with == format), "{format} is not among {with_factors:?}");
        }
    }
}
