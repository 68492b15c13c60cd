//! Finds one MoE layer in a checkpoint and reads it: a single `.safetensors` file, or a folder of shards with an
//! index. Headers are read when they are needed, so a checkpoint of which only some shards are on disk is fine as long
//! as the layer's are.

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::family::{Family, GateUp, Layout};
use crate::model::model_config::ModelConfig;
use crate::model::tensor_file::{self, TensorFile};
use crate::model::tensor_header::{UniqueMap, check_name};
use crate::model::weights::{MoeWeights, WeightFormat};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

pub use crate::model::tensor_file::{read_tensor, write_tensor};

const INDEX_NAME: &str = "model.safetensors.index.json";
/// The index of the largest published checkpoint is about 15 MB.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// A checkpoint on disk. Opening reads its configuration and its table of tensors, not the tensors.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<PathBuf>,
    /// Which of `files` holds each tensor.
    file_of_tensor: BTreeMap<String, usize>,
    metadata: BTreeMap<String, String>,
    config: Option<ModelConfig>,
}

/// One layer, read and checked.
#[derive(Clone, Debug)]
pub struct LoadedLayer {
    /// Sizes and semantics.
    pub config: MoeConfig,
    /// Weights as f32, all finite, shaped as `config` says.
    pub weights: MoeWeights,
    /// The family's name.
    pub family: String,
    /// The layout that was found, as the family calls it.
    pub layout: String,
    /// In front of the layer's tensor names.
    pub prefix: String,
    /// Types that the tensors had, e.g. `["BF16"]`.
    pub stored_as: Vec<String>,
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index (`*.json`), or a folder that holds either.
    ///
    /// # Errors
    /// [`Error::Io`], and [`Error::BadFile`] for anything that is not a sound checkpoint.
    pub fn open(path: &Path) -> Result<Self> {
        let content = if path.is_dir() { main_file(path)? } else { path.to_owned() };
        let folder = content.parent().unwrap_or(Path::new("")).to_owned();
        let mut checkpoint = if content.extension().is_some_and(|extension| extension == "json") {
            Self::from_index(&content, &folder)?
        } else {
            let file = TensorFile::open(&content)?;
            let file_of_tensor = file.tensors.into_keys().map(|name| (name, 0)).collect();
            let metadata = file.metadata;
            Self { path: path.to_owned(), files: vec![content], file_of_tensor, metadata, config: None }
        };
        checkpoint.config = match checkpoint.metadata.get("config") {
            Some(json) => Some(ModelConfig::parse(&checkpoint.path, json.as_bytes())?),
            None => read_config(&folder.join("config.json"))?,
        };
        Ok(checkpoint)
    }

    fn from_index(path: &Path, folder: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: UniqueMap<String>,
        }
        let bad = |message| Error::BadFile { path: path.to_owned(), message };
        let json = tensor_file::read_small(path, MAX_INDEX_BYTES)?;
        let index: Index =
            serde_json::from_slice(&json).map_err(|error| bad(format!("not a usable checkpoint index: {error}")))?;
        let shards: BTreeSet<&String> = index.weight_map.0.values().collect();
        for shard in &shards {
            // An index comes from elsewhere: it may only name its neighbours.
            let mut components = Path::new(shard.as_str()).components();
            let is_plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
            if !is_plain || shard.contains(['/', '\\', ':']) || shard.chars().any(char::is_control) {
                return Err(bad(format!("shard {shard:?} is not the name of a file in the same folder")));
            }
        }
        index.weight_map.0.keys().try_for_each(|name| check_name(name)).map_err(bad)?;
        let number: BTreeMap<String, usize> = shards.into_iter().cloned().zip(0..).collect();
        let files = number.keys().map(|shard| folder.join(shard)).collect();
        let file_of_tensor = index.weight_map.0.into_iter().map(|(tensor, shard)| (tensor, number[&shard])).collect();
        Ok(Self { path: path.to_owned(), files, file_of_tensor, metadata: BTreeMap::new(), config: None })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value of the file's `__metadata__`. An index has none.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// Names of all tensors, in alphabetical order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.file_of_tensor.keys().map(String::as_str)
    }

    /// Reads the MoE block of `layer`. The family is detected from the configuration unless one is given.
    ///
    /// Sizes come from the metadata key `config` or from `config.json` beside the file. If the metadata names a
    /// `prefix`, the file holds one block and `layer` must be its `layer_idx`. If it names a `layout`, only that one
    /// is looked for, otherwise each of the family's.
    ///
    /// # Errors
    /// - [`Error::Unsupported`]: the family, its activation or a tensor's type is not known, or the block holds tensors
    ///   that the family's description does not mention, so that leaving them out would give wrong results;
    /// - [`Error::MissingTensor`], [`Error::BadTensor`], [`Error::NonFinite`], [`Error::BadFile`], [`Error::Io`]:
    ///   the files are not what configuration and family say;
    /// - [`Error::InvalidConfig`]: sizes out of range.
    pub fn load_layer(&self, family: Option<&Family>, layer: u32) -> Result<LoadedLayer> {
        let model_config = self.config.as_ref().ok_or_else(|| Error::BadFile {
            path: self.path.clone(),
            message: "no configuration: neither config.json beside it nor a metadata key \"config\"".to_owned(),
        })?;
        let family = match family {
            Some(family) => family,
            None => model_config.family()?,
        };
        let config = family.moe_config(model_config)?;
        let (layout_name, layout, prefix) = self.find_layout(family, layer)?;
        let names = Names { layout, prefix: &prefix, config: &config };
        self.check_all_used(family, &names)?;

        let mut shards = Shards { checkpoint: self, open: BTreeMap::new() };
        let mut stored_as = BTreeSet::new();
        for (name, shape) in names.tensors() {
            let file = shards.file_of(&name)?;
            file.expect(&name, &shape)?;
            stored_as.insert(file.info(&name)?.dtype.to_string());
        }
        let weights = names.read(&mut shards)?;
        weights.validate(&config, WeightFormat::F32)?;
        Ok(LoadedLayer {
            config,
            weights,
            family: family.name().to_owned(),
            layout: layout_name.to_owned(),
            prefix,
            stored_as: stored_as.into_iter().collect(),
        })
    }

    /// The first layout and prefix whose router and first projection exist.
    fn find_layout<'f>(&self, family: &'f Family, layer: u32) -> Result<(&'f str, &'f Layout, String)> {
        if self.metadata.contains_key("prefix") {
            let only = self.metadata("layer_idx").unwrap_or("0");
            if only.parse() != Ok(layer) {
                return Err(Error::config("layer", layer, format!("{only}, the only one in {}", self.path.display())));
            }
        }
        if let Some(prefix) = self.metadata("prefix").filter(|prefix| !prefix.is_empty()) {
            let bad = |message| Error::BadFile { path: self.path.clone(), message };
            check_name(prefix).map_err(|message| bad(format!("metadata prefix: {message}")))?;
        }
        let wanted = self.metadata("layout");
        let mut tried = Vec::new();
        for (name, layout) in family.layouts().iter().filter(|(name, _)| wanted.is_none_or(|w| w == name.as_str())) {
            let of_family = || layout.prefixes.iter().map(|prefix| prefix.replace("{layer}", &layer.to_string()));
            let prefixes = self.metadata("prefix").map_or_else(|| of_family().collect(), |p| vec![p.to_owned()]);
            for prefix in prefixes {
                let (GateUp::Separate { gate_proj: first, .. } | GateUp::Fused(first)) = &layout.gate_up;
                let needed = [layout.router.clone(), first.replace("{expert}", "0")];
                let missing =
                    needed.iter().find(|tensor| !self.file_of_tensor.contains_key(&format!("{prefix}{tensor}")));
                match missing {
                    None => return Ok((name, layout, prefix)),
                    Some(tensor) => tried.push(format!("{prefix}{tensor}")),
                }
            }
        }
        let Some(first) = tried.first() else {
            let known: Vec<&str> = family.layouts().keys().map(String::as_str).collect();
            return Err(Error::Unsupported {
                what: format!("layout {:?} of {}", wanted.unwrap_or_default(), self.path.display()),
                by: format!("by family {:?}", family.name()),
                hint: format!("{} describes {}", family.path().display(), known.join(", ")),
            });
        };
        Err(Error::MissingTensor {
            path: self.path.clone(),
            tensor: first.clone(),
            hint: format!(
                "family {:?} found no MoE block at layer {layer} (also looked for {}); {}",
                family.name(),
                tried[1..].join(", "),
                tensor_file::names_hint(self.file_of_tensor.keys(), self.file_of_tensor.len())
            ),
        })
    }

    /// A bias, a scale or a shared expert that is there but not described must not be left out in silence.
    fn check_all_used(&self, family: &Family, names: &Names) -> Result<()> {
        let used: BTreeSet<String> = names.tensors().into_iter().map(|(name, _)| name).collect();
        let under_prefix = self.file_of_tensor.range(names.prefix.to_owned()..).map(|(name, _)| name);
        let mut under_prefix = under_prefix.take_while(|name| name.starts_with(names.prefix));
        match under_prefix.find(|name| !used.contains(*name)) {
            None => Ok(()),
            Some(extra) => Err(Error::Unsupported {
                what: format!("tensor {extra:?} of {}", self.path.display()),
                by: format!("by family {:?} with {} experts", family.name(), names.config.num_experts()),
                hint: format!(
                    "the result would be wrong without it; {} would have to name it",
                    family.path().display()
                ),
            }),
        }
    }
}

/// Shards opened so far: each header is read at most once for a layer.
struct Shards<'c> {
    checkpoint: &'c Checkpoint,
    open: BTreeMap<usize, TensorFile>,
}

impl Shards<'_> {
    fn file_of(&mut self, tensor: &str) -> Result<&mut TensorFile> {
        let checkpoint = self.checkpoint;
        let &number = checkpoint.file_of_tensor.get(tensor).ok_or_else(|| Error::MissingTensor {
            path: checkpoint.path.clone(),
            tensor: tensor.to_owned(),
            hint: tensor_file::names_hint(checkpoint.file_of_tensor.keys(), checkpoint.file_of_tensor.len()),
        })?;
        Ok(match self.open.entry(number) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(slot) => {
                slot.insert(TensorFile::open(&checkpoint.files[number])?)
            }
        })
    }
}

/// The tensors of one layer: names, shapes, and where each expert's part lies.
struct Names<'a> {
    layout: &'a Layout,
    prefix: &'a str,
    config: &'a MoeConfig,
}

impl Names<'_> {
    fn name(&self, pattern: &str, expert: usize) -> String {
        format!("{}{}", self.prefix, pattern.replace("{expert}", &expert.to_string()))
    }

    /// Each tensor of the layer once, with the shape that it must have.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let [h, i, e] = self.sizes();
        let Layout { prefixes: _, router, router_bias, gate_up, down_proj } = self.layout;
        let mut tensors = vec![(self.name(router, 0), vec![e, h])];
        tensors.extend(router_bias.as_ref().map(|bias| (self.name(bias, 0), vec![e])));
        let mut projections = vec![(down_proj, [h, i])];
        match gate_up {
            GateUp::Separate { gate_proj, up_proj } => projections.extend([(gate_proj, [i, h]), (up_proj, [i, h])]),
            GateUp::Fused(both) => projections.push((both, [2 * i, h])),
        }
        for (pattern, [out, inner]) in projections {
            if pattern.contains("{expert}") {
                tensors.extend((0..e).map(|expert| (self.name(pattern, expert), vec![out, inner])));
            } else {
                tensors.push((self.name(pattern, 0), vec![e, out, inner]));
            }
        }
        tensors
    }

    /// Reads every tensor. All of [`Names::tensors`] have been checked, so sizes are bounded by what is on disk.
    fn read(&self, shards: &mut Shards) -> Result<MoeWeights> {
        let [h, i, e] = self.sizes();
        let one = i * h;
        let (gate_proj, up_proj) = match &self.layout.gate_up {
            GateUp::Separate { gate_proj, up_proj } => {
                (self.read_experts(shards, gate_proj, one, 0..one)?, self.read_experts(shards, up_proj, one, 0..one)?)
            }
            GateUp::Fused(both) => (
                self.read_experts(shards, both, 2 * one, 0..one)?,
                self.read_experts(shards, both, 2 * one, one..2 * one)?,
            ),
        };
        let router_bias = self.layout.router_bias.as_ref();
        Ok(MoeWeights {
            router: self.read_whole(shards, &self.layout.router, e * h)?,
            router_bias: router_bias.map(|bias| self.read_whole(shards, bias, e)).transpose()?,
            gate_proj,
            up_proj,
            down_proj: self.read_experts(shards, &self.layout.down_proj, one, 0..one)?,
            ..MoeWeights::default()
        })
    }

    fn read_whole(&self, shards: &mut Shards, pattern: &str, count: usize) -> Result<Vec<f32>> {
        let name = self.name(pattern, 0);
        let mut values = Vec::new();
        shards.file_of(&name)?.read_f32(&name, 0..count, &mut values)?;
        Ok(values)
    }

    /// Elements `part` of each expert's `stride` elements, experts in order.
    fn read_experts(&self, shards: &mut Shards, pattern: &str, stride: usize, part: Range<usize>) -> Result<Vec<f32>> {
        let num_experts = self.config.num_experts() as usize;
        let mut values = Vec::new();
        for expert in 0..num_experts {
            let name = self.name(pattern, expert);
            let file = shards.file_of(&name)?;
            if expert == 0 {
                file.reserve(&mut values, num_experts.saturating_mul(part.len()))?;
            }
            let offset = if pattern.contains("{expert}") { 0 } else { expert * stride };
            file.read_f32(&name, part.start + offset..part.end + offset, &mut values)?;
        }
        Ok(values)
    }

    fn sizes(&self) -> [usize; 3] {
        [self.config.hidden_size(), self.config.intermediate_size(), self.config.num_experts()].map(|n| n as usize)
    }
}

/// The file to start from in a folder: the index, else the only tensor file.
fn main_file(folder: &Path) -> Result<PathBuf> {
    for name in [INDEX_NAME, "model.safetensors"] {
        let path = folder.join(name);
        if path.exists() {
            return Ok(path);
        }
    }
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let mut tensor_files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensor_files.push(path);
        }
    }
    match tensor_files.as_slice() {
        [only] => Ok(only.clone()),
        several => Err(Error::BadFile {
            path: folder.to_owned(),
            message: format!(
                "{} .safetensors files and neither {INDEX_NAME} nor model.safetensors; name the file",
                several.len()
            ),
        }),
    }
}

/// `None` if there is no such file.
fn read_config(path: &Path) -> Result<Option<ModelConfig>> {
    if !path.exists() {
        return Ok(None);
    }
    let json = tensor_file::read_small(path, tensor_file::MAX_JSON_BYTES)?;
    ModelConfig::parse(path, &json).map(Some)
}
