//! A layer's weights on the host, with checked shapes.

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::formats::{self, WeightFormat};
use crate::model::routing::{Noise, Scores};

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
        let [h, i, e, d] =
            [config.hidden_size(), config.intermediate_size(), config.num_experts(), config.expert_size()]
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
        let optional = [
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
            tensors.extend(values.as_deref().map(|values: &[f32]| (name, values, shape)));
        }
        tensors
    }

    /// What is there is what `config` needs; lengths fit it, every value is finite, and `format` packs rows of these
    /// lengths.
    pub fn validate(&self, config: &MoeConfig, format: WeightFormat) -> Result<()> {
        self.check_presence(config, true)?;
        for (tensor, _, shape) in self.tensors(config) {
            if tensor.ends_with("_proj") {
                format.check_inputs(tensor, shape[2] as u32)?;
            }
        }
        self.check_tensors(config, true)
    }

    /// As [`MoeWeights::validate`], of weights whose experts are elsewhere.
    pub(crate) fn validate_without_experts(&self, config: &MoeConfig) -> Result<()> {
        self.check_presence(config, false)?;
        self.check_tensors(config, false)
    }

    fn check_tensors(&self, config: &MoeConfig, with_experts: bool) -> Result<()> {
        for (tensor, values, shape) in self.tensors(config) {
            if !with_experts && tensor.ends_with("_proj") {
                continue;
            }
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
    fn check_presence(&self, config: &MoeConfig, with_experts: bool) -> Result<()> {
        let (x, c, routing) = (&self.extras, config.extras(), config.routing());
        let gated = config.activation().is_gated();
        let latent = c.latent_size.is_some();
        let shared = c.shared.is_some();
        let is = |tensor: &Option<Vec<f32>>| tensor.is_some();
        for (tensor, there, needed) in [
            // Of a matrix that is needed, the length says that it is missing.
            ("gate_proj", gated || !self.gate_proj.is_empty(), gated),
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
            if !with_experts && tensor.ends_with("_proj") {
                continue;
            }
            match (there, needed) {
                (false, true) => return Err(Error::config(tensor, "missing", "there, as the configuration needs it")),
                (true, false) => {
                    return Err(Error::config(tensor, "there", "none, as the configuration has no use for it"));
                }
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

    /// Puts an expert in at index `at`, before those without weights, and returns the configuration that now fits.
    /// Nothing changes on an error.
    ///
    /// Its row of `router_noise`, where there is one, is zeros.
    pub fn insert_expert(&mut self, config: &MoeConfig, at: u32, expert: &ExpertWeights) -> Result<MoeConfig> {
        let weighted = config.num_weighted_experts();
        if at > weighted {
            return Err(Error::config("at", at, format!("at most {weighted}: experts without weights are the last")));
        }
        let grown = config.with_num_experts(config.num_experts() + 1)?;
        self.validate(config, WeightFormat::F32)?;
        expert.validate(config)?;
        expert.check_optional(&OptionalTensors::of(self))?;
        self.splice(config, at as usize, 0, Some(expert));
        Ok(grown)
    }

    /// Takes an expert out, whose id the next one gets, and returns the configuration that now fits. Nothing changes on
    /// an error.
    pub fn remove_expert(&mut self, config: &MoeConfig, id: u32) -> Result<MoeConfig> {
        check_expert_id(config, id)?;
        let shrunk = config.with_num_experts(config.num_experts() - 1)?;
        self.validate(config, WeightFormat::F32)?;
        self.splice(config, id as usize, 1, None);
        Ok(shrunk)
    }

    /// `removed` experts at `at` make place for the inserted one.
    fn splice(&mut self, config: &MoeConfig, at: usize, removed: usize, inserted: Option<&ExpertWeights>) {
        let size = config.intermediate_size() as usize * config.expert_size() as usize;
        let none = ExpertWeights::default();
        let new = inserted.unwrap_or(&none);
        splice_row(&mut self.up_proj, size, at, removed, &new.up_proj);
        splice_row(&mut self.down_proj, size, at, removed, &new.down_proj);
        if config.activation().is_gated() {
            splice_row(&mut self.gate_proj, size, at, removed, &new.gate_proj);
        }
        self.splice_without_matrices(config, at, removed, inserted);
    }

    /// As [`MoeWeights::splice`], for all but the experts' matrices.
    pub(crate) fn splice_without_matrices(
        &mut self,
        config: &MoeConfig,
        at: usize,
        removed: usize,
        inserted: Option<&ExpertWeights>,
    ) {
        let [h, i, d] = [config.hidden_size(), config.intermediate_size(), config.expert_size()].map(|n| n as usize);
        let none = ExpertWeights::default();
        let new = inserted.unwrap_or(&none);
        let extras = &mut self.extras;
        splice_row(&mut self.router, h, at, removed, &new.router_row);
        let scalar = |of: fn(&ExpertWeights) -> f32| inserted.map(of).into_iter().collect::<Vec<f32>>();
        let no_noise = vec![0.0; if inserted.is_some() { h } else { 0 }];
        let row = |bias: &Option<Vec<f32>>| bias.clone().unwrap_or_default();
        for (values, size, row) in [
            (&mut self.router_bias, 1, scalar(|expert| expert.router_bias)),
            (&mut extras.selection_bias, 1, scalar(|expert| expert.selection_bias)),
            (&mut extras.per_expert_scale, 1, scalar(|expert| expert.per_expert_scale)),
            (&mut extras.router_noise, h, no_noise),
            (&mut extras.gate_bias, i, row(&new.gate_bias)),
            (&mut extras.up_bias, i, row(&new.up_bias)),
            (&mut extras.down_bias, d, row(&new.down_bias)),
        ] {
            if let Some(values) = values {
                splice_row(values, size, at, removed, &row);
            }
        }
    }

    /// The same weights as `format` will hold them: the input of the reference for a device with this storage.
    /// Only the matrices of experts are rounded.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] where rows are no multiple of the format's blocks, [`Error::NotRepresentable`].
    pub fn rounded(&self, config: &MoeConfig, format: WeightFormat) -> Result<MoeWeights> {
        let mut rounded = self.clone();
        rounded.round(config, format)?;
        Ok(rounded)
    }

    /// As [`MoeWeights::rounded`], in place. On an error, some are rounded.
    pub fn round(&mut self, config: &MoeConfig, format: WeightFormat) -> Result<()> {
        let x = &mut self.extras;
        let (d, i) = (config.expert_size(), config.intermediate_size());
        let (h, s) = (config.hidden_size(), config.extras().shared.map_or(1, |shared| shared.intermediate_size));
        for (tensor, values, rows, inputs) in [
            ("gate_proj", &mut self.gate_proj, i, d),
            ("up_proj", &mut self.up_proj, i, d),
            ("down_proj", &mut self.down_proj, d, i),
            ("shared_gate_proj", &mut x.shared_gate_proj, s, h),
            ("shared_up_proj", &mut x.shared_up_proj, s, h),
            ("shared_down_proj", &mut x.shared_down_proj, h, s),
        ] {
            for (matrix, values) in values.chunks_mut(rows as usize * inputs as usize).enumerate() {
                let packed = pack_matrix(format, tensor, matrix, inputs, values)?;
                values.copy_from_slice(&formats::decode(format, inputs as usize, &packed));
            }
        }
        Ok(())
    }
}

/// Packed rows of matrix number `matrix` of a tensor, `values [rows, inputs]`.
pub(crate) fn pack_matrix(
    format: WeightFormat,
    tensor: &'static str,
    matrix: usize,
    inputs: u32,
    values: &[f32],
) -> Result<Vec<u8>> {
    format.check_inputs(tensor, inputs)?;
    formats::encode(format, inputs as usize, values).map_err(|at| Error::NotRepresentable {
        tensor: tensor.to_owned(),
        index: matrix * values.len() + at.index,
        value: at.value,
        format: format.name(),
    })
}

/// The first NaN or infinity, as an error that says where it is.
pub(crate) fn check_finite(tensor: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite { tensor: tensor.to_owned(), index, value: values[index] }),
    }
}

/// The id of an expert that has weights.
pub(crate) fn check_expert_id(config: &MoeConfig, id: u32) -> Result<()> {
    let weighted = config.num_weighted_experts();
    let expected = || format!("an expert with weights, 0 to {}", weighted - 1);
    if id < weighted { Ok(()) } else { Err(Error::config("id", id, expected())) }
}

/// `removed` rows of this size at `at` make place for `inserted`.
pub(crate) fn splice_row<T: Copy>(values: &mut Vec<T>, size: usize, at: usize, removed: usize, inserted: &[T]) {
    values.splice(at * size..(at + removed) * size, inserted.iter().copied());
}

/// One expert with its part of the router, for a layer whose experts come and go. Shapes as in [`MoeWeights`].
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertWeights {
    /// `[intermediate_size, expert_size]`; empty where the activation has no gate.
    pub gate_proj: Vec<f32>,
    /// `[intermediate_size, expert_size]`
    pub up_proj: Vec<f32>,
    /// `[expert_size, intermediate_size]`
    pub down_proj: Vec<f32>,
    /// `[intermediate_size]`, there exactly when the layer's experts have it, as the other two.
    pub gate_bias: Option<Vec<f32>>,
    /// `[intermediate_size]`
    pub up_bias: Option<Vec<f32>>,
    /// `[expert_size]`
    pub down_bias: Option<Vec<f32>>,
    /// `[hidden_size]`
    pub router_row: Vec<f32>,
    /// 0 where the layer's router has no bias.
    pub router_bias: f32,
    /// 0 where the layer has none.
    pub selection_bias: f32,
    /// 1 where the layer has none.
    pub per_expert_scale: f32,
}

impl Default for ExpertWeights {
    /// Empty tensors, no bias, scale 1.
    fn default() -> Self {
        Self {
            gate_proj: Vec::new(),
            up_proj: Vec::new(),
            down_proj: Vec::new(),
            gate_bias: None,
            up_bias: None,
            down_bias: None,
            router_row: Vec::new(),
            router_bias: 0.0,
            selection_bias: 0.0,
            per_expert_scale: 1.0,
        }
    }
}

/// Which of the tensors that a layer may or may not have are there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OptionalTensors {
    /// Added to logits.
    pub router_bias: bool,
    /// Added to ranks.
    pub selection_bias: bool,
    /// Factor of weights.
    pub per_expert_scale: bool,
    /// Of the gate projections.
    pub gate_bias: bool,
    /// Of the up projections.
    pub up_bias: bool,
    /// Of the down projections.
    pub down_bias: bool,
    /// Of the layer.
    pub output_bias: bool,
}

impl OptionalTensors {
    /// Those that are there.
    pub fn of(weights: &MoeWeights) -> Self {
        let extras = &weights.extras;
        Self {
            router_bias: weights.router_bias.is_some(),
            selection_bias: extras.selection_bias.is_some(),
            per_expert_scale: extras.per_expert_scale.is_some(),
            gate_bias: extras.gate_bias.is_some(),
            up_bias: extras.up_bias.is_some(),
            down_bias: extras.down_bias.is_some(),
            output_bias: extras.output_bias.is_some(),
        }
    }
}

impl ExpertWeights {
    /// Its matrices as those of a layer of one expert: for packing.
    pub(crate) fn matrices(&self) -> MoeWeights {
        MoeWeights {
            gate_proj: self.gate_proj.clone(),
            up_proj: self.up_proj.clone(),
            down_proj: self.down_proj.clone(),
            ..MoeWeights::default()
        }
    }

    /// Lengths fit `config`, and every value is finite.
    pub fn validate(&self, config: &MoeConfig) -> Result<()> {
        let [h, i, d] = [config.hidden_size(), config.intermediate_size(), config.expert_size()].map(|n| n as usize);
        let gated = config.activation().is_gated();
        if !gated && (!self.gate_proj.is_empty() || self.gate_bias.is_some()) {
            return Err(Error::config("gate_proj", "there", "none: the activation has no gate"));
        }
        let gate_shape = if gated { vec![i, d] } else { vec![0] };
        let matrices = [
            ("gate_proj", &self.gate_proj, gate_shape),
            ("up_proj", &self.up_proj, vec![i, d]),
            ("down_proj", &self.down_proj, vec![d, i]),
            ("router_row", &self.router_row, vec![h]),
        ];
        let biases =
            [("gate_bias", &self.gate_bias, i), ("up_bias", &self.up_bias, i), ("down_bias", &self.down_bias, d)];
        let biases = biases.into_iter().filter_map(|(tensor, bias, size)| Some((tensor, bias.as_ref()?, vec![size])));
        for (tensor, values, shape) in matrices.into_iter().chain(biases) {
            let (expected, found) = (shape.iter().product(), values.len());
            if found != expected {
                return Err(Error::LengthMismatch { tensor, shape: format!("{shape:?}"), expected, found });
            }
            check_finite(tensor, values)?;
        }
        check_finite("router_bias", &[self.router_bias])?;
        check_finite("selection_bias", &[self.selection_bias])?;
        check_finite("per_expert_scale", &[self.per_expert_scale])
    }

    /// It has what the layer's other experts have, and nothing that would be left out in silence.
    pub(crate) fn check_optional(&self, there: &OptionalTensors) -> Result<()> {
        for (field, value, neutral, there) in [
            ("router_bias", self.router_bias, 0.0, there.router_bias),
            ("selection_bias", self.selection_bias, 0.0, there.selection_bias),
            ("per_expert_scale", self.per_expert_scale, 1.0, there.per_expert_scale),
        ] {
            if value != neutral && !there {
                return Err(Error::config(field, value, format!("{neutral}, as the layer has no such tensor")));
            }
        }
        for (field, bias, there) in [
            ("gate_bias", &self.gate_bias, there.gate_bias),
            ("up_bias", &self.up_bias, there.up_bias),
            ("down_bias", &self.down_bias, there.down_bias),
        ] {
            match (bias.is_some(), there) {
                (true, false) => return Err(Error::config(field, "there", "none, as the layer's other experts")),
                (false, true) => return Err(Error::config(field, "missing", "there, as in the layer's other experts")),
                _ => {}
            }
        }
        Ok(())
    }
}
