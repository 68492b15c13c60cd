//! The header of a `.safetensors` file: a JSON object of tensors. Nothing in it is believed: every number is checked
//! against the file's length and against limits before anyone uses it. This module sees bytes, never files.

use crate::error::brief;
use crate::model::formats::GgmlType;
use crate::model::tensor_file::READABLE;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

pub(crate) const MAX_TENSORS: usize = 65_536;
const MAX_NAME_BYTES: usize = 256;
const MAX_RANK: usize = 8;
/// An entry in memory is twenty times as large as the shortest in a file.
const MAX_ENTRIES: usize = 65_536;
pub(crate) const MAX_DIM: u64 = 1 << 40;

/// Where a tensor lies. Offsets count from the start of the file and are inside it.
#[derive(Clone, Debug)]
pub(crate) struct TensorInfo {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub start: u64,
    /// Only of GGUF types that are no `dtype`. The tensor is bytes then, and the last axis of `shape` those of a row.
    pub ggml: Option<GgmlTensor>,
}

/// A tensor whose rows are cut into blocks.
#[derive(Clone, Debug)]
pub(crate) struct GgmlTensor {
    /// The type, as the file has it.
    pub number: u32,
    /// What counts numbers, not bytes.
    pub shape: Vec<usize>,
}

impl GgmlTensor {
    /// The type's name, or its number if that is not known.
    pub fn type_name(&self) -> String {
        let number = self.number;
        GgmlType::of_number(number).map_or_else(|| format!("ggml type {number}"), |known| known.name.to_owned())
    }
}

impl TensorInfo {
    /// The shape, in numbers.
    pub fn numbers(&self) -> &[usize] {
        self.ggml.as_ref().map_or(&self.shape, |ggml| &ggml.shape)
    }
}

impl fmt::Display for TensorInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.ggml {
            Some(ggml) => write!(f, "{} {:?}", ggml.type_name(), ggml.shape),
            None => write!(f, "{} {:?}", self.dtype, self.shape),
        }
    }
}

/// A header that has been checked.
pub(crate) struct Header {
    /// `__metadata__`
    pub metadata: BTreeMap<String, String>,
    /// Every tensor by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// Parses `json`, which is the whole header of a file of `file_len` bytes. An error is what is wrong, in words.
    pub fn parse(json: &[u8], file_len: u64) -> Result<Self, String> {
        let raw: RawHeader =
            serde_json::from_slice(json).map_err(|error| format!("the header is not usable: {}", brief(error)))?;
        let tensors = check_layout(raw.tensors, 8 + json.len() as u64, file_len)?;
        Ok(Self { metadata: raw.metadata, tensors })
    }
}

/// A tensor's entry as the header has it. Unsigned 64-bit numbers, whatever the pointer size here.
#[derive(Deserialize)]
struct RawTensor {
    dtype: String,
    shape: RawShape,
    data_offsets: (u64, u64),
}

/// The first axes, and how many there are: a list of millions is counted, not kept.
struct RawShape {
    sizes: Vec<u64>,
    rank: usize,
}

#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: BTreeMap<String, RawTensor>,
}

/// Tensors one after the other, without gap or overlap, ending where the file ends; sizes that fit their types.
fn check_layout(
    raw: BTreeMap<String, RawTensor>,
    data_start: u64,
    file_len: u64,
) -> Result<BTreeMap<String, TensorInfo>, String> {
    let mut by_offset: Vec<(String, RawTensor)> = raw.into_iter().collect();
    by_offset.sort_by_key(|(_, tensor)| tensor.data_offsets);
    let mut tensors = BTreeMap::new();
    let mut end_of_last = 0;
    for (name, tensor) in by_offset {
        let (start, end) = tensor.data_offsets;
        let bytes = bytes_of(&name, &tensor)?;
        if start != end_of_last || end.checked_sub(start) != Some(bytes.size) {
            return Err(format!(
                "tensor {name:?} ({} {:?}, {} bytes) lies at {start}..{end}, expected {end_of_last}..{}",
                tensor.dtype,
                tensor.shape.sizes,
                bytes.size,
                end_of_last.saturating_add(bytes.size)
            ));
        }
        end_of_last = end;
        let start = data_start.checked_add(start).ok_or_else(|| format!("tensor {name:?} lies beyond any file"))?;
        tensors.insert(name, TensorInfo { dtype: bytes.dtype, shape: bytes.shape, start, ggml: None });
    }
    match data_start.checked_add(end_of_last) {
        Some(end) if end == file_len => Ok(tensors),
        end => Err(format!(
            "the header describes a file of {} bytes, the file has {file_len}; it is {}",
            end.map_or("more than 2^64".to_owned(), |end| end.to_string()),
            if end.is_some_and(|end| end < file_len) { "followed by something else" } else { "cut off, copy it again" }
        )),
    }
}

struct Bytes {
    dtype: Dtype,
    shape: Vec<usize>,
    size: u64,
}

fn bytes_of(name: &str, tensor: &RawTensor) -> Result<Bytes, String> {
    let dtype: Dtype = serde_json::from_value(serde_json::Value::String(tensor.dtype.clone())).map_err(|_| {
        format!("tensor {name:?} has the unknown type {:?}; {READABLE} are read", start_of(&tensor.dtype))
    })?;
    let RawShape { sizes: shape, rank } = &tensor.shape;
    if *rank > MAX_RANK {
        return Err(format!("tensor {name:?} has {rank} dimensions, at most {MAX_RANK} are accepted"));
    }
    let too_large = || format!("tensor {name:?} has shape {shape:?}, more than can be addressed");
    if shape.iter().any(|&n| n > MAX_DIM) {
        return Err(too_large());
    }
    let bits = shape.iter().try_fold(dtype.bitsize() as u64, |product, &n| product.checked_mul(n));
    let bits = bits.ok_or_else(too_large)?;
    if bits % 8 != 0 {
        return Err(format!("tensor {name:?} ({dtype} {shape:?}) does not fill whole bytes"));
    }
    // On a 32-bit host a legal tensor can still be too large to index.
    usize::try_from(bits / 8).map_err(|_| too_large())?;
    let sizes = shape.iter().map(|&n| usize::try_from(n)).collect::<Result<_, _>>().map_err(|_| too_large())?;
    Ok(Bytes { dtype, shape: sizes, size: bits / 8 })
}

impl<'de> Deserialize<'de> for RawShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = RawShape;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of sizes")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<RawShape, A::Error> {
                let mut sizes = Vec::new();
                while sizes.len() < MAX_RANK
                    && let Some(size) = list.next_element()?
                {
                    sizes.push(size);
                }
                let mut rank = sizes.len();
                while let Some(IgnoredAny) = list.next_element()? {
                    rank += 1;
                }
                Ok(RawShape { sizes, rank })
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// By hand because a derived map keeps the last of two equal keys in silence, and buffers the whole header once more.
impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct HeaderVisitor;
        impl<'de> Visitor<'de> for HeaderVisitor {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                use serde::de::Error as _;
                let mut header = RawHeader::default();
                let mut has_metadata = false;
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        if std::mem::replace(&mut has_metadata, true) {
                            return Err(A::Error::custom("__metadata__ appears twice"));
                        }
                        header.metadata = map.next_value::<UniqueMap<String>>()?.0;
                        continue;
                    }
                    if header.tensors.len() == MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                    check_name(&name).map_err(A::Error::custom)?;
                    let tensor = map
                        .next_value::<RawTensor>()
                        .map_err(|e| A::Error::custom(format!("{name:?}: {}", brief(e))))?;
                    if header.tensors.contains_key(&name) {
                        return Err(A::Error::custom(format!("tensor {name:?} appears twice")));
                    }
                    header.tensors.insert(name, tensor);
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(HeaderVisitor)
    }
}

/// Printable and at most 256 bytes: names end up in messages and terminals.
pub(crate) fn check_name(name: &str) -> Result<(), String> {
    check_text("a tensor's name", name)
}

/// The same for another text.
pub(crate) fn check_text(what: &str, text: &str) -> Result<(), String> {
    if text.is_empty() || text.len() > MAX_NAME_BYTES || text.chars().any(char::is_control) {
        return Err(format!(
            "{what} starts {:?} and has {} bytes; 1 to {MAX_NAME_BYTES} printable ones are accepted",
            start_of(text),
            text.len()
        ));
    }
    Ok(())
}

/// Enough of a string to recognise it: a message must not be as long as a hostile file.
pub(crate) fn start_of(text: &str) -> String {
    text.chars().take(40).collect()
}

/// A JSON object in which no key may appear twice, of at most 65,536.
pub(crate) struct UniqueMap<V>(pub BTreeMap<String, V>);

impl<'de, V: DeserializeOwned> Deserialize<'de> for UniqueMap<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor<V>(PhantomData<V>);
        impl<'de, V: DeserializeOwned> Visitor<'de> for MapVisitor<V> {
            type Value = UniqueMap<V>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap<V>, A::Error> {
                use serde::de::Error as _;
                let mut entries = BTreeMap::new();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if entries.len() == MAX_ENTRIES {
                        return Err(A::Error::custom(format!("more than {MAX_ENTRIES} entries")));
                    }
                    if let Some(_first) = entries.insert(key.clone(), value) {
                        return Err(A::Error::custom(format!("{:?} appears twice", start_of(&key))));
                    }
                }
                Ok(UniqueMap(entries))
            }
        }
        deserializer.deserialize_map(MapVisitor(PhantomData))
    }
}
