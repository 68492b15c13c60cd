//! Finds one MoE layer in a checkpoint and reads it: a single `.safetensors` file, a folder of shards with an index, or
//! a GGUF file, possibly split. Headers of shards are read when they are needed, so a checkpoint of which only some
//! shards are on disk is fine as long as the layer's are. GGUF has no index: all parts have to be there.

mod index;

use crate::error::{Error, Result, brief};
use crate::model::config::MoeConfig;
use crate::model::family::Family;
use crate::model::family::layout::{self, Layout};
use crate::model::formats::{LayerFormats, WeightFormat};
use crate::model::gguf::parts::{self, GgufParts};
use crate::model::layer_reader::{self, FileSource, LayerFile, LayerReader, Shards};
use crate::model::model_config::{self, ModelConfig};
use crate::model::routing::Routing;
use crate::model::tensor_file::{self, TensorFile};
use crate::model::tensor_header::{UniqueMap, check_name, check_text};
use crate::model::weights::MoeWeights;
use crate::small_file::{self, Unreadable};
use index::Index;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

pub use crate::model::tensor_file::{read_activations, read_integers, read_tensor, write_tensor};

/// Metadata key: formats of the tensors that hold packed rows, as JSON.
pub(crate) const PACKED_KEY: &str = "packed_weights";
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
    /// Metadata, if it is a GGUF file. Then there is no configuration.
    gguf: Option<ModelConfig>,
    /// Tensors of packed rows, which this program wrote.
    packed: BTreeMap<String, WeightFormat>,
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
    /// What the configuration calls the model, which a family may know under several names: `model_type`, or the
    /// architecture of a GGUF file.
    pub model_type: Option<String>,
    /// The layout that was found, as the family calls it.
    pub layout: String,
    /// In front of the layer's tensor names.
    pub prefix: String,
    /// Types that the tensors had, e.g. `["BF16"]`.
    pub stored_as: Vec<String>,
}

/// One layer of a checkpoint, described and checked, whose experts are still in its files.
pub struct LayerSource<'c> {
    config: MoeConfig,
    /// All but the matrices of experts.
    weights: MoeWeights,
    family: &'c str,
    model_type: Option<&'c str>,
    layout: &'c str,
    file: LayerFile<'c>,
    /// What experts are converted to.
    converted: Option<LayerFormats>,
}

impl<'c> LayerSource<'c> {
    /// Sizes and semantics.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// The family's name.
    pub fn family(&self) -> &str {
        self.family
    }

    /// The layout that was found, as the family calls it.
    pub fn layout(&self) -> &str {
        self.layout
    }

    /// In front of the layer's tensor names.
    pub fn prefix(&self) -> &str {
        self.file.prefix()
    }

    /// Types that the tensors have, e.g. `["BF16"]`.
    pub fn stored_as(&self) -> Vec<String> {
        self.file.stored_as.iter().cloned().collect()
    }

    /// Converts every expert to this format on its way. Without it, experts are kept as they are stored.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] where rows are no multiple of the format's blocks.
    pub fn convert_to(&mut self, format: WeightFormat) -> Result<()> {
        let formats = LayerFormats::from(format);
        formats.check(&self.config)?;
        self.converted = Some(formats);
        Ok(())
    }

    /// Formats that experts will have on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the gate and up projections of an expert are stored differently.
    pub fn formats(&mut self) -> Result<LayerFormats> {
        self.converted.map_or_else(|| self.file.stored_formats(), Ok)
    }

    /// The layer's other tensors, and where its experts come from.
    pub(crate) fn parts(&mut self) -> Result<(&MoeWeights, FileSource<'_, 'c>)> {
        let (formats, as_stored) = (self.formats()?, self.converted.is_none());
        Ok((&self.weights, FileSource { file: &mut self.file, formats, as_stored }))
    }

    /// Reads all of it as f32.
    pub fn read(mut self) -> Result<LoadedLayer> {
        let stored_as = self.stored_as();
        let prefix = self.prefix().to_owned();
        let mut weights = self.weights;
        self.file.read_experts(&mut weights)?;
        weights.validate(&self.config, WeightFormat::F32)?;
        Ok(LoadedLayer {
            config: self.config,
            weights,
            family: self.family.to_owned(),
            model_type: self.model_type.map(str::to_owned),
            layout: self.layout.to_owned(),
            prefix,
            stored_as,
        })
    }
}

impl Checkpoint {
    /// Opens a `.safetensors` file, an index (`*.json`), a GGUF file or any part of a split one, or a folder that holds
    /// one of these.
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
            if let Some(metadata) = file.gguf {
                return Ok(Self::from_gguf(path, GgufParts::open(&content, &metadata, file_of_tensor)?));
            }
            let metadata = file.metadata;
            Self {
                path: path.to_owned(),
                files: vec![content],
                file_of_tensor,
                metadata,
                config: None,
                gguf: None,
                packed: BTreeMap::new(),
            }
        };
        if let Some(json) = checkpoint.metadata.get(PACKED_KEY) {
            let bad = |message| Error::BadFile { path: checkpoint.path.clone(), message };
            checkpoint.packed = serde_json::from_str::<UniqueMap<WeightFormat>>(json)
                .map_err(|error| bad(format!("metadata key {PACKED_KEY:?}: {}", brief(error))))?
                .0;
        }
        checkpoint.config = match checkpoint.metadata.get("config") {
            Some(json) => Some(ModelConfig::parse(&checkpoint.path, json.as_bytes())?),
            None => read_config(&folder.join("config.json"))?,
        };
        Ok(checkpoint)
    }

    fn from_gguf(path: &Path, parts: GgufParts) -> Self {
        let GgufParts { files, file_of_tensor, metadata } = parts;
        Self {
            path: path.to_owned(),
            files,
            file_of_tensor,
            metadata: BTreeMap::new(),
            config: None,
            gguf: Some(metadata),
            packed: BTreeMap::new(),
        }
    }

    fn from_index(path: &Path, folder: &Path) -> Result<Self> {
        let bad = |message| Error::BadFile { path: path.to_owned(), message };
        let unreadable = |reason: Unreadable| reason.bad_file(path, MAX_INDEX_BYTES, "an index of tensors");
        let json = small_file::read(path, MAX_INDEX_BYTES).map_err(unreadable)?;
        let Index { shards, shard_of_tensor } =
            Index::parse(&json).map_err(|error| bad(format!("not a usable checkpoint index: {error}")))?;
        let files: Vec<PathBuf> = shards.iter().map(|shard| folder.join(shard)).collect();
        files.iter().try_for_each(|file| small_file::check_neighbour(file)).map_err(bad)?;
        Ok(Self {
            path: path.to_owned(),
            files,
            file_of_tensor: shard_of_tensor,
            metadata: BTreeMap::new(),
            config: None,
            gguf: None,
            packed: BTreeMap::new(),
        })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A value of the file's `__metadata__`. An index has none, nor has a GGUF file, whose metadata are another matter.
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
    /// is looked for, otherwise each of the family's. A GGUF file has its sizes in itself, in what the family's
    /// description calls `[gguf]`, and is only read by the layouts for such files.
    ///
    /// # Errors
    /// - [`Error::Unsupported`]: the family, its activation or a tensor's type is not known, or the block holds tensors
    ///   that the family's description does not mention, so that leaving them out would give wrong results;
    /// - [`Error::MissingTensor`], [`Error::BadTensor`], [`Error::NonFinite`], [`Error::BadFile`], [`Error::Io`]:
    ///   the files are not what configuration and family say;
    /// - [`Error::InvalidConfig`]: sizes out of range.
    pub fn load_layer(&self, family: Option<&Family>, layer: u32) -> Result<LoadedLayer> {
        self.layer(family, layer)?.read()
    }

    /// As [`Checkpoint::load_layer`], but reads only the tensors that are small: experts follow one by one when the
    /// layer is put on a device ([`crate::MoeLayer::load`]), in the format that they are stored in.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load_layer`], but for what is wrong with experts.
    pub fn layer<'c>(&'c self, family: Option<&'c Family>, layer: u32) -> Result<LayerSource<'c>> {
        let (layout_name, mut file) = self.layer_file(family, layer)?;
        let (weights, scale) = file.small()?;
        let config = match scale {
            Some(factor) => scaled(file.config(), factor)?,
            None => file.config().clone(),
        };
        weights.validate_without_experts(&config)?;
        Ok(LayerSource {
            config,
            weights,
            family: file.family().name(),
            model_type: self.model_type().filter(|text| check_text("model_type", text).is_ok()),
            layout: layout_name,
            file,
            converted: None,
        })
    }

    fn model_type(&self) -> Option<&str> {
        match &self.gguf {
            Some(metadata) => metadata.architecture(),
            None => self.config.as_ref().and_then(ModelConfig::model_type),
        }
    }

    fn model_config(&self) -> Result<&ModelConfig> {
        self.config.as_ref().ok_or_else(|| Error::BadFile {
            path: self.path.clone(),
            message: "no configuration: neither config.json beside it nor a metadata key \"config\"".to_owned(),
        })
    }

    /// A layer in its files, and the name of its layout.
    pub(crate) fn layer_file<'c>(&'c self, family: Option<&'c Family>, layer: u32) -> Result<(&'c str, LayerFile<'c>)> {
        let family = self.family(family)?;
        let model_config = self.config_of(family, layer)?;
        let config = family.moe_config(&model_config, layer)?;
        let (name, layout, prefix) = self.find_layout(family, layer)?;
        let reader = LayerReader { family, layout, prefix, config };
        Ok((name, LayerFile::open(reader, self.shards(&model_config))?))
    }

    /// The family that was given, or else the one that configuration or metadata tell.
    fn family<'c>(&self, given: Option<&'c Family>) -> Result<&'c Family> {
        match (given, &self.gguf) {
            (Some(family), _) => Ok(family),
            (None, Some(metadata)) => Family::of_gguf(metadata),
            (None, None) => self.model_config()?.family(),
        }
    }

    /// The configuration that a layer is described with.
    fn config_of(&self, family: &Family, layer: u32) -> Result<Cow<'_, ModelConfig>> {
        match &self.gguf {
            Some(metadata) => family.gguf_config(metadata, layer).map(Cow::Owned),
            None => self.model_config().map(Cow::Borrowed),
        }
    }

    /// The configuration of some layers, as a `config.json` would have it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for layers of a GGUF file whose metadata say different things of them.
    pub(crate) fn config_text(&self, family: Option<&Family>, layers: &[u32]) -> Result<String> {
        let family = self.family(family)?;
        let mut text = None;
        for &layer in layers {
            let mut config = self.config_of(family, layer)?;
            if self.gguf.is_some() {
                let model_type = family.model_types().first().map(|name| name.as_str().into());
                config.to_mut().set("model_type", model_type, Vec::new());
            }
            let of_layer = config.to_json();
            if text.get_or_insert_with(|| of_layer.clone()) != &of_layer {
                return Err(Error::Unsupported {
                    what: format!("layers {layers:?} of {}", self.path.display()),
                    by: "in one file, as its metadata say different things of them".to_owned(),
                    hint: "write each layer to a file of its own".to_owned(),
                });
            }
        }
        Ok(text.unwrap_or_default())
    }

    /// The layers that have an MoE block, ascending: those whose router and first projection exist.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load_layer`] about the configuration and the family; [`Error::MissingTensor`] if there is
    /// none.
    pub fn layers(&self, family: Option<&Family>) -> Result<Vec<u32>> {
        let family = self.family(family)?;
        let mut candidates = BTreeSet::new();
        if self.metadata.contains_key("prefix") {
            candidates.insert(self.metadata("layer_idx").and_then(|text| text.parse().ok()).unwrap_or(0));
        } else {
            let layouts = family.layouts()?.iter().filter(|(name, _)| self.may_have(name));
            for prefix in layouts.flat_map(|(_, layout)| &layout.prefixes) {
                let Some((start, end)) = prefix.split_once("{layer}") else {
                    candidates.insert(0);
                    continue;
                };
                let number = |name: &str| {
                    let rest = name.strip_prefix(start)?;
                    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
                    rest[digits..].starts_with(end).then(|| rest[..digits].parse::<u32>().ok())?
                };
                candidates.extend(self.tensor_names().filter_map(number));
            }
        }
        let first = candidates.first().copied().unwrap_or(0);
        let layers: Vec<u32> =
            candidates.into_iter().filter(|&layer| self.find_layout(family, layer).is_ok()).collect();
        match layers.is_empty() {
            true => self.find_layout(family, first).map(|_| layers),
            false => Ok(layers),
        }
    }

    /// `output` is none of the files that are read.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if it is one: writing there would destroy what is read.
    pub fn check_not_a_source(&self, output: &Path) -> Result<()> {
        let same = |file: &PathBuf| match (file.canonicalize(), output.canonicalize()) {
            (Ok(file), Ok(output)) => file == output,
            _ => false,
        };
        match self.files.iter().find(|file| same(file)) {
            None => Ok(()),
            Some(file) => Err(Error::config("output", file.display(), "a file that is not read at the same time")),
        }
    }

    fn shards(&self, config: &ModelConfig) -> Shards<'_> {
        Shards {
            path: &self.path,
            files: &self.files,
            file_of_tensor: &self.file_of_tensor,
            open: BTreeMap::new(),
            is_gguf: self.gguf.is_some(),
            packed: &self.packed,
            quantization: config.quantization(),
        }
    }

    /// A layout of this name can be this file's: that which the metadata name, or any of its kind of files.
    fn may_have(&self, layout: &str) -> bool {
        match self.metadata("layout") {
            Some(wanted) => wanted == layout,
            None => layout::is_of_gguf(layout) == self.gguf.is_some(),
        }
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
        for (name, layout) in family.layouts()?.iter().filter(|(name, _)| self.may_have(name)) {
            let of_family = || layout.prefixes.iter().map(|prefix| prefix.replace("{layer}", &layer.to_string()));
            let prefixes = self.metadata("prefix").map_or_else(|| of_family().collect(), |p| vec![p.to_owned()]);
            for prefix in prefixes {
                let there = |name: &str| {
                    let tensor = format!("{prefix}{}", name.replace("{expert}", "0"));
                    layer_reader::is_stored(
                        self.gguf.is_some(),
                        |tensor| self.file_of_tensor.contains_key(tensor),
                        &tensor,
                    )
                };
                let mut landmarks = layout.landmarks();
                let missing = landmarks.find(|tensor| !tensor.names.iter().any(|name| there(name)));
                let missing = missing.and_then(|tensor| tensor.names.first());
                match missing {
                    None => return Ok((name, layout, prefix)),
                    Some(tensor) => tried.push(format!("{prefix}{}", tensor.replace("{expert}", "0"))),
                }
            }
        }
        let Some(first) = tried.first() else {
            let known = family.layout_names();
            return Err(Error::Unsupported {
                what: format!(
                    "the layout{} of {}",
                    wanted.map_or(String::new(), |w| format!(" {w:?}")),
                    self.path.display()
                ),
                by: format!("by family {:?}", family.name()),
                hint: format!("{} describes {}", family.path().display(), known.join(", ")),
            });
        };
        Err(Error::MissingTensor {
            path: self.path.clone(),
            tensor: first.clone(),
            hint: format!(
                "family {:?} found no MoE block at layer {layer}{}; {}",
                family.name(),
                if tried.len() > 1 { format!(" (also looked for {})", tried[1..].join(", ")) } else { String::new() },
                tensor_file::names_hint(self.file_of_tensor.keys(), self.file_of_tensor.len())
            ),
        })
    }
}

/// The layer with every weight of a choice multiplied by a number that the checkpoint stores.
fn scaled(config: &MoeConfig, factor: f32) -> Result<MoeConfig> {
    let routing = Routing { scale: config.routing().scale * factor, ..config.routing() };
    let [h, i] = [config.hidden_size(), config.intermediate_size()];
    MoeConfig::new(h, i, config.num_experts(), config.top_k(), routing, config.activation())?
        .with_extras(config.extras().clone())
}

/// The file to start from in a folder: the index, else the only tensor file, else the only GGUF model.
fn main_file(folder: &Path) -> Result<PathBuf> {
    for name in [INDEX_NAME, "model.safetensors"] {
        let path = folder.join(name);
        if path.exists() {
            return Ok(path);
        }
    }
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let bad = |message| Err(Error::BadFile { path: folder.to_owned(), message });
    let [mut tensor_files, mut gguf_files] = [Vec::new(), Vec::new()];
    for entry in std::fs::read_dir(folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            tensor_files.push(path);
        } else if parts::is_gguf(&path) {
            gguf_files.push(path);
        }
    }
    gguf_files.sort();
    match (tensor_files.as_slice(), parts::main_part(&gguf_files)) {
        ([only], _) => Ok(only.clone()),
        ([], Ok(Some(main))) => Ok(main.clone()),
        ([], Err(several)) => bad(format!("{several} .gguf files, which are not the parts of one; name the file")),
        (several, _) => bad(format!(
            "{} .safetensors files and neither {INDEX_NAME} nor model.safetensors; name the file",
            several.len()
        )),
    }
}

/// `None` if there is no such file.
fn read_config(path: &Path) -> Result<Option<ModelConfig>> {
    if !path.exists() {
        return Ok(None);
    }
    let bad = |message| Error::BadFile { path: path.to_owned(), message };
    small_file::check_neighbour(path).map_err(bad)?;
    let json = small_file::read(path, model_config::MAX_BYTES)
        .map_err(|reason| reason.bad_file(path, model_config::MAX_BYTES, "a model's configuration"))?;
    ModelConfig::parse(path, &json).map(Some)
}
