//! The Rust side of the kernels in `shaders/`: for each stage its bindings, overrides and grid, in one place.
//!
//! Nothing here is compiled or run; that is `gpu/`. `tests/shader_contract.rs` compares these lists with what naga
//! finds in the assembled WGSL, so that the two cannot drift.

pub mod combine;
pub mod down;
pub mod gate_up;
pub mod matmul;
pub mod params;
pub mod permute;
pub mod probe_fma;
pub mod probe_read;
pub mod router;

use crate::model::activation::Activation;
use crate::model::weights::WeightFormat;

/// One WGSL file: a kernel's source is a list of them, concatenated as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// File name in `shaders/`, without the extension.
    pub file: &'static str,
    /// Its text.
    pub source: &'static str,
}

/// `wgsl!("x")` is the part `shaders/x.wgsl`.
macro_rules! wgsl {
    ($file:literal) => {
        $crate::kernels::Part {
            file: $file,
            source: include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $file, ".wgsl")),
        }
    };
}
pub(crate) use wgsl;

/// How a kernel uses a binding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A uniform buffer.
    Uniform,
    /// A storage buffer that is only read.
    Read,
    /// A storage buffer that is written.
    Write,
}

/// One buffer of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Binding {
    /// `@binding` number; the group is always 0.
    pub index: u32,
    /// The WGSL variable, and the name by which the layer's buffers are bound.
    pub name: &'static str,
    /// How it is used.
    pub access: Access,
}

/// A binding, in one line at the definition.
pub(crate) const fn bind(index: u32, name: &'static str, access: Access) -> Binding {
    Binding { index, name, access }
}

/// What a kernel computes: the stages of the pass, in order, and the probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Logits, selection, weights.
    Router,
    /// Assignments sorted by expert.
    Permute,
    /// First projections and activation.
    GateUp,
    /// Second projection.
    Down,
    /// Weighted sum per token.
    Combine,
    /// Not part of the pass: measures the rate of multiply-adds.
    ProbeFma,
    /// Not part of the pass: measures the rate of reads.
    ProbeRead,
}

impl Stage {
    /// Every stage of the pass, in order.
    pub const ALL: [Stage; 5] = [Stage::Router, Stage::Permute, Stage::GateUp, Stage::Down, Stage::Combine];

    /// The stage's name: also that of its entry point, its shader, and its files in `kernels/` and `reference/`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Router => "router",
            Stage::Permute => "permute",
            Stage::GateUp => "gate_up",
            Stage::Down => "down",
            Stage::Combine => "combine",
            Stage::ProbeFma => "probe_fma",
            Stage::ProbeRead => "probe_read",
        }
    }
}

/// One kernel: source, bindings and the values of its overrides.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// Which stage it computes; the entry point has the stage's name.
    pub stage: Stage,
    /// The stage's name followed by what distinguishes this variant, as in `gate_up.subgroup8.f16`.
    pub label: String,
    /// WGSL files, concatenated in this order.
    pub parts: Vec<Part>,
    /// Buffers, by binding number.
    pub bindings: Vec<Binding>,
    /// Pipeline constants: what the plan chose.
    pub overrides: Vec<(&'static str, u32)>,
    /// Invocations in a workgroup.
    pub workgroup_size: u32,
    /// Whether it uses subgroup operations.
    pub needs_subgroups: bool,
}

impl Kernel {
    /// The WGSL that the driver gets.
    pub fn wgsl(&self) -> String {
        self.parts.iter().map(|part| part.source).collect::<Vec<_>>().join("\n")
    }

    /// The kernel's label.
    pub fn label(&self) -> &str {
        &self.label
    }

    /// The file and line of the part that holds `line` (1-based) of [`Kernel::wgsl`].
    pub fn locate(&self, line: u32) -> (&'static str, u32) {
        let mut first = 1;
        for part in &self.parts {
            let lines = part.source.lines().count() as u32 + 1;
            if line < first + lines {
                return (part.file, line + 1 - first);
            }
            first += lines;
        }
        ("", line)
    }
}

/// How a kernel reads its input rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Four elements at a time: the row stride is a multiple of 4.
    Vec4,
    /// One element at a time: any stride.
    Scalar,
}

impl Input {
    /// What a row stride allows.
    pub fn of_stride(stride: u32) -> Self {
        if stride.is_multiple_of(4) { Input::Vec4 } else { Input::Scalar }
    }

    pub(crate) fn part(self) -> Part {
        match self {
            Input::Vec4 => wgsl!("input_vec4"),
            Input::Scalar => wgsl!("input_scalar"),
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Input::Vec4 => "",
            Input::Scalar => ".scalar",
        }
    }
}

/// Every kernel that a plan can choose, and the probes, with the default values of their overrides.
pub fn all() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for input in [Input::Vec4, Input::Scalar] {
        kernels.push(router::kernel(input, 64, 8));
    }
    kernels.push(permute::kernel(crate::model::config::MAX_EXPERTS));
    for choice in matmul::MatmulChoice::examples() {
        for &format in WeightFormat::ALL {
            for activation in [Activation::SWIGLU] {
                for input in [Input::Vec4, Input::Scalar] {
                    kernels.push(gate_up::kernel(choice, format, activation, input));
                }
            }
            kernels.push(down::kernel(choice, format));
        }
    }
    kernels.push(combine::kernel());
    kernels.extend([probe_fma::kernel(256), probe_read::kernel(false)]);
    kernels
}
