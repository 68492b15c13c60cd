//! Stages 3 and 4: the experts' projections, and the router's, which has the same shape.

use super::chunks::Chunk;
use super::kernel::Product;
use super::panels::{Line, Panels, WIDTH};
use super::shared::SharedSlice;
use crate::error::Result;
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::weights::WeightFormat;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Intermediate columns in a panel of `gate_up`: half of its columns are gates, half are ups.
const PAIRS: usize = WIDTH / 2;

/// Panels whose first half are gate columns and whose second half are the up columns of the same place, so that one
/// pass over the rows leaves both in the same accumulators.
/// `gate_proj`, `up_proj [num_experts, intermediate_size, hidden_size]`.
pub(super) fn pack_gate_up(config: &MoeConfig, gate: &[f32], up: &[f32], format: WeightFormat) -> Result<Panels> {
    let [h, i, e] = [config.hidden_size(), config.intermediate_size(), config.num_experts()].map(|n| n as usize);
    let columns = i.div_ceil(PAIRS) * WIDTH;
    Panels::pack(format, e, [columns, h], |expert, column| {
        let (panel, j) = (column / WIDTH, column % WIDTH);
        let (source, j) = if j < PAIRS { (gate, j) } else { (up, j - PAIRS) };
        let column = panel * PAIRS + j;
        (column < i).then(|| &source[(expert * i + column) * h..][..h])
    })
}

/// `intermediate[r, i] = act(x[r, :] . gate_proj[expert, i], x[r, :] . up_proj[expert, i])`
/// `x [num_rows, hidden_size]` and `intermediate [num_rows, intermediate_size]` are packed.
pub(super) fn gate_up(
    simd: Arch,
    activation: Activation,
    weights: &Panels,
    chunks: &[Chunk],
    x: &[f32],
    intermediate: &mut [f32],
    intermediate_size: usize,
) {
    let intermediate = &SharedSlice::new(intermediate);
    for_each_product(weights, chunks, x, |product| {
        simd.dispatch(GateUp { product, activation, intermediate, intermediate_size });
    });
}

/// `out[r, n] = x[r, :] . w[expert, n, :]`; `x [num_rows, K]` is packed, `out [num_rows, N]` is not.
pub(super) fn project(simd: Arch, weights: &Panels, chunks: &[Chunk], x: &[f32], out: &mut [f32]) {
    let out = &SharedSlice::new(out);
    for_each_product(weights, chunks, x, |product| simd.dispatch(Project { product, out }));
}

/// Every chunk of rows with every panel of its expert, in parallel. Panels vary faster, so that a thread keeps a
/// chunk's rows in its cache.
fn for_each_product<'a>(weights: &'a Panels, chunks: &'a [Chunk], x: &'a [f32], run: impl Fn(Product<'a>) + Sync) {
    let panels = weights.per_expert();
    (0..chunks.len() * panels).into_par_iter().for_each(|task| {
        run(Product { weights, panel: task % panels, chunk: &chunks[task / panels], x });
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
        product.for_each_row(simd, |row, sums| {
            let at = row * columns + first;
            // SAFETY: only this task has this row and this panel, and the piece ends with this iteration.
            let out = unsafe { out.piece(at..at + width) };
            out.copy_from_slice(&sums.0[..width]);
        });
    }
}

struct GateUp<'a> {
    product: Product<'a>,
    activation: Activation,
    intermediate: &'a SharedSlice<'a>,
    intermediate_size: usize,
}

impl WithSimd for GateUp<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let GateUp { product, activation, intermediate, intermediate_size } = self;
        let first = product.panel * PAIRS;
        let width = PAIRS.min(intermediate_size - first);
        let mut tiles = product.chunk.tiles();
        let mut tile = 0..0;
        product.for_each_row(simd, |row, sums| {
            if row >= tile.end {
                tile = tiles.next().unwrap_or(row..row + 1);
            }
            let values = activate(simd, activation, sums);
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

/// `act(gate, up)` of a panel whose first half are gates and whose second half are ups.
#[inline(always)]
fn activate<S: Simd>(simd: S, activation: Activation, sums: &Line) -> [f32; PAIRS] {
    let mut values = [0.0; PAIRS];
    let (gates, ups) = sums.0.split_at(PAIRS);
    let (gates, _) = S::as_simd_f32s(gates);
    let (ups, _) = S::as_simd_f32s(ups);
    for ((value, &gate), &up) in S::as_mut_simd_f32s(&mut values).0.iter_mut().zip(gates).zip(ups) {
        *value = match activation {
            _ => simd.mul_f32s(silu(simd, gate), up),
        };
    }
    values
}

/// `v / (1 + exp(-v))`
#[inline(always)]
fn silu<S: Simd>(simd: S, v: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(v, simd.add_f32s(one, exp(simd, simd.neg_f32s(v))))
}

/// `exp(v)` within 2 units in the last place; infinity above 88.4, and `exp(-87)` below -87, where `silu` no longer
/// sees a difference.
#[inline(always)]
fn exp<S: Simd>(simd: S, v: S::f32s) -> S::f32s {
    // v = n ln 2 + r with n an integer and |r| <= ln 2 / 2; exp(v) = 2^n exp(r).
    // Adding 1.5 * 2^23 rounds to an integer and leaves n in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first exact in few bits, so that n * ln 2 is subtracted without loss.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Taylor: the first term left out is below 6e-9 of the result.
    const TERMS: [f32; 7] = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let splat = |value| simd.splat_f32s(value);
    let v = simd.min_f32s(simd.max_f32s(v, splat(-87.0)), splat(89.0));
    let rounded = simd.mul_add_f32s(v, splat(std::f32::consts::LOG2_E), splat(ROUND));
    let n = simd.sub_f32s(rounded, splat(ROUND));
    let r = simd.mul_add_f32s(n, splat(-LN2_LOW), simd.mul_add_f32s(n, splat(-LN2_HIGH), v));
    let mut power = splat(1.0 / 5040.0);
    for term in TERMS {
        power = simd.mul_add_f32s(power, r, splat(term));
    }
    // 2^n by its bits; n = 128 makes infinity.
    let shifted = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(rounded), simd.splat_u32s(23));
    let scale = simd.transmute_f32s_u32s(simd.add_u32s(shifted, simd.splat_u32s(127 << 23)));
    simd.mul_f32s(power, scale)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::chunks::{CHUNK_ROWS, TILE_ROWS, chunks};
    use crate::cpu::permute::pack;

    /// Every instruction set that this processor offers.
    fn instruction_sets() -> Vec<Arch> {
        let mut sets = vec![Arch::new(), Arch::Scalar];
        #[cfg(target_arch = "x86_64")]
        sets.extend(pulp::x86::V3::try_new().map(Arch::V3));
        sets
    }

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
                let row = |e, n| Some(&w[(e * columns + n) * depth..][..depth]);
                let weights = Panels::pack(WeightFormat::F32, 2, [columns, depth], row).expect("the memory is there");
                let offsets = [0, rows / 3, rows];
                let chunks = chunks(&offsets);
                let (mut packed, mut out) = (vec![f32::NAN; x.len()], vec![f32::NAN; rows * columns]);
                pack(&chunks, &mut packed, |r| &x[r * depth..][..depth]);
                project(simd, &weights, &chunks, &packed, &mut out);
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

    struct Silu<'a>(&'a mut [f32; PAIRS]);
    impl WithSimd for Silu<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            for v in S::as_mut_simd_f32s(self.0).0 {
                *v = silu(simd, *v);
            }
        }
    }

    fn silu_everywhere(v: f32) -> Vec<f32> {
        let silu = |simd: Arch| {
            let mut lanes = [v; PAIRS];
            simd.dispatch(Silu(&mut lanes));
            assert!(lanes.iter().all(|lane| lane.to_bits() == lanes[0].to_bits()), "lanes differ at {v}");
            lanes[0]
        };
        instruction_sets().into_iter().map(silu).collect()
    }

    #[test]
    fn silu_is_within_a_few_units_of_its_definition() {
        for step in -120_000..=120_000 {
            let v = step as f32 / 1000.0;
            let expected = Activation::SWIGLU.apply(f64::from(v), 1.0);
            for got in silu_everywhere(v) {
                let difference = (f64::from(got) - expected).abs();
                // Below -87 the function is smaller than 1e-35 and any tiny number will do.
                assert!(difference <= 4e-7 * expected.abs() + 1e-34, "silu({v}) = {got}, expected {expected}");
            }
        }
    }

    #[test]
    fn silu_keeps_its_limits() {
        for (v, expected) in [(0.0, 0.0), (f32::MAX, f32::MAX), (f32::MIN, 0.0), (f32::INFINITY, f32::INFINITY)] {
            assert!(silu_everywhere(v).iter().all(|&got| got == expected), "silu({v})");
        }
        assert!(silu_everywhere(f32::NAN).iter().all(|v| v.is_nan()));
    }
}
