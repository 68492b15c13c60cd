//! A layer's weights on the host, with checked shapes.

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::routing::{Noise, Scores};
use serde::{Deserialize, Serialize};

/// How a device stores expert weights. Sums are f32 whatever the storage.
/// Router weights are always f32: they decide who computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum WeightFormat {
    /// 32-bit floats.
    #[default]
    F32,
    /// 16-bit IEEE floats, two to a u32.
    F16,
}

impl WeightFormat {
    /// Every format.
    pub const ALL: &'static [WeightFormat] = &[WeightFormat::F32, WeightFormat::F16];

    /// The name used in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            WeightFormat::F32 => "f32",
            WeightFormat::F16 => "f16",
        }
    }

    /// Bits of one weight.
    pub fn bits(self) -> u32 {
        match self {
            WeightFormat::F32 => 32,
            WeightFormat::F16 => 16,
        }
    }

    /// The value that a weight has once stored: what the reference must be given to be comparable.
    pub fn round(self, weight: f32) -> f32 {
        match self {
            WeightFormat::F32 => weight,
            WeightFormat::F16 => half::f16::from_f32(weight).to_f32(),
        }
    }
}

/// One layer's weights, f32, row-major, `[out, in]` as checkpoints store them. `expert_size` is `hidden_size`, or
/// `latent_size` where there is one; experts are those that have weights.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MoeWeights {
    /// `[num_experts, hidden_size]`
    pub router: Vec<f32>,
    /// `[num_experts]`, added to the logits.
    pub router_bias: Option<Vec<f32>>,
    /// `[experts, intermediate_size, expert_size]`; empty where the activation has no gate.
    pub gate_proj: Vec<f32>,
    /// `[experts, intermediate_size, expert_size]`
    pub up_proj: Vec<f32>,
    /// `[experts, expert_size, intermediate_size]`
    pub down_proj: Vec<f32>,
    /// What only some layers have.
    pub extras: ExtraWeights,
}

/// Tensors that only some layers have. Which ones are needed follows from the [`MoeConfig`]; others are errors.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ExtraWeights {
    /// `[num_experts]`, added to ranks, not to weights.
    pub selection_bias: Option<Vec<f32>>,
    /// `[num_experts]`, factor of each expert's weight.
    pub per_expert_scale: Option<Vec<f32>>,
    /// `[num_experts, hidden_size]`, for [`Noise::NoisyTopK`].
    pub router_noise: Option<Vec<f32>>,
    /// `[num_groups, hidden_size]`, for [`Scores::Hierarchical`].
    pub group_router: Option<Vec<f32>>,
    /// `[vocab_size, top_k]`, experts by token id.
    pub token_table: Option<Vec<u32>>,
    /// `[experts, intermediate_size]`
    pub gate_bias: Option<Vec<f32>>,
    /// `[experts, intermediate_size]`
    pub up_bias: Option<Vec<f32>>,
    /// `[experts, expert_size]`
    pub down_bias: Option<Vec<f32>>,
    /// `[latent_size, hidden_size]`
    pub latent_in: Option<Vec<f32>>,
    /// `[hidden_size, latent_size]`
    pub latent_out: Option<Vec<f32>>,
    /// `[hidden_size]`, as all norm weights: the factor itself, also where a checkpoint stores it minus one.
    pub router_norm: Option<Vec<f32>>,
    /// `[expert_size]`
    pub expert_norm: Option<Vec<f32>>,
    /// `[expert_size]`
    pub expert_out_norm: Option<Vec<f32>>,
    /// `[hidden_size]`
    pub routed_norm: Option<Vec<f32>>,
    /// `[hidden_size]`
    pub output_norm: Option<Vec<f32>>,
    /// `[hidden_size]`, added to the output before its norm.
    pub output_bias: Option<Vec<f32>>,
    /// `[num_shared, shared intermediate_size, hidden_size]`; empty where their activation has no gate.
    pub shared_gate_proj: Vec<f32>,
    /// `[num_shared, shared intermediate_size, hidden_size]`
    pub shared_up_proj: Vec<f32>,
    /// `[num_shared, hidden_size, shared intermediate_size]`
    pub shared_down_proj: Vec<f32>,
    /// `[num_shared, hidden_size]`, router rows of the shared experts.
    pub shared_gate: Option<Vec<f32>>,
}

impl MoeWeights {
    /// Each tensor that is there with its name and the shape that `config` gives it.
    pub fn tensors(&self, config: &MoeConfig) -> Vec<(&'static str, &[f32], Vec<usize>)> {
        let [h, i, e, d] = [
            config.hidden_size(),
            config.intermediate_size(),
            config.num_experts(),
            config.expert_size(),
        ]
        .map(|n| n as usize);
        let weighted = config.num_weighted_experts() as usize;
        let x = &self.extras;
        let mut tensors = vec![("router", self.router.as_slice(), vec![e, h])];
        if config.activation().is_gated() || !self.gate_proj.is_empty() {
            tensors.push(("gate_proj", &self.gate_proj, vec![weighted, i, d]));
        }
        tensors.push(("up_proj", &self.up_proj, vec![weighted, i, d]));
        tensors.push(("down_proj", &self.down_proj, vec![weighted, d, i]));
        if let Some(shared) = config.extras().shared {
            let [n, s] = [shared.num, shared.intermediate_size].map(|n| n as usize);
            if shared.activation.is_gated() {
                tensors.push(("shared_gate_proj", &x.shared_gate_proj, vec![n, s, h]));
            }
            tensors.push(("shared_up_proj", &x.shared_up_proj, vec![n, s, h]));
            tensors.push(("shared_down_proj", &x.shared_down_proj, vec![n, h, s]));
        }
        let latent = config.extras().latent_size.unwrap_or(0) as usize;
        let groups = config.routing().groups.map_or(0, |groups| groups.num_groups) as usize;
        let optional: [(&'static str, &Option<Vec<f32>>, Vec<usize>); 17] = [
            ("router_bias", &self.router_bias, vec![e]),
            ("selection_bias", &x.selection_bias, vec![e]),
            ("per_expert_scale", &x.per_expert_scale, vec![e]),
            ("router_noise", &x.router_noise, vec![e, h]),
            ("group_router", &x.group_router, vec![groups, h]),
            ("gate_bias", &x.gate_bias, vec![weighted, i]),
            ("up_bias", &x.up_bias, vec![weighted, i]),
            ("down_bias", &x.down_bias, vec![weighted, d]),
            ("latent_in", &x.latent_in, vec![latent, h]),
            ("latent_out", &x.latent_out, vec![h, latent]),
            ("router_norm", &x.router_norm, vec![h]),
            ("expert_norm", &x.expert_norm, vec![d]),
            ("expert_out_norm", &x.expert_out_norm, vec![d]),
            ("routed_norm", &x.routed_norm, vec![h]),
            ("output_norm", &x.output_norm, vec![h]),
            ("output_bias", &x.output_bias, vec![h]),
            ("shared_gate", &x.shared_gate, vec![config.num_gated_shared() as usize, h]),
        ];
        for (name, values, shape) in optional {
            tensors.extend(values.as_deref().map(|values| (name, values, shape)));
        }
        tensors
    }

    /// What is there is what `config` needs; lengths fit it, every value is finite, and `format` can hold every expert
    /// weight.
    pub fn validate(&self, config: &MoeConfig, format: WeightFormat) -> Result<()> {
        self.check_presence(config)?;
        for (tensor, values, shape) in self.tensors(config) {
            let expected = shape.iter().product::<usize>();
            if values.len() != expected {
                return Err(Error::LengthMismatch {
                    tensor,
                    shape: format!("{shape:?}"),
                    expected,
                    found: values.len(),
                });
            }
            check_finite(tensor, values)?;
            let is_expert = tensor.ends_with("_proj");
            if is_expert
                && format == WeightFormat::F16
                && let Some(index) = values.iter().position(|&w| !format.round(w).is_finite())
            {
                let (tensor, value) = (tensor.to_owned(), values[index]);
                return Err(Error::NotRepresentable { tensor, index, value, format: format.name() });
            }
        }
        if let (Some(table), Some(vocab)) = (&self.extras.token_table, config.vocab_size()) {
            let expected = vocab as usize * config.top_k() as usize;
            if table.len() != expected {
                let shape = format!("[{vocab}, {}]", config.top_k());
                return Err(Error::LengthMismatch { tensor: "token_table", shape, expected, found: table.len() });
            }
            if let Some(&id) = table.iter().find(|&&id| id >= config.num_experts()) {
                return Err(Error::config("token_table", id, format!("expert ids below {}", config.num_experts())));
            }
        }
        Ok(())
    }

    /// Nothing is missing, and nothing is there that would be left out in silence.
    fn check_presence(&self, config: &MoeConfig) -> Result<()> {
        let (x, c, routing) = (&self.extras, config.extras(), config.routing());
        let gated = config.activation().is_gated();
        let latent = c.latent_size.is_some();
        let shared = c.shared.is_some();
        let is = |tensor: &Option<Vec<f32>>| tensor.is_some();
        for (tensor, there, needed) in [
            ("gate_proj", !self.gate_proj.is_empty(), gated),
            ("router_noise", is(&x.router_noise), routing.noise == Noise::NoisyTopK),
            ("group_router", is(&x.group_router), routing.scores == Scores::Hierarchical),
            ("token_table", x.token_table.is_some(), config.vocab_size().is_some()),
            ("latent_in", is(&x.latent_in), latent),
            ("latent_out", is(&x.latent_out), latent),
            ("expert_norm", is(&x.expert_norm), c.expert_norm.is_some()),
            ("expert_out_norm", is(&x.expert_out_norm), c.expert_out_norm.is_some()),
            ("routed_norm", is(&x.routed_norm), c.routed_norm.is_some()),
            ("output_norm", is(&x.output_norm), c.output_norm.is_some()),
            ("router_norm", is(&x.router_norm), c.router_norm.is_some()),
            ("shared_gate_proj", !x.shared_gate_proj.is_empty(), c.shared.is_some_and(|s| s.activation.is_gated())),
            ("shared_up_proj", !x.shared_up_proj.is_empty(), shared),
            ("shared_down_proj", !x.shared_down_proj.is_empty(), shared),
            ("shared_gate", is(&x.shared_gate), config.num_gated_shared() > 0),
        ] {
            match (there, needed) {
                (false, true) => return Err(Error::config(tensor, "missing", "there, as the configuration needs it")),
                (true, false) => return Err(Error::config(tensor, "there", "none, as the configuration has no use for it")),
                _ => {}
            }
        }
        if is(&x.gate_bias) && !gated {
            return Err(Error::config("gate_bias", "there", "none: the activation has no gate"));
        }
        if is(&x.gate_bias) != is(&x.up_bias) && gated {
            return Err(Error::config("gate_bias", is(&x.gate_bias), "there exactly when up_bias is"));
        }
        if is(&x.selection_bias) && (routing.choices_are_given() || routing.is_dense()) {
            return Err(Error::config("selection_bias", "there", "none: the choices do not depend on ranks"));
        }
        Ok(())
    }

    /// The same weights as `format` will hold them: the input of the reference for a device with this storage.
    /// Only the matrices of experts are rounded.
    pub fn rounded(&self, format: WeightFormat) -> MoeWeights {
        let round = |values: &[f32]| values.iter().map(|&w| format.round(w)).collect();
        MoeWeights {
            router: self.router.clone(),
            router_bias: self.router_bias.clone(),
            gate_proj: round(&self.gate_proj),
            up_proj: round(&self.up_proj),
            down_proj: round(&self.down_proj),
            extras: ExtraWeights {
                shared_gate_proj: round(&self.extras.shared_gate_proj),
                shared_up_proj: round(&self.extras.shared_up_proj),
                shared_down_proj: round(&self.extras.shared_down_proj),
                ..self.extras.clone()
            },
        }
    }
}

/// The first NaN or infinity, as an error that says where it is.
pub(crate) fn check_finite(tensor: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite { tensor: tensor.to_owned(), index, value: values[index] }),
    }
}
