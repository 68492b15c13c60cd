//! The header of a GGUF file, versions 2 and 3: metadata, then an entry for each tensor, then their data. Nothing in it
//! is believed: every count, length and offset is checked against the file's length and against limits before anyone
//! uses it. Lists that nobody here needs, such as those of tokens, are passed over, not kept.

pub(crate) mod parts;
mod tensors;

use crate::model::tensor_header::{MAX_TENSORS, TensorInfo, check_name, check_text, start_of};
use serde_json::{Number, Value};
use std::collections::BTreeMap;
use std::io::{self, BufRead, Read};
use tensors::{RawTensor, check_layout};

/// What a file starts with.
pub(crate) const MAGIC: [u8; 4] = *b"GGUF";
/// The same on a machine of the other byte order, in case that somebody writes it as a number.
pub(crate) const SWAPPED_MAGIC: [u8; 4] = *b"FUGG";
/// Headers hold the vocabulary: 15 MB in the largest published ones.
const MAX_HEADER_BYTES: u64 = 64 << 20;
const MAX_KEYS: u64 = 65_536;
/// Of ggml.
const MAX_RANK: u32 = 4;
const MAX_ALIGNMENT: u64 = 1 << 20;
const DEFAULT_ALIGNMENT: u64 = 32;
/// Longer texts are passed over. Architectures and choices have names.
const MAX_KEPT_BYTES: u64 = 1024;
/// Of all texts together; those after that are passed over too.
const MAX_ALL_TEXT_BYTES: u64 = 4 << 20;
/// Longer lists are passed over. No model has as many layers.
const MAX_KEPT_ENTRIES: u64 = 4096;
/// Numbers of all lists together: one in memory is 32 times as large as a byte in the file.
const MAX_ALL_ENTRIES: u64 = 65_536;
const MAX_NESTING: u32 = 4;
/// The shortest entries: a key of one byte and a byte; a tensor with a name of one byte and without axes.
const MIN_KEY_BYTES: u64 = 8 + 1 + 4 + 1;
const MIN_TENSOR_BYTES: u64 = 8 + 1 + 4 + 4 + 8;

/// A header that has been checked.
pub(crate) struct GgufHeader {
    /// By key. What was passed over is a text that says so: whoever needs it gets an error with these words. Of a list,
    /// `KEY.length` is how many entries it has.
    pub metadata: BTreeMap<String, Value>,
    /// Every tensor by name. Axes are in the usual order, the longest stride first: the reverse of the file's.
    pub tensors: BTreeMap<String, TensorInfo>,
}

/// Why there is no header.
#[derive(Debug)]
pub(crate) enum Failure {
    /// What is wrong, in words.
    Wrong(String),
    /// The file could not be read.
    Io(io::Error),
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Failure::Wrong(message)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Io(error)
    }
}

type Result<T, E = Failure> = std::result::Result<T, E>;

impl GgufHeader {
    /// Reads the header of a file of `file_len` bytes, of which `from` is at the start.
    pub fn read(from: impl BufRead, file_len: u64) -> Result<Self> {
        let mut reader = Reader { from, at: 0, file_len, kept: 0, kept_text: 0 };
        reader.start()?;
        let num_tensors = reader.u64("the number of tensors")?;
        let num_keys = reader.u64("the number of metadata keys")?;
        reader.check_count("tensors", num_tensors, MAX_TENSORS as u64, MIN_TENSOR_BYTES)?;
        reader.check_count("metadata keys", num_keys, MAX_KEYS, MIN_KEY_BYTES)?;
        let mut metadata = BTreeMap::new();
        let mut lengths = Vec::new();
        for _ in 0..num_keys {
            let (key, value, length) = reader.entry()?;
            lengths.extend(length.map(|length| (format!("{key}.length"), length)));
            if metadata.contains_key(&key) {
                return Err(format!("metadata key {key:?} appears twice").into());
            }
            metadata.insert(key, value);
        }
        for (key, length) in lengths {
            metadata.entry(key).or_insert(length.into());
        }
        let alignment = alignment(&metadata)?;
        let mut raw = BTreeMap::new();
        for _ in 0..num_tensors {
            let (name, tensor) = reader.tensor()?;
            if raw.contains_key(&name) {
                return Err(format!("tensor {name:?} appears twice").into());
            }
            raw.insert(name, tensor);
        }
        let tensors = check_layout(raw, reader.at, alignment, file_len)?;
        Ok(Self { metadata, tensors })
    }
}

/// The types of metadata values.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    List,
    U64,
    I64,
    F64,
}

impl Kind {
    fn of_number(number: u32) -> Option<Self> {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, Text, List, U64, I64, F64].get(number as usize).copied()
    }

    /// Bytes of the shortest value.
    fn least_bytes(self) -> u64 {
        match self {
            Kind::U8 | Kind::I8 | Kind::Bool => 1,
            Kind::U16 | Kind::I16 => 2,
            Kind::U32 | Kind::I32 | Kind::F32 => 4,
            Kind::U64 | Kind::I64 | Kind::F64 | Kind::Text => 8,
            Kind::List => 12,
        }
    }
}

struct Reader<R> {
    from: R,
    /// Bytes read.
    at: u64,
    file_len: u64,
    /// Numbers in lists that were kept.
    kept: u64,
    /// Bytes of texts that were kept.
    kept_text: u64,
}

impl<R: BufRead> Reader<R> {
    fn start(&mut self) -> Result<()> {
        let magic: [u8; 4] = self.bytes("the first word")?;
        if magic == SWAPPED_MAGIC {
            return Err(big_endian());
        }
        if magic != MAGIC {
            return Err(format!("it starts with the bytes {magic:02x?}, a GGUF file with {MAGIC:02x?} (GGUF)").into());
        }
        match u32::from_le_bytes(self.bytes("the version")?) {
            2 | 3 => Ok(()),
            1 => Err("GGUF version 1, of August 2023; 2 and 3 are read. Convert the model again".to_owned().into()),
            version if version & 0xffff == 0 && version != 0 => Err(big_endian()),
            version => Err(format!("GGUF version {version}; 2 and 3 are read").into()),
        }
    }

    /// The next `count` bytes are part of the header.
    fn claim(&mut self, count: u64, what: &str) -> Result<()> {
        let end = self.at.saturating_add(count);
        if end > self.file_len {
            let left = self.file_len - self.at;
            return Err(format!(
                "{what}, at byte {}, takes {count} bytes, and {left} are left of {}; cut off, or no such file",
                self.at, self.file_len
            )
            .into());
        }
        if end > MAX_HEADER_BYTES {
            return Err(format!("the header is longer than {MAX_HEADER_BYTES} bytes, which {what} would end at").into());
        }
        self.at = end;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        self.claim(N as u64, what)?;
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    fn skip(&mut self, count: u64, what: &str) -> Result<()> {
        self.claim(count, what)?;
        let skipped = io::copy(&mut self.from.by_ref().take(count), &mut io::sink())?;
        if skipped == count { Ok(()) } else { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) }
    }

    /// So many entries, of at least so many bytes each, can follow.
    fn check_count(&self, what: &str, count: u64, most: u64, least_bytes: u64) -> Result<()> {
        let left = self.file_len - self.at;
        if count > most {
            return Err(format!("it claims {count} {what}, at most {most} are accepted").into());
        }
        if count.saturating_mul(least_bytes) > left {
            return Err(
                format!("it claims {count} {what}, but only {left} bytes follow; cut off, or no such file").into()
            );
        }
        Ok(())
    }

    /// A text of at most `most` bytes; a longer one is passed over, and its length returned.
    fn text(&mut self, most: u64, what: &str) -> Result<Result<String, u64>> {
        let length = self.u64(what)?;
        if length > most {
            self.skip(length, what)?;
            return Ok(Err(length));
        }
        self.claim(length, what)?;
        let mut bytes = vec![0; length as usize];
        self.from.read_exact(&mut bytes)?;
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Ok(text)),
            Err(error) => {
                let start = start_of(&String::from_utf8_lossy(error.as_bytes()));
                Err(format!("{what}, {start:?}, is not UTF-8").into())
            }
        }
    }

    fn name(&mut self, what: &str) -> Result<String> {
        match self.text(MAX_KEPT_BYTES, what)? {
            Ok(text) => Ok(text),
            Err(length) => Err(format!("{what} has {length} bytes; 1 to 256 printable ones are accepted").into()),
        }
    }

    /// Key, value, and how many entries that has if it is a list.
    fn entry(&mut self) -> Result<(String, Value, Option<u64>)> {
        let key = self.name("a metadata key")?;
        check_text("a metadata key", &key)?;
        let what = format!("metadata key {key:?}");
        Ok(match self.kind(&what)? {
            Kind::List => {
                let (value, length) = self.list(&what)?;
                (key, value, Some(length))
            }
            kind => (key, self.value(kind, &what)?, None),
        })
    }

    fn kind(&mut self, what: &str) -> Result<Kind> {
        let number = self.u32(what)?;
        Kind::of_number(number)
            .ok_or_else(|| format!("{what} has a value of the unknown type {number}; 0 to 12 are known").into())
    }

    /// One value, not a list.
    fn value(&mut self, kind: Kind, what: &str) -> Result<Value> {
        // JSON has no NaN and no infinities, and nobody has a use for them.
        let float = |number: f64| {
            Number::from_f64(number).map_or_else(|| Value::String(format!("the number {number}")), Value::Number)
        };
        Ok(match kind {
            Kind::U8 => u8::from_le_bytes(self.bytes(what)?).into(),
            Kind::I8 => i8::from_le_bytes(self.bytes(what)?).into(),
            Kind::U16 => u16::from_le_bytes(self.bytes(what)?).into(),
            Kind::I16 => i16::from_le_bytes(self.bytes(what)?).into(),
            Kind::U32 => self.u32(what)?.into(),
            Kind::I32 => i32::from_le_bytes(self.bytes(what)?).into(),
            Kind::U64 => self.u64(what)?.into(),
            Kind::I64 => i64::from_le_bytes(self.bytes(what)?).into(),
            Kind::F32 => float(f32::from_le_bytes(self.bytes(what)?).into()),
            Kind::F64 => float(f64::from_le_bytes(self.bytes(what)?)),
            Kind::Bool => match self.bytes(what)? {
                [0] => false.into(),
                [1] => true.into(),
                [other] => return Err(format!("{what} is a truth value of {other}; 0 and 1 are known").into()),
            },
            Kind::Text => match self.text(MAX_KEPT_BYTES.min(MAX_ALL_TEXT_BYTES - self.kept_text), what)? {
                Ok(text) => {
                    self.kept_text += text.len() as u64;
                    text.into()
                }
                Err(length) => format!("a text of {length} bytes, which is not kept").into(),
            },
            Kind::List => return Err(format!("{what} is a list where a value should be").into()),
        })
    }

    /// A short list of numbers or truth values, or a text that says what was passed over; and the number of entries.
    fn list(&mut self, what: &str) -> Result<(Value, u64)> {
        let (kind, count) = self.list_start(what)?;
        let is_short = count <= MAX_KEPT_ENTRIES && count <= MAX_ALL_ENTRIES - self.kept;
        if is_short && !matches!(kind, Kind::Text | Kind::List) {
            self.kept += count;
            let values = (0..count).map(|_| self.value(kind, what)).collect::<Result<_>>()?;
            return Ok((Value::Array(values), count));
        }
        self.pass_over(kind, count, what, 1)?;
        Ok((format!("a list of {count} entries, which is not kept").into(), count))
    }

    fn list_start(&mut self, what: &str) -> Result<(Kind, u64)> {
        let kind = self.kind(what)?;
        let count = self.u64(what)?;
        self.check_count(&format!("entries in {what}"), count, MAX_HEADER_BYTES, kind.least_bytes())?;
        Ok((kind, count))
    }

    fn pass_over(&mut self, kind: Kind, count: u64, what: &str, depth: u32) -> Result<()> {
        match kind {
            Kind::List if depth == MAX_NESTING => {
                Err(format!("{what} holds lists in lists, more than {MAX_NESTING} deep").into())
            }
            Kind::List => (0..count).try_for_each(|_| {
                let (kind, count) = self.list_start(what)?;
                self.pass_over(kind, count, what, depth + 1)
            }),
            Kind::Text => (0..count).try_for_each(|_| {
                let length = self.u64(what)?;
                self.skip(length, what)
            }),
            // cannot overflow: the count has been checked against the file's length
            kind => self.skip(count * kind.least_bytes(), what),
        }
    }

    fn tensor(&mut self) -> Result<(String, RawTensor)> {
        let name = self.name("a tensor's name")?;
        check_name(&name)?;
        let what = format!("the entry of tensor {name:?}");
        let rank = self.u32(&what)?;
        if rank > MAX_RANK {
            return Err(format!("tensor {name:?} has {rank} dimensions, at most {MAX_RANK} are accepted").into());
        }
        let mut shape: Vec<u64> = (0..rank).map(|_| self.u64(&what)).collect::<Result<_>>()?;
        shape.reverse();
        let number = self.u32(&what)?;
        let offset = self.u64(&what)?;
        Ok((name, RawTensor { shape, number, offset }))
    }
}

fn big_endian() -> Failure {
    "a big-endian GGUF file; little-endian ones are read. Convert the model again".to_owned().into()
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT_ALIGNMENT) };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= MAX_ALIGNMENT => Ok(alignment),
        _ => Err(format!("general.alignment is {value}, expected a power of two of at most {MAX_ALIGNMENT}").into()),
    }
}
