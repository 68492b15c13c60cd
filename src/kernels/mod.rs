//! The Rust side of the kernels in `shaders/`: for each stage its bindings, overrides and grid, in one place.
//!
//! Nothing here is compiled or run; that is `gpu/`. `tests/shader_contract.rs` compares these lists with what naga
//! finds in the assembled WGSL, so that the two cannot drift.

pub mod capacity;
pub mod combine;
pub mod down;
pub mod down_combine;
pub mod drop_rows;
mod examples;
pub mod expert_statistics;
pub mod gate_up;
pub mod matmul;
pub mod norm;
pub mod params;
pub mod permute;
pub mod probe_fma;
pub mod probe_read;
pub mod reweigh;
pub mod router;
pub mod token_statistics;
pub mod token_table;

use crate::model::activation::Activation;
use crate::model::formats::WeightFormat;
use crate::model::routing::{Capacity, Priority, Selection};
use combine::{Rows, Tail};
use gate_up::Epilogue;
use matmul::Tiles;

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

/// What a kernel computes: the stages of the pass, in order, and what is not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Stage {
    /// Choices by token id.
    TokenTable,
    /// Rows divided by their root mean square.
    Norm,
    /// Logits, selection, weights.
    Router,
    /// Assignments beyond an expert's capacity dropped.
    Capacity,
    /// Weights normalised over what is left.
    Reweigh,
    /// Assignments sorted by expert.
    Permute,
    /// First projections and activation.
    GateUp,
    /// Second projection.
    Down,
    /// Weighted sum per token.
    Combine,
    /// Second projection and weighted sum of a single token.
    DownCombine,
    /// Zeros for tokens that the router could make nothing of.
    DropRows,
    /// Not part of the pass: sums over each token's logits.
    TokenStatistics,
    /// Not part of the pass: sums over each sequence, by expert.
    ExpertStatistics,
    /// Not part of the pass: measures the rate of multiply-adds.
    ProbeFma,
    /// Not part of the pass: measures the rate of reads.
    ProbeRead,
}

impl Stage {
    /// The stages that every layer has, in order. Others appear only where a layer needs them.
    pub const ALL: [Stage; 5] = [Stage::Router, Stage::Permute, Stage::GateUp, Stage::Down, Stage::Combine];

    /// The stage's name: also that of its entry point, its shader, and its file in `kernels/`.
    pub fn name(self) -> &'static str {
        match self {
            Stage::TokenTable => "token_table",
            Stage::Norm => "norm",
            Stage::Router => "router",
            Stage::Capacity => "capacity",
            Stage::Reweigh => "reweigh",
            Stage::Permute => "permute",
            Stage::GateUp => "gate_up",
            Stage::Down => "down",
            Stage::Combine => "combine",
            Stage::DownCombine => "down_combine",
            Stage::DropRows => "drop_rows",
            Stage::TokenStatistics => "token_statistics",
            Stage::ExpertStatistics => "expert_statistics",
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

    /// Whether it uses integers of 64 bits, which are no part of standard WGSL.
    pub fn needs_int64(&self) -> bool {
        self.parts.iter().any(|part| part.file == "words_64")
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

/// How a kernel reads its input rows; a grouped matmul its weights, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Input {
    /// Four elements at a time: the row stride is a multiple of 4.
    Vec4,
    /// One element at a time: any stride.
    Scalar,
    /// As `Vec4`, and weights as well as inputs 64 bits at a time: for drivers on which a load costs by its elements.
    Wide,
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
            Input::Wide => wgsl!("input_64"),
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Input::Vec4 => "",
            Input::Scalar => ".scalar",
            Input::Wide => ".wide",
        }
    }

    /// Whether it reads 64 bits at a time.
    pub fn is_wide(self) -> bool {
        self == Input::Wide
    }
}

/// Every kernel that a plan can choose, and the probes, with the default values of their overrides. Of the router and
/// of the activations, one of each kind.
pub fn all() -> Vec<Kernel> {
    let mut kernels = examples::routers();
    kernels.push(permute::kernel(crate::model::config::MAX_EXPERTS));
    let input = Input::Vec4;
    let swiglu = Activation::SWIGLU;
    for choice in matmul::MatmulChoice::examples() {
        for tiles in [Tiles::Routed, Tiles::Dense] {
            for &format in WeightFormat::ALL {
                for input in [Input::Vec4, Input::Scalar, Input::Wide] {
                    kernels.push(gate_up::kernel(choice, tiles, format, swiglu, Epilogue::default(), input));
                    kernels.push(down::kernel(choice, tiles, format, false, input));
                    if !choice.sorted() && tiles == Tiles::Routed {
                        kernels.push(down_combine::kernel(choice, tiles, format, false, true, input));
                    }
                }
            }
        }
        kernels.push(gate_up::kernel(choice, Tiles::Cached, WeightFormat::F16, swiglu, Epilogue::default(), input));
        kernels.push(down::kernel(choice, Tiles::Cached, WeightFormat::F16, false, input));
        if !choice.sorted() {
            kernels.push(down_combine::kernel(choice, Tiles::Cached, WeightFormat::F16, false, true, input));
        }
        for bias in [false, true] {
            for weigh_input in [false, true] {
                let epilogue = Epilogue { bias, weigh_input };
                kernels.push(gate_up::kernel(choice, Tiles::Routed, WeightFormat::F32, swiglu, epilogue, input));
            }
            kernels.push(down::kernel(choice, Tiles::Routed, WeightFormat::F32, bias, input));
            if !choice.sorted() {
                kernels.push(down_combine::kernel(choice, Tiles::Routed, WeightFormat::F32, bias, true, input));
            }
        }
    }
    for activation in Activation::examples() {
        let choice = matmul::MatmulChoice::Tiled { tile_m: 32, tile_n: 64 };
        let format = WeightFormat::F32;
        kernels.push(gate_up::kernel(choice, Tiles::Routed, format, activation, Epilogue::default(), input));
    }
    let dropped = Rows::Dropped { weigh: true, special_is_identity: true, pass_through: false };
    for rows in [Rows::Weighted(true), dropped, Rows::Summed] {
        for tail in [Tail::None, Tail::Scaled, Tail::Shared, Tail::SharedGated, Tail::Bias] {
            kernels.push(combine::kernel(rows, tail));
        }
    }
    kernels.extend([
        token_table::kernel(),
        reweigh::kernel(),
        norm::kernel(false),
        norm::kernel(true),
        drop_rows::kernel(),
    ]);
    for (priority, selection) in [
        (Priority::Position, Selection::TopK),
        (Priority::Choice, Selection::TopK),
        (Priority::Score, Selection::TopK),
        (Priority::Position, Selection::ExpertChoice),
    ] {
        kernels.push(capacity::kernel(&Capacity { priority, ..examples::CAPACITY }, selection));
    }
    kernels.extend([token_statistics::kernel(), expert_statistics::kernel()]);
    kernels.extend([probe_fma::kernel(256), probe_read::kernel(false)]);
    // Some of the ways above lead to the same kernel.
    let mut seen: Vec<(String, Vec<Part>)> = Vec::new();
    kernels.retain(|kernel| {
        let key = (kernel.label.clone(), kernel.parts.clone());
        let is_new = !seen.contains(&key);
        seen.push(key);
        is_new
    });
    kernels
}
