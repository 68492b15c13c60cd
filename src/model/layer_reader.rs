//! Reads the tensors of one layer: which ones the configuration needs, what the layout calls them, and how the
//! numbers in them have to be turned to be `[out, in]`, expert after expert.

mod layer_file;
mod shards;

pub(crate) use layer_file::{FileSource, LayerFile, Tensor};
pub(crate) use shards::{Shards, is_stored};

use crate::error::{Error, Result};
use crate::model::config::{MoeConfig, SharedGate};
use crate::model::family::layout::{Layout, TensorNames};
use crate::model::family::{Family, NORMS};
use crate::model::formats::published::{self, Kind};
use crate::model::formats::{self, GgmlBlocks, WeightFormat};
use crate::model::routing::{Noise, Scores};
use crate::model::stored::{self, Blocks, FP4_BLOCK, Fp4Scales, PackedMatrix};
use crate::model::tensor_file::{self, TensorFile};
use crate::model::weights::{ExtraWeights, MoeWeights};
use rayon::prelude::*;
use safetensors::Dtype;
use shards::base;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

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
        // Beside an axis of zero, the others can be any numbers.
        let each = down.checked_mul(across);
        let fits = each.is_some_and(|each| there == each || Some(there) == each.checked_mul(matrices));
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
