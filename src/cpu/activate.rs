//! The functions between an expert's projections, on vectors.

use super::experts::PAIRS;
use super::panels::WIDTH;
use crate::model::activation::{Activation, Form, Function};
use pulp::{NullaryFnOnce, Simd};

/// `values = act(gate, up)` of a panel whose first half are gates and whose second half are ups, or, without a gate,
/// whose columns are all ups. With a gate only the first half of `values` is written.
///
/// A function of its own, with this processor's instructions, so that the matmul around it compiles as if the
/// activation were small. For the same reason nothing in this file is a closure that the compiler might not inline.
#[inline(always)]
pub(super) fn activate<S: Simd>(simd: S, activation: Activation, sums: &[f32; WIDTH], values: &mut [f32; WIDTH]) {
    simd.vectorize(Activate { simd, activation, sums, values });
}

struct Activate<'a, S> {
    simd: S,
    activation: Activation,
    sums: &'a [f32; WIDTH],
    values: &'a mut [f32; WIDTH],
}

impl<S: Simd> NullaryFnOnce for Activate<'_, S> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Activate { simd, activation, sums, values } = self;
        let (gates, ups) = sums.split_at(PAIRS);
        let (gates, ups) = (S::as_simd_f32s(gates).0, S::as_simd_f32s(ups).0);
        if !activation.is_gated() {
            values.copy_from_slice(sums);
            return apply(simd, activation.function, S::as_mut_simd_f32s(&mut values[..]).0);
        }
        values[..PAIRS].copy_from_slice(&sums[..PAIRS]);
        let values = S::as_mut_simd_f32s(&mut values[..PAIRS]).0;
        match activation.form {
            Form::Plain => {}
            Form::Gated => {
                apply(simd, activation.function, values);
                for (v, &up) in values.iter_mut().zip(ups) {
                    *v = simd.mul_f32s(*v, up);
                }
            }
            Form::Clamped { limit } => {
                for v in &mut *values {
                    *v = simd.min_f32s(*v, simd.splat_f32s(limit));
                }
                apply(simd, activation.function, values);
                for (v, &up) in values.iter_mut().zip(ups) {
                    *v = simd.mul_f32s(*v, clamp(simd, up, limit));
                }
            }
            Form::ClampedAfter { limit } => {
                apply(simd, activation.function, values);
                for (v, &up) in values.iter_mut().zip(ups) {
                    *v = simd.mul_f32s(simd.min_f32s(*v, simd.splat_f32s(limit)), clamp(simd, up, limit));
                }
            }
            Form::GptOss { limit, alpha } => {
                for ((v, &gate), &up) in values.iter_mut().zip(gates).zip(ups) {
                    let gate = simd.min_f32s(gate, simd.splat_f32s(limit));
                    let up = simd.add_f32s(clamp(simd, up, limit), simd.splat_f32s(1.0));
                    let inner = simd.mul_f32s(simd.splat_f32s(alpha), gate);
                    *v = simd.mul_f32s(times_sigmoid(simd, gate, inner), up);
                }
            }
            Form::SoftCapped { gate: gate_cap, up: up_cap } => {
                for ((v, &gate), &up) in values.iter_mut().zip(gates).zip(ups) {
                    let capped = cap(simd, gate, gate_cap);
                    *v = simd.mul_f32s(times_sigmoid(simd, capped, gate), cap(simd, up, up_cap));
                }
            }
        }
    }
}

#[inline(always)]
fn clamp<S: Simd>(simd: S, v: S::f32s, limit: f32) -> S::f32s {
    simd.max_f32s(simd.min_f32s(v, simd.splat_f32s(limit)), simd.splat_f32s(-limit))
}

/// `cap * tanh(v / cap)`
#[inline(always)]
fn cap<S: Simd>(simd: S, v: S::f32s, cap: f32) -> S::f32s {
    let cap = simd.splat_f32s(cap);
    simd.mul_f32s(cap, tanh(simd, simd.div_f32s(v, cap)))
}

/// `values = f(values)`
#[inline(always)]
fn apply<S: Simd>(simd: S, function: Function, values: &mut [S::f32s]) {
    match function {
        Function::Silu => {
            for v in values {
                *v = times_sigmoid(simd, *v, *v);
            }
        }
        Function::GeluQuick => {
            for v in values {
                *v = times_sigmoid(simd, *v, simd.mul_f32s(simd.splat_f32s(1.702), *v));
            }
        }
        Function::GeluTanh => {
            for v in values {
                *v = gelu_tanh(simd, *v);
            }
        }
        Function::Gelu => {
            for v in values {
                *v = simd.mul_f32s(*v, normal_cdf(simd, *v));
            }
        }
        Function::Relu => {
            for v in values {
                *v = simd.max_f32s(*v, simd.splat_f32s(0.0));
            }
        }
        Function::Relu2 => {
            for v in values {
                let positive = simd.max_f32s(*v, simd.splat_f32s(0.0));
                *v = simd.mul_f32s(positive, positive);
            }
        }
    }
}

/// `v * (1 + tanh(u)) / 2 = v * sigmoid(2 u)`, `2 u = 2 sqrt(2 / pi) (v + 0.044715 v^3)`
#[inline(always)]
fn gelu_tanh<S: Simd>(simd: S, v: S::f32s) -> S::f32s {
    let square = simd.mul_f32s(v, v);
    let cubic = simd.mul_add_f32s(square, simd.splat_f32s(0.044715), simd.splat_f32s(1.0));
    times_sigmoid(simd, v, simd.mul_f32s(simd.splat_f32s(1.595_769), simd.mul_f32s(v, cubic)))
}

/// `a / (1 + exp(-v))`
#[inline(always)]
fn times_sigmoid<S: Simd>(simd: S, a: S::f32s, v: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    simd.div_f32s(a, simd.add_f32s(one, exp(simd, simd.neg_f32s(v))))
}

/// `erfc(-v / sqrt(2)) / 2`, the probability that a standard normal number is below v.
#[inline(always)]
fn normal_cdf<S: Simd>(simd: S, v: S::f32s) -> S::f32s {
    // erfc(z) = t exp(-z^2 + P(t)), t = 1 / (1 + z / 2), within 1.2e-7 of itself for z >= 0: a Chebyshev fit (Press,
    // Teukolsky, Vetterling and Flannery, "Numerical Recipes", section 6.2).
    const P: [f32; 9] = [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ];
    let splat = |value| simd.splat_f32s(value);
    let z = simd.mul_f32s(simd.abs_f32s(v), splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = simd.div_f32s(splat(1.0), simd.mul_add_f32s(z, splat(0.5), splat(1.0)));
    let mut p = splat(0.170_872_77);
    for coefficient in P {
        p = simd.mul_add_f32s(p, t, splat(coefficient));
    }
    // exp(-z^2) apart from the rest, whose exponent is small and so exact
    let tail = simd.mul_f32s(exp(simd, simd.neg_f32s(simd.mul_f32s(z, z))), simd.mul_f32s(t, exp(simd, p)));
    let half = simd.mul_f32s(splat(0.5), tail);
    simd.select_f32s(simd.less_than_f32s(v, splat(0.0)), half, simd.sub_f32s(splat(1.0), half))
}

/// `tanh(v)`
#[inline(always)]
fn tanh<S: Simd>(simd: S, v: S::f32s) -> S::f32s {
    // Near zero the quotient below would cancel: there a polynomial (Cephes, tanhf).
    const P: [f32; 4] = [0.020_639_088, -0.053_739_715, 0.133_314_42, -0.333_332_8];
    let splat = |value| simd.splat_f32s(value);
    let size = simd.abs_f32s(v);
    let square = simd.mul_f32s(v, v);
    let mut p = splat(-0.005_704_988_7);
    for coefficient in P {
        p = simd.mul_add_f32s(p, square, splat(coefficient));
    }
    let near = simd.mul_add_f32s(simd.mul_f32s(p, square), v, v);
    // 1 - 2 / (exp(2 |v|) + 1)
    let power = simd.add_f32s(exp(simd, simd.add_f32s(size, size)), splat(1.0));
    let far = simd.sub_f32s(splat(1.0), simd.div_f32s(splat(2.0), power));
    let far = simd.select_f32s(simd.less_than_f32s(v, splat(0.0)), simd.neg_f32s(far), far);
    simd.select_f32s(simd.less_than_f32s(size, splat(0.625)), near, far)
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

/// Every instruction set that this processor offers.
#[cfg(test)]
pub(super) fn instruction_sets() -> Vec<pulp::Arch> {
    let mut sets = vec![pulp::Arch::new(), pulp::Arch::Scalar];
    #[cfg(target_arch = "x86_64")]
    sets.extend(pulp::x86::V3::try_new().map(pulp::Arch::V3));
    sets
}

#[cfg(test)]
mod tests {
    use super::*;
    use pulp::{Arch, WithSimd};

    struct Run<'a>(Activation, [f32; WIDTH], &'a mut [f32; WIDTH]);
    impl WithSimd for Run<'_> {
        type Output = ();
        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) {
            activate(simd, self.0, &self.1, self.2);
        }
    }

    /// `act(gate, up)` by each instruction set.
    fn everywhere(activation: Activation, gate: f32, up: f32) -> Vec<f32> {
        let value = |simd: Arch| {
            let mut sums = [up; WIDTH];
            if activation.is_gated() {
                sums[..PAIRS].fill(gate);
            }
            let mut values = [f32::NAN; WIDTH];
            simd.dispatch(Run(activation, sums, &mut values));
            let values = if activation.is_gated() { &values[..PAIRS] } else { &values[..] };
            assert!(values.iter().all(|v| v.to_bits() == values[0].to_bits()), "lanes differ at {gate}, {up}");
            values[0]
        };
        instruction_sets().into_iter().map(value).collect()
    }

    #[test]
    fn silu_is_within_a_few_units_of_its_definition() {
        for step in -120_000..=120_000 {
            let v = step as f32 / 1000.0;
            let expected = Activation::SWIGLU.apply(f64::from(v), 1.0);
            for got in everywhere(Activation::SWIGLU, v, 1.0) {
                let difference = (f64::from(got) - expected).abs();
                // Below -87 the function is smaller than 1e-35 and any tiny number will do.
                assert!(difference <= 4e-7 * expected.abs() + 1e-34, "silu({v}) = {got}, expected {expected}");
            }
        }
    }

    #[test]
    fn every_activation_is_close_to_its_definition() {
        for activation in Activation::examples() {
            for step in -12_000..=12_000 {
                let gate = step as f32 / 800.0;
                let up = if activation.is_gated() { (step % 77) as f32 / 20.0 } else { gate };
                let expected = activation.apply(f64::from(gate), f64::from(up));
                // In the tails of the functions an error of their argument grows with its size.
                let bound = (1e-6 + 2e-7 * f64::from(gate * gate)) * expected.abs() + 1e-34;
                for got in everywhere(activation, gate, up) {
                    let difference = (f64::from(got) - expected).abs();
                    assert!(difference <= bound, "{activation:?} of {gate}, {up}: {got}, expected {expected}");
                }
            }
        }
    }

    #[test]
    fn silu_keeps_its_limits() {
        for (v, expected) in [(0.0, 0.0), (f32::MAX, f32::MAX), (f32::MIN, 0.0), (f32::INFINITY, f32::INFINITY)] {
            assert!(everywhere(Activation::SWIGLU, v, 1.0).iter().all(|&got| got == expected), "silu({v})");
        }
        assert!(everywhere(Activation::SWIGLU, f32::NAN, 1.0).iter().all(|v| v.is_nan()));
    }

    #[test]
    fn large_values_stay_numbers() {
        for function in Function::ALL {
            for v in [1e4, 1e18] {
                let expected = function.apply(f64::from(v)) as f32;
                assert!(everywhere(Activation::plain(function), 0.0, v).iter().all(|&got| got == expected));
                let tiny = |got: &f32| got.abs() <= v * 1e-37;
                assert!(everywhere(Activation::plain(function), 0.0, -v).iter().all(tiny), "{function:?}");
            }
        }
    }
}
