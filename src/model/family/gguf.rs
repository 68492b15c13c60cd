//! `[gguf]`: how the metadata of a GGUF file say what a `config.json` would have said.

use super::setting::{Scope, Setting};
use crate::error::Result;
use crate::model::model_config::ModelConfig;
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The section. Its settings are about metadata, those of all others about the configuration that comes out.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct GgufRules {
    /// Values of `general.architecture`.
    pub architecture: Vec<String>,
    /// What else has to hold for the family to be detected.
    #[serde(default)]
    when: Vec<Setting<bool>>,
    /// By key of the configuration.
    #[serde(default)]
    config: BTreeMap<String, Setting<Value>>,
}

impl GgufRules {
    /// A file with these metadata is of this family.
    pub fn detects(&self, metadata: &ModelConfig, family: &str) -> bool {
        let lists_it =
            metadata.architecture().is_some_and(|found| self.architecture.iter().any(|known| known == found));
        let scope = Scope { config: metadata, layer: 0, family };
        // A value that a condition does not know is one that it does not hold for.
        let holds = |condition: &Setting<bool>| condition.optional(scope).ok().flatten() == Some(true);
        lists_it && self.when.iter().all(holds)
    }

    /// The configuration of a layer.
    pub fn config(&self, scope: Scope) -> Result<ModelConfig> {
        let mut config = ModelConfig::empty(&scope.config.path);
        for (key, setting) in &self.config {
            let sources = setting.keys().iter().map(|key| scope.config.full_key(key)).collect();
            config.set(key, setting.optional(scope)?, sources);
        }
        Ok(config)
    }

    /// A key of `[gguf.config]` that no setting reads: misspelt, or of no use.
    pub fn unread(&self, description: &toml::Table) -> Option<(&str, BTreeSet<String>)> {
        let mut read = BTreeSet::new();
        for section in ["sizes", "routing", "experts", "shared"] {
            description.get(section).into_iter().for_each(|section| collect_keys(section, &mut read));
        }
        let unread = self.config.keys().find(|key| !read.contains(*key))?;
        Some((unread, read))
    }
}

/// Keys of `config.json` that settings name, without their indices.
fn collect_keys(value: &toml::Value, keys: &mut BTreeSet<String>) {
    const NAMING: [&str; 6] = ["from", "times", "divided_by", "plus", "minus", "if_layer_below"];
    let Some(table) = value.as_table() else { return };
    for (name, value) in table {
        if NAMING.contains(&name.as_str()) {
            let named = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice).iter();
            let names = named.filter_map(|key| key.as_str()?.split('[').next());
            keys.extend(names.map(str::to_owned));
        } else {
            collect_keys(value, keys);
        }
    }
}
