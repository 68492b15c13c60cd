//! Work of each stage: the FLOPs it computes and the least bytes it has to move.

use super::pad4;
use crate::kernels::Stage;
use crate::model::config::MoeConfig;
use crate::model::weights::WeightFormat;

/// FLOPs and least bytes of one stage. A multiply-add is 2 FLOPs; bytes count each input and output once, and of the
/// weights those of as many experts as the batch can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageCost {
    /// The stage's name.
    pub name: &'static str,
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

/// Costs of the stages that run, in order.
pub fn stages(config: &MoeConfig, format: WeightFormat, num_tokens: u32, sorted: bool) -> Vec<StageCost> {
    let [t, h, i, e, k] =
        [num_tokens, config.hidden_size(), config.intermediate_size(), config.num_experts(), config.top_k()]
            .map(u64::from);
    let a = t * k;
    let reached = e.min(a);
    let weights = |count: u64| reached * count * u64::from(format.bits()) / 8;
    let (i4, h4) = (u64::from(pad4(config.intermediate_size())), u64::from(pad4(config.hidden_size())));
    Stage::ALL
        .into_iter()
        .filter(|&stage| sorted || stage != Stage::Permute)
        .map(|stage| {
            let (flops, bytes) = match stage {
                Stage::Router => (2 * t * h * e, 4 * (t * h + e * h + t * e + 2 * a)),
                Stage::Permute => (0, 4 * (3 * a + e)),
                Stage::GateUp => (2 * a * 2 * i * h, weights(2 * i * h) + 4 * (t * h + a * i4)),
                Stage::Down => (2 * a * h * i, weights(h * i) + 4 * (a * i4 + a * h4)),
                Stage::Combine => (2 * a * h, 4 * (a * h4 + a + t * h)),
                Stage::ProbeFma | Stage::ProbeRead => (0, 0), // not in Stage::ALL
            };
            StageCost { name: stage.name(), flops, bytes }
        })
        .collect()
}
