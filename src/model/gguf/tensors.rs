//! Tensors of a GGUF file: how large each is, and that they lie one after the other.

use crate::model::formats::GgmlType;
use crate::model::tensor_header::{GgmlTensor, MAX_DIM, TensorInfo};
use safetensors::Dtype;
use std::collections::BTreeMap;

/// A tensor's entry as the header has it, but for the order of axes.
pub(super) struct RawTensor {
    pub shape: Vec<u64>,
    /// Of the type.
    pub number: u32,
    /// From the start of the data.
    pub offset: u64,
}

impl RawTensor {
    fn type_name(&self) -> String {
        GgmlTensor { number: self.number, shape: Vec::new() }.type_name()
    }

    /// How many bytes it has; `None`: its type is not known.
    fn size(&self, name: &str) -> Result<Option<u64>, String> {
        let shape = &self.shape;
        if let Some(zero) = shape.iter().position(|&n| n == 0) {
            return Err(format!("tensor {name:?} has shape {shape:?}, of which axis {zero} is empty"));
        }
        let too_large = || format!("tensor {name:?} has shape {shape:?}, more than can be addressed");
        if shape.iter().any(|&n| n > MAX_DIM) {
            return Err(too_large());
        }
        let count = shape.iter().try_fold(1u64, |product, &n| product.checked_mul(n)).ok_or_else(too_large)?;
        let Some(known) = GgmlType::of_number(self.number) else { return Ok(None) };
        let row = shape.last().copied().unwrap_or(1);
        if row % known.inputs != 0 {
            let GgmlType { name: kind, inputs, .. } = known;
            return Err(format!(
                "tensor {name:?} ({kind} {shape:?}) has rows of {row} numbers, and {kind} packs {inputs} together"
            ));
        }
        let size = (count / known.inputs).checked_mul(known.bytes).ok_or_else(too_large)?;
        // On a 32-bit host a legal tensor can still be too large to index.
        usize::try_from(size.max(count)).map_err(|_| too_large())?;
        Ok(Some(size))
    }

    /// What the rest of the crate sees; sizes fit a `usize` if the type is known.
    fn info(self, start: u64) -> TensorInfo {
        let mut shape: Vec<usize> = self.shape.iter().map(|&n| usize::try_from(n).unwrap_or(usize::MAX)).collect();
        let dtype = match self.number {
            0 => Dtype::F32,
            1 => Dtype::F16,
            24 => Dtype::I8,
            25 => Dtype::I16,
            26 => Dtype::I32,
            27 => Dtype::I64,
            28 => Dtype::F64,
            30 => Dtype::BF16,
            number => {
                let ggml = Some(GgmlTensor { number, shape: shape.clone() });
                match (GgmlType::of_number(number), shape.last_mut()) {
                    (Some(known), Some(row)) => *row = *row / known.inputs as usize * known.bytes as usize,
                    // nobody knows how large it is
                    _ => shape = vec![0],
                }
                return TensorInfo { dtype: Dtype::U8, shape, start, ggml };
            }
        };
        TensorInfo { dtype, shape, start, ggml: None }
    }
}

/// Tensors one after the other, each aligned, without gap or overlap, ending where the file ends.
pub(super) fn check_layout(
    raw: BTreeMap<String, RawTensor>,
    header_end: u64,
    alignment: u64,
    file_len: u64,
) -> Result<BTreeMap<String, TensorInfo>, String> {
    // The last tensor's padding may be missing. Nothing here overflows: all of it is checked against the file's length.
    let aligned = |at: u64| at.div_ceil(alignment).saturating_mul(alignment);
    let data_start = aligned(header_end);
    let cut_off = |what: &str, end: u64| {
        let end = if end == u64::MAX { "more than any file has".to_owned() } else { format!("byte {end}") };
        format!("{what} ends at {end}, the file has {file_len} bytes; it is cut off, copy it again")
    };
    if let Some((name, tensor)) = raw.iter().find(|(_, tensor)| !tensor.offset.is_multiple_of(alignment)) {
        let offset = tensor.offset;
        return Err(format!("tensor {name:?} lies at {offset} of the data, which is no multiple of {alignment}"));
    }
    let mut by_offset: Vec<(String, RawTensor)> = raw.into_iter().collect();
    by_offset.sort_by_key(|(_, tensor)| tensor.offset);
    let mut tensors = BTreeMap::new();
    // Where the last tensor starts and, if that is known, ends, and its name.
    let mut last: (u64, Option<u64>, String) = (data_start, Some(header_end), "the header".to_owned());
    for (name, tensor) in by_offset {
        let (last_start, last_end, last_name) = &last;
        let offset = tensor.offset;
        let size = tensor.size(&name)?;
        let entry = format!("tensor {name:?} ({} {:?})", tensor.type_name(), tensor.shape);
        let start = data_start.saturating_add(offset);
        if start >= file_len {
            return Err(cut_off(&entry, start.saturating_add(size.unwrap_or(1))));
        }
        let expected = last_end.map(aligned);
        let is_first = tensors.is_empty();
        let overlaps = !is_first && (start == *last_start || expected.is_some_and(|expected| start < expected));
        if overlaps {
            return Err(format!("{entry} lies at {offset} of the data, inside {last_name}"));
        }
        if let Some(expected) = expected.filter(|&expected| start != expected) {
            let expected = expected.saturating_sub(data_start);
            return Err(format!("{entry} lies at {offset} of the data, expected {expected}, after {last_name}"));
        }
        let end = size.map(|size| start.saturating_add(size));
        if let Some(end) = end.filter(|&end| end > file_len) {
            return Err(cut_off(&entry, end));
        }
        last = (start, end, format!("tensor {name:?}"));
        tensors.insert(name, tensor.info(start));
    }
    match last {
        (_, Some(end), name) if file_len > aligned(end) => {
            Err(format!("{name} ends at byte {end}, the file has {file_len} bytes; it is followed by something else"))
        }
        _ => Ok(tensors),
    }
}
