//! Reads the tensors of one layer: which ones the configuration needs, what the layout calls them, and how the
//! numbers in them have to be turned to be `[out, in]`, expert after expert.

use crate::error::{Error, Result};
use crate::model::config::{MoeConfig, SharedGate};
use crate::model::family::layout::{Layout, TensorNames};
use crate::model::family::{Family, NORMS};
use crate::model::packed::{self, Blocks};
use crate::model::routing::{Noise, Scores};
use crate::model::tensor_file::{self, TensorFile};
use crate::model::weights::{ExtraWeights, MoeWeights};
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
    pub prefix: &'a str,
    /// What the layer is.
    pub config: &'a MoeConfig,
}

/// What was read.
pub(crate) struct ReadLayer {
    pub weights: MoeWeights,
    /// Factor of the routing scale.
    pub weight_scale: Option<f32>,
    /// Types of the tensors.
    pub stored_as: BTreeSet<String>,
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
}

impl LayerReader<'_> {
    /// How many matrices of which shape belong in `slot`; `None` if this layer has no use for it.
    fn shape(&self, slot: &str) -> Option<Shape> {
        let config = self.config;
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
            let there = names.iter().find(|name| {
                let first = self.name(name, 0);
                shards.has(&first) || shards.has(&format!("{first}_blocks"))
            });
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

    /// Reads every tensor. Shapes are checked first, so sizes are bounded by what is on disk.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tensor under the prefix that is not described: a bias, a scale or a shared expert
    /// must not be left out in silence.
    pub fn read(&self, mut shards: Shards) -> Result<ReadLayer> {
        let shards = &mut shards;
        let found = self.find(shards)?;
        self.check_all_used(shards, &found)?;
        let mut stored_as = BTreeSet::new();
        for tensor in &found {
            self.check(shards, tensor, &mut stored_as)?;
        }

        let mut values: BTreeMap<&'static str, Vec<f32>> = BTreeMap::new();
        let mut token_table = None;
        for tensor in &found {
            match tensor.slot {
                "token_table" => token_table = Some(self.read_table(shards, tensor)?),
                "gate_up_proj" => self.read_fused(shards, tensor, ["gate_proj", "up_proj"], &mut values)?,
                "gate_up_bias" => self.read_fused(shards, tensor, ["gate_bias", "up_bias"], &mut values)?,
                "shared_gate_up_proj" => {
                    self.read_fused(shards, tensor, ["shared_gate_proj", "shared_up_proj"], &mut values)?;
                }
                slot => {
                    let mut all = Vec::new();
                    let Shape { count, rows, columns, .. } = tensor.shape;
                    shards.file_of_first(self, tensor)?.reserve(&mut all, count.saturating_mul(rows * columns))?;
                    for item in 0..count {
                        all.extend(self.read_matrix(shards, tensor, item)?);
                    }
                    values.insert(slot, all);
                }
            }
        }
        Ok(self.assemble(values, token_table, stored_as))
    }

    fn assemble(
        &self,
        mut values: BTreeMap<&'static str, Vec<f32>>,
        token_table: Option<Vec<u32>>,
        stored_as: BTreeSet<String>,
    ) -> ReadLayer {
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
        ReadLayer { weights, weight_scale, stored_as }
    }

    /// Each file of a described tensor is there, readable and of the right shape.
    fn check(&self, shards: &mut Shards, tensor: &Found, stored_as: &mut BTreeSet<String>) -> Result<()> {
        for name in self.tensor_names(tensor) {
            let shapes = self.stored_shapes(tensor);
            match self.storage(shards, &name)? {
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
                        let block = packed::FP4_BLOCK;
                        ([with(&[last / block, block / 2]), with(&[last / 2])], with(&[last.div_ceil(block)]))
                    };
                    let (blocks, of_scales): (Vec<_>, Vec<_>) = shapes.iter().map(halved).unzip();
                    let file = shards.file_of(&bytes)?;
                    let blocks = blocks.concat();
                    // F4 counts numbers, the others bytes.
                    let is_f4 = file.info(&bytes)?.dtype == Dtype::F4;
                    check_shape(file, &bytes, if is_f4 { &shapes } else { &blocks })?;
                    let columns = shapes.first().and_then(|shape| shape.last()).copied().unwrap_or(0);
                    if columns % packed::FP4_BLOCK != 0 {
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

    /// Matrix `item` of a tensor, `[rows, columns]`.
    fn read_matrix(&self, shards: &mut Shards, tensor: &Found, item: usize) -> Result<Vec<f32>> {
        let name = self.name(&tensor.pattern, item);
        let [rows, columns] = self.stored(tensor);
        let size = rows * columns;
        let start = if self.is_stacked(tensor) { item * size } else { 0 };
        let mut values = Vec::new();
        match self.storage(shards, &name)? {
            Storage::Plain => shards.file_of(&name)?.read_f32(&name, start..start + size, &mut values)?,
            Storage::Fp8 { scales } => {
                let bytes = shards.file_of(&name)?.read_bytes(&name, start..start + size)?;
                values.extend(bytes.into_iter().map(packed::fp8_e4m3));
                let blocks = self.fp8_blocks(shards, tensor, &scales)?;
                let count = blocks[0].count * blocks[1].count;
                let file = shards.file_of(&scales)?;
                let there: usize = file.info(&scales)?.shape.iter().product();
                let first = if there > count { item * count } else { 0 };
                let scales = read_scales(file, &scales, first..first + count)?;
                packed::scale_blocks(&mut values, columns, &scales, blocks);
            }
            Storage::Fp4 { bytes, scales } => {
                let block = packed::FP4_BLOCK;
                let file = shards.file_of(&scales)?;
                let scales = read_scales(file, &scales, start / block..(start + size) / block)?;
                let file = shards.file_of(&bytes)?;
                values = packed::unpack_fp4(&file.read_bytes(&bytes, start / 2..(start + size) / 2)?, &scales);
            }
        }
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            let tensor = format!("tensor {name:?} of {}", shards.path.display());
            return Err(Error::NonFinite { tensor, index: start + index, value: values[index] });
        }
        if self.layout.is_transposed(tensor.slot) {
            values = (0..size).map(|at| values[at % rows * columns + at / rows]).collect();
        }
        Ok(values)
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

    /// Reads both first projections, or their biases, from one tensor.
    fn read_fused(
        &self,
        shards: &mut Shards,
        tensor: &Found,
        slots: [&'static str; 2],
        values: &mut BTreeMap<&'static str, Vec<f32>>,
    ) -> Result<()> {
        let Shape { count, rows, columns, .. } = tensor.shape;
        let half = rows / 2 * columns;
        let [mut first, mut second] = [Vec::new(), Vec::new()];
        for part in [&mut first, &mut second] {
            shards.file_of_first(self, tensor)?.reserve(part, count.saturating_mul(half))?;
        }
        for item in 0..count {
            let both = self.read_matrix(shards, tensor, item)?;
            if self.layout.is_interleaved(tensor.slot) {
                for pair in both.chunks_exact(2 * columns) {
                    first.extend(&pair[..columns]);
                    second.extend(&pair[columns..]);
                }
            } else {
                first.extend(&both[..half]);
                second.extend(&both[half..]);
            }
        }
        if self.layout.is_up_first(tensor.slot) {
            std::mem::swap(&mut first, &mut second);
        }
        values.extend([(slots[0], first), (slots[1], second)]);
        Ok(())
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
                Storage::Plain => {}
                Storage::Fp8 { scales } => drop(used.insert(scales)),
                Storage::Fp4 { bytes, scales } => used.extend([bytes, scales]),
            }
            used.insert(name);
        }
        let under_prefix = shards.file_of_tensor.range(self.prefix.to_owned()..).map(|(name, _)| name);
        let mut under_prefix = under_prefix.take_while(|name| name.starts_with(self.prefix));
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

impl Shards<'_> {
    /// The file of a tensor's first part.
    fn file_of_first(&mut self, reader: &LayerReader, tensor: &Found) -> Result<&mut TensorFile> {
        let name = reader.name(&tensor.pattern, 0);
        let name = if self.has(&name) { name } else { format!("{name}_blocks") };
        self.file_of(&name)
    }
}

/// A vector has no columns.
fn matrix(rows: usize, columns: usize) -> Vec<usize> {
    if columns == 1 { vec![rows] } else { vec![rows, columns] }
}

/// The shape is one of these, apart from axes of length 1.
fn check_shape(file: &TensorFile, name: &str, shapes: &[Vec<usize>]) -> Result<()> {
    let without_ones = |shape: &[usize]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
    let found = without_ones(&file.info(name)?.shape);
    if shapes.iter().any(|shape| without_ones(shape) == found) {
        return Ok(());
    }
    let expected: Vec<String> = shapes.iter().map(|shape| format!("{shape:?}")).collect();
    Err(file.mismatch(name, &format!("shape {}", expected.join(" or "))))
}

/// Scales are floats, or bytes that are exponents of two.
fn read_scales(file: &mut TensorFile, name: &str, range: std::ops::Range<usize>) -> Result<Vec<f32>> {
    if matches!(file.info(name)?.dtype, Dtype::U8 | Dtype::F8_E8M0) {
        return Ok(file.read_bytes(name, range)?.into_iter().map(packed::e8m0).collect());
    }
    let mut scales = Vec::new();
    file.read_f32(name, range, &mut scales)?;
    Ok(scales)
}
