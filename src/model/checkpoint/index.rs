//! `model.safetensors.index.json`: which shard holds each tensor. It comes from elsewhere, and may only name files in
//! its own folder.

use crate::error::brief;
use crate::model::tensor_header::{check_name, start_of};
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fmt;
use std::path::{Component, Path};

/// The largest published checkpoints have a third of this.
const MAX_TENSORS: usize = 1 << 20;
/// Names of files end there on most systems.
const MAX_NAME_BYTES: usize = 255;

/// An index that has been checked.
#[derive(Default)]
pub(super) struct Index {
    /// Names of files, in the order of the first tensor that each has in the index.
    pub shards: Vec<String>,
    /// Which of `shards` holds each tensor.
    pub shard_of_tensor: BTreeMap<String, usize>,
}

impl Index {
    /// An error is what is wrong, in words.
    pub fn parse(json: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Stored {
            weight_map: Index,
        }
        serde_json::from_slice::<Stored>(json).map(|stored| stored.weight_map).map_err(brief)
    }
}

/// By hand because a derived map keeps the last of two equal keys, and the name of a shard for each of its tensors.
impl<'de> Deserialize<'de> for Index {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct IndexVisitor;
        impl<'de> Visitor<'de> for IndexVisitor {
            type Value = Index;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of file names by tensor")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Index, A::Error> {
                let mut index = Index::default();
                let mut number_of_shard = BTreeMap::new();
                while let Some((tensor, shard)) = map.next_entry::<String, String>()? {
                    check_name(&tensor).map_err(A::Error::custom)?;
                    if index.shard_of_tensor.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    let number = match number_of_shard.get(&shard) {
                        Some(&number) => number,
                        None => {
                            check_shard(&shard).map_err(A::Error::custom)?;
                            index.shards.push(shard.clone());
                            number_of_shard.insert(shard, index.shards.len() - 1);
                            index.shards.len() - 1
                        }
                    };
                    match index.shard_of_tensor.entry(tensor) {
                        Entry::Vacant(free) => free.insert(number),
                        Entry::Occupied(taken) => {
                            return Err(A::Error::custom(format!("{:?} appears twice", taken.key())));
                        }
                    };
                }
                Ok(index)
            }
        }
        deserializer.deserialize_map(IndexVisitor)
    }
}

/// The name of a file, and nothing more.
fn check_shard(name: &str) -> Result<(), String> {
    let mut components = Path::new(name).components();
    let is_plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    if !is_plain || name.len() > MAX_NAME_BYTES || name.contains(['/', '\\', ':']) || name.chars().any(char::is_control)
    {
        let start = start_of(name);
        let bytes = name.len();
        return Err(format!(
            "shard {start:?} ({bytes} bytes) is not the name of a file in the same folder, of at most {MAX_NAME_BYTES}"
        ));
    }
    Ok(())
}
