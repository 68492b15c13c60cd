//! From weights to a layer, one expert after the other.

use super::CpuLayer;
use super::experts::{Biases, Experts};
use super::norm::RmsNorm;
use super::panels::Panels;
use super::router::Router;
use crate::error::Result;
use crate::model::config::{MoeConfig, SharedExperts};
use crate::model::formats::{LayerFormats, WeightFormat};
use crate::model::routing::NonFinite;
use crate::model::source::{ExpertKind, ExpertMatrix, ExpertSource, HostSource, Projection, read_ahead};
use crate::model::weights::MoeWeights;
use std::sync::Mutex;

impl CpuLayer {
    /// Packs `weights` for this processor. `format` is how expert weights are stored; sums are f32 in any case.
    ///
    /// Errors: what [`MoeWeights::validate`] finds, weights that the format cannot hold, memory that cannot be had.
    pub fn new(config: MoeConfig, weights: &MoeWeights, format: WeightFormat) -> Result<Self> {
        weights.validate(&config, format)?;
        let mut source = HostSource { config: &config, weights, formats: format.into() };
        Self::from_source(config.clone(), weights, &mut source, &mut |_, _| {})
    }

    /// The matrices of experts from `source`, in its formats, one by one; everything else from `weights`, which are
    /// checked. `progress(done, total)` is told of their bytes.
    pub(crate) fn from_source(
        config: MoeConfig,
        weights: &MoeWeights,
        source: &mut dyn ExpertSource,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let formats = source.formats();
        formats.check(&config)?;
        let (extras, surroundings) = (&weights.extras, config.extras());
        let mut experts = routed_experts(&config, &formats);
        let mut shared = surroundings.shared.map(|shared| shared_experts(&config, &shared, &formats));
        let num_shared = surroundings.shared.map_or(0, |shared| shared.num);
        let mut matrices = Vec::new();
        for (kind, num) in [(ExpertKind::Routed, config.num_weighted_experts()), (ExpertKind::Shared, num_shared)] {
            for expert in 0..num as usize {
                matrices.extend([Projection::First, Projection::Down].map(|projection| ExpertMatrix {
                    kind,
                    projection,
                    expert,
                }));
            }
        }
        let bytes = |matrix: &ExpertMatrix| match matrix.kind {
            ExpertKind::Routed => experts.bytes_of(matrix.projection),
            ExpertKind::Shared => shared.as_ref().map_or(0, |shared| shared.bytes_of(matrix.projection)),
        };
        let total = matrices.iter().map(bytes).sum();
        let mut coming = matrices.iter();
        pollster::block_on(read_ahead(source, &matrices, async |rows| {
            let Some(matrix) = coming.next() else { return Ok(()) };
            match (matrix.kind, &mut shared) {
                (ExpertKind::Shared, Some(shared)) => shared.push(matrix.projection, &rows)?,
                _ => experts.push(matrix.projection, &rows)?,
            }
            progress(experts.bytes() + shared.as_ref().map_or(0, Experts::bytes), total);
            Ok(())
        }))?;
        let biases = Biases {
            gate: extras.gate_bias.as_deref(),
            up: extras.up_bias.as_deref(),
            down: extras.down_bias.as_deref(),
        };
        let [h, d] = [config.hidden_size(), config.expert_size()].map(|n| n as usize);
        let matrix =
            |rows: &Option<Vec<f32>>, width| rows.as_deref().map(|rows| Panels::of_rows(rows, width)).transpose();
        Ok(Self {
            formats,
            simd: pulp::Arch::new(),
            router: Router::pack(&config, weights)?,
            experts: experts.with_biases(biases),
            shared,
            latent_in: matrix(&extras.latent_in, h)?,
            latent_out: matrix(&extras.latent_out, d)?,
            router_norm: RmsNorm::new(surroundings.router_norm, &extras.router_norm),
            expert_norm: RmsNorm::new(surroundings.expert_norm, &extras.expert_norm),
            expert_out_norm: RmsNorm::new(surroundings.expert_out_norm, &extras.expert_out_norm),
            routed_norm: RmsNorm::new(surroundings.routed_norm, &extras.routed_norm),
            output_norm: RmsNorm::new(surroundings.output_norm, &extras.output_norm),
            output_bias: extras.output_bias.clone(),
            non_finite: NonFinite::default(),
            scratch: Mutex::default(),
            config,
        })
    }
}

/// Bytes that the matrices of such a layer's experts will take, shared ones included.
pub(crate) fn weight_bytes(config: &MoeConfig, formats: &LayerFormats) -> u64 {
    let of_one =
        |experts: &Experts| [Projection::First, Projection::Down].map(|p| experts.bytes_of(p)).iter().sum::<u64>();
    let shared = config.extras().shared;
    let shared = shared.map_or(0, |s| u64::from(s.num) * of_one(&shared_experts(config, &s, formats)));
    u64::from(config.num_weighted_experts()) * of_one(&routed_experts(config, formats)) + shared
}

/// The experts that tokens are routed to; none yet.
pub(super) fn routed_experts(config: &MoeConfig, formats: &LayerFormats) -> Experts {
    let sizes = [config.expert_size(), config.intermediate_size()].map(|n| n as usize);
    Experts::new(config.activation(), sizes, [formats.gate_up, formats.down])
}

/// Those of every token; none yet.
fn shared_experts(config: &MoeConfig, shared: &SharedExperts, formats: &LayerFormats) -> Experts {
    let sizes = [config.hidden_size(), shared.intermediate_size].map(|n| n as usize);
    Experts::new(shared.activation, sizes, [formats.shared_gate_up, formats.shared_down])
}
