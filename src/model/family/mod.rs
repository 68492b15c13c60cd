//! What is particular to a model family, as data: where its configuration keeps the sizes, how its router works and
//! what its tensors are called. One TOML file each; `docs/families.md` describes the format.
//! This module reads descriptions and configurations, never tensors.

mod builtin;
mod gguf;
pub(crate) mod layout;
mod rules;
pub(crate) mod setting;

pub(crate) use rules::NORMS;

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::model_config::ModelConfig;
use crate::small_file;
use builtin::BUILTIN;
use layout::Layout;
use rules::{Rules, Unsupported};
use serde::Deserialize;
use setting::Scope;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// The longest built-in one has 4 KB; while it is parsed, one takes a hundred times its size.
const MAX_FAMILY_BYTES: u64 = 256 << 10;

/// A model family's description: built in, or from a user's file.
#[derive(Clone, Debug)]
pub struct Family {
    path: PathBuf,
    text: String,
    body: Body,
}

#[derive(Clone, Debug)]
enum Body {
    Rules(Box<Rules>),
    /// Known by name, with the reason why it cannot be described.
    Unsupported(Unsupported),
}

impl Family {
    /// The families that this crate knows, in alphabetical order.
    pub fn builtin() -> &'static [Family] {
        static FAMILIES: OnceLock<Vec<Family>> = OnceLock::new();
        FAMILIES.get_or_init(|| {
            let parse = |(path, text)| Family::from_toml(Path::new(path), text);
            BUILTIN.into_iter().map(parse).collect::<Result<_>>().expect("a unit test parses every embedded family")
        })
    }

    /// The built-in family of this name.
    pub fn named(name: &str) -> Option<&'static Family> {
        Self::builtin().iter().find(|family| family.name() == name)
    }

    /// The built-in family whose description lists `model_type`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is none.
    pub fn detect(model_type: &str) -> Result<&'static Family> {
        let lists_it = |family: &&Family| family.model_types().iter().any(|known| known == model_type);
        Self::builtin().iter().find(lists_it).ok_or_else(|| Error::Unsupported {
            what: format!("model_type {model_type:?}"),
            by: format!("by the built-in families ({})", names(Self::builtin())),
            hint: "describe it in a TOML file and pass that, see docs/families.md".to_owned(),
        })
    }

    /// The built-in family that a GGUF file with these metadata is of.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is none, [`Error::BadFile`] without an architecture.
    pub(crate) fn of_gguf(metadata: &ModelConfig) -> Result<&'static Family> {
        let Some(architecture) = metadata.architecture() else {
            let message = "the metadata lack general.architecture, which says what the model is; name the family";
            return Err(Error::BadFile { path: metadata.path.clone(), message: message.to_owned() });
        };
        let rules = |family: &'static Family| family.rules().ok()?.gguf.as_ref().map(|gguf| (family, gguf));
        if let Some((family, _)) =
            Self::builtin().iter().filter_map(rules).find(|(family, gguf)| gguf.detects(metadata, family.name()))
        {
            return Ok(family);
        }
        let lists_it = |family: &&Family| family.gguf_architectures().iter().any(|known| known == architecture);
        let near: Vec<&str> = Self::builtin().iter().filter(lists_it).map(Family::name).collect();
        let with_gguf: Vec<&str> =
            Self::builtin().iter().filter(|f| !f.gguf_architectures().is_empty()).map(Family::name).collect();
        let (by, hint) = if near.is_empty() {
            let hint = "describe it in a TOML file with a section [gguf] and pass that, see docs/families.md";
            (format!("by the built-in families that read GGUF files ({})", with_gguf.join(", ")), hint.to_owned())
        } else {
            let near = near.join(", ");
            let hint = format!("is it a model without experts? `when` in {near} says what its metadata have to be");
            (format!("with its metadata by {near}"), hint)
        };
        let what = format!("architecture {architecture:?} of {}", metadata.path.display());
        Err(Error::Unsupported { what, by, hint })
    }

    /// Reads a description of at most 256 KiB.
    ///
    /// # Errors
    /// [`Error::BadFamily`] with the line and the known values, [`Error::Io`].
    pub fn from_file(path: &Path) -> Result<Family> {
        let bytes = small_file::read(path, MAX_FAMILY_BYTES)
            .map_err(|reason| reason.bad_file(path, MAX_FAMILY_BYTES, "a family's description"))?;
        let text = String::from_utf8(bytes).map_err(|error| bad(path, format!("not UTF-8: {error}")))?;
        Self::from_toml(path, &text)
    }

    /// Parses a description; `path` is what errors call it.
    ///
    /// # Errors
    /// [`Error::BadFamily`] with the line and the known values.
    pub fn from_toml(path: &Path, text: &str) -> Result<Family> {
        #[derive(Deserialize)]
        struct Probe {
            unsupported: Option<toml::Value>,
        }
        let wrong = |error: toml::de::Error| {
            let at = error.span().map_or(String::new(), |span| format!("line {}: ", line_of(text, span.start)));
            let unquoted = error.message().starts_with("invalid float") || error.message().contains("expected `nan`");
            let hint = if unquoted { " (keys of config.json stand in quotes)" } else { "" };
            bad(path, format!("{at}{}{hint}", error.message()))
        };
        let probe: Probe = toml::from_str(text).map_err(wrong)?;
        let body = if probe.unsupported.is_some() {
            Body::Unsupported(toml::from_str(text).map_err(wrong)?)
        } else {
            let rules: Rules = toml::from_str(text).map_err(wrong)?;
            rules.check().map_err(|(section, key, message)| {
                bad(path, format!("line {}: {message}", line_of_key(text, &section, key)))
            })?;
            let table: toml::Table = toml::from_str(text).map_err(wrong)?;
            if let Some((key, read)) = rules.gguf.as_ref().and_then(|gguf| gguf.unread(&table)) {
                let read: Vec<&str> = read.iter().map(String::as_str).collect();
                let line =
                    line_of_key(text, "gguf.config", key).max(line_of_key(text, "gguf.config", &format!("{key:?}")));
                let message =
                    format!("no setting of this family reads {key:?}; those that are read: {}", read.join(", "));
                return Err(bad(path, format!("line {line}: {message}")));
            }
            Body::Rules(Box::new(rules))
        };
        Ok(Family { path: path.to_owned(), text: text.to_owned(), body })
    }

    /// The family's name.
    pub fn name(&self) -> &str {
        match &self.body {
            Body::Rules(rules) => &rules.name,
            Body::Unsupported(family) => &family.name,
        }
    }

    /// Values of `model_type` in a `config.json` that mean this family.
    pub fn model_types(&self) -> &[String] {
        match &self.body {
            Body::Rules(rules) => &rules.detect.model_type,
            Body::Unsupported(family) => &family.detect.model_type,
        }
    }

    /// Values of `general.architecture` in a GGUF file that can mean this family. Empty: it has no section `[gguf]`,
    /// and reads no such files.
    pub fn gguf_architectures(&self) -> &[String] {
        match &self.body {
            Body::Rules(rules) => rules.gguf.as_ref().map_or(&[], |gguf| &gguf.architecture),
            Body::Unsupported(_) => &[],
        }
    }

    /// Why layers of this family cannot be described, if they cannot.
    pub fn unsupported(&self) -> Option<&str> {
        match &self.body {
            Body::Rules(_) => None,
            Body::Unsupported(family) => Some(&family.unsupported),
        }
    }

    /// Names of the ways in which layers of this family are stored.
    pub fn layout_names(&self) -> Vec<&str> {
        match &self.body {
            Body::Rules(rules) => rules.tensors.keys().map(String::as_str).collect(),
            Body::Unsupported(_) => Vec::new(),
        }
    }

    /// How the family routes, in a few words.
    pub fn summary(&self) -> String {
        match &self.body {
            Body::Rules(rules) => rules.summary(),
            Body::Unsupported(_) => "not supported".to_owned(),
        }
    }

    /// The description, as it was written.
    pub fn toml(&self) -> &str {
        &self.text
    }

    /// Layouts by name, in the order in which they are tried.
    pub(crate) fn layouts(&self) -> Result<&BTreeMap<String, Layout>> {
        self.rules().map(|rules| &rules.tensors)
    }

    /// Where the description comes from.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// This norm's weight is stored minus one.
    pub(crate) fn is_stored_minus_one(&self, norm: &str) -> bool {
        matches!(&self.body, Body::Rules(rules) if rules.is_stored_minus_one(norm))
    }

    /// The layer that a `config.json` describes; `path` is what errors call it.
    ///
    /// # Errors
    /// [`Error::BadFile`] for a missing or mistyped key, [`Error::Unsupported`] for an activation or another choice
    /// that is not known, [`Error::InvalidConfig`] for sizes out of range.
    pub fn layer_config(&self, path: &Path, json: &[u8], layer: u32) -> Result<MoeConfig> {
        self.moe_config(&ModelConfig::parse(path, json)?, layer)
    }

    /// The configuration of a layer, from the metadata of a GGUF file.
    pub(crate) fn gguf_config(&self, metadata: &ModelConfig, layer: u32) -> Result<ModelConfig> {
        let gguf = self.rules()?.gguf.as_ref().ok_or_else(|| Error::Unsupported {
            what: format!("the GGUF file {}", metadata.path.display()),
            by: format!("by family {:?}", self.name()),
            hint: format!("{} has no section [gguf], see docs/families.md", self.path.display()),
        })?;
        gguf.config(Scope { config: metadata, layer, family: self.name() })
    }

    /// The layer that `config` describes.
    ///
    /// # Errors
    /// [`Error::BadFile`] for a missing or mistyped key, [`Error::Unsupported`] for an activation or another choice
    /// that is not known, [`Error::InvalidConfig`] for sizes out of range.
    pub(crate) fn moe_config(&self, config: &ModelConfig, layer: u32) -> Result<MoeConfig> {
        self.rules()?.moe_config(Scope { config, layer, family: self.name() })
    }

    fn rules(&self) -> Result<&Rules> {
        match &self.body {
            Body::Rules(rules) => Ok(rules),
            Body::Unsupported(family) => Err(Error::Unsupported {
                what: format!("family {:?}", family.name),
                by: "by this version".to_owned(),
                hint: family.unsupported.clone(),
            }),
        }
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

/// The line of `key` in `[section]`, or that of the section, or the first.
fn line_of_key(text: &str, section: &str, key: &str) -> usize {
    let (mut current, mut best) = (String::new(), 1);
    for (line, number) in text.lines().zip(1..) {
        let line = line.trim();
        if let Some(header) = line.strip_prefix('[').and_then(|line| line.split(']').next()) {
            current = header.replace(['"', ' '], "");
            if current == section || current == format!("{section}.{key}") {
                best = number;
            }
        }
        let starts = line.strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with(['=', '.']));
        if current == section && starts {
            return number;
        }
    }
    best
}

fn bad(path: &Path, message: String) -> Error {
    Error::BadFamily { path: path.to_owned(), message }
}

pub(crate) fn names(families: &[Family]) -> String {
    families.iter().map(Family::name).collect::<Vec<_>>().join(", ")
}
