//! Work of each stage: the FLOPs it computes and the least bytes it has to move.

use super::pad4;
use crate::kernels::router;
use crate::model::config::MoeConfig;
use crate::model::formats::{LayerFormats, WeightFormat};

/// FLOPs and least bytes of one stage. A multiply-add is 2 FLOPs; bytes count each input and output once, and of the
/// weights those of as many experts as the batch can reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageCost {
    /// The stage's name, as dispatches are called.
    pub name: &'static str,
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

/// Which stages of a pass are apart, or in one.
#[derive(Clone, Copy, Debug)]
pub struct Dispatched {
    /// There is a permute.
    pub sorted: bool,
    /// The router's dot products are a dispatch of their own.
    pub logits_apart: bool,
    /// Down and combine are one dispatch.
    pub combine_fused: bool,
}

impl Dispatched {
    /// How a pass of these stages does it.
    pub fn of(stages: &[StageCost]) -> Self {
        let has = |name: &str| stages.iter().any(|stage| stage.name == name);
        Self { sorted: has("permute"), logits_apart: has("logits"), combine_fused: has("down_combine") }
    }
}

/// Costs of the stages that run and whose work is worth counting, in order. Norms, capacity and what else only some
/// layers have beside matrices are small.
///
/// `active_experts`: experts that got a token; `None`: as many as the batch can reach. `how`: which of them are apart, or
/// in one.
pub fn stages(
    config: &MoeConfig,
    formats: &LayerFormats,
    num_tokens: u32,
    active_experts: Option<u32>,
    how: Dispatched,
) -> Vec<StageCost> {
    let Dispatched { sorted, logits_apart, combine_fused } = how;
    let [t, h, d, i, e, k] = [
        num_tokens,
        config.hidden_size(),
        config.expert_size(),
        config.intermediate_size(),
        config.num_weighted_experts(),
        config.top_k(),
    ]
    .map(u64::from);
    let a = t * k;
    let reached = active_experts.map_or(e.min(a), u64::from);
    // Columns of some inputs each, a quad at a time, as they are stored.
    let weights = |format: WeightFormat, columns: u64, inputs: u64| {
        columns * format.quad_bytes(u32::try_from(inputs).unwrap_or(u32::MAX)) / 4
    };
    let [i4, d4, h4] =
        [config.intermediate_size(), config.expert_size(), config.hidden_size()].map(|n| u64::from(pad4(n)));
    let rows = u64::from(router::num_rows(config));
    let first = |gated: bool| if gated { 2 } else { 1 };
    let mut stages = if logits_apart {
        vec![("logits", 2 * t * h * rows, 4 * (t * h + rows * h + t * rows)), ("router", 0, 4 * (2 * t * rows + 2 * a))]
    } else {
        vec![("router", 2 * t * h * rows, 4 * (t * h + rows * h + t * rows + 2 * a))]
    };
    if sorted {
        stages.push(("permute", 0, 4 * (3 * a + e)));
    }
    if config.extras().latent_size.is_some() {
        stages.push(("latent_in", 2 * t * h * d, 4 * (h * d + t * h + t * d4)));
    }
    if let Some(shared) = config.extras().shared {
        let (n, s, s4) = (shared.num.into(), shared.intermediate_size.into(), pad4(shared.intermediate_size).into());
        let (n, s, s4): (u64, u64, u64) = (n, s, s4);
        let columns = first(shared.activation.is_gated()) * s;
        stages.push((
            "shared_gate_up",
            2 * n * t * columns * h,
            weights(formats.shared_gate_up, n * columns, h) + 4 * (t * h + n * t * s4),
        ));
        stages.push((
            "shared_down",
            2 * n * t * s * h,
            weights(formats.shared_down, n * h, s) + 4 * n * (t * s4 + t * h4),
        ));
    }
    let columns = first(config.activation().is_gated()) * i;
    stages.push((
        "gate_up",
        2 * a * columns * d,
        weights(formats.gate_up, reached * columns, d) + 4 * (t * d + a * i4),
    ));
    let down = (2 * a * d * i, weights(formats.down, reached * d, i) + 4 * a * i4);
    let combine = (2 * a * d, 4 * (a + t * d));
    if combine_fused {
        stages.push(("down_combine", down.0 + combine.0, down.1 + combine.1));
    } else {
        stages.push(("down", down.0, down.1 + 4 * a * d4));
        stages.push(("combine", combine.0, combine.1 + 4 * a * d4));
    }
    if config.extras().latent_size.is_some() {
        stages.push(("latent_out", 2 * t * h * d, 4 * (h * d + t * d4 + t * h4)));
    }
    stages.into_iter().map(|(name, flops, bytes)| StageCost { name, flops, bytes }).collect()
}
