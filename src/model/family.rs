//! What is particular to a model family, as data: where its configuration keeps the sizes, how its router works and
//! what its tensors are called. One TOML file each; `docs/families.md` describes the format.
//! This module reads descriptions and configurations, never tensors.

use crate::error::{Error, Result};
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::model_config::ModelConfig;
use crate::model::routing::{Routing, Scores};
use crate::model::tensor_file;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use toml::Spanned;

const BUILTIN: [(&str, &str); 3] = [
    ("mixtral.toml", include_str!("families/mixtral.toml")),
    ("olmoe.toml", include_str!("families/olmoe.toml")),
    ("qwen3_moe.toml", include_str!("families/qwen3_moe.toml")),
];
const MAX_FAMILY_BYTES: u64 = 1 << 20;

/// A model family's description: built in, or from a user's file.
#[derive(Debug)]
pub struct Family {
    path: PathBuf,
    rules: Rules,
    layouts: BTreeMap<String, Layout>,
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
        let rules: Rules = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(String::new(), |span| format!("line {}: ", line_of(text, span.start)));
            bad(path, format!("{at}{}", error.message()))
        })?;
        let layouts = rules
            .layouts()
            .map_err(|(offset, message)| bad(path, format!("line {}: {message}", line_of(text, offset))))?;
        Ok(Family { path: path.to_owned(), rules, layouts })
    }

    /// The family's name.
    pub fn name(&self) -> &str {
        &self.rules.name
    }

    /// Values of `model_type` in a `config.json` that mean this family.
    pub fn model_types(&self) -> &[String] {
        &self.rules.detect.model_type
    }

    /// Layouts by name, in the order in which they are tried.
    pub(crate) fn layouts(&self) -> &BTreeMap<String, Layout> {
        &self.layouts
    }

    /// Where the description comes from.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The layer that `config` describes.
    ///
    /// # Errors
    /// [`Error::BadFile`] for a missing or mistyped key, [`Error::Unsupported`] for an activation that is not known,
    /// [`Error::InvalidConfig`] for sizes out of range.
    pub(crate) fn moe_config(&self, config: &ModelConfig) -> Result<MoeConfig> {
        let Rules { sizes, routing, experts, .. } = &self.rules;
        let name = self.name();
        let activation = experts.activation.value("activation", name, config)?;
        let activation = activation_named(&activation).ok_or_else(|| Error::Unsupported {
            what: format!("the activation {activation:?} of {}", config.path.display()),
            by: "by this version".to_owned(),
            hint: format!("known: {}", ACTIVATIONS.map(|(name, _)| name).join(", ")),
        })?;
        MoeConfig::new(
            sizes.hidden_size.value("hidden_size", name, config)?,
            sizes.intermediate_size.value("intermediate_size", name, config)?,
            sizes.num_experts.value("num_experts", name, config)?,
            sizes.top_k.value("top_k", name, config)?,
            Routing::new(routing.scores, routing.renormalize.value("renormalize", name, config)?),
            activation,
        )
    }
}

// ---- the vocabulary of a description; unknown keys and values are errors ----

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rules {
    name: String,
    detect: Detect,
    sizes: Sizes,
    routing: RoutingRules,
    experts: ExpertRules,
    tensors: BTreeMap<String, LayoutNames>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Detect {
    model_type: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sizes {
    hidden_size: Setting<u32>,
    intermediate_size: Setting<u32>,
    num_experts: Setting<u32>,
    top_k: Setting<u32>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoutingRules {
    scores: Scores,
    renormalize: Setting<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpertRules {
    activation: Setting<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct LayoutNames {
    prefix: Spanned<OneOrMore>,
    router: Spanned<String>,
    router_bias: Option<Spanned<String>>,
    gate_proj: Option<Spanned<String>>,
    up_proj: Option<Spanned<String>>,
    gate_up_proj: Option<Spanned<String>>,
    down_proj: Spanned<String>,
}

/// Tensor names of one way to store a layer. An expert tensor's name without `{expert}` is one tensor of all experts,
/// stacked along a first axis.
#[derive(Debug)]
pub(crate) struct Layout {
    /// In front of every name, with `{layer}` for the layer's number; the first whose tensors exist is taken.
    pub prefixes: Vec<String>,
    /// `[num_experts, hidden_size]`
    pub router: String,
    /// `[num_experts]`
    pub router_bias: Option<String>,
    /// The first projections of each expert.
    pub gate_up: GateUp,
    /// `[hidden_size, intermediate_size]` of each expert
    pub down_proj: String,
}

/// How the first projections of an expert are stored.
#[derive(Debug)]
pub(crate) enum GateUp {
    /// `[intermediate_size, hidden_size]` each
    Separate { gate_proj: String, up_proj: String },
    /// `[2 * intermediate_size, hidden_size]`: gate rows, then up rows
    Fused(String),
}

impl Rules {
    /// The layouts, checked for what types cannot say. An error is a byte offset and a message.
    fn layouts(&self) -> Result<BTreeMap<String, Layout>, (usize, String)> {
        if self.tensors.is_empty() {
            return Err((0, "no layout: add a section such as [tensors.hub]".to_owned()));
        }
        self.tensors.iter().map(|(name, names)| Ok((name.clone(), names.layout()?))).collect()
    }
}

impl LayoutNames {
    fn layout(&self) -> Result<Layout, (usize, String)> {
        for prefix in &self.prefix.get_ref().0 {
            check_placeholders(prefix, "{layer}").map_err(|message| (self.prefix.span().start, message))?;
        }
        let plain = |name: &Spanned<String>, placeholder| {
            check_placeholders(name.get_ref(), placeholder).map_err(|message| (name.span().start, message))?;
            Ok(name.get_ref().clone())
        };
        let expert = |name| plain(name, "{expert}");
        let gate_up = match (&self.gate_proj, &self.up_proj, &self.gate_up_proj) {
            (Some(gate), Some(up), None) => GateUp::Separate { gate_proj: expert(gate)?, up_proj: expert(up)? },
            (None, None, Some(both)) => GateUp::Fused(expert(both)?),
            _ => {
                let message = "this layout must name either gate_proj and up_proj, or gate_up_proj".to_owned();
                return Err((self.router.span().start, message));
            }
        };
        Ok(Layout {
            prefixes: self.prefix.get_ref().0.clone(),
            router: plain(&self.router, "")?,
            router_bias: self.router_bias.as_ref().map(|bias| plain(bias, "")).transpose()?,
            gate_up,
            down_proj: expert(&self.down_proj)?,
        })
    }
}

/// A value that is fixed for the family, or that each model's configuration gives.
#[derive(Debug)]
enum Setting<T> {
    Fixed(T),
    FromConfig { from: OneOrMore, default: Option<T> },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FromConfig<T> {
    from: OneOrMore,
    default: Option<T>,
}

impl<T: DeserializeOwned + Clone> Setting<T> {
    fn value(&self, field: &str, family: &str, config: &ModelConfig) -> Result<T> {
        let (from, default) = match self {
            Setting::Fixed(value) => return Ok(value.clone()),
            Setting::FromConfig { from, default } => (from, default),
        };
        let bad = |message| Error::BadFile { path: config.path.clone(), message };
        match (config.get(&from.0), default) {
            (Some((key, value)), _) => {
                T::deserialize(value).map_err(|error| bad(format!("{key:?} of the configuration: {error}")))
            }
            (None, Some(default)) => Ok(default.clone()),
            (None, None) => Err(bad(format!(
                "the configuration lacks {}, which family {family:?} reads as {field}",
                from.0.iter().map(|key| format!("{key:?}")).collect::<Vec<_>>().join(" or ")
            ))),
        }
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for Setting<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SettingVisitor<T>(PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for SettingVisitor<T> {
            type Value = Setting<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value, or { from = \"key of config.json\", default = value }")
            }
            fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Self::Value, E> {
                T::deserialize(value.into_deserializer()).map(Setting::Fixed)
            }
            fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Self::Value, E> {
                T::deserialize(value.into_deserializer()).map(Setting::Fixed)
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Self::Value, E> {
                T::deserialize(value.into_deserializer()).map(Setting::Fixed)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                let FromConfig { from, default } = FromConfig::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Setting::FromConfig { from, default })
            }
        }
        deserializer.deserialize_any(SettingVisitor(PhantomData))
    }
}

/// A string or a list of strings of which the first that fits is taken.
#[derive(Debug)]
struct OneOrMore(Vec<String>);

impl<'de> Deserialize<'de> for OneOrMore {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ListVisitor;
        impl<'de> Visitor<'de> for ListVisitor {
            type Value = OneOrMore;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }
            fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<OneOrMore, E> {
                Ok(OneOrMore(vec![value.to_owned()]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMore, A::Error> {
                let mut values = Vec::new();
                while let Some(value) = list.next_element()? {
                    values.push(value);
                }
                if values.is_empty() {
                    return Err(serde::de::Error::custom("the list is empty"));
                }
                Ok(OneOrMore(values))
            }
        }
        deserializer.deserialize_any(ListVisitor)
    }
}

/// Names of activations in configurations, and ours.
const ACTIVATIONS: [(&str, Activation); 3] =
    [("silu", Activation::SWIGLU), ("swish", Activation::SWIGLU), ("swiglu", Activation::SWIGLU)];

fn activation_named(name: &str) -> Option<Activation> {
    ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|&(_, activation)| activation)
}

/// The only braces in `name` are one `known` placeholder; an empty one allows none.
fn check_placeholders(name: &str, known: &str) -> Result<(), String> {
    if !name.replacen(known, "", 1).contains(['{', '}']) {
        return Ok(());
    }
    let known = if known.is_empty() { "no placeholder" } else { known };
    Err(format!("{name:?} may hold {known} once and no other braces"))
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
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
