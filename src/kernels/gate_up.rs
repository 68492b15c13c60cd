//! Stage 3: each expert's first projections and its activation. See `shaders/gate_up.wgsl`.

use super::matmul::{MatmulChoice, Tiles};
use super::{Access, Input, Kernel, Part, Stage, bind, wgsl};
use crate::model::activation::{Activation, Form, Function};
use crate::model::formats::WeightFormat;

/// What else the stage does while storing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// Each expert has a bias.
    pub bias: bool,
    /// The input is multiplied by the token's weight.
    pub weigh_input: bool,
}

/// The grouped matmul `choice` with gathered input and fused activation.
pub fn kernel(
    choice: MatmulChoice,
    tiles: Tiles,
    format: WeightFormat,
    activation: Activation,
    epilogue: Epilogue,
    input: Input,
) -> Kernel {
    let mut own = vec![function(activation.function)];
    let of_function = matches!(activation.function, Function::Silu | Function::GeluTanh | Function::GeluQuick);
    if of_function || matches!(activation.form, Form::GptOss { .. } | Form::SoftCapped { .. }) {
        own.push(wgsl!("times_sigmoid"));
    }
    match activation.form {
        Form::Plain => own.push(wgsl!("store_plain")),
        form => own.extend([form_part(form), wgsl!("store_gated")]),
    }
    own.push(if epilogue.bias { wgsl!("bias_experts") } else { wgsl!("bias_none") });
    own.push(if epilogue.weigh_input { wgsl!("input_weighted") } else { wgsl!("input_unweighted") });
    own.push(wgsl!("gate_up"));
    let mut kernel = choice.kernel(Stage::GateUp, tiles, format, input, &own);
    if activation != Activation::SWIGLU {
        kernel.label = format!("{}.{}", kernel.label, activation.name());
    }
    kernel.bindings.push(bind(5, "intermediate", Access::Write)); // [num_rows, intermediate_size padded to 4]
    if epilogue.bias {
        kernel.label.push_str(".bias");
        kernel.bindings.push(bind(6, "bias", Access::Read)); // [experts, packed columns]
    }
    if epilogue.weigh_input {
        kernel.label.push_str(".weighted");
        kernel.bindings.push(bind(7, "topk_weights", Access::Read)); // [num_tokens, top_k]
    }
    kernel
}

fn function(function: Function) -> Part {
    match function {
        Function::Silu => wgsl!("function_silu"),
        Function::Gelu => wgsl!("function_gelu"),
        Function::GeluTanh => wgsl!("function_gelu_tanh"),
        Function::GeluQuick => wgsl!("function_gelu_quick"),
        Function::Relu => wgsl!("function_relu"),
        Function::Relu2 => wgsl!("function_relu2"),
    }
}

fn form_part(form: Form) -> Part {
    match form {
        Form::Clamped { .. } => wgsl!("activation_clamped"),
        Form::ClampedAfter { .. } => wgsl!("activation_clamped_after"),
        Form::GptOss { .. } => wgsl!("activation_gpt_oss"),
        Form::SoftCapped { .. } => wgsl!("activation_soft_capped"),
        Form::Gated | Form::Plain => wgsl!("activation_gated"),
    }
}
