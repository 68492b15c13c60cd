//! Experts that come and go. The bytes of the others stay as they are, and so do the bits of every token whose choices
//! and weights do not depend on the edited expert.

use super::CpuLayer;
use super::experts::{Biases, Experts};
use super::load::routed_experts;
use super::panels::Panels;
use crate::error::Result;
use crate::model::config::MoeConfig;
use crate::model::source::{ExpertKind, ExpertMatrix, HostSource, Projection, read_expert};
use crate::model::weights::{ExpertWeights, OptionalTensors, check_expert_id, splice_row};

impl CpuLayer {
    /// Adds an expert after the others that have weights, and returns its id; those without weights move up by one.
    /// Nothing changes on an error.
    ///
    /// Its row of the router's noise, where there is any, is zeros.
    pub fn add_expert(&mut self, expert: &ExpertWeights) -> Result<u32> {
        let id = self.config.num_weighted_experts();
        let config = self.config.with_num_experts(self.config.num_experts() + 1)?;
        self.edit(config, id, 0, Some(expert))?;
        Ok(id)
    }

    /// Takes an expert out; those after it move down by one. Nothing changes on an error.
    pub fn remove_expert(&mut self, id: u32) -> Result<()> {
        check_expert_id(&self.config, id)?;
        let config = self.config.with_num_experts(self.config.num_experts() - 1)?;
        self.edit(config, id, 1, None)
    }

    /// Puts another expert in the place of this one. Nothing changes on an error.
    pub fn replace_expert(&mut self, id: u32, expert: &ExpertWeights) -> Result<()> {
        check_expert_id(&self.config, id)?;
        self.edit(self.config.clone(), id, 1, Some(expert))
    }

    /// First everything that can fail, then the change.
    fn edit(&mut self, config: MoeConfig, id: u32, removed: usize, inserted: Option<&ExpertWeights>) -> Result<()> {
        let at = id as usize;
        let packed = inserted.map(|expert| self.pack_expert(expert)).transpose()?;
        if inserted.is_some() {
            self.experts.reserve_one()?;
        }
        let no_row = Vec::new();
        let row = inserted.map_or(&no_row, |expert| &expert.router_row);
        let logits = spliced(&self.router.logits, at, removed, row)?;
        let noise = match &self.router.noise {
            Some(noise) if removed == 0 || inserted.is_none() => {
                Some(spliced(noise, at, removed, &vec![0.0; row.len()])?)
            }
            _ => None, // there is none, or the old row stays
        };

        self.config = config;
        self.experts.splice(at, removed, packed);
        self.router.logits = logits;
        self.router.noise = noise.or(self.router.noise.take());
        let router = &mut self.router;
        for (values, new) in [
            (&mut router.bias, inserted.map(|expert| expert.router_bias)),
            (&mut router.selection_bias, inserted.map(|expert| expert.selection_bias)),
            (&mut router.per_expert_scale, inserted.map(|expert| expert.per_expert_scale)),
        ] {
            if let Some(values) = values {
                splice_row(values, 1, at, removed, new.as_slice());
            }
        }
        Ok(())
    }

    /// One expert as this layer stores them, checked.
    fn pack_expert(&self, expert: &ExpertWeights) -> Result<Experts> {
        expert.validate(&self.config)?;
        let first_bias = self.experts.first.has_bias();
        expert.check_optional(&OptionalTensors {
            router_bias: self.router.bias.is_some(),
            selection_bias: self.router.selection_bias.is_some(),
            per_expert_scale: self.router.per_expert_scale.is_some(),
            gate_bias: first_bias && self.config.activation().is_gated(),
            up_bias: first_bias,
            down_bias: self.experts.down.has_bias(),
            output_bias: false, // not about experts
        })?;
        let weights = expert.matrices();
        let mut source = HostSource { config: &self.config, weights: &weights, formats: self.formats };
        let mut packed = routed_experts(&self.config, &self.formats);
        for projection in [Projection::First, Projection::Down] {
            let matrix = ExpertMatrix { kind: ExpertKind::Routed, projection, expert: 0 };
            packed.push(projection, &read_expert(&mut source, matrix)?)?;
        }
        Ok(packed.with_biases(Biases {
            gate: expert.gate_bias.as_deref(),
            up: expert.up_bias.as_deref(),
            down: expert.down_bias.as_deref(),
        }))
    }
}

/// A matrix of the router with other rows at `at`. Its columns lie side by side in a panel, so all of it is packed
/// anew: it is small.
fn spliced(matrix: &Panels, at: usize, removed: usize, inserted: &[f32]) -> Result<Panels> {
    let mut rows = matrix.unpack(pulp::Scalar, 0);
    splice_row(&mut rows, matrix.depth, at, removed, inserted);
    Panels::of_rows(&rows, matrix.depth)
}
