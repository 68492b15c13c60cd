//! What is particular to a model family, as data: where its configuration keeps the sizes, how its router works and
//! what its tensors are called. One TOML file each; `docs/families.md` describes the format.
//! This module reads descriptions and configurations, never tensors.

use crate::error::{Error, Result};
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::routing::{Routing, Scores};
use crate::model::tensor_file;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
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
        rules.check().map_err(|(offset, message)| bad(path, format!("line {}: {message}", line_of(text, offset))))?;
        Ok(Family { path: path.to_owned(), rules })
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
        &self.rules.tensors
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
            Routing { scores: routing.scores, renormalize: routing.renormalize.value("renormalize", name, config)? },
            activation,
        )
    }
}

/// A model's `config.json`, from a file or from a tensor file's metadata.
#[derive(Clone, Debug)]
pub(crate) struct ModelConfig {
    /// The file it was read from.
    pub path: PathBuf,
    /// The object itself and, in multimodal models, its `text_config`: looked into in this order.
    scopes: Vec<Map<String, Value>>,
}

impl ModelConfig {
    pub fn parse(path: &Path, json: &[u8]) -> Result<Self> {
        let bad = |message| Error::BadFile { path: path.to_owned(), message };
        let value = serde_json::from_slice(json)
            .or_else(|error| serde_json::from_slice(&without_infinities(json)).map_err(|_| error))
            .map_err(|error| bad(format!("the configuration is not JSON: {error}")))?;
        let Value::Object(mut outer) = value else {
            return Err(bad("the configuration is not a JSON object".to_owned()));
        };
        let mut scopes = Vec::new();
        if let Some(Value::Object(text)) = outer.remove("text_config") {
            scopes.push(text);
        }
        scopes.push(outer);
        Ok(Self { path: path.to_owned(), scopes })
    }

    /// The first built-in family that a `model_type` of this configuration names.
    pub fn family(&self) -> Result<&'static Family> {
        let types: Vec<&str> = self.scopes.iter().filter_map(|scope| scope.get("model_type")?.as_str()).collect();
        let Some(first) = types.first() else {
            return Err(Error::BadFile {
                path: self.path.clone(),
                message: format!(
                    "the configuration has no model_type, so the family is unknown; name one of {}",
                    names(Family::builtin())
                ),
            });
        };
        types.iter().find_map(|model_type| Family::detect(model_type).ok()).map_or_else(|| Family::detect(first), Ok)
    }

    /// The first of `keys` that is there and not null.
    fn get(&self, keys: &[String]) -> Option<(&str, &Value)> {
        let in_scope = |scope| keys.iter().find_map(move |key| present(scope, key));
        fn present<'a>(scope: &'a Map<String, Value>, key: &str) -> Option<(&'a str, &'a Value)> {
            scope.get_key_value(key).filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.as_str(), value))
        }
        self.scopes.iter().find_map(in_scope)
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
    tensors: BTreeMap<String, Layout>,
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

/// Tensor names of one way to store a layer. `{layer}` and `{expert}` stand for numbers. A name without `{expert}` is
/// one tensor of all experts, stacked along a first axis.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Layout {
    /// In front of every name; the first whose tensors exist is taken.
    pub prefix: Spanned<OneOrMore>,
    /// `[num_experts, hidden_size]`
    pub router: Spanned<String>,
    /// `[num_experts]`
    pub router_bias: Option<Spanned<String>>,
    /// `[intermediate_size, hidden_size]` of one expert
    pub gate_proj: Option<Spanned<String>>,
    /// `[intermediate_size, hidden_size]` of one expert
    pub up_proj: Option<Spanned<String>>,
    /// `[2 * intermediate_size, hidden_size]` of one expert: gate rows, then up rows
    pub gate_up_proj: Option<Spanned<String>>,
    /// `[hidden_size, intermediate_size]` of one expert
    pub down_proj: Spanned<String>,
}

impl Rules {
    /// What types cannot say. An error is a byte offset and a message.
    fn check(&self) -> Result<(), (usize, String)> {
        for layout in self.tensors.values() {
            for prefix in &layout.prefix.get_ref().0 {
                check_placeholders(prefix, &["{layer}"]).map_err(|message| (layout.prefix.span().start, message))?;
            }
            let whole = [Some(&layout.router), layout.router_bias.as_ref()];
            let experts = [&layout.gate_proj, &layout.up_proj, &layout.gate_up_proj].map(Option::as_ref);
            for (names, known) in
                [(&whole[..], &[][..]), (&experts, &["{expert}"]), (&[Some(&layout.down_proj)], &["{expert}"])]
            {
                for name in names.iter().copied().flatten() {
                    check_placeholders(name.get_ref(), known).map_err(|message| (name.span().start, message))?;
                }
            }
            if !matches!(experts, [Some(_), Some(_), None] | [None, None, Some(_)]) {
                let message = "a layout names either gate_proj and up_proj, or gate_up_proj".to_owned();
                return Err((layout.router.span().start, message));
            }
        }
        if self.tensors.is_empty() {
            return Err((0, "no layout: add a section such as [tensors.hub]".to_owned()));
        }
        Ok(())
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
pub(crate) struct OneOrMore(pub Vec<String>);

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

/// Python writes `NaN`, `Infinity` and `-Infinity` into configurations, which JSON does not have. No key that is read
/// here can mean one of them, so they become `null`.
fn without_infinities(json: &[u8]) -> Vec<u8> {
    let mut strict = Vec::with_capacity(json.len());
    let (mut rest, mut in_string) = (json, false);
    while let Some(&byte) = rest.first() {
        let literal = [&b"-Infinity"[..], b"Infinity", b"NaN"].into_iter().find(|literal| rest.starts_with(literal));
        let taken = match literal {
            Some(literal) if !in_string => {
                strict.extend(b"null");
                literal.len()
            }
            _ => {
                in_string ^= byte == b'"';
                let taken = if in_string && byte == b'\\' { rest.len().min(2) } else { 1 };
                strict.extend(&rest[..taken]);
                taken
            }
        };
        rest = &rest[taken..];
    }
    strict
}

/// Names of activations in configurations, and ours.
const ACTIVATIONS: [(&str, Activation); 3] =
    [("silu", Activation::Swiglu), ("swish", Activation::Swiglu), ("swiglu", Activation::Swiglu)];

fn activation_named(name: &str) -> Option<Activation> {
    ACTIVATIONS.iter().find(|(known, _)| *known == name).map(|&(_, activation)| activation)
}

/// Every `{...}` in `name` is one of `known`, at most once.
fn check_placeholders(name: &str, known: &[&str]) -> Result<(), String> {
    let rest = known.iter().fold(name.to_owned(), |rest, placeholder| rest.replacen(placeholder, "", 1));
    if !rest.contains(['{', '}']) {
        return Ok(());
    }
    let known = if known.is_empty() { "no placeholder".to_owned() } else { known.join(", ") };
    Err(format!("{name:?} may hold {known} once and no other braces"))
}

fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|&byte| byte == b'\n').count() + 1
}

fn bad(path: &Path, message: String) -> Error {
    Error::BadFamily { path: path.to_owned(), message }
}

fn names(families: &[Family]) -> String {
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
    fn python_numbers_are_read_as_absent() {
        let json = br#"{"a": [0.0, Infinity], "b": -Infinity, "c": NaN, "model_type": "NaN \" Infinity"}"#;
        let config = ModelConfig::parse(Path::new("config.json"), json).expect("lenient");
        assert_eq!(config.get(&["model_type".to_owned()]).expect("there").1, "NaN \" Infinity");
        assert!(config.get(&["b".to_owned(), "c".to_owned()]).is_none());
        assert!(ModelConfig::parse(Path::new("config.json"), b"{NaN").is_err());
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
