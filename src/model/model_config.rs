//! A model's own configuration, as Hugging Face publishes it: only looked into, never interpreted here.

use crate::error::{Error, Result};
use crate::model::family::{self, Family};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

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
                    family::names(Family::builtin())
                ),
            });
        };
        types.iter().find_map(|model_type| Family::detect(model_type).ok()).map_or_else(|| Family::detect(first), Ok)
    }

    /// The first of `keys` that is there and not null.
    pub fn get(&self, keys: &[String]) -> Option<(&str, &Value)> {
        let in_scope = |scope| keys.iter().find_map(move |key| present(scope, key));
        fn present<'a>(scope: &'a Map<String, Value>, key: &str) -> Option<(&'a str, &'a Value)> {
            scope.get_key_value(key).filter(|(_, value)| !value.is_null()).map(|(key, value)| (key.as_str(), value))
        }
        self.scopes.iter().find_map(in_scope)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn python_numbers_are_read_as_absent() {
        let json = br#"{"a": [0.0, Infinity], "b": -Infinity, "c": NaN, "model_type": "NaN \" Infinity"}"#;
        let config = ModelConfig::parse(Path::new("config.json"), json).expect("lenient");
        assert_eq!(config.get(&["model_type".to_owned()]).expect("there").1, "NaN \" Infinity");
        assert!(config.get(&["b".to_owned(), "c".to_owned()]).is_none());
        assert!(ModelConfig::parse(Path::new("config.json"), b"{NaN").is_err());
    }
}
