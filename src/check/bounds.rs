//! How far WGSL lets an activation be off that is given exact arguments.

use super::verdict::UNIT;
use crate::model::activation::{Activation, Form, Function, sigmoid};

/// Of `activation.apply(gate, up)` as `shaders/function_*.wgsl` and `shaders/activation_*.wgsl` compute it.
pub(super) fn evaluation_error(activation: Activation, gate: f64, up: f64) -> f64 {
    let function = activation.function;
    // Each factor's own error, and a rounding of their product.
    let product = |(a, da): (f64, f64), (b, db): (f64, f64)| {
        (a * b, da * b.abs() + a.abs() * db + da * db + UNIT * (a * b).abs())
    };
    let of_function = |v: f64| (function.apply(v), function_error(function, v));
    let exact = |v: f64| (v, 0.0);
    match activation.form {
        Form::Plain => function_error(function, up),
        Form::Gated => product(of_function(gate), exact(up)).1,
        Form::Clamped { limit } => {
            let limit = f64::from(limit);
            product(of_function(gate.min(limit)), exact(up.clamp(-limit, limit))).1
        }
        Form::ClampedAfter { limit } => {
            let limit = f64::from(limit);
            let (f, error) = of_function(gate);
            product((f.min(limit), error), exact(up.clamp(-limit, limit))).1
        }
        Form::GptOss { limit, alpha } => {
            let (limit, alpha) = (f64::from(limit), f64::from(alpha));
            let g = gate.min(limit);
            let gated = g * sigmoid(alpha * g);
            let next = up.clamp(-limit, limit) + 1.0;
            product((gated, exp_error(6.0 * (alpha * g).abs()) * gated.abs()), (next, UNIT * next.abs())).1
        }
        Form::SoftCapped { gate: gate_cap, up: up_cap } => {
            let (gate_cap, up_cap) = (f64::from(gate_cap), f64::from(up_cap));
            // tanh is as good as two exponentials that nearly cancel: an error of its cap, however small the value.
            let cap = |v: f64, cap: f64| (cap * (v / cap).tanh(), cap * exp_error(4.0 * (v / cap).abs().min(15.0)));
            let s = sigmoid(gate);
            let gated = product(cap(gate, gate_cap), (s, exp_error(4.0 * gate.abs()) * s));
            product(gated, cap(up, up_cap)).1
        }
    }
}

/// Of `function.apply(v)`.
fn function_error(function: Function, v: f64) -> f64 {
    let value = function.apply(v).abs();
    match function {
        Function::Silu => exp_error(4.0 * v.abs()) * value,
        // The argument of exp is rounded too, once or three times.
        Function::GeluQuick => exp_error(6.0 * (1.702 * v).abs()) * value,
        Function::GeluTanh => {
            let inner = 2.0 * (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v);
            exp_error(8.0 * inner.abs()) * value
        }
        // erf is within a unit in the last place of 1, and 1 + erf may cancel.
        Function::Gelu => 16.0 * UNIT * v.abs(),
        Function::Relu => 0.0,
        Function::Relu2 => 2.0 * UNIT * value,
    }
}

/// Relative error of something divided by `1 + exp(a)`: exp may be off by 3 + 2 |a| units in the last place (WGSL's table
/// of accuracies), of two roundoffs each, and then there are the sum and the division. `of_argument`: roundoffs for the size
/// of the argument.
fn exp_error(of_argument: f64) -> f64 {
    UNIT * (2.0 * 3.0 + of_argument + 7.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Small enough that an error anybody would call one is larger, and never less than what f32 can do.
    #[test]
    fn errors_are_a_few_roundoffs() {
        for activation in Activation::examples() {
            for gate in [-3.0, -0.5, 0.1, 2.0] {
                for up in [-2.0, 0.3, 1.5] {
                    let error = evaluation_error(activation, gate, up);
                    let most = 200.0 * UNIT * (1.0 + activation.apply(gate, up).abs());
                    assert!((0.0..most).contains(&error), "{} {gate} {up}: {error:e}", activation.name());
                }
            }
        }
        assert_eq!(evaluation_error(Activation::plain(Function::Relu), 0.0, 3.0), 0.0);
    }
}
