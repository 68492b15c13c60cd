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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::family::Family;
    use std::path::Path;

    /// Families that share an architecture are told apart, whatever the metadata are.
    #[test]
    fn no_file_is_of_two_families() {
        let choices: [(&str, &[Value]); 5] = [
            ("expert_gating_func", &[Value::Null, 0.into(), 1.into(), 2.into(), 9.into()]),
            ("expert_weights_norm", &[Value::Null, false.into(), true.into()]),
            ("expert_group_count", &[Value::Null, 0.into(), 1.into(), 2.into()]),
            ("vocab_size", &[Value::Null, 154_880.into(), 129_280.into()]),
            ("expert_shared_feed_forward_length", &[Value::Null, 0.into(), 4.into()]),
        ];
        let mut shared = BTreeSet::new();
        for architecture in Family::builtin().iter().flat_map(Family::gguf_architectures) {
            let lists_it = |family: &&Family| family.gguf_architectures().contains(architecture);
            let families: Vec<&Family> = Family::builtin().iter().filter(lists_it).collect();
            if families.len() > 1 {
                shared.insert(architecture.as_str());
            }
            let mut found = BTreeSet::new();
            for n in 0..choices.iter().map(|(_, values)| values.len()).product() {
                let mut n: usize = n;
                let mut metadata = BTreeMap::from([("general.architecture".to_owned(), architecture.as_str().into())]);
                metadata.insert(format!("{architecture}.expert_count"), 4.into());
                for (key, values) in choices {
                    metadata.insert(format!("{architecture}.{key}"), values[n % values.len()].clone());
                    n /= values.len();
                }
                let metadata = ModelConfig::of_gguf(Path::new("model.gguf"), metadata);
                let detects = |family: &&&Family| {
                    let gguf = family.rules().expect("described").gguf.as_ref().expect("it lists the architecture");
                    gguf.detects(&metadata, family.name())
                };
                let names: Vec<&str> = families.iter().filter(detects).map(|family| family.name()).collect();
                assert!(names.len() < 2, "{names:?} with {metadata:?}");
                found.extend(names);
            }
            assert_eq!(found.len(), families.len(), "some files of {architecture} are of each of its families");
        }
        assert_eq!(shared, BTreeSet::from(["deepseek2", "granitemoe"]));
    }
}
