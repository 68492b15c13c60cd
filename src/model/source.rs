//! Where a layer's expert matrices come from, one expert at a time: from host memory, or from a checkpoint while it is
//! read. A layer's other tensors are small, and are in its [`MoeWeights`].

use crate::error::Result;
use crate::model::config::MoeConfig;
use crate::model::formats::LayerFormats;
use crate::model::weights::{MoeWeights, pack_matrix};

/// Experts of one shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExpertKind {
    /// Those that tokens are routed to.
    Routed,
    /// Those that every token goes through.
    Shared,
}

/// The expert matrices of a layer, as packed rows of their formats.
pub(crate) trait ExpertSource: Send {
    /// How they are packed.
    fn formats(&self) -> LayerFormats;

    /// The first projections of an expert: those of the gate, empty where there is none, and those beside it, each
    /// `[intermediate_size, expert_size]`.
    fn first(&mut self, kind: ExpertKind, expert: usize) -> Result<[Vec<u8>; 2]>;

    /// The second projection, `[expert_size, intermediate_size]`.
    fn down(&mut self, kind: ExpertKind, expert: usize) -> Result<Vec<u8>>;
}

/// From f32 in host memory.
pub(crate) struct HostSource<'a> {
    pub config: &'a MoeConfig,
    pub weights: &'a MoeWeights,
    pub formats: LayerFormats,
}

impl ExpertSource for HostSource<'_> {
    fn formats(&self) -> LayerFormats {
        self.formats
    }

    fn first(&mut self, kind: ExpertKind, expert: usize) -> Result<[Vec<u8>; 2]> {
        let (c, w) = (self.config, self.weights);
        let (format, names, tensors, rows, inputs) = match kind {
            ExpertKind::Routed => {
                let tensors = [&w.gate_proj, &w.up_proj];
                (self.formats.gate_up, ["gate_proj", "up_proj"], tensors, c.intermediate_size(), c.expert_size())
            }
            ExpertKind::Shared => {
                let tensors = [&w.extras.shared_gate_proj, &w.extras.shared_up_proj];
                let rows = c.extras().shared.map_or(0, |shared| shared.intermediate_size);
                (self.formats.shared_gate_up, ["shared_gate_proj", "shared_up_proj"], tensors, rows, c.hidden_size())
            }
        };
        let size = rows as usize * inputs as usize;
        let pack = |n: usize| match tensors[n].get(expert * size..(expert + 1) * size) {
            Some(values) => pack_matrix(format, names[n], expert, inputs, values),
            None => Ok(Vec::new()),
        };
        Ok([pack(0)?, pack(1)?])
    }

    fn down(&mut self, kind: ExpertKind, expert: usize) -> Result<Vec<u8>> {
        let (c, w) = (self.config, self.weights);
        let (format, name, tensor, rows, inputs) = match kind {
            ExpertKind::Routed => {
                (self.formats.down, "down_proj", &w.down_proj, c.expert_size(), c.intermediate_size())
            }
            ExpertKind::Shared => {
                let inputs = c.extras().shared.map_or(0, |shared| shared.intermediate_size);
                (self.formats.shared_down, "shared_down_proj", &w.extras.shared_down_proj, c.hidden_size(), inputs)
            }
        };
        let size = rows as usize * inputs as usize;
        match tensor.get(expert * size..(expert + 1) * size) {
            Some(values) => pack_matrix(format, name, expert, inputs, values),
            None => Ok(Vec::new()),
        }
    }
}
