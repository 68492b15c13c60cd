//! A layer's weights on the host, packed as they went to its device: what it is rebuilt from when that device is lost.

use crate::error::Result;
use crate::model::config::MoeConfig;
use crate::model::formats::LayerFormats;
use crate::model::source::{ExpertKind, ExpertSource, HostSource};
use crate::model::weights::{ExpertWeights, ExtraWeights, MoeWeights, check_expert_id};

/// Gate, up and down of an expert, as packed rows; the gate's are empty where there is none.
type PackedExpert = [Vec<u8>; 3];

/// Everything that a layer was built from.
#[derive(Debug)]
pub(crate) struct HostCopy {
    /// All but the matrices of experts.
    pub weights: MoeWeights,
    /// Experts that kernels are chosen for, whatever was added or removed since.
    pub nominal_experts: u32,
    formats: LayerFormats,
    routed: Vec<PackedExpert>,
    shared: Vec<PackedExpert>,
}

/// A change of the routed experts that is ready to be made.
pub(crate) struct Change<'a> {
    at: usize,
    removed: usize,
    inserted: Option<(&'a ExpertWeights, PackedExpert)>,
}

impl HostCopy {
    /// No experts yet: [`Keeping`] adds them.
    pub fn new(weights: &MoeWeights, formats: LayerFormats, nominal_experts: u32) -> Self {
        let extras = ExtraWeights {
            shared_gate_proj: Vec::new(),
            shared_up_proj: Vec::new(),
            shared_down_proj: Vec::new(),
            ..weights.extras.clone()
        };
        let weights = MoeWeights {
            router: weights.router.clone(),
            router_bias: weights.router_bias.clone(),
            gate_proj: Vec::new(),
            up_proj: Vec::new(),
            down_proj: Vec::new(),
            extras,
        };
        Self { weights, nominal_experts, formats, routed: Vec::new(), shared: Vec::new() }
    }

    fn expert(&mut self, kind: ExpertKind, expert: usize) -> &mut PackedExpert {
        let experts = match kind {
            ExpertKind::Routed => &mut self.routed,
            ExpertKind::Shared => &mut self.shared,
        };
        if experts.len() <= expert {
            experts.resize_with(expert + 1, PackedExpert::default);
        }
        &mut experts[expert]
    }

    /// Everything of a change that can fail. `removed` experts at `at` make place for another, or none.
    pub fn prepare<'a>(
        &self,
        config: &MoeConfig,
        (at, removed, inserted): (u32, u32, Option<&'a ExpertWeights>),
    ) -> Result<Change<'a>> {
        if removed > 0 {
            check_expert_id(config, at)?;
        }
        let inserted = match inserted {
            None => None,
            Some(expert) => {
                expert.validate(config)?;
                let weights = expert.matrices();
                let mut source = HostSource { config, weights: &weights, formats: self.formats };
                let [gate, up] = source.first(ExpertKind::Routed, 0)?;
                Some((expert, [gate, up, source.down(ExpertKind::Routed, 0)?]))
            }
        };
        Ok(Change { at: at as usize, removed: removed as usize, inserted })
    }

    /// Makes a change; `config` is the layer's before it.
    pub fn apply(&mut self, config: &MoeConfig, change: Change<'_>) {
        let Change { at, removed, inserted } = change;
        let (expert, packed) = inserted.unzip();
        // A replaced expert's row of the router's noise stays.
        let noise = self.weights.extras.router_noise.clone().filter(|_| removed > 0 && expert.is_some());
        self.weights.splice_without_matrices(config, at, removed, expert);
        let extras = &mut self.weights.extras;
        extras.router_noise = noise.or(extras.router_noise.take());
        self.routed.splice(at..at + removed, packed);
    }
}

impl ExpertSource for &HostCopy {
    fn formats(&self) -> LayerFormats {
        self.formats
    }

    fn first(&mut self, kind: ExpertKind, expert: usize) -> Result<[Vec<u8>; 2]> {
        Ok(self.packed(kind, expert).map_or_else(Default::default, |[gate, up, _]| [gate.clone(), up.clone()]))
    }

    fn down(&mut self, kind: ExpertKind, expert: usize) -> Result<Vec<u8>> {
        Ok(self.packed(kind, expert).map_or_else(Vec::new, |[_, _, down]| down.clone()))
    }
}

impl HostCopy {
    fn packed(&self, kind: ExpertKind, expert: usize) -> Option<&PackedExpert> {
        let experts = if kind == ExpertKind::Routed { &self.routed } else { &self.shared };
        experts.get(expert)
    }
}

/// A source that keeps what is read from it.
pub(crate) struct Keeping<'a> {
    pub source: &'a mut dyn ExpertSource,
    pub copy: HostCopy,
}

impl ExpertSource for Keeping<'_> {
    fn formats(&self) -> LayerFormats {
        self.source.formats()
    }

    fn first(&mut self, kind: ExpertKind, expert: usize) -> Result<[Vec<u8>; 2]> {
        let [gate, up] = self.source.first(kind, expert)?;
        let kept = self.copy.expert(kind, expert);
        (kept[0], kept[1]) = (gate.clone(), up.clone());
        Ok([gate, up])
    }

    fn down(&mut self, kind: ExpertKind, expert: usize) -> Result<Vec<u8>> {
        let down = self.source.down(kind, expert)?;
        self.copy.expert(kind, expert)[2] = down.clone();
        Ok(down)
    }
}
