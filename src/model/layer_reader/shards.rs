//! The files of a checkpoint, and tensors that take several of one name to read: those of quantisers.

use crate::error::{Error, Result};
use crate::model::formats::WeightFormat;
use crate::model::formats::published::{self, GptqZeros, Integers, Kind, MatrixScale, Nvfp4, Qweight};
use crate::model::model_config::Quantization;
use crate::model::stored::PackedMatrix;
use crate::model::tensor_file::{self, TensorFile};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The files of a checkpoint: each is opened at most once for a layer.
pub(crate) struct Shards<'c> {
    /// What was opened.
    pub path: &'c Path,
    /// All files.
    pub files: &'c [PathBuf],
    /// Which of them holds each tensor.
    pub file_of_tensor: &'c BTreeMap<String, usize>,
    /// Those that are open.
    pub open: BTreeMap<usize, TensorFile>,
    /// They are GGUF files, where a tensor's type says all and names say nothing.
    pub is_gguf: bool,
    /// Tensors of packed rows, which this program wrote.
    pub packed: &'c BTreeMap<String, WeightFormat>,
    /// What the configuration says of quantised tensors.
    pub quantization: Quantization,
}

/// Numbers are stored under this name, or in tensors that are called after it.
pub(crate) fn is_stored(is_gguf: bool, present: impl Fn(&str) -> bool, name: &str) -> bool {
    let beside = || present(&format!("{name}_blocks")) || published::detect(&present, base(name)).is_some();
    present(name) || !is_gguf && beside()
}

/// What quantised tensors are called by, instead of `weight`.
pub(super) fn base(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

impl Shards<'_> {
    pub(super) fn has(&self, tensor: &str) -> bool {
        self.file_of_tensor.contains_key(tensor)
    }

    pub(super) fn file_of(&mut self, tensor: &str) -> Result<&mut TensorFile> {
        let &number = self.file_of_tensor.get(tensor).ok_or_else(|| Error::MissingTensor {
            path: self.path.to_owned(),
            tensor: tensor.to_owned(),
            hint: tensor_file::names_hint(self.file_of_tensor.keys(), self.file_of_tensor.len()),
        })?;
        Ok(match self.open.entry(number) {
            std::collections::btree_map::Entry::Occupied(open) => open.into_mut(),
            std::collections::btree_map::Entry::Vacant(slot) => slot.insert(TensorFile::open(&self.files[number])?),
        })
    }
}

impl Shards<'_> {
    pub(super) fn published_error(&self, base: &str, message: &str) -> Error {
        Error::BadFile { path: self.path.to_owned(), message: format!("tensor {base:?} {message}") }
    }

    /// All bytes of `base.suffix`, which has one of these types.
    fn all_bytes(&mut self, base: &str, suffix: &str, dtypes: &[Dtype]) -> Result<Vec<u8>> {
        let name = format!("{base}.{suffix}");
        let file = self.file_of(&name)?;
        let info = file.info(&name)?;
        if !dtypes.contains(&info.dtype) {
            let known: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
            return Err(file.mismatch(&name, &known.join(" or ")));
        }
        let count = info.shape.iter().product();
        file.read_raw(&name, 0..count)
    }

    /// A matrix in one of the layouts that quantisers write.
    pub(super) fn published(&mut self, kind: Kind, base: &str, [rows, inputs]: [usize; 2]) -> Result<PackedMatrix> {
        let wrong = |message: String| Error::BadFile {
            path: self.path.to_owned(),
            message: format!("tensors \"{base}.…\": {message}"),
        };
        let floats = &[Dtype::F32, Dtype::F16, Dtype::BF16][..];
        let (format, bytes) = match kind {
            Kind::Nvfp4PackQuantized | Kind::ModelOptNvfp4 => {
                let (codes, matrix_scale) = match kind {
                    Kind::ModelOptNvfp4 => ("weight", "weight_scale_2"),
                    _ => ("weight_packed", "weight_global_scale"),
                };
                let codes = self.all_bytes(base, codes, &[Dtype::U8])?;
                let scales = self.all_bytes(base, "weight_scale", &[Dtype::F8_E4M3])?;
                let matrix_scale = self.all_bytes(base, matrix_scale, &[Dtype::F32])?;
                let value = match matrix_scale.as_slice() {
                    &[a, b, c, d] => f32::from_le_bytes([a, b, c, d]),
                    other => return Err(wrong(format!("{} bytes as the matrix scale, expected 4", other.len()))),
                };
                let matrix_scale = match kind {
                    Kind::ModelOptNvfp4 => MatrixScale::Factor(value),
                    _ => MatrixScale::Divisor(value),
                };
                published::nvfp4_rows(&Nvfp4 { rows, inputs, codes: &codes, scales: &scales, matrix_scale })
            }
            Kind::PackQuantized => {
                let codes = self.all_bytes(base, "weight_packed", &[Dtype::I32])?;
                let shape = self.all_bytes(base, "weight_shape", &[Dtype::I64, Dtype::I32])?;
                published::check_shape(&shape, rows, inputs).map_err(wrong)?;
                let scales = self.widened(base, "weight_scale", floats)?;
                let zeros = self.optional(base, "weight_zero_point")?;
                let index = self.optional(base, "weight_g_idx")?;
                let bits = (codes.len() as u64 * 8).checked_div(rows as u64 * inputs as u64).unwrap_or(0) as u32;
                let (zeros, group_index) = (zeros.as_deref(), index.as_deref());
                let integers = Integers { rows, inputs, bits, codes: &codes, scales: &scales, zeros, group_index };
                published::pack_quantized_rows(&integers)
            }
            Kind::Qweight => {
                let shape = self.file_of(&format!("{base}.qweight"))?.info(&format!("{base}.qweight"))?.shape.clone();
                let layout = published::qweight(&shape, rows, inputs).map_err(wrong)?;
                let codes = self.all_bytes(base, "qweight", &[Dtype::I32])?;
                let scales = self.widened(base, "scales", floats)?;
                let zeros = self.optional(base, "qzeros")?;
                let index = self.optional(base, "g_idx")?;
                let (zeros, group_index) = (zeros.as_deref(), index.as_deref());
                let bits = if let Qweight::Gptq { bits } = layout { bits } else { 4 };
                let integers = Integers { rows, inputs, bits, codes: &codes, scales: &scales, zeros, group_index };
                let about = &self.quantization;
                match layout {
                    Qweight::Gptq { .. } => {
                        let zeros = if about.gptq_v2 { GptqZeros::Plain } else { GptqZeros::LessOne };
                        published::gptq_rows(&integers, zeros, about.symmetric)
                    }
                    Qweight::Awq if about.is_gemm => published::awq_rows(&integers),
                    Qweight::Awq => Err("AWQ in another version than gemm".to_owned()),
                }
            }
        }
        .map_err(|message| Error::BadFile {
            path: self.path.to_owned(),
            message: format!("tensors \"{base}.…\": {message}"),
        })?;
        Ok(PackedMatrix { format, inputs, bytes })
    }

    fn optional(&mut self, base: &str, suffix: &str) -> Result<Option<Vec<u8>>> {
        if !self.has(&format!("{base}.{suffix}")) {
            return Ok(None);
        }
        self.all_bytes(base, suffix, &[Dtype::I32]).map(Some)
    }

    fn widened(&mut self, base: &str, suffix: &str, dtypes: &[Dtype]) -> Result<Vec<f32>> {
        let bytes = self.all_bytes(base, suffix, dtypes)?;
        let name = format!("{base}.{suffix}");
        let dtype = self.file_of(&name)?.info(&name)?.dtype;
        published::widened(dtype, &bytes).map_err(|message| self.published_error(&name, &message))
    }
}
