//! One layer in its files: its small tensors at once, its experts one by one.

use super::{Found, LayerReader, Shards, Storage};
use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::family::Family;
use crate::model::formats::{self, LayerFormats, WeightFormat};
use crate::model::source::{ExpertKind, ExpertSource};
use crate::model::stored::PackedMatrix;
use crate::model::tensor_file;
use crate::model::weights::MoeWeights;
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// A tensor of a layer, for those who copy it: `count` matrices `[rows, columns]`.
pub(crate) struct Tensor {
    /// With `{expert}` where there is one for each.
    pub name: String,
    /// Names in files.
    pub files: Vec<String>,
    pub count: usize,
    pub rows: usize,
    pub columns: usize,
    /// It holds matrices of experts.
    pub is_expert: bool,
}

/// A layer in its files: described, found and checked, but not read.
pub(crate) struct LayerFile<'c> {
    reader: LayerReader<'c>,
    shards: Shards<'c>,
    found: Vec<Found>,
    /// Types of the tensors.
    pub stored_as: BTreeSet<String>,
}

/// Slots of expert matrices: gate, up, both, down.
fn expert_slots(kind: ExpertKind) -> [&'static str; 4] {
    match kind {
        ExpertKind::Routed => ["gate_proj", "up_proj", "gate_up_proj", "down_proj"],
        ExpertKind::Shared => ["shared_gate_proj", "shared_up_proj", "shared_gate_up_proj", "shared_down_proj"],
    }
}

impl<'c> LayerFile<'c> {
    /// The layer.
    pub fn config(&self) -> &MoeConfig {
        &self.reader.config
    }

    /// Its description.
    pub fn family(&self) -> &'c Family {
        self.reader.family
    }

    /// In front of its tensors' names.
    pub fn prefix(&self) -> &str {
        &self.reader.prefix
    }

    /// Finds every tensor and checks shapes, so that sizes are bounded by what is on disk.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tensor under the prefix that is not described: a bias, a scale or a shared expert
    /// must not be left out in silence.
    pub fn open(reader: LayerReader<'c>, mut shards: Shards<'c>) -> Result<Self> {
        let found = reader.find(&shards)?;
        reader.check_all_used(&mut shards, &found)?;
        let mut stored_as = BTreeSet::new();
        for tensor in &found {
            reader.check(&mut shards, tensor, &mut stored_as)?;
        }
        Ok(Self { reader, shards, found, stored_as })
    }

    /// All tensors but the matrices of experts, and the factor of the routing scale, if one is stored.
    pub fn small(&mut self) -> Result<(MoeWeights, Option<f32>)> {
        let expert_slots = [expert_slots(ExpertKind::Routed), expert_slots(ExpertKind::Shared)].concat();
        let mut values: BTreeMap<&'static str, Vec<f32>> = BTreeMap::new();
        let mut token_table = None;
        let Self { reader, shards, found, .. } = self;
        for tensor in found.iter().filter(|tensor| !expert_slots.contains(&tensor.slot)) {
            match tensor.slot {
                "token_table" => token_table = Some(reader.read_table(shards, tensor)?),
                "gate_up_bias" => {
                    let [mut gate, mut up] = [Vec::new(), Vec::new()];
                    for item in 0..tensor.shape.count {
                        let [first, second] = reader.read_fused(shards, tensor, item)?;
                        gate.extend(first.to_f32());
                        up.extend(second.to_f32());
                    }
                    values.extend([("gate_bias", gate), ("up_bias", up)]);
                }
                slot => {
                    let mut all = Vec::new();
                    for item in 0..tensor.shape.count {
                        all.extend(reader.read_matrix(shards, tensor, item)?.to_f32());
                    }
                    values.insert(slot, all);
                }
            }
        }
        Ok(reader.assemble(values, token_table))
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        self.shards.path
    }

    /// Every tensor.
    pub fn tensors(&self) -> Vec<Tensor> {
        let experts = [ExpertKind::Routed, ExpertKind::Shared].map(expert_slots).concat();
        let describe = |tensor: &Found| Tensor {
            name: format!("{}{}", self.reader.prefix, tensor.pattern),
            files: self.reader.tensor_names(tensor),
            count: tensor.shape.count,
            rows: tensor.shape.rows,
            columns: tensor.shape.columns,
            is_expert: experts.contains(&tensor.slot),
        };
        self.found.iter().map(describe).collect()
    }

    /// Matrix `item` of a tensor, as it is stored.
    pub fn read(&mut self, tensor: usize, item: usize) -> Result<PackedMatrix> {
        self.reader.read_matrix(&mut self.shards, &self.found[tensor], item)
    }

    /// A tensor's matrices are stored `[in, out]`.
    pub fn is_transposed(&self, tensor: usize) -> bool {
        self.reader.layout.is_transposed(self.found[tensor].slot)
    }

    /// Type, shape and bytes of a tensor whose numbers are stored one by one; `None` for others.
    pub fn plain(&mut self, name: &str) -> Result<Option<(Dtype, Vec<usize>, u64)>> {
        let Storage::Plain = self.reader.storage(&mut self.shards, name)? else { return Ok(None) };
        let info = self.shards.file_of(name)?.info(name)?;
        let bits = info.shape.iter().product::<usize>() as u64 * info.dtype.bitsize() as u64;
        Ok(Some((info.dtype, info.shape.clone(), bits / 8)))
    }

    /// All bytes of such a tensor.
    pub fn copy(&mut self, name: &str) -> Result<Vec<u8>> {
        let file = self.shards.file_of(name)?;
        let count = file.info(name)?.shape.iter().product();
        file.read_raw(name, 0..count)
    }

    fn matrix(&mut self, slot: &str, item: usize) -> Result<Option<PackedMatrix>> {
        match self.found.iter().find(|tensor| tensor.slot == slot) {
            Some(tensor) => self.reader.read_matrix(&mut self.shards, tensor, item).map(Some),
            None => Ok(None),
        }
    }

    /// Gate and up of one expert, as they are stored.
    fn first(&mut self, kind: ExpertKind, expert: usize) -> Result<[Option<PackedMatrix>; 2]> {
        let [gate, up, both, _] = expert_slots(kind);
        if let Some(tensor) = self.found.iter().find(|tensor| tensor.slot == both) {
            return Ok(self.reader.read_fused(&mut self.shards, tensor, expert)?.map(Some));
        }
        Ok([self.matrix(gate, expert)?, self.matrix(up, expert)?])
    }

    fn down(&mut self, kind: ExpertKind, expert: usize) -> Result<Option<PackedMatrix>> {
        self.matrix(expert_slots(kind)[3], expert)
    }

    /// The formats that the first expert of each kind is stored in.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if its gate and its up projection differ: kernels read them together.
    pub fn stored_formats(&mut self) -> Result<LayerFormats> {
        let mut formats = LayerFormats::default();
        for kind in [ExpertKind::Routed, ExpertKind::Shared] {
            let of_first = match self.first(kind, 0)? {
                [Some(gate), Some(up)] if gate.format != up.format => {
                    return Err(self.mixed(format!("gate as {} and up as {}", gate.format, up.format)));
                }
                [_, up] => up.map_or(WeightFormat::F32, |up| up.format),
            };
            let of_down = self.down(kind, 0)?.map_or(WeightFormat::F32, |down| down.format);
            match kind {
                ExpertKind::Routed => (formats.gate_up, formats.down) = (of_first, of_down),
                ExpertKind::Shared => (formats.shared_gate_up, formats.shared_down) = (of_first, of_down),
            }
        }
        Ok(formats)
    }

    fn mixed(&self, what: String) -> Error {
        Error::Unsupported {
            what: format!("{}: {what}", self.shards.path.display()),
            by: "as it is stored".to_owned(),
            hint: "name one format for all experts, such as --weights bf16".to_owned(),
        }
    }

    /// The experts as f32 `[out, in]`, into `weights`, which has everything else.
    pub fn read_experts(&mut self, weights: &mut MoeWeights) -> Result<()> {
        let shared = self.reader.config.extras().shared.map_or(0, |shared| shared.num as usize);
        for (kind, experts) in
            [(ExpertKind::Routed, self.reader.config.num_weighted_experts() as usize), (ExpertKind::Shared, shared)]
        {
            let x = &mut weights.extras;
            let [gate_proj, up_proj, down_proj] = match kind {
                ExpertKind::Routed => [&mut weights.gate_proj, &mut weights.up_proj, &mut weights.down_proj],
                ExpertKind::Shared => [&mut x.shared_gate_proj, &mut x.shared_up_proj, &mut x.shared_down_proj],
            };
            for expert in 0..experts {
                let [gate, up] = self.first(kind, expert)?;
                let down = self.down(kind, expert)?;
                for (values, matrix) in [(&mut *gate_proj, gate), (&mut *up_proj, up), (&mut *down_proj, down)] {
                    let Some(matrix) = matrix else { continue };
                    let new = matrix.to_f32();
                    if expert == 0 {
                        tensor_file::reserve(self.shards.path, values, new.len().saturating_mul(experts))?;
                    }
                    values.extend(new);
                }
            }
        }
        Ok(())
    }
}

/// Experts of a layer as they are read from its files.
pub(crate) struct FileSource<'f, 'c> {
    pub file: &'f mut LayerFile<'c>,
    pub formats: LayerFormats,
    /// The formats are those of the first expert: another one is an error, as it would have to be rounded.
    pub as_stored: bool,
}

impl FileSource<'_, '_> {
    fn convert(&self, slot: &str, expert: usize, matrix: Option<PackedMatrix>, to: WeightFormat) -> Result<Vec<u8>> {
        let Some(matrix) = matrix else { return Ok(Vec::new()) };
        if matrix.format == to {
            return Ok(matrix.bytes);
        }
        if self.as_stored {
            return Err(self
                .file
                .mixed(format!("{slot} of expert {expert} as {}, of expert 0 as {to}", matrix.format)));
        }
        let values = matrix.to_f32();
        formats::encode(to, matrix.inputs, &values).map_err(|at| Error::NotRepresentable {
            tensor: format!("{slot} of expert {expert} of {}", self.file.shards.path.display()),
            index: at.index,
            value: at.value,
            format: to.name(),
        })
    }
}

impl ExpertSource for FileSource<'_, '_> {
    fn formats(&self) -> LayerFormats {
        self.formats
    }

    fn first(&mut self, kind: ExpertKind, expert: usize) -> Result<[Vec<u8>; 2]> {
        let [gate, up] = self.file.first(kind, expert)?;
        let to = match kind {
            ExpertKind::Routed => self.formats.gate_up,
            ExpertKind::Shared => self.formats.shared_gate_up,
        };
        let [gate_slot, up_slot, ..] = expert_slots(kind);
        Ok([self.convert(gate_slot, expert, gate, to)?, self.convert(up_slot, expert, up, to)?])
    }

    fn down(&mut self, kind: ExpertKind, expert: usize) -> Result<Vec<u8>> {
        let down = self.file.down(kind, expert)?;
        let to = match kind {
            ExpertKind::Routed => self.formats.down,
            ExpertKind::Shared => self.formats.shared_down,
        };
        self.convert(expert_slots(kind)[3], expert, down, to)
    }
}
