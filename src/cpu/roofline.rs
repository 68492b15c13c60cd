//! What this processor can do at best: the yardstick for the engine's own figures.

use rayon::prelude::*;
use std::time::{Duration, Instant};

/// Best rates measured on all threads of the current pool.
#[derive(Clone, Debug, PartialEq)]
pub struct Roofline {
    /// f32 operations of a dense matmul by the `gemm` crate, in 10^9 per second; a multiply-add counts as two.
    pub gflops: f64,
    /// (bytes, 10^9 bytes read per second) of buffers of growing size: caches first, then memory.
    pub bandwidths: Vec<(u64, f64)>,
}

/// Buffers that are read, in bytes.
const SIZES: [u64; 3] = [8 << 20, 32 << 20, 256 << 20];

/// Measures all of them, in about a second.
pub fn roofline() -> Roofline {
    let bandwidths = SIZES.map(|bytes| (bytes, read_gbytes_per_s(bytes as usize / size_of::<u32>())));
    Roofline { gflops: dense_gflops(768), bandwidths: bandwidths.into() }
}

/// The best rate of a square matmul of this size.
fn dense_gflops(size: usize) -> f64 {
    let (a, b) = (vec![0.5f32; size * size], vec![0.25f32; size * size]);
    let mut c = vec![0.0f32; size * size];
    let seconds = best(Duration::from_millis(200), || dense_matmul([size; 3], &a, &b, &mut c));
    2.0 * (size as f64).powi(3) / seconds / 1e9
}

/// `c = a * b` by the `gemm` crate on all threads; `a [m, k]`, `b [k, n]`, `c [m, n]`.
pub(crate) fn dense_matmul([m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
    multiply([m, n, k], a, b, [n, 1], c);
}

/// As [`dense_matmul`] with `b [n, k]`: each row of `a` times each row of `b`.
pub(crate) fn rows_times_rows([m, n, k]: [usize; 3], a: &[f32], b: &[f32], c: &mut [f32]) {
    multiply([m, n, k], a, b, [1, k], c);
}

/// `strides`: how far apart the rows of `b` are, and its columns; `[n, 1]` or `[1, k]`.
fn multiply([m, n, k]: [usize; 3], a: &[f32], b: &[f32], strides: [usize; 2], c: &mut [f32]) {
    assert_eq!([a.len(), b.len(), c.len()], [m * k, k * n, m * n], "a, b and c have m k, k n and m n elements");
    let [n_stride, k_stride, row_stride, column_stride] = [n, k, strides[0], strides[1]].map(|stride| stride as isize);
    // SAFETY: the lengths are checked above, and the strides are those of dense matrices of these shapes, row-major but
    // for a `b` of rows, which is column-major; `c` is borrowed exclusively and not read, as `read_dst` is false.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n_stride,
            false,
            a.as_ptr(),
            1,
            k_stride,
            b.as_ptr(),
            column_stride,
            row_stride,
            0.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

/// The best rate of folding this many words into one.
fn read_gbytes_per_s(len: usize) -> f64 {
    let values = vec![1u32; len];
    let seconds = best(Duration::from_millis(200), || {
        std::hint::black_box(fold(&values));
    });
    (len * size_of::<u32>()) as f64 / seconds / 1e9
}

/// Reads all of `values`, on all threads.
pub(crate) fn fold(values: &[u32]) -> u32 {
    let simd = pulp::Arch::new();
    values.par_chunks(1 << 15).map(|part| simd.dispatch(|| part.iter().fold(0u32, |a, &b| a ^ b))).sum()
}

/// Seconds of the fastest run within `budget`, after one that warms up.
fn best(budget: Duration, mut run: impl FnMut()) -> f64 {
    run();
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while best.is_infinite() || begin.elapsed() < budget {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_yardstick_multiplies() {
        let mut c = [f32::NAN; 4];
        dense_matmul([2, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0, 0.0, 0.0, 1.0, 2.0, 3.0], &mut c);
        assert_eq!(c, [7.0, 11.0, 16.0, 23.0]);
        c = [f32::NAN; 4];
        rows_times_rows([2, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0, 0.0, 2.0, 0.0, 1.0, 3.0], &mut c);
        assert_eq!(c, [7.0, 11.0, 16.0, 23.0]);
    }

    #[test]
    fn rates_are_positive_numbers() {
        let Roofline { gflops, bandwidths } = roofline();
        assert!(gflops.is_finite() && gflops > 0.0);
        assert!(bandwidths.iter().all(|&(_, rate)| rate.is_finite() && rate > 0.0));
    }
}
