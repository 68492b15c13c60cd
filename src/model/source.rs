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

/// One of an expert's two projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Projection {
    /// That of the gate, where there is one, and the one beside it.
    First,
    /// The one after the activation.
    Down,
}

/// Which matrix of a layer's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ExpertMatrix {
    pub kind: ExpertKind,
    pub projection: Projection,
    pub expert: usize,
}

/// Packed rows of one matrix of one expert. With a gate there are two: its own, and those beside it.
pub(crate) struct PackedRows(pub Vec<u8>, pub Option<Vec<u8>>);

/// What `source` has of one matrix.
pub(crate) fn read_expert(source: &mut dyn ExpertSource, matrix: ExpertMatrix) -> Result<PackedRows> {
    match matrix.projection {
        Projection::First => {
            let [gate, up] = source.first(matrix.kind, matrix.expert)?;
            Ok(if gate.is_empty() { PackedRows(up, None) } else { PackedRows(gate, Some(up)) })
        }
        Projection::Down => Ok(PackedRows(source.down(matrix.kind, matrix.expert)?, None)),
    }
}

/// Hands what `source` has of each matrix to `take`, in order. Where there are threads, the next is read and packed
/// while the last is being taken.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) async fn read_ahead(
    source: &mut dyn ExpertSource,
    matrices: &[ExpertMatrix],
    mut take: impl AsyncFnMut(PackedRows) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        // One waits, one is being read, one is being taken.
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        scope.spawn(move || {
            for &matrix in matrices {
                let rows = read_expert(source, matrix);
                let failed = rows.is_err();
                // Nobody takes it any more if taking failed.
                if sender.send(rows).is_err() || failed {
                    return;
                }
            }
        });
        pollster::block_on(async {
            for rows in receiver {
                take(rows?).await?;
            }
            Ok(())
        })
    })
}

/// As above, one after the other.
#[cfg(target_arch = "wasm32")]
pub(crate) async fn read_ahead(
    source: &mut dyn ExpertSource,
    matrices: &[ExpertMatrix],
    mut take: impl AsyncFnMut(PackedRows) -> Result<()>,
) -> Result<()> {
    for &matrix in matrices {
        take(read_expert(source, matrix)?).await?;
    }
    Ok(())
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
