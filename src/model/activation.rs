//! What an expert does between its two projections.

use serde::{Deserialize, Serialize};

/// The function between an expert's first and second projection.
/// One WGSL file each (`shaders/activation_*.wgsl`) and one arm in [`Activation::apply`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// `silu(gate) * up` with `silu(v) = v / (1 + exp(-v))` (Shazeer 2020, "GLU Variants Improve Transformer").
    #[default]
    Swiglu,
}

impl Activation {
    /// Every activation.
    pub const ALL: &'static [Activation] = &[Activation::Swiglu];

    /// The definition, in f64.
    pub fn apply(self, gate: f64, up: f64) -> f64 {
        match self {
            Activation::Swiglu => gate / (1.0 + (-gate).exp()) * up,
        }
    }

    /// The name used in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Activation::Swiglu => "swiglu",
        }
    }
}
