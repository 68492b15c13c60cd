//! A checkpoint's MoE layers with their experts in another format, as a file of their own.
//!
//! Experts become packed rows (`formats/mod.rs`), U8 `[experts, rows, bytes of a row]` under the names that they had;
//! the metadata key `packed_weights` says of each which format it is. Everything else of the layers is copied. So the
//! file is read by the same description of the family.

use crate::atomic_file::AtomicFile;
use crate::error::{Error, Result};
use crate::model::checkpoint::{Checkpoint, PACKED_KEY};
use crate::model::family::Family;
use crate::model::formats::{self, WeightFormat};
use crate::model::layer_reader::{LayerFile, Tensor, check_blocks};
use crate::model::tensor_file::MAX_JSON_BYTES;
use crate::model::tensor_header::MAX_TENSORS;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::Serialize;
use serde_json::{Map, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What storing an expert tensor in another format did to it. Of layouts with one tensor for each expert, all of them
/// together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct QuantizedTensor {
    /// Its name, with `{expert}` where there is one for each.
    pub name: String,
    /// The format that it had.
    pub from: WeightFormat,
    /// The format that it has.
    pub to: WeightFormat,
    /// Bytes as packed rows before.
    pub bytes_before: u64,
    /// Bytes as packed rows after.
    pub bytes_after: u64,
    /// Root of the mean square of the differences, by that of the weights.
    pub rms_error: f64,
    /// Largest difference, by the largest weight.
    pub max_error: f64,
}

/// Sums over the weights of a tensor.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    squares: f64,
    squared_errors: f64,
    largest: f64,
    largest_error: f64,
}

impl Sums {
    fn of(before: &[f32], after: &[f32]) -> Self {
        let of_rows = |(before, after): (&[f32], &[f32])| {
            let mut sums = Self::default();
            for (&before, &after) in before.iter().zip(after) {
                let (value, error) = (f64::from(before), f64::from(after) - f64::from(before));
                sums.squares += value * value;
                sums.squared_errors += error * error;
                sums.largest = sums.largest.max(value.abs());
                sums.largest_error = sums.largest_error.max(error.abs());
            }
            sums
        };
        // In an order that does not depend on threads.
        let parts: Vec<Self> = before.par_chunks(CHUNK).zip(after.par_chunks(CHUNK)).map(of_rows).collect();
        parts.into_iter().fold(Self::default(), Self::plus)
    }

    fn plus(self, other: Self) -> Self {
        Self {
            squares: self.squares + other.squares,
            squared_errors: self.squared_errors + other.squared_errors,
            largest: self.largest.max(other.largest),
            largest_error: self.largest_error.max(other.largest_error),
        }
    }
}

/// Weights that a thread compares at a time.
const CHUNK: usize = 1 << 16;

/// A tensor of the new file.
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: u64,
    from: Source,
}

/// Where its content comes from.
enum Source {
    /// A tensor of a layer, as it is.
    Copied { layer: usize },
    /// Matrices of a tensor of a layer, as f32.
    Floats { layer: usize, tensor: usize, items: std::ops::Range<usize> },
    /// The same as packed rows.
    Packed { layer: usize, tensor: usize, items: std::ops::Range<usize> },
}

/// Writes the MoE blocks of `layers` to the safetensors file `output`, their experts in the format `to`. What has no
/// place in a layer (attention, embeddings) is left out. `progress(done, total)` is told of bytes written.
///
/// The file appears complete or not at all. It holds one matrix in memory at a time.
///
/// # Errors
/// Those of [`Checkpoint::load_layer`]; [`Error::InvalidConfig`] where rows are no multiple of the format's blocks, and
/// for an output that is one of the checkpoint's own files; [`Error::NotRepresentable`]; [`Error::Io`].
pub fn quantize(
    checkpoint: &Checkpoint,
    family: Option<&Family>,
    layers: &[u32],
    to: WeightFormat,
    output: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Vec<QuantizedTensor>> {
    checkpoint.check_not_a_source(output)?;
    let mut files = Vec::new();
    let mut layout = None;
    for &layer in layers {
        let (name, file) = checkpoint.layer_file(family, layer)?;
        layout = Some(name);
        files.push(file);
    }
    let mut entries = BTreeMap::new();
    for (layer, file) in files.iter_mut().enumerate() {
        for (tensor, described) in file.tensors().into_iter().enumerate() {
            add_entries(file, layer, tensor, &described, to, &mut entries)?;
        }
    }

    let is_packed = |entry: &Entry| matches!(entry.from, Source::Packed { .. });
    let mut order: Vec<(&String, &Entry)> = entries.iter().collect();
    // Larger elements first, so that all of them are aligned.
    order.sort_by_key(|(_, entry)| (std::cmp::Reverse(entry.dtype.bitsize()), is_packed(entry)));
    let mut metadata = Map::new();
    let packed: BTreeMap<&String, WeightFormat> =
        order.iter().filter(|(_, entry)| is_packed(entry)).map(|&(name, _)| (name, to)).collect();
    metadata.insert(PACKED_KEY.to_owned(), json!(json!(packed).to_string()));
    metadata.insert("config".to_owned(), json!(checkpoint.config_text(family, layers)?));
    metadata.extend(layout.map(|layout| ("layout".to_owned(), json!(layout))));
    for key in ["prefix", "layer_idx"] {
        metadata.extend(checkpoint.metadata(key).map(|value| (key.to_owned(), json!(value))));
    }
    let header = header(&order, metadata, output)?;

    let mut file = AtomicFile::create(output)?;
    file.write(&header)?;
    let total = order.iter().map(|(_, entry)| entry.bytes).sum();
    let mut done = 0;
    // (layer, tensor): what it was, and sums
    let mut converted: BTreeMap<(usize, usize), (QuantizedTensor, Sums)> = BTreeMap::new();
    for (name, entry) in order {
        match &entry.from {
            Source::Copied { layer } => {
                file.write(&files[*layer].copy(name)?)?;
                done += entry.bytes;
            }
            Source::Floats { layer, tensor, items } => {
                for item in items.clone() {
                    let values = files[*layer].read(*tensor, item)?.to_f32();
                    file.write(bytemuck::cast_slice(&values))?;
                }
                done += entry.bytes;
            }
            Source::Packed { layer, tensor, items } => {
                for item in items.clone() {
                    let matrix = files[*layer].read(*tensor, item)?;
                    let before = matrix.to_f32();
                    let packed = formats::encode(to, matrix.inputs, &before).map_err(|at| {
                        let tensor = format!("tensor {name:?} of {}", checkpoint.path().display());
                        let index = (item - items.start) * before.len() + at.index;
                        Error::NotRepresentable { tensor, index, value: at.value, format: to.name() }
                    })?;
                    let after = formats::decode_matrix(to, matrix.inputs, &packed);
                    let (result, sums) = converted.entry((*layer, *tensor)).or_insert_with(|| {
                        let name = files[*layer].tensors().swap_remove(*tensor).name;
                        (QuantizedTensor::new(name, matrix.format, to), Sums::default())
                    });
                    result.bytes_before += matrix.bytes.len() as u64;
                    result.bytes_after += packed.len() as u64;
                    *sums = sums.plus(Sums::of(&before, &after));
                    file.write(&packed)?;
                    done += packed.len() as u64;
                    progress(done, total);
                }
            }
        }
        progress(done, total);
    }
    file.commit()?;
    Ok(converted.into_values().map(|(result, sums)| result.with_errors(&sums)).collect())
}

impl QuantizedTensor {
    fn new(name: String, from: WeightFormat, to: WeightFormat) -> Self {
        Self { name, from, to, bytes_before: 0, bytes_after: 0, rms_error: 0.0, max_error: 0.0 }
    }

    fn with_errors(mut self, sums: &Sums) -> Self {
        let ratio = |part: f64, whole: f64| if part == 0.0 { 0.0 } else { part / whole };
        self.rms_error = ratio(sums.squared_errors, sums.squares).sqrt();
        self.max_error = ratio(sums.largest_error, sums.largest);
        self
    }
}

/// The tensors of the new file that hold what `tensor` holds.
fn add_entries(
    file: &mut LayerFile<'_>,
    layer: usize,
    tensor: usize,
    described: &Tensor,
    to: WeightFormat,
    entries: &mut BTreeMap<String, Entry>,
) -> Result<()> {
    let Tensor { name, files, count, rows, columns, is_expert } = described;
    let per_file = count / files.len().max(1);
    for (n, stored) in files.iter().enumerate() {
        let items = n * per_file..(n + 1) * per_file;
        let entry = if *is_expert {
            check_blocks(to, file.path(), name, *columns)?;
            let row_bytes = to.layout(*columns).bytes;
            let bytes = (per_file * rows * row_bytes) as u64;
            let from = Source::Packed { layer, tensor, items };
            Entry { dtype: Dtype::U8, shape: vec![per_file, *rows, row_bytes], bytes, from }
        } else if let Some((dtype, shape, bytes)) = file.plain(stored)? {
            Entry { dtype, shape, bytes, from: Source::Copied { layer } }
        } else if file.is_transposed(tensor) {
            return Err(Error::Unsupported {
                what: format!("tensor {stored:?} of {}", file.path().display()),
                by: "here, as it is quantised and transposed and no expert's".to_owned(),
                hint: "use a checkpoint that stores it as floats".to_owned(),
            });
        } else {
            let bytes = (per_file * rows * columns * 4) as u64;
            let shape = vec![per_file, *rows, *columns];
            Entry { dtype: Dtype::F32, shape, bytes, from: Source::Floats { layer, tensor, items } }
        };
        if entries.insert(stored.clone(), entry).is_some() {
            return Err(Error::BadFile {
                path: file.path().to_owned(),
                message: format!("tensor {stored:?} belongs to several layers; name one of them"),
            });
        }
    }
    Ok(())
}

/// The header, with its length in front and padded to whole 8 bytes.
fn header(order: &[(&String, &Entry)], metadata: Map<String, serde_json::Value>, output: &Path) -> Result<Vec<u8>> {
    let mut header = Map::new();
    header.insert("__metadata__".to_owned(), metadata.into());
    let mut at = 0;
    for (name, entry) in order {
        let (start, end) = (at, at + entry.bytes);
        let dtype = entry.dtype.to_string();
        header.insert((*name).clone(), json!({"dtype": dtype, "shape": entry.shape, "data_offsets": [start, end]}));
        at = end;
    }
    let mut json = serde_json::Value::from(header).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let too_large = |what: &str, required: u64, available: u64| Error::LimitExceeded {
        what: format!("{what} of {}", output.display()),
        required,
        available,
        hint: "write fewer layers to one file",
    };
    if order.len() > MAX_TENSORS {
        return Err(too_large("the number of tensors", order.len() as u64, MAX_TENSORS as u64));
    }
    if json.len() as u64 > MAX_JSON_BYTES {
        return Err(too_large("the header", json.len() as u64, MAX_JSON_BYTES));
    }
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}
