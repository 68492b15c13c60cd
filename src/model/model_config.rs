//! A model's own configuration, as Hugging Face publishes it: only looked into, never interpreted here.

use crate::error::{Error, Result, brief};
use crate::model::family::setting::{Key, Step};
use crate::model::family::{self, Family};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Most bytes of a configuration. Published ones have at most some hundred thousand.
pub(crate) const MAX_BYTES: u64 = 4 << 20;
/// Most values: one in memory can be eighty times as large as in the file.
const MAX_VALUES: usize = 1 << 17;

/// Which model a GGUF file holds: most of its keys start with this one's value.
const ARCHITECTURE: &str = "general.architecture";

/// A model's `config.json`, from a file or from a tensor file's metadata; or the metadata of a GGUF file.
#[derive(Clone, Debug)]
pub(crate) struct ModelConfig {
    /// The file it was read from.
    pub path: PathBuf,
    /// What was read there; empty where it was put together from metadata.
    text: String,
    /// What is looked into, in this order: the configuration of the text model inside a multimodal one, and what is
    /// around it. Of GGUF metadata: those of the architecture without that in front, and all of them.
    scopes: Vec<Map<String, Value>>,
    /// The GGUF keys that a key comes from, for messages.
    sources: BTreeMap<String, Vec<String>>,
}

impl ModelConfig {
    /// A configuration that says nothing.
    pub fn empty(path: &Path) -> Self {
        Self { path: path.to_owned(), text: String::new(), scopes: vec![Map::new()], sources: BTreeMap::new() }
    }

    /// The metadata of a GGUF file. Keys can be written without the architecture in front.
    pub fn of_gguf(path: &Path, metadata: BTreeMap<String, Value>) -> Self {
        let all: Map<String, Value> = metadata.into_iter().collect();
        let prefix = all.get(ARCHITECTURE).and_then(Value::as_str).map(|architecture| format!("{architecture}."));
        let own = |(key, value): (&String, &Value)| {
            prefix.as_ref().and_then(|prefix| key.strip_prefix(prefix)).map(|key| (key.to_owned(), value.clone()))
        };
        let scopes = vec![all.iter().filter_map(own).collect(), all];
        Self { path: path.to_owned(), text: String::new(), scopes, sources: BTreeMap::new() }
    }

    /// As a `config.json` that says the same.
    pub fn to_json(&self) -> String {
        match self.scopes.first() {
            Some(scope) if self.text.is_empty() => Value::Object(scope.clone()).to_string(),
            _ => self.text.clone(),
        }
    }

    /// What a GGUF file holds, by its own words.
    pub fn architecture(&self) -> Option<&str> {
        self.scopes.last()?.get(ARCHITECTURE)?.as_str()
    }

    /// What a key of GGUF metadata is called in the file.
    pub fn full_key(&self, key: &str) -> String {
        let name = key.split('[').next().unwrap_or_default();
        match self.architecture() {
            Some(architecture) if self.scopes.last().is_none_or(|all| !all.contains_key(name)) => {
                format!("{architecture}.{key}")
            }
            _ => key.to_owned(),
        }
    }

    /// Sets a key, unless there is no value; `sources` are the GGUF keys that say so.
    pub fn set(&mut self, key: &str, value: Option<Value>, sources: Vec<String>) {
        if let (Some(value), Some(scope)) = (value, self.scopes.first_mut()) {
            scope.insert(key.to_owned(), value);
        }
        if !sources.is_empty() {
            self.sources.insert(key.to_owned(), sources);
        }
    }

    /// Keys in words, with what they come from.
    pub fn quoted(&self, keys: &[String]) -> String {
        let quoted = |keys: &[String]| keys.iter().map(|key| format!("{key:?}")).collect::<Vec<_>>().join(" or ");
        let with_sources = |key: &String| {
            let name = key.split('[').next().unwrap_or_default();
            match self.sources.get(name) {
                Some(sources) => format!("{key:?} (from {})", quoted(sources)),
                None => format!("{key:?}"),
            }
        };
        keys.iter().map(with_sources).collect::<Vec<_>>().join(" or ")
    }

    pub fn parse(path: &Path, json: &[u8]) -> Result<Self> {
        let bad = |message| Error::BadFile { path: path.to_owned(), message };
        if json.len() as u64 > MAX_BYTES {
            let found = json.len();
            return Err(bad(format!("the configuration has {found} bytes, at most {MAX_BYTES} are accepted")));
        }
        // What is in texts counts too, which nobody will notice.
        let values = json.iter().filter(|byte| b",[{".contains(byte)).count();
        if values > MAX_VALUES {
            return Err(bad(format!("the configuration has about {values} values, at most {MAX_VALUES} are accepted")));
        }
        let value = serde_json::from_slice(json)
            .or_else(|error| serde_json::from_slice(&without_infinities(json)).map_err(|_| error))
            .map_err(|error| bad(format!("the configuration is not JSON: {}", brief(error))))?;
        let Value::Object(outer) = value else {
            return Err(bad("the configuration is not a JSON object".to_owned()));
        };
        let mut scopes = Vec::new();
        collect_scopes(outer, &mut scopes);
        let text = String::from_utf8_lossy(json).into_owned();
        Ok(Self { path: path.to_owned(), text, scopes, sources: BTreeMap::new() })
    }

    /// What the text model, or else the whole model, calls itself.
    pub fn model_type(&self) -> Option<&str> {
        self.scopes.iter().find_map(|scope| scope.get("model_type")?.as_str())
    }

    /// The first built-in family that a `model_type` of this configuration names.
    pub fn family(&self) -> Result<&'static Family> {
        let types: Vec<&str> = self.scopes.iter().filter_map(|scope| scope.get("model_type")?.as_str()).collect();
        let Some(first) = types.first() else {
            return Err(Error::BadFile {
                path: self.path.clone(),
                message: format!(
                    "the configuration has no model_type, so the family is unknown; name one of {}",
                    family::names(Family::builtin())
                ),
            });
        };
        types.iter().find_map(|model_type| Family::detect(model_type).ok()).map_or_else(|| Family::detect(first), Ok)
    }

    /// The value of the first of `keys` that is there and not null, which must not be a list: an index takes an entry
    /// of that.
    pub fn get<'a>(&'a self, keys: &'a [Key], layer: u32) -> Result<Option<(&'a str, &'a Value)>> {
        for scope in &self.scopes {
            for key in keys {
                match self.walk(scope, key, layer)? {
                    Some(Value::Array(_)) => {
                        let text = &key.text;
                        return Err(self.bad(format!(
                            "{text:?} of the configuration is a list, expected one value; {text}[{{layer}}] is the entry \
                             of the layer, {text}[0] the first"
                        )));
                    }
                    Some(value) => return Ok(Some((&key.text, value))),
                    None => {}
                }
            }
        }
        Ok(None)
    }

    /// What `key` leads to; a value that is not a list is every entry of it.
    fn walk<'a>(&self, scope: &'a Map<String, Value>, key: &Key, layer: u32) -> Result<Option<&'a Value>> {
        // GGUF keys have dots in them.
        let name = key.text.split('[').next().unwrap_or_default();
        let mut at = scope.get(name);
        let skipped = if at.is_some() { name.split('.').count() } else { 0 };
        if at.is_some_and(Value::is_null) {
            return Ok(None);
        }
        for step in key.steps.iter().skip(skipped) {
            let index = match step {
                Step::Name(name) => {
                    let object = if let Some(value) = at { value.as_object() } else { Some(scope) };
                    at = object.and_then(|object| object.get(name));
                    None
                }
                Step::Index(index) => Some(*index),
                Step::Layer => Some(layer as usize),
            };
            if let (Some(index), Some(Value::Array(entries))) = (index, at) {
                let too_short = || {
                    self.bad(format!(
                        "{:?} of the configuration has {} entries, none is {index}",
                        key.text,
                        entries.len()
                    ))
                };
                at = Some(entries.get(index).ok_or_else(too_short)?);
            }
            if at.is_none_or(Value::is_null) {
                return Ok(None);
            }
        }
        Ok(at)
    }

    fn bad(&self, message: String) -> Error {
        Error::BadFile { path: self.path.clone(), message }
    }
}

/// What a configuration says of quantised tensors that their shapes do not.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Quantization {
    /// GPTQ: zero points are stored as they are, not less one.
    pub gptq_v2: bool,
    /// GPTQ: zero points are in the middle.
    pub symmetric: bool,
    /// AWQ: the layout of its `gemm` version.
    pub is_gemm: bool,
}

impl ModelConfig {
    /// What `quantization_config` says.
    pub fn quantization(&self) -> Quantization {
        let Some(about) = self.scopes.iter().find_map(|scope| scope.get("quantization_config")) else {
            return Quantization { is_gemm: true, ..Quantization::default() };
        };
        let text = |key: &str| about.get(key).and_then(Value::as_str).unwrap_or_default().to_lowercase();
        Quantization {
            gptq_v2: text("checkpoint_format") == "gptq_v2",
            symmetric: about.get("sym").and_then(Value::as_bool).unwrap_or(false),
            is_gemm: ["", "gemm"].contains(&text("version").as_str()),
        }
    }
}

/// Where multimodal models keep the configuration of their text model.
const INNER: [&str; 4] = ["text_config", "thinker_config", "language_config", "llm_config"];

/// Inner configurations first.
fn collect_scopes(mut object: Map<String, Value>, scopes: &mut Vec<Map<String, Value>>) {
    for name in INNER {
        match object.remove(name) {
            Some(Value::Object(inner)) => collect_scopes(inner, scopes),
            Some(other) => drop(object.insert(name.to_owned(), other)),
            None => {}
        }
    }
    scopes.push(object);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_numbers_are_read_as_absent() {
        let json = br#"{"a": [0.0, Infinity], "b": -Infinity, "c": NaN, "model_type": "NaN \" Infinity"}"#;
        let config = ModelConfig::parse(Path::new("config.json"), json).expect("lenient");
        let get = |key: &str| config.scopes[0].get(key).cloned();
        assert_eq!(get("model_type").expect("there"), "NaN \" Infinity");
        assert!(get("b").expect("there").is_null() && get("c").expect("there").is_null());
        assert!(ModelConfig::parse(Path::new("config.json"), b"{NaN").is_err());
    }
}
