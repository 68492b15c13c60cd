//! Division by the root mean square, where a layer has it.

use crate::model::config::Norm;
use pulp::Arch;
use rayon::prelude::*;

/// A norm with its weight `[row length]`.
#[derive(Debug)]
pub(super) struct RmsNorm {
    norm: Norm,
    weight: Vec<f32>,
}

impl RmsNorm {
    /// There is one where the layer has both.
    pub fn new(norm: Option<Norm>, weight: &Option<Vec<f32>>) -> Option<Self> {
        norm.zip(weight.clone()).map(|(norm, weight)| Self { norm, weight })
    }

    /// `row / sqrt(mean(row^2) + epsilon) * weight`; with `scale_first` the row is multiplied by the weight before
    /// anything else.
    pub fn apply(&self, simd: Arch, row: &mut [f32]) {
        simd.dispatch(|| {
            let scale = |row: &mut [f32]| row.iter_mut().zip(&self.weight).for_each(|(v, w)| *v *= w);
            if self.norm.scale_first {
                scale(row);
            }
            let mean = sum_of_squares(row) / row.len() as f64;
            let factor = 1.0 / (mean + f64::from(self.norm.epsilon)).sqrt();
            row.iter_mut().for_each(|v| *v = (f64::from(*v) * factor) as f32);
            if !self.norm.scale_first {
                scale(row);
            }
        });
    }

    /// The same for each row.
    pub fn apply_rows(&self, simd: Arch, rows: &mut [f32]) {
        rows.par_chunks_exact_mut(self.weight.len()).for_each(|row| self.apply(simd, row));
    }
}

/// In f64: squares of f32 overflow early. Sixteen sums at a time, so that the additions overlap.
#[inline(always)]
fn sum_of_squares(row: &[f32]) -> f64 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let (blocks, rest) = row.as_chunks::<16>();
    let mut sums = [0.0; 16];
    for block in blocks {
        sums.iter_mut().zip(block).for_each(|(sum, &v)| *sum += square(v));
    }
    sums.into_iter().chain(rest.iter().map(|&v| square(v))).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn it_is_that_of_the_reference() {
        for len in [1, 15, 16, 17, 100] {
            for (scale_first, size) in [(false, 1.0), (true, 1.0), (false, 1e30), (true, 1e-30)] {
                let row: Vec<f32> = (0..len).map(|n| ((n * 37 % 19) as f32 - 8.5) * size).collect();
                let weight: Vec<f32> = (0..len).map(|n| (n * 11 % 7) as f32 * 0.5 - 1.25).collect();
                let norm = Norm { epsilon: 1e-6, scale_first };
                let wide: Vec<f64> = row.iter().map(|&v| f64::from(v)).collect();
                let expected = reference::norm::norm(norm, &weight, &wide);
                let mut got = row;
                RmsNorm { norm, weight }.apply(Arch::new(), &mut got);
                for (got, expected) in got.iter().zip(expected) {
                    assert!((f64::from(*got) - expected).abs() <= 3e-7 * expected.abs() + 1e-40, "{got} {expected}");
                }
            }
        }
    }
}
