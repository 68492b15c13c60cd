//! One `.safetensors` or GGUF file: its header is read and checked in full before any tensor is touched, tensors are
//! read on request, in pieces, as f32. Files are never mapped into memory, so a truncated one is an error here instead
//! of zeros later. This module knows nothing of layers.

use crate::atomic_file::write_atomically;
use crate::error::{Error, Result};
use crate::model::formats::GgmlType;
use crate::model::gguf::{Failure, GgufHeader, MAGIC, SWAPPED_MAGIC};
use crate::model::tensor_header::{GgmlTensor, Header, TensorInfo};
use crate::small_file;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Most bytes of JSON that are read from any file.
pub(crate) const MAX_JSON_BYTES: u64 = 16 << 20;
/// Bytes read at once: a multiple of every element size, large enough to keep a disk busy.
const CHUNK_BYTES: usize = 1 << 20;
/// Types that become f32.
pub(crate) const READABLE: &str = "F32, F16, BF16 and F64";

/// An open file whose header has been checked: sizes, offsets, types and names are what they claim to be.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    file: File,
    /// `__metadata__` of the header.
    pub metadata: BTreeMap<String, String>,
    /// Metadata of a GGUF file.
    pub gguf: Option<BTreeMap<String, Value>>,
    /// Every tensor by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl TensorFile {
    /// Reads and checks the header, whatever the size of the file. What it starts with says which one it has: as the
    /// length of a safetensors header, the first word of a GGUF file would be more than is accepted.
    pub fn open(path: &Path) -> Result<Self> {
        let bad = |message: String| Error::BadFile { path: path.to_owned(), message };
        let io = |source| Error::Io { path: path.to_owned(), source };
        let no_file = |reason: small_file::Unreadable| reason.bad_file(path, 0, "a file of tensors");
        let (mut file, file_len) = small_file::open(path).map_err(no_file)?;
        let mut start = [0; 4];
        if file_len >= 4 {
            file.read_exact(&mut start).and_then(|()| file.rewind()).map_err(io)?;
        }
        if [MAGIC, SWAPPED_MAGIC].contains(&start) || has_extension(path, "gguf") {
            let header = GgufHeader::read(BufReader::new(&mut file), file_len);
            let GgufHeader { metadata, tensors } = header.map_err(|failure| match failure {
                Failure::Wrong(message) => bad(message),
                Failure::Io(error) => io(error),
            })?;
            let (path, gguf) = (path.to_owned(), Some(metadata));
            return Ok(Self { path, file, metadata: BTreeMap::new(), gguf, tensors });
        }
        if file_len < 8 {
            return Err(bad(format!("{file_len} bytes, but a safetensors file starts with an 8-byte header length")));
        }
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(io)?;
        let header_len = u64::from_le_bytes(length);
        if header_len > MAX_JSON_BYTES || header_len > file_len - 8 {
            return Err(bad(format!(
                "the header claims {header_len} bytes; the file has {} after the length, and at most \
                 {MAX_JSON_BYTES} are accepted. Is this a safetensors file?",
                file_len - 8
            )));
        }
        let mut json = vec![0; header_len as usize];
        file.read_exact(&mut json).map_err(io)?;
        let Header { metadata, tensors } = Header::parse(&json, file_len).map_err(bad)?;
        Ok(Self { path: path.to_owned(), file, metadata, gguf: None, tensors })
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entry of `name`, or an error that lists names that are there.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            hint: names_hint(self.tensors.keys(), self.tensors.len()),
        })
    }

    /// Checks that `name` has this shape and a type that [`TensorFile::read_f32`] reads.
    pub fn expect(&self, name: &str, shape: &[usize]) -> Result<()> {
        let info = self.info(name)?;
        if info.numbers() != shape {
            let mut swapped = info.numbers().to_vec();
            if let [.., a, b] = &mut swapped[..] {
                std::mem::swap(a, b);
            }
            let hint = if swapped == shape { "; the last two axes are swapped: is it `transposed`?" } else { "" };
            return Err(self.mismatch(name, &format!("shape {shape:?}{hint}")));
        }
        self.readable(name, info)
    }

    /// `name`, or that of the only tensor.
    fn named_or_only(&self, name: Option<&str>) -> Result<String> {
        match (name, self.tensors.keys().next()) {
            (Some(name), _) => Ok(name.to_owned()),
            (None, Some(only)) if self.tensors.len() == 1 => Ok(only.clone()),
            _ => Err(Error::BadFile {
                path: self.path.clone(),
                message: format!(
                    "which of its tensors? name one; {}",
                    names_hint(self.tensors.keys(), self.tensors.len())
                ),
            }),
        }
    }

    /// A [`Error::BadTensor`] for `name`, which must exist.
    pub fn mismatch(&self, name: &str, expected: &str) -> Error {
        Error::BadTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            found: self.tensors.get(name).map_or_else(|| "missing".to_owned(), TensorInfo::to_string),
            expected: expected.to_owned(),
        }
    }

    /// [`TensorFile::read_f32`] reads the type of `name`.
    pub fn check_readable(&self, name: &str) -> Result<()> {
        self.readable(name, self.info(name)?)
    }

    fn readable(&self, name: &str, info: &TensorInfo) -> Result<()> {
        if let Some(ggml) = &info.ggml {
            return Err(self.unsupported(name, ggml));
        }
        match info.dtype {
            Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64 => Ok(()),
            other => Err(Error::Unsupported {
                what: format!("type {other} of tensor {name:?} in {}", self.path.display()),
                by: "as floating-point data".to_owned(),
                hint: format!(
                    "{READABLE} are read; smaller types where their scales are beside them (docs/families.md)"
                ),
            }),
        }
    }

    /// The type of a GGUF tensor cannot be read, or not here.
    pub fn unsupported(&self, name: &str, ggml: &GgmlTensor) -> Error {
        Error::Unsupported {
            what: format!("type {} of tensor {name:?} in {}", ggml.type_name(), self.path.display()),
            by: "here".to_owned(),
            hint: format!("of GGUF files, {} are read, and blocks only as matrices of a layer", GgmlType::readable()),
        }
    }

    /// Appends elements `range` of `name` to `values` as f32. NaN, infinities and f64 values beyond f32 are errors.
    pub fn read_f32(&mut self, name: &str, range: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        let first = values.len();
        self.read_any_f32(name, range, values)?;
        match values[first..].iter().position(|v| !v.is_finite()) {
            None => Ok(()),
            Some(at) => Err(Error::NonFinite {
                tensor: format!("tensor {name:?} of {}", self.path.display()),
                index: at,
                value: values[first + at],
            }),
        }
    }

    /// As [`TensorFile::read_f32`], whatever the values are.
    fn read_any_f32(&mut self, name: &str, range: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        let info = self.info(name)?;
        self.readable(name, info)?;
        let dtype = info.dtype;
        reserve(&self.path, values, range.len())?;
        self.read_chunks(name, range, |bytes| match dtype {
            Dtype::F16 => extend(values, bytes, |b| half::f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => extend(values, bytes, |b| half::bf16::from_le_bytes(b).to_f32()),
            Dtype::F64 => extend(values, bytes, |b| f64::from_le_bytes(b) as f32),
            _ => extend(values, bytes, f32::from_le_bytes),
        })
    }

    /// Bytes `range` of a tensor whose elements have at most eight bits.
    pub fn read_bytes(&mut self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let bits = self.info(name)?.dtype.bitsize();
        if bits > 8 {
            return Err(self.mismatch(name, "numbers of at most eight bits"));
        }
        let mut bytes = Vec::new();
        self.read_chunks(name, range, |chunk| bytes.extend_from_slice(chunk))?;
        Ok(bytes)
    }

    /// Elements `range` of a tensor, whatever their type, as they are stored.
    pub fn read_raw(&mut self, name: &str, range: Range<usize>) -> Result<Vec<u8>> {
        let size = self.info(name)?.dtype.bitsize().div_ceil(8);
        let mut bytes = Vec::new();
        reserve(&self.path, &mut bytes, range.len().saturating_mul(size))?;
        self.read_chunks(name, range, |chunk| bytes.extend_from_slice(chunk))?;
        Ok(bytes)
    }

    /// All of an I32 or I64 tensor.
    pub fn read_integers(&mut self, name: &str) -> Result<Vec<i64>> {
        let info = self.info(name)?;
        let dtype = info.dtype;
        if !matches!(dtype, Dtype::I32 | Dtype::I64) {
            return Err(self.mismatch(name, "I32 or I64"));
        }
        let count = info.shape.iter().product();
        let mut values = Vec::new();
        self.read_chunks(name, 0..count, |bytes| match dtype {
            Dtype::I32 => extend(&mut values, bytes, |b| i64::from(i32::from_le_bytes(b))),
            _ => extend(&mut values, bytes, i64::from_le_bytes),
        })?;
        Ok(values)
    }

    /// Hands elements `range` of `name` to `take` in pieces of whole elements. Only for types of whole bytes.
    fn read_chunks(&mut self, name: &str, range: Range<usize>, mut take: impl FnMut(&[u8])) -> Result<()> {
        let info = self.info(name)?;
        let bits = info.dtype.bitsize();
        // of four bits: bytes are what is counted then
        let element = bits.div_ceil(8);
        let count = info.shape.iter().product::<usize>() / (8 / bits.min(8)).max(1);
        if range.end > count {
            return Err(self.mismatch(name, &format!("at least {} elements", range.end)));
        }
        let start = info.start + (range.start * element) as u64;
        let io = |source| Error::Io { path: self.path.clone(), source };
        self.file.seek(SeekFrom::Start(start)).map_err(io)?;
        let mut remaining = range.len() * element;
        let mut chunk = vec![0; remaining.min(CHUNK_BYTES)];
        while remaining > 0 {
            let bytes = &mut chunk[..remaining.min(CHUNK_BYTES)];
            self.file.read_exact(bytes).map_err(io)?;
            take(bytes);
            remaining -= bytes.len();
        }
        Ok(())
    }
}

/// Room for `count` more values of a file. The count is bounded by the file's length, but a sparse file can be longer
/// than memory, and that must not abort the process.
pub(crate) fn reserve<T>(path: &Path, values: &mut Vec<T>, count: usize) -> Result<()> {
    if values.capacity() - values.len() >= count {
        return Ok(());
    }
    values.try_reserve_exact(count).map_err(|_| Error::Io {
        path: path.to_owned(),
        source: std::io::Error::new(
            std::io::ErrorKind::OutOfMemory,
            format!("no memory for {count} values of {} bytes", size_of::<T>()),
        ),
    })
}

/// Reads one float tensor: `name`, or the only tensor of the file. Returns its values and its shape.
///
/// # Errors
/// Those of opening a file, [`Error::MissingTensor`] (also if `name` is `None` and the file has several tensors),
/// [`Error::Unsupported`] for a type that is not F32, F16, BF16 or F64, [`Error::NonFinite`].
pub fn read_tensor(path: &Path, name: Option<&str>) -> Result<(Vec<f32>, Vec<usize>)> {
    read_whole(path, name, TensorFile::read_f32)
}

/// As [`read_tensor`], with NaN and infinities as they are: for activations, of which a layer can make something
/// ([`NonFinite`](crate::NonFinite)).
pub fn read_activations(path: &Path, name: Option<&str>) -> Result<(Vec<f32>, Vec<usize>)> {
    read_whole(path, name, TensorFile::read_any_f32)
}

fn read_whole(
    path: &Path,
    name: Option<&str>,
    read: fn(&mut TensorFile, &str, Range<usize>, &mut Vec<f32>) -> Result<()>,
) -> Result<(Vec<f32>, Vec<usize>)> {
    let mut file = TensorFile::open(path)?;
    let name = file.named_or_only(name)?;
    let shape = file.info(&name)?.shape.clone();
    let mut values = Vec::new();
    read(&mut file, &name, 0..shape.iter().product(), &mut values)?;
    Ok((values, shape))
}

/// Reads one tensor of whole numbers, I32 or I64: `name`, or the only tensor of the file.
///
/// # Errors
/// As [`read_tensor`].
pub fn read_integers(path: &Path, name: Option<&str>) -> Result<Vec<i64>> {
    let mut file = TensorFile::open(path)?;
    let name = file.named_or_only(name)?;
    file.read_integers(&name)
}

/// Writes a file with one F32 tensor, which appears under `path` complete or not at all.
///
/// # Errors
/// [`Error::LengthMismatch`] if `shape` does not hold `values`, [`Error::Io`].
pub fn write_tensor(path: &Path, name: &str, values: &[f32], shape: &[usize]) -> Result<()> {
    let expected = shape.iter().try_fold(1usize, |product, &n| product.checked_mul(n)).unwrap_or(usize::MAX);
    if expected != values.len() {
        return Err(Error::LengthMismatch {
            tensor: "values",
            shape: format!("{shape:?}"),
            expected,
            found: values.len(),
        });
    }
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let bad = |error| Error::BadFile { path: path.to_owned(), message: format!("cannot be written: {error}") };
    let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.to_vec(), &bytes).map_err(bad)?;
    let content = safetensors::serialize([(name, view)], None::<HashMap<String, String>>).map_err(bad)?;

    write_atomically(path, &content)
}

/// The name ends in `.extension`, in small or capital letters.
pub(crate) fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// "the file has 19 tensors: a, b, c, ..."
pub(crate) fn names_hint<'a>(names: impl Iterator<Item = &'a String>, count: usize) -> String {
    const SHOWN: usize = 8;
    // Of a golden file, the layer's tensors say more than those about its input and output.
    let is_weight = |name: &&String| !["io.", "aux.", "grad."].iter().any(|own| name.starts_with(own));
    let shown: Vec<&str> = names.filter(is_weight).take(SHOWN).map(String::as_str).collect();
    let more = if count > SHOWN { ", ..." } else { "" };
    format!("the file has {count} tensor(s): {}{more}", shown.join(", "))
}

fn extend<T, const N: usize>(values: &mut Vec<T>, bytes: &[u8], convert: impl Fn([u8; N]) -> T) {
    values.extend(bytes.as_chunks::<N>().0.iter().map(|&b| convert(b)));
}
