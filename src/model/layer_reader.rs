//! Reads the tensors of one layer: which ones the configuration needs, what the layout calls them, and how the
//! numbers in them have to be turned to be `[out, in]`, expert after expert.

use crate::error::{Error, Result};
use crate::model::config::{MoeConfig, SharedGate};
use crate::model::family::layout::{Layout, TensorNames};
use crate::model::family::{Family, NORMS};
use crate::model::formats::published::{self, GptqZeros, Integers, Kind, MatrixScale, Nvfp4, Qweight};
use crate::model::formats::{self, GgmlBlocks, LayerFormats, WeightFormat};
use crate::model::model_config::Quantization;
use crate::model::routing::{Noise, Scores};
use crate::model::source::{ExpertKind, ExpertSource};
use crate::model::stored::{self, Blocks, FP4_BLOCK, Fp4Scales, PackedMatrix};
use crate::model::tensor_file::{self, TensorFile};
use crate::model::weights::{ExtraWeights, MoeWeights};
use rayon::prelude::*;
use safetensors::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The files of a checkpoint: each is opened at most once for a layer.
pub(crate) struct Shards<'c> {
    /// What was opened.
    pub path: &'c Path,
    /// All files.
    pub files: &'c [PathBuf],
    /// Which of them holds each tensor.
    pub file_of_tensor: &'c BTreeMap<String, usize>,
    /// Those that are open.
    pub open: BTreeMap<usize, TensorFile>,
    /// They are GGUF files, where a tensor's type says all and names say nothing.
    pub is_gguf: bool,
    /// Tensors of packed rows, which this program wrote.
    pub packed: &'c BTreeMap<String, WeightFormat>,
    /// What the configuration says of quantised tensors.
    pub quantization: Quantization,
}

/// Numbers are stored under this name, or in tensors that are called after it.
pub(crate) fn is_stored(is_gguf: bool, present: impl Fn(&str) -> bool, name: &str) -> bool {
    let beside = || present(&format!("{name}_blocks")) || published::detect(&present, base(name)).is_some();
    present(name) || !is_gguf && beside()
}

/// What quantised tensors are called by, instead of `weight`.
fn base(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

impl Shards<'_> {
    fn has(&self, tensor: &str) -> bool {
        self.file_of_tensor.contains_key(tensor)
    }

    fn file_of(&mut self, tensor: &str) -> Result<&mut TensorFile> {
        let &number = self.file_of_tensor.get(tensor).ok_or_else(|| Error::MissingTensor {
            path: self.path.to_owned(),
            tensor: tensor.to_owned(),
            hint: tensor_file::names_hint(self.file_of_tensor.keys(), self.file_of_tensor.len()),
        })?;
        Ok(match self.open.entry(number) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(slot) => slot.insert(TensorFile::open(&self.files[number])?),
        })
    }
}

/// One layer in one layout.
pub(crate) struct LayerReader<'a> {
    /// For messages, and for norms that are stored minus one.
    pub family: &'a Family,
    /// Names.
    pub layout: &'a Layout,
    /// In front of them.
    pub prefix: String,
    /// What the layer is.
    pub config: MoeConfig,
}

/// `count` matrices of one shape.
#[derive(Clone, Copy)]
struct Shape {
    count: usize,
    rows: usize,
    columns: usize,
    /// The layout may have one for each of these instead, of which the last have no meaning.
    most: usize,
}

/// A described tensor that is there: its name with `{expert}`, and what it holds.
struct Found {
    slot: &'static str,
    pattern: String,
    shape: Shape,
}

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

/// How the numbers of a tensor are stored.
enum Storage {
    /// One by one.
    Plain,
    /// F8_E4M3 with scales.
    Fp8 { scales: String },
    /// Two in a byte, with a scale for each 32.
    Fp4 { bytes: String, scales: String },
    /// One of the layouts that quantisers write.
    Published { kind: Kind, base: String },
    /// Packed rows.
    Packed(WeightFormat),
    /// Blocks of a GGUF file.
    Ggml(GgmlBlocks),
}

impl LayerReader<'_> {
    /// How many matrices of which shape belong in `slot`; `None` if this layer has no use for it.
    fn shape(&self, slot: &str) -> Option<Shape> {
        let config = &self.config;
        let extras = config.extras();
        let size = |n: u32| n as usize;
        let [h, i, e, d] =
            [config.hidden_size(), config.intermediate_size(), config.num_experts(), config.expert_size()].map(size);
        let weighted = size(config.num_weighted_experts());
        let routing = config.routing();
        let one = |rows, columns| Some(Shape { count: 1, rows, columns, most: 1 });
        let each = |rows, columns| Some(Shape { count: weighted, rows, columns, most: e });
        let gated = config.activation().is_gated();
        let shared = extras.shared.as_ref();
        let shared_gated = shared.is_some_and(|shared| shared.activation.is_gated());
        let [num, width] = shared.map_or([0, 0], |shared| [shared.num, shared.intermediate_size].map(size));
        let each_shared = |rows, columns| Some(Shape { count: num, rows, columns, most: num });
        let in_router = if self.layout.shared_gate_in_router { size(config.num_gated_shared()) } else { 0 };
        let latent = extras.latent_size.map(size);
        match slot {
            "router" => one(e + in_router, h),
            "router_bias" | "per_expert_scale" => one(e, 1),
            "selection_bias" if !routing.choices_are_given() && !routing.is_dense() => one(e, 1),
            "weight_scale" => one(1, 1),
            "router_noise" if routing.noise == Noise::NoisyTopK => one(e, h),
            "group_router" if routing.scores == Scores::Hierarchical => one(size(routing.groups?.num_groups), h),
            "gate_proj" if gated => each(i, d),
            "up_proj" => each(i, d),
            "gate_up_proj" if gated => each(2 * i, d),
            "down_proj" => each(d, i),
            "gate_bias" if gated => each(i, 1),
            "up_bias" => each(i, 1),
            "gate_up_bias" if gated => each(2 * i, 1),
            "down_bias" => each(d, 1),
            "latent_in" => one(latent?, h),
            "latent_out" => one(h, latent?),
            "router_norm" if extras.router_norm.is_some() => one(h, 1),
            "expert_norm" if extras.expert_norm.is_some() => one(d, 1),
            "expert_out_norm" if extras.expert_out_norm.is_some() => one(d, 1),
            "routed_norm" if extras.routed_norm.is_some() => one(h, 1),
            "output_norm" if extras.output_norm.is_some() => one(h, 1),
            "output_bias" => one(h, 1),
            "shared_gate_proj" if shared_gated => each_shared(width, h),
            "shared_up_proj" if num > 0 => each_shared(width, h),
            "shared_gate_up_proj" if shared_gated => each_shared(2 * width, h),
            "shared_down_proj" if num > 0 => each_shared(h, width),
            "shared_gate" if shared.is_some_and(|shared| shared.gate != SharedGate::None) => one(num, h),
            "token_table" => one(size(config.vocab_size()?), size(config.top_k())),
            _ => None,
        }
    }

    /// The described tensors that this layer needs. One that is missing is an error, unless it is optional.
    fn find(&self, shards: &Shards) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for slot in crate::model::family::layout::SLOTS {
            let (Some(TensorNames { names, optional }), Some(shape)) = (self.layout.names(slot), self.shape(slot))
            else {
                continue;
            };
            let there =
                names.iter().find(|name| is_stored(shards.is_gguf, |tensor| shards.has(tensor), &self.name(name, 0)));
            match there.or(if *optional { None } else { names.first() }) {
                Some(pattern) => found.push(Found { slot, pattern: pattern.clone(), shape }),
                None => continue,
            }
        }
        Ok(found)
    }

    fn name(&self, pattern: &str, item: usize) -> String {
        format!("{}{}", self.prefix, pattern.replace("{expert}", &item.to_string()))
    }

    /// One name, or one for each expert.
    fn tensor_names(&self, tensor: &Found) -> Vec<String> {
        let files = if self.is_stacked(tensor) { 1 } else { tensor.shape.count };
        (0..files).map(|item| self.name(&tensor.pattern, item)).collect()
    }

    /// How a tensor is stored, from its type and from what lies beside it.
    fn storage(&self, shards: &mut Shards, name: &str) -> Result<Storage> {
        if let Some(&format) = shards.packed.get(name) {
            return Ok(Storage::Packed(format));
        }
        if shards.is_gguf {
            let file = shards.file_of(name)?;
            return match &file.info(name)?.ggml {
                None => Ok(Storage::Plain),
                Some(ggml) => match GgmlBlocks::of_type(ggml.number) {
                    Some(blocks) => Ok(Storage::Ggml(blocks)),
                    None => Err(file.unsupported(name, ggml)),
                },
            };
        }
        if let Some(kind) = published::detect(|tensor| shards.has(tensor), base(name)) {
            let base = base(name).to_owned();
            if let Some(extra) = published::unsupported(|tensor| shards.has(tensor), &base) {
                return Err(Error::Unsupported {
                    what: format!("tensor \"{base}.{extra}\" of {}", shards.path.display()),
                    by: "beside quantised weights".to_owned(),
                    hint: "it changes what the weights do; use a checkpoint without it".to_owned(),
                });
            }
            return Ok(Storage::Published { kind, base });
        }
        let [bytes, scales] = ["blocks", "scales"].map(|end| format!("{name}_{end}"));
        if !shards.has(name) && shards.has(&bytes) && shards.has(&scales) {
            return Ok(Storage::Fp4 { bytes, scales });
        }
        let beside = [
            Some(format!("{name}_scale_inv")),
            Some(format!("{name}_scale")),
            name.strip_suffix("weight").map(|start| format!("{start}scale")),
        ];
        let scales = beside.into_iter().flatten().find(|name| shards.has(name));
        let dtype = shards.file_of(name)?.info(name)?.dtype;
        Ok(match (dtype, scales) {
            (Dtype::F8_E4M3, Some(scales)) => Storage::Fp8 { scales },
            (Dtype::U8 | Dtype::I8 | Dtype::F4, Some(scales)) => Storage::Fp4 { bytes: name.to_owned(), scales },
            _ => Storage::Plain,
        })
    }

    fn assemble(
        &self,
        mut values: BTreeMap<&'static str, Vec<f32>>,
        token_table: Option<Vec<u32>>,
    ) -> (MoeWeights, Option<f32>) {
        for norm in NORMS {
            let (Some(shape), described) = (self.shape(norm), self.layout.has(norm)) else { continue };
            if !described {
                values.insert(norm, vec![1.0; shape.rows]);
            } else if self.family.is_stored_minus_one(norm)
                && let Some(weight) = values.get_mut(norm)
            {
                weight.iter_mut().for_each(|w| *w += 1.0);
            }
        }
        let mut router = values.remove("router").unwrap_or_default();
        if self.layout.shared_gate_in_router {
            let own = self.config.num_experts() as usize * self.config.hidden_size() as usize;
            let gate = router.split_off(own.min(router.len()));
            if !gate.is_empty() {
                values.insert("shared_gate", gate);
            }
        }
        let mut take = |slot: &str| values.remove(slot);
        let weight_scale = take("weight_scale").and_then(|values| values.first().copied());
        let weights = MoeWeights {
            router,
            router_bias: take("router_bias"),
            gate_proj: take("gate_proj").unwrap_or_default(),
            up_proj: take("up_proj").unwrap_or_default(),
            down_proj: take("down_proj").unwrap_or_default(),
            extras: ExtraWeights {
                selection_bias: take("selection_bias"),
                per_expert_scale: take("per_expert_scale"),
                router_noise: take("router_noise"),
                group_router: take("group_router"),
                token_table,
                gate_bias: take("gate_bias"),
                up_bias: take("up_bias"),
                down_bias: take("down_bias"),
                latent_in: take("latent_in"),
                latent_out: take("latent_out"),
                router_norm: take("router_norm"),
                expert_norm: take("expert_norm"),
                expert_out_norm: take("expert_out_norm"),
                routed_norm: take("routed_norm"),
                output_norm: take("output_norm"),
                output_bias: take("output_bias"),
                shared_gate_proj: take("shared_gate_proj").unwrap_or_default(),
                shared_up_proj: take("shared_up_proj").unwrap_or_default(),
                shared_down_proj: take("shared_down_proj").unwrap_or_default(),
                shared_gate: take("shared_gate"),
            },
        };
        (weights, weight_scale)
    }

    /// Each file of a described tensor is there, readable and of the right shape.
    fn check(&self, shards: &mut Shards, tensor: &Found, stored_as: &mut BTreeSet<String>) -> Result<()> {
        for name in self.tensor_names(tensor) {
            let shapes = self.stored_shapes(tensor);
            match self.storage(shards, &name)? {
                Storage::Packed(format) => {
                    let Shape { count, rows, columns, .. } = tensor.shape;
                    check_blocks(format, shards.path, &name, columns)?;
                    let stacked = if self.is_stacked(tensor) { count } else { 1 };
                    let shape = vec![stacked, rows, format.layout(columns).bytes];
                    check_shape(shards.file_of(&name)?, &name, &[shape])?;
                    stored_as.insert(format.name());
                }
                Storage::Ggml(blocks) => {
                    let file = shards.file_of(&name)?;
                    check_shape(file, &name, &shapes)?;
                    if tensor.shape.columns == 1 || self.layout.is_transposed(tensor.slot) {
                        return Err(
                            file.mismatch(&name, "single numbers, F32, F16 or BF16: blocks hold rows [out, in]")
                        );
                    }
                    stored_as.insert(blocks.name.to_owned());
                }
                Storage::Published { kind, base } => {
                    if self.is_stacked(tensor) && tensor.shape.count > 1 {
                        return Err(shards.published_error(&base, "holds all experts; expected one for each expert"));
                    }
                    if self.layout.is_transposed(tensor.slot) {
                        return Err(shards.published_error(&base, "is quantised; the layout expects [in, out]"));
                    }
                    stored_as.insert(match kind {
                        Kind::PackQuantized | Kind::Qweight => "quantised integers".to_owned(),
                        Kind::Nvfp4PackQuantized | Kind::ModelOptNvfp4 => "NVFP4".to_owned(),
                    });
                }
                Storage::Plain => {
                    let file = shards.file_of(&name)?;
                    check_shape(file, &name, &shapes)?;
                    if tensor.slot != "token_table" {
                        file.check_readable(&name)?;
                    }
                    stored_as.insert(file.info(&name)?.dtype.to_string());
                }
                Storage::Fp8 { scales } => {
                    check_shape(shards.file_of(&name)?, &name, &shapes)?;
                    self.fp8_blocks(shards, tensor, &scales)?;
                    stored_as.insert("F8_E4M3".to_owned());
                }
                Storage::Fp4 { bytes, scales } => {
                    let halved = |shape: &Vec<usize>| {
                        let (last, front) = shape.split_last().map_or((0, &[][..]), |(last, front)| (*last, front));
                        let with = |tail: &[usize]| [front, tail].concat();
                        let block = FP4_BLOCK;
                        ([with(&[last / block, block / 2]), with(&[last / 2])], with(&[last.div_ceil(block)]))
                    };
                    let (blocks, of_scales): (Vec<_>, Vec<_>) = shapes.iter().map(halved).unzip();
                    let file = shards.file_of(&bytes)?;
                    let blocks = blocks.concat();
                    // F4 counts numbers, the others bytes.
                    let is_f4 = file.info(&bytes)?.dtype == Dtype::F4;
                    check_shape(file, &bytes, if is_f4 { &shapes } else { &blocks })?;
                    let columns = shapes.first().and_then(|shape| shape.last()).copied().unwrap_or(0);
                    if columns % FP4_BLOCK != 0 {
                        return Err(file.mismatch(&bytes, &format!("a multiple of 32 columns, not {columns}")));
                    }
                    check_shape(shards.file_of(&scales)?, &scales, &of_scales)?;
                    stored_as.insert("MXFP4".to_owned());
                }
            }
        }
        Ok(())
    }

    /// Rows and columns of one matrix as it is stored.
    fn stored(&self, tensor: &Found) -> [usize; 2] {
        let Shape { rows, columns, .. } = tensor.shape;
        if self.layout.is_transposed(tensor.slot) { [columns, rows] } else { [rows, columns] }
    }

    fn is_stacked(&self, tensor: &Found) -> bool {
        !tensor.pattern.contains("{expert}")
    }

    fn is_flattened(&self, tensor: &Found) -> bool {
        self.layout.flattened && self.is_stacked(tensor) && tensor.shape.count > 1 && !tensor.slot.starts_with("shared")
    }

    /// Shapes that the tensor may have, the usual one first. Axes of length 1 do not count.
    fn stored_shapes(&self, tensor: &Found) -> Vec<Vec<usize>> {
        let [rows, columns] = self.stored(tensor);
        let Shape { count, most, .. } = tensor.shape;
        if !self.is_stacked(tensor) {
            return vec![matrix(rows, columns)];
        }
        let of = |count: usize| match (count, self.is_flattened(tensor)) {
            (1, _) if most == 1 => matrix(rows, columns),
            (_, true) => matrix(count.saturating_mul(rows), columns),
            _ => [vec![count], matrix(rows, columns)].concat(),
        };
        if most > count { vec![of(count), of(most)] } else { vec![of(count)] }
    }

    /// Matrix `item` of a tensor as packed rows `[rows, columns]`, in the format that it is stored in. What no format
    /// holds becomes f32. All its weights are finite.
    fn read_matrix(&self, shards: &mut Shards, tensor: &Found, item: usize) -> Result<PackedMatrix> {
        let name = self.name(&tensor.pattern, item);
        let [rows, columns] = self.stored(tensor);
        let size = rows * columns;
        let start = if self.is_stacked(tensor) { item * size } else { 0 };
        let transposed = self.layout.is_transposed(tensor.slot);
        let matrix = match self.storage(shards, &name)? {
            Storage::Plain => read_plain(shards.file_of(&name)?, &name, start, [rows, columns], transposed)?,
            Storage::Fp8 { scales } => {
                let codes = shards.file_of(&name)?.read_bytes(&name, start..start + size)?;
                let blocks = self.fp8_blocks(shards, tensor, &scales)?;
                let count = blocks[0].count * blocks[1].count;
                let file = shards.file_of(&scales)?;
                let there: usize = file.info(&scales)?.shape.iter().product();
                let first = if there > count { item * count } else { 0 };
                let scales = read_scales(file, &scales, first..first + count)?;
                stored::fp8(codes, columns, &scales, blocks, transposed)
            }
            Storage::Fp4 { bytes, scales } => {
                let file = shards.file_of(&scales)?;
                let range = start / FP4_BLOCK..(start + size) / FP4_BLOCK;
                let scales = if matches!(file.info(&scales)?.dtype, Dtype::U8 | Dtype::F8_E8M0) {
                    Fp4Scales::Exponents(file.read_bytes(&scales, range)?)
                } else {
                    Fp4Scales::Floats(read_scales(file, &scales, range)?)
                };
                let file = shards.file_of(&bytes)?;
                let matrix = stored::fp4(&file.read_bytes(&bytes, start / 2..(start + size) / 2)?, columns, scales);
                if transposed {
                    let values = stored::transpose::<4>(bytemuck::cast_slice(&matrix.to_f32()), rows, columns);
                    PackedMatrix { format: WeightFormat::F32, inputs: rows, bytes: values }
                } else {
                    matrix
                }
            }
            Storage::Published { kind, base } => shards.published(kind, &base, [rows, columns])?,
            Storage::Ggml(blocks) => {
                let file = shards.file_of(&name)?;
                read_ggml(file, &name, &blocks, start / columns, [rows, columns])?
            }
            Storage::Packed(format) => {
                let Shape { rows, columns, .. } = tensor.shape;
                let bytes = rows * format.layout(columns).bytes;
                let start = if self.is_stacked(tensor) { item * bytes } else { 0 };
                let bytes = shards.file_of(&name)?.read_bytes(&name, start..start + bytes)?;
                PackedMatrix { format, inputs: columns, bytes }
            }
        };
        match matrix.not_finite() {
            None => Ok(matrix),
            Some((index, value)) => {
                let tensor = format!("tensor {name:?} of {}", shards.path.display());
                Err(Error::NonFinite { tensor, index: start + index, value })
            }
        }
    }

    /// How the rows and columns of each matrix share the scales in tensor `scales`.
    fn fp8_blocks(&self, shards: &mut Shards, tensor: &Found, scales: &str) -> Result<[Blocks; 2]> {
        let [rows, columns] = self.stored(tensor);
        let file = shards.file_of(scales)?;
        let shape = file.info(scales)?.shape.clone();
        let there: usize = shape.iter().product();
        let matrices = if self.is_stacked(tensor) { tensor.shape.count } else { 1 };
        let [down, across] = match shape.as_slice() {
            _ if there == 1 || there == matrices => [1, 1],
            [.., down, across] => [*down, *across],
            [only] => [*only, 1],
            [] => [1, 1],
        };
        let fits = there == down * across || there == down * across * matrices;
        match (Blocks::new(down, rows), Blocks::new(across, columns)) {
            (Some(down), Some(across)) if fits && !self.is_flattened(tensor) => Ok([down, across]),
            _ => {
                let expected = format!("one scale for each 128 x 128 of [{rows}, {columns}], for each row, or one");
                Err(file.mismatch(scales, &expected))
            }
        }
    }

    /// Both first projections, or their biases, from one tensor: each row goes to one of them.
    fn read_fused(&self, shards: &mut Shards, tensor: &Found, item: usize) -> Result<[PackedMatrix; 2]> {
        let PackedMatrix { format, inputs, bytes } = self.read_matrix(shards, tensor, item)?;
        let row_bytes = format.layout(inputs).bytes.max(1);
        let mut halves = [Vec::with_capacity(bytes.len() / 2), Vec::with_capacity(bytes.len() / 2)];
        if self.layout.is_interleaved(tensor.slot) {
            for (n, row) in bytes.chunks_exact(row_bytes).enumerate() {
                halves[n % 2].extend(row);
            }
        } else {
            let (first, second) = bytes.split_at(bytes.len() / row_bytes / 2 * row_bytes);
            halves = [first.to_vec(), second.to_vec()];
        }
        if self.layout.is_up_first(tensor.slot) {
            halves.swap(0, 1);
        }
        Ok(halves.map(|bytes| PackedMatrix { format, inputs, bytes }))
    }

    fn read_table(&self, shards: &mut Shards, tensor: &Found) -> Result<Vec<u32>> {
        let name = self.name(&tensor.pattern, 0);
        let file = shards.file_of(&name)?;
        let ids = file.read_integers(&name)?;
        let id = |id: i64| u32::try_from(id).map_err(|_| file.mismatch(&name, &format!("ids of experts, not {id}")));
        ids.into_iter().map(id).collect()
    }

    fn check_all_used(&self, shards: &mut Shards, found: &[Found]) -> Result<()> {
        let mut used = BTreeSet::new();
        for name in found.iter().flat_map(|tensor| self.tensor_names(tensor)) {
            match self.storage(shards, &name)? {
                Storage::Plain | Storage::Packed(_) | Storage::Ggml(_) => {}
                Storage::Published { base, .. } => {
                    used.extend(published::SUFFIXES.iter().map(|suffix| format!("{base}.{suffix}")));
                }
                Storage::Fp8 { scales } => drop(used.insert(scales)),
                Storage::Fp4 { bytes, scales } => used.extend([bytes, scales]),
            }
            used.insert(name);
        }
        let under_prefix = shards.file_of_tensor.range(self.prefix.clone()..).map(|(name, _)| name);
        let mut under_prefix = under_prefix.take_while(|name| name.starts_with(&self.prefix));
        let unknown = |name: &&String| {
            // A golden file of one block without a prefix has its own tensors beside it.
            let of_golden = self.prefix.is_empty() && ["io.", "aux.", "grad."].iter().any(|own| name.starts_with(own));
            !used.contains(*name) && !of_golden && !self.layout.ignores(&name[self.prefix.len()..])
        };
        match under_prefix.find(unknown) {
            None => Ok(()),
            Some(extra) => Err(Error::Unsupported {
                what: format!("tensor {extra:?} of {}", shards.path.display()),
                by: format!("by family {:?} with {} experts", self.family.name(), self.config.num_experts()),
                hint: match self.layout.slot_of(&extra[self.prefix.len()..]) {
                    Some(slot) => format!(
                        "{} names it as {slot}, but by its settings this model has none: is a key of config.json \
                         misspelt in what it belongs to (such as width, latent_size, select)?",
                        self.family.path().display()
                    ),
                    None => format!(
                        "the result would be wrong without it; {} would have to name it, or to list it under ignore \
                         if it is no part of the layer",
                        self.family.path().display()
                    ),
                },
            }),
        }
    }
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

impl Shards<'_> {
    fn published_error(&self, base: &str, message: &str) -> Error {
        Error::BadFile { path: self.path.to_owned(), message: format!("tensor {base:?} {message}") }
    }

    /// All bytes of `base.suffix`, which has one of these types.
    fn all_bytes(&mut self, base: &str, suffix: &str, dtypes: &[Dtype]) -> Result<Vec<u8>> {
        let name = format!("{base}.{suffix}");
        let file = self.file_of(&name)?;
        let info = file.info(&name)?;
        if !dtypes.contains(&info.dtype) {
            let known: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
            return Err(file.mismatch(&name, &known.join(" or ")));
        }
        let count = info.shape.iter().product();
        file.read_raw(&name, 0..count)
    }

    /// A matrix in one of the layouts that quantisers write.
    fn published(&mut self, kind: Kind, base: &str, [rows, inputs]: [usize; 2]) -> Result<PackedMatrix> {
        let wrong = |message: String| Error::BadFile {
            path: self.path.to_owned(),
            message: format!("tensors \"{base}.…\": {message}"),
        };
        let floats = &[Dtype::F32, Dtype::F16, Dtype::BF16][..];
        let (format, bytes) = match kind {
            Kind::Nvfp4PackQuantized | Kind::ModelOptNvfp4 => {
                let (codes, matrix_scale) = match kind {
                    Kind::ModelOptNvfp4 => ("weight", "weight_scale_2"),
                    _ => ("weight_packed", "weight_global_scale"),
                };
                let codes = self.all_bytes(base, codes, &[Dtype::U8])?;
                let scales = self.all_bytes(base, "weight_scale", &[Dtype::F8_E4M3])?;
                let matrix_scale = self.all_bytes(base, matrix_scale, &[Dtype::F32])?;
                let value = match matrix_scale.as_slice() {
                    &[a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                    other => return Err(wrong(format!("{} bytes as the matrix scale, expected 4", other.len()))),
                };
                let matrix_scale = match kind {
                    Kind::ModelOptNvfp4 => MatrixScale::Factor(value),
                    _ => MatrixScale::Divisor(value),
                };
                published::nvfp4_rows(&Nvfp4 { rows, inputs, codes: &codes, scales: &scales, matrix_scale })
            }
            Kind::PackQuantized => {
                let codes = self.all_bytes(base, "weight_packed", &[Dtype::I32])?;
                let shape = self.all_bytes(base, "weight_shape", &[Dtype::I64, Dtype::I32])?;
                published::check_shape(&shape, rows, inputs).map_err(wrong)?;
                let scales = self.widened(base, "weight_scale", floats)?;
                let zeros = self.optional(base, "weight_zero_point")?;
                let index = self.optional(base, "weight_g_idx")?;
                let bits = (codes.len() as u64 * 8).checked_div(rows as u64 * inputs as u64).unwrap_or(0) as u32;
                let (zeros, group_index) = (zeros.as_deref(), index.as_deref());
                let integers = Integers { rows, inputs, bits, codes: &codes, scales: &scales, zeros, group_index };
                published::pack_quantized_rows(&integers)
            }
            Kind::Qweight => {
                let shape = self.file_of(&format!("{base}.qweight"))?.info(&format!("{base}.qweight"))?.shape.clone();
                let layout = published::qweight(&shape, rows, inputs).map_err(wrong)?;
                let codes = self.all_bytes(base, "qweight", &[Dtype::I32])?;
                let scales = self.widened(base, "scales", floats)?;
                let zeros = self.optional(base, "qzeros")?;
                let index = self.optional(base, "g_idx")?;
                let (zeros, group_index) = (zeros.as_deref(), index.as_deref());
                let bits = if let Qweight::Gptq { bits } = layout { bits } else { 4 };
                let integers = Integers { rows, inputs, bits, codes: &codes, scales: &scales, zeros, group_index };
                let about = &self.quantization;
                match layout {
                    Qweight::Gptq { .. } => {
                        let zeros = if about.gptq_v2 { GptqZeros::Plain } else { GptqZeros::LessOne };
                        published::gptq_rows(&integers, zeros, about.symmetric)
                    }
                    Qweight::Awq if about.is_gemm => published::awq_rows(&integers),
                    Qweight::Awq => Err("AWQ in another version than gemm".to_owned()),
                }
            }
        }
        .map_err(|message| Error::BadFile {
            path: self.path.to_owned(),
            message: format!("tensors \"{base}.…\": {message}"),
        })?;
        Ok(PackedMatrix { format, inputs, bytes })
    }

    fn optional(&mut self, base: &str, suffix: &str) -> Result<Option<Vec<u8>>> {
        if !self.has(&format!("{base}.{suffix}")) {
            return Ok(None);
        }
        self.all_bytes(base, suffix, &[Dtype::I32]).map(Some)
    }

    fn widened(&mut self, base: &str, suffix: &str, dtypes: &[Dtype]) -> Result<Vec<f32>> {
        let bytes = self.all_bytes(base, suffix, dtypes)?;
        let name = format!("{base}.{suffix}");
        let dtype = self.file_of(&name)?.info(&name)?.dtype;
        published::widened(dtype, &bytes).map_err(|message| self.published_error(&name, &message))
    }
}

/// A matrix of floats, `[rows, columns]` as stored.
fn read_plain(
    file: &mut TensorFile,
    name: &str,
    start: usize,
    [rows, columns]: [usize; 2],
    transposed: bool,
) -> Result<PackedMatrix> {
    let range = start..start + rows * columns;
    let inputs = if transposed { rows } else { columns };
    let (format, bytes) = match file.info(name)?.dtype {
        Dtype::F16 => (WeightFormat::F16, file.read_raw(name, range)?),
        Dtype::BF16 => (WeightFormat::Bf16, file.read_raw(name, range)?),
        Dtype::F32 => (WeightFormat::F32, file.read_raw(name, range)?),
        _ => {
            let mut values = Vec::new();
            file.read_f32(name, range, &mut values)?;
            (WeightFormat::F32, bytemuck::cast_slice(&values).to_vec())
        }
    };
    let bytes = match format {
        _ if !transposed => bytes,
        WeightFormat::F32 => stored::transpose::<4>(&bytes, rows, columns),
        _ => stored::transpose::<2>(&bytes, rows, columns),
    };
    Ok(PackedMatrix { format, inputs, bytes })
}

/// Rows of `columns` inputs are whole blocks of a format.
pub(crate) fn check_blocks(format: WeightFormat, path: &Path, tensor: &str, columns: usize) -> Result<()> {
    let checked = format.check_inputs("a tensor", u32::try_from(columns).unwrap_or(u32::MAX));
    checked.map_err(|error| match error {
        Error::InvalidConfig { found, expected, .. } => {
            Error::BadTensor { path: path.to_owned(), tensor: tensor.to_owned(), found, expected }
        }
        other => other,
    })
}

/// Bytes of GGUF blocks that are turned at a time.
const GGML_BYTES: usize = 1 << 20;

/// Rows of GGUF blocks, from `first_row` of the tensor on, as packed rows.
fn read_ggml(
    file: &mut TensorFile,
    name: &str,
    blocks: &GgmlBlocks,
    first_row: usize,
    [rows, columns]: [usize; 2],
) -> Result<PackedMatrix> {
    let stored_bytes = columns / blocks.inputs * blocks.bytes;
    let packed_bytes = blocks.format.layout(columns).bytes;
    let mut bytes = Vec::new();
    tensor_file::reserve(file.path(), &mut bytes, rows.saturating_mul(packed_bytes))?;
    bytes.resize(rows * packed_bytes, 0u8);
    let at_once = (GGML_BYTES / stored_bytes.max(1)).max(1);
    for (n, packed) in bytes.chunks_mut(at_once * packed_bytes.max(1)).enumerate() {
        let start = (first_row + n * at_once) * stored_bytes;
        let stored = file.read_bytes(name, start..start + packed.len() / packed_bytes * stored_bytes)?;
        let stored = stored.par_chunks_exact(stored_bytes);
        let packed = packed.par_chunks_exact_mut(packed_bytes);
        stored.zip(packed).for_each(|(stored, packed)| formats::ggml_row(blocks, stored, packed));
    }
    Ok(PackedMatrix { format: blocks.format, inputs: columns, bytes })
}

/// A vector has no columns.
fn matrix(rows: usize, columns: usize) -> Vec<usize> {
    if columns == 1 { vec![rows] } else { vec![rows, columns] }
}

/// The shape is one of these, apart from axes of length 1.
fn check_shape(file: &TensorFile, name: &str, shapes: &[Vec<usize>]) -> Result<()> {
    let without_ones = |shape: &[usize]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
    let found = without_ones(file.info(name)?.numbers());
    if shapes.iter().any(|shape| without_ones(shape) == found) {
        return Ok(());
    }
    let expected: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
    Err(file.mismatch(name, &format!("shape {}", expected.join(" or "))))
}

/// Scales are floats, or bytes that are exponents of two.
fn read_scales(file: &mut TensorFile, name: &str, range: std::ops::Range<usize>) -> Result<Vec<f32>> {
    if matches!(file.info(name)?.dtype, Dtype::U8 | Dtype::F8_E8M0) {
        return Ok(file.read_bytes(name, range)?.into_iter().map(formats::small_floats::e8m0).collect());
    }
    let mut scales = Vec::new();
    file.read_f32(name, range, &mut scales)?;
    Ok(scales)
}
