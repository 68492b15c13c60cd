//! What is particular to a model family, as data: where its configuration keeps the sizes, how its router works and
//! what its tensors are called. One TOML file each; `docs/families.md` describes the format.
//! This module reads descriptions and configurations, never tensors.

mod builtin;
pub(crate) mod layout;
mod rules;
pub(crate) mod setting;

pub(crate) use rules::NORMS;

use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::model_config::ModelConfig;
use crate::model::tensor_file;
use builtin::BUILTIN;
use layout::Layout;
use rules::{Rules, Unsupported};
use serde::Deserialize;
use setting::Scope;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const MAX_FAMILY_BYTES: u64 = 1 << 20;

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

    /// Reads a description of at most 1 MiB.
    ///
    /// # Errors
    /// [`Error::BadFamily`] with the line and the known values, [`Error::Io`].
    pub fn from_file(path: &Path) -> Result<Family> {
        let text = String::from_utf8(tensor_file::read_small(path, MAX_FAMILY_BYTES)?)
            .map_err(|error| bad(path, format!("not UTF-8: {error}")))?;
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
            bad(path, format!("{at}{}", error.message()))
        };
        let probe: Probe = toml::from_str(text).map_err(wrong)?;
        let body = if probe.unsupported.is_some() {
            Body::Unsupported(toml::from_str(text).map_err(wrong)?)
        } else {
            let rules: Rules = toml::from_str(text).map_err(wrong)?;
            rules.check().map_err(|(section, key, message)| {
                bad(path, format!("line {}: {message}", line_of_key(text, &section, key)))
            })?;
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

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> ModelConfig {
        ModelConfig::parse(Path::new("config.json"), json.as_bytes()).expect("valid JSON in a test")
    }

    fn error(text: &str) -> String {
        Family::from_toml(Path::new("mine.toml"), text).expect_err("a bad description").to_string()
    }

    #[test]
    fn every_embedded_family_parses_and_finds_itself() {
        for family in Family::builtin() {
            assert_eq!(family.path(), Path::new(&format!("{}.toml", family.name())));
            for model_type in family.model_types() {
                assert_eq!(Family::detect(model_type).expect("listed").name(), family.name());
            }
        }
        assert!(matches!(Family::detect("t5"), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn sizes_and_routing_come_from_the_configuration() {
        let json = r#"{"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144,
            "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "hidden_act": "silu"}"#;
        let family = config(json).family().expect("qwen3_moe is built in");
        let layer = family.moe_config(&config(json)).expect("complete");
        assert_eq!((layer.hidden_size(), layer.intermediate_size()), (2048, 768));
        assert_eq!((layer.num_experts(), layer.top_k()), (128, 8));
        assert!(!layer.routing().renormalize, "without the key, qwen3_moe does not renormalise");
        let renormalized = json.replacen('{', r#"{"norm_topk_prob": true, "#, 1);
        assert!(family.moe_config(&config(&renormalized)).expect("complete").routing().renormalize);
    }

    #[test]
    fn a_nested_text_config_is_preferred() {
        let json = r#"{"model_type": "some_vl", "hidden_size": 1, "text_config": {"model_type": "olmoe",
            "hidden_size": 64, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2}}"#;
        let family = config(json).family().expect("the text model is built in");
        assert_eq!(family.moe_config(&config(json)).expect("complete").hidden_size(), 64);
    }

    #[test]
    fn missing_mistyped_and_unsupported_keys_are_named() {
        let olmoe = Family::detect("olmoe").expect("built in");
        let message = |json: &str| olmoe.moe_config(&config(json)).expect_err("incomplete").to_string();
        assert!(message("{}").contains(r#"lacks "hidden_size""#), "{}", message("{}"));
        assert!(message(r#"{"hidden_size": -4}"#).contains(r#""hidden_size" of the configuration"#));
        let gelu = olmoe.moe_config(&config(r#"{"hidden_act": "gelu"}"#)).expect_err("not implemented");
        assert!(matches!(&gelu, Error::Unsupported { what, .. } if what.contains("gelu")), "{gelu}");
        assert!(config("{}").family().expect_err("nothing to go by").to_string().contains("no model_type"));
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let good = BUILTIN[0].1;
        let cases = [
            (good.replace("renormalize = true", "renormalise = true"), "unknown field `renormalise`", "renormalise"),
            (good.replace("\"softmax\"", "\"sofmax\""), "`softmax`", "sofmax"),
            (good.replace("renormalize = true", "renormalize = 3"), "expected a boolean", "renormalize = 3"),
            (good.replace("default = \"silu\"", "fallback = \"silu\""), "unknown field `fallback`", "fallback"),
            (good.replace("experts.{expert}.w1", "experts.{e}.w1"), "{expert}", "{e}"),
            (good.replace("gate_up_proj = \"experts.gate_up_proj\"\n", ""), "either gate_proj and up_proj", ""),
            (good.replace("name = \"mixtral\"", "name = 7"), "string", "name = 7"),
        ];
        for (text, expected, culprit) in cases {
            let message = error(&text);
            assert!(message.starts_with("mine.toml: line "), "{message}");
            assert!(message.contains(expected), "{message}");
            if !culprit.is_empty() {
                let line = text.lines().position(|line| line.contains(culprit)).expect("the mistake is there") + 1;
                assert!(message.contains(&format!("line {line}:")), "expected line {line}: {message}");
            }
        }
    }
}
