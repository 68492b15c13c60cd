//! A layer's weights on the host, with checked shapes.

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
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

/// One layer's weights, f32, row-major, `[out, in]` as checkpoints store them.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeWeights {
    /// `[num_experts, hidden_size]`
    pub router: Vec<f32>,
    /// `[num_experts]`, added to the logits.
    pub router_bias: Option<Vec<f32>>,
    /// `[num_experts, intermediate_size, hidden_size]`
    pub gate_proj: Vec<f32>,
    /// `[num_experts, intermediate_size, hidden_size]`
    pub up_proj: Vec<f32>,
    /// `[num_experts, hidden_size, intermediate_size]`
    pub down_proj: Vec<f32>,
}

impl MoeWeights {
    /// Each tensor with its name and the shape that `config` gives it.
    pub fn tensors(&self, config: &MoeConfig) -> Vec<(&'static str, &[f32], Vec<usize>)> {
        let [h, i, e] = [config.hidden_size(), config.intermediate_size(), config.num_experts()].map(|n| n as usize);
        let mut tensors = vec![("router", self.router.as_slice(), vec![e, h])];
        if let Some(bias) = &self.router_bias {
            tensors.push(("router_bias", bias, vec![e]));
        }
        tensors.push(("gate_proj", &self.gate_proj, vec![e, i, h]));
        tensors.push(("up_proj", &self.up_proj, vec![e, i, h]));
        tensors.push(("down_proj", &self.down_proj, vec![e, h, i]));
        tensors
    }

    /// Lengths fit `config`, every value is finite, and `format` can hold every expert weight.
    pub fn validate(&self, config: &MoeConfig, format: WeightFormat) -> Result<()> {
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
        Ok(())
    }

    /// The same weights as `format` will hold them: the input of the reference for a device with this storage.
    pub fn rounded(&self, format: WeightFormat) -> MoeWeights {
        let round = |values: &[f32]| values.iter().map(|&w| format.round(w)).collect();
        MoeWeights {
            router: self.router.clone(),
            router_bias: self.router_bias.clone(),
            gate_proj: round(&self.gate_proj),
            up_proj: round(&self.up_proj),
            down_proj: round(&self.down_proj),
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
