//! A GGUF model in one file, or split over several in one folder: `name-00001-of-00003.gguf` and so on, of which the
//! first has the metadata.

use crate::error::{Error, Result};
use crate::model::model_config::ModelConfig;
use crate::model::tensor_file::{self, TensorFile};
use crate::model::tensor_header::MAX_TENSORS;
use crate::small_file;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The number of parts is 16 bits wide.
const MAX_PARTS: u64 = 65_535;

/// Every part, opened and checked.
pub(crate) struct GgufParts {
    pub files: Vec<PathBuf>,
    /// Which of `files` holds each tensor.
    pub file_of_tensor: BTreeMap<String, usize>,
    pub metadata: ModelConfig,
}

impl GgufParts {
    /// The parts of which the file at `path` is one; its metadata are `own`.
    pub fn open(path: &Path, own: &BTreeMap<String, Value>, tensors: BTreeMap<String, usize>) -> Result<Self> {
        let bad = |path: &Path, message| Error::BadFile { path: path.to_owned(), message };
        let count = number(own, "split.count").map_err(|message| bad(path, message))?.unwrap_or(1);
        if count <= 1 {
            let metadata = ModelConfig::of_gguf(path, own.clone());
            return Ok(Self { files: vec![path.to_owned()], file_of_tensor: tensors, metadata });
        }
        let files = part_paths(path, own, count).map_err(|message| bad(path, message))?;
        let mut file_of_tensor = BTreeMap::new();
        let mut metadata = None;
        for (n, part) in files.iter().enumerate() {
            if !part.exists() {
                let name = part.file_name().unwrap_or_default();
                let message = format!("part {} of {count} is missing: there is no {name:?} beside it", n + 1);
                return Err(bad(path, message));
            }
            if part != path {
                small_file::check_neighbour(part).map_err(|message| bad(part, message))?;
            }
            let file = TensorFile::open(part)?;
            let about = file.gguf.unwrap_or_default();
            let found = [number(&about, "split.no"), number(&about, "split.count")];
            match found {
                [Ok(Some(no)), Ok(Some(of))] if (no, of) == (n as u64, count) => {}
                [no, of] => {
                    let words = |found: Result<Option<u64>, String>, more: u64| match found {
                        Ok(Some(number)) => (number + more).to_string(),
                        _ => "?".to_owned(),
                    };
                    let found = format!("part {} of {}", words(no, 1), words(of, 0));
                    return Err(bad(part, format!("its metadata say {found}, expected part {} of {count}", n + 1)));
                }
            }
            for name in file.tensors.into_keys() {
                if let Some(first) = file_of_tensor.get(&name) {
                    let first: &PathBuf = &files[*first];
                    return Err(bad(part, format!("tensor {name:?} is in {} as well", first.display())));
                }
                file_of_tensor.insert(name, n);
            }
            if file_of_tensor.len() > MAX_TENSORS {
                return Err(bad(path, format!("more than {MAX_TENSORS} tensors in its parts")));
            }
            metadata.get_or_insert(about);
        }
        let metadata = metadata.unwrap_or_default();
        let expected = number(&metadata, "split.tensors.count").map_err(|message| bad(&files[0], message))?;
        if let Some(expected) = expected.filter(|&expected| expected != file_of_tensor.len() as u64) {
            let found = file_of_tensor.len();
            return Err(bad(path, format!("its {count} parts have {found} tensors, expected {expected}")));
        }
        let metadata = ModelConfig::of_gguf(&files[0], metadata);
        Ok(Self { files, file_of_tensor, metadata })
    }
}

/// A whole number that may be absent.
fn number(metadata: &BTreeMap<String, Value>, key: &str) -> Result<Option<u64>, String> {
    let Some(value) = metadata.get(key) else { return Ok(None) };
    match value.as_u64().filter(|&number| number <= MAX_PARTS.max(MAX_TENSORS as u64)) {
        Some(number) => Ok(Some(number)),
        None => Err(format!("metadata key {key:?} is {value}, expected a number of at most {MAX_PARTS}")),
    }
}

/// Paths of all parts, in order, from the path and the metadata of one of them.
fn part_paths(path: &Path, own: &BTreeMap<String, Value>, count: u64) -> Result<Vec<PathBuf>, String> {
    let no = number(own, "split.no")?.ok_or("the metadata lack split.no, the number of this part")?;
    if no >= count {
        return Err(format!("the metadata say part {} of {count}", no + 1));
    }
    let end = |no: u64| format!("-{:05}-of-{count:05}.gguf", no + 1);
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(stem) = name.strip_suffix(&end(no)) else {
        return Err(format!(
            "the metadata say part {} of {count}: its name would have to end in {:?}",
            no + 1,
            end(no)
        ));
    };
    Ok((0..count).map(|no| path.with_file_name(format!("{stem}{}", end(no)))).collect())
}

/// Of the `.gguf` files of a folder, the one to start from: the only one, or the first part of the only one that is
/// split. Otherwise how many there are.
pub(crate) fn main_part(files: &[PathBuf]) -> Result<Option<&PathBuf>, usize> {
    let is_later_part = |path: &Path| {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let mut words = stem.rsplitn(4, '-');
        let [count, of, no] = [words.next(), words.next(), words.next()].map(Option::unwrap_or_default);
        of == "of"
            && [count, no].iter().all(|number| number.len() == 5 && number.parse::<u32>().is_ok())
            && no != "00001"
    };
    let mut firsts = files.iter().filter(|path| !is_later_part(path));
    match (firsts.next(), firsts.next(), files.first()) {
        (Some(only), None, _) => Ok(Some(only)),
        // The first part is missing: any other will say so.
        (None, _, later) => Ok(later),
        _ => Err(files.len()),
    }
}

/// The path names a GGUF file.
pub(crate) fn is_gguf(path: &Path) -> bool {
    tensor_file::has_extension(path, "gguf")
}
