//! What an expert does between its two projections.

use serde::{Deserialize, Serialize};

/// A function of one number. One WGSL file each (`shaders/function_*.wgsl`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Function {
    /// `v / (1 + exp(-v))`
    #[default]
    Silu,
    /// `v * (1 + erf(v / sqrt(2))) / 2`
    Gelu,
    /// `v * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v^3))) / 2`
    GeluTanh,
    /// `v / (1 + exp(-1.702 * v))`
    GeluQuick,
    /// `max(v, 0)`
    Relu,
    /// `max(v, 0)^2`
    Relu2,
}

impl Function {
    /// Every function.
    pub const ALL: [Function; 6] =
        [Function::Silu, Function::Gelu, Function::GeluTanh, Function::GeluQuick, Function::Relu, Function::Relu2];

    /// The definition, in f64.
    pub fn apply(self, v: f64) -> f64 {
        match self {
            Function::Silu => v * sigmoid(v),
            Function::Gelu => v * 0.5 * libm::erfc(-v * std::f64::consts::FRAC_1_SQRT_2),
            Function::GeluTanh => {
                // (1 + tanh(u)) / 2 = sigmoid(2 u)
                let inner = (2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v * v * v);
                v * sigmoid(2.0 * inner)
            }
            Function::GeluQuick => v * sigmoid(1.702 * v),
            Function::Relu => v.max(0.0),
            Function::Relu2 => v.max(0.0) * v.max(0.0),
        }
    }

    /// The name used in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Function::Silu => "silu",
            Function::Gelu => "gelu",
            Function::GeluTanh => "gelu_tanh",
            Function::GeluQuick => "gelu_quick",
            Function::Relu => "relu",
            Function::Relu2 => "relu2",
        }
    }
}

/// How the projections of an expert meet. One WGSL file each (`shaders/activation_*.wgsl`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Form {
    /// `f(up)`: no gate, two matrices.
    Plain,
    /// `f(gate) * up` (Shazeer 2020, "GLU Variants Improve Transformer").
    #[default]
    Gated,
    /// `f(min(gate, limit)) * clamp(up, -limit, limit)` (DeepSeek-V4).
    Clamped {
        /// Bound of both.
        limit: f32,
    },
    /// `min(f(gate), limit) * clamp(up, -limit, limit)` (Step-3).
    ClampedAfter {
        /// Bound of both.
        limit: f32,
    },
    /// `g * sigmoid(alpha * g) * (u + 1)`, `g = min(gate, limit)`, `u = clamp(up, -limit, limit)` (gpt-oss).
    /// The function is not used.
    GptOss {
        /// Bound of both.
        limit: f32,
        /// Steepness.
        alpha: f32,
    },
    /// `c tanh(gate / c) * sigmoid(gate) * d tanh(up / d)` (SiTU). The function is not used.
    SoftCapped {
        /// c
        gate: f32,
        /// d
        up: f32,
    },
}

/// What an expert does between its two projections: a form and its function.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Activation {
    /// How gate and up meet.
    pub form: Form,
    /// What happens to the gate, or to the only projection.
    pub function: Function,
}

impl Activation {
    /// `silu(gate) * up`
    pub const SWIGLU: Activation = Activation { form: Form::Gated, function: Function::Silu };

    /// `f(gate) * up`
    pub const fn gated(function: Function) -> Self {
        Self { form: Form::Gated, function }
    }

    /// `f(up)`
    pub const fn plain(function: Function) -> Self {
        Self { form: Form::Plain, function }
    }

    /// One of each form with each function that it uses.
    pub fn examples() -> Vec<Activation> {
        let mut all: Vec<Activation> =
            Function::ALL.into_iter().flat_map(|f| [Activation::gated(f), Activation::plain(f)]).collect();
        let silu = |form| Activation { form, function: Function::Silu };
        all.extend([
            silu(Form::Clamped { limit: 0.75 }),
            silu(Form::ClampedAfter { limit: 0.25 }),
            silu(Form::GptOss { limit: 0.75, alpha: 1.702 }),
            silu(Form::SoftCapped { gate: 1.5, up: 2.5 }),
        ]);
        all
    }

    /// There is a gate: three matrices for each expert, not two.
    pub fn is_gated(self) -> bool {
        self.form != Form::Plain
    }

    /// The definition, in f64. Without a gate, `gate` is not looked at.
    pub fn apply(self, gate: f64, up: f64) -> f64 {
        let f = |v| self.function.apply(v);
        match self.form {
            Form::Plain => f(up),
            Form::Gated => f(gate) * up,
            Form::Clamped { limit } => {
                let limit = f64::from(limit);
                f(gate.min(limit)) * up.clamp(-limit, limit)
            }
            Form::ClampedAfter { limit } => {
                let limit = f64::from(limit);
                f(gate).min(limit) * up.clamp(-limit, limit)
            }
            Form::GptOss { limit, alpha } => {
                let (limit, alpha) = (f64::from(limit), f64::from(alpha));
                let gate = gate.min(limit);
                gate * sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1.0)
            }
            Form::SoftCapped { gate: gate_cap, up: up_cap } => {
                let cap = |v: f64, cap: f32| f64::from(cap) * (v / f64::from(cap)).tanh();
                cap(gate, gate_cap) * sigmoid(gate) * cap(up, up_cap)
            }
        }
    }

    /// The name of its WGSL: form, then function if it uses one.
    pub fn name(self) -> String {
        match self.form {
            Form::Plain => self.function.name().to_owned(),
            Form::Gated => format!("{}_glu", self.function.name()),
            Form::Clamped { .. } => format!("{}_glu_clamped", self.function.name()),
            Form::ClampedAfter { .. } => format!("{}_glu_clamped_after", self.function.name()),
            Form::GptOss { .. } => "gpt_oss".to_owned(),
            Form::SoftCapped { .. } => "soft_capped".to_owned(),
        }
    }

    /// The numbers of the form, as its WGSL reads them.
    pub fn parameters(self) -> [f32; 2] {
        match self.form {
            Form::Plain | Form::Gated => [0.0; 2],
            Form::Clamped { limit } | Form::ClampedAfter { limit } => [limit, 0.0],
            Form::GptOss { limit, alpha } => [limit, alpha],
            Form::SoftCapped { gate, up } => [gate, up],
        }
    }
}

/// `1 / (1 + exp(-v))`
pub(crate) fn sigmoid(v: f64) -> f64 {
    1.0 / (1.0 + (-v).exp())
}
