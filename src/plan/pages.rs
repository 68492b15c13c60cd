//! Weights larger than a binding: which experts, and which of their columns, each page holds.

use crate::error::{Error, Result};

/// Columns of a page are a multiple of this, so that a lane's four columns, and gate with up, stay together.
const COLUMN_GROUP: u32 = 8;

/// A run of packed weight rows in one buffer: whole experts, or a column range of one expert too large for a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WeightPage {
    /// First expert.
    pub first_expert: u32,
    /// One past the last expert.
    pub end_expert: u32,
    /// First packed column.
    pub first_column: u32,
    /// Packed columns of each expert in this page.
    pub num_columns: u32,
    /// Size in bytes.
    pub bytes: u64,
}

impl WeightPage {
    /// Bytes of one expert in this page.
    pub fn expert_bytes(&self) -> u64 {
        self.bytes / u64::from((self.end_expert - self.first_expert).max(1))
    }
}

/// Cuts `num_experts` matrices of `num_columns` packed columns, `quad_bytes` bytes for each four, into pages of at most
/// `limit` bytes.
pub fn weight_pages(num_experts: u32, num_columns: u32, quad_bytes: u64, limit: u64) -> Result<Vec<WeightPage>> {
    let bytes_of = |columns: u32| u64::from(columns / 4) * quad_bytes;
    let expert_bytes = bytes_of(num_columns);
    let mut pages = Vec::new();
    let experts_per_page = (limit / expert_bytes).min(u64::from(num_experts)) as u32;
    if experts_per_page > 0 {
        for first_expert in (0..num_experts).step_by(experts_per_page as usize) {
            let end_expert = (first_expert + experts_per_page).min(num_experts);
            let bytes = u64::from(end_expert - first_expert) * expert_bytes;
            pages.push(WeightPage { first_expert, end_expert, first_column: 0, num_columns, bytes });
        }
        return Ok(pages);
    }
    let columns_per_page =
        (limit / bytes_of(COLUMN_GROUP)).min(u64::from(num_columns / COLUMN_GROUP) + 1) as u32 * COLUMN_GROUP;
    if columns_per_page == 0 {
        return Err(Error::LimitExceeded {
            what: format!("a weight page of {COLUMN_GROUP} columns"),
            required: bytes_of(COLUMN_GROUP),
            available: limit,
            hint: "use a device with a larger storage binding limit, or a smaller weight format",
        });
    }
    for first_expert in 0..num_experts {
        for first_column in (0..num_columns).step_by(columns_per_page as usize) {
            let columns = columns_per_page.min(num_columns - first_column);
            let bytes = bytes_of(columns);
            let end_expert = first_expert + 1;
            pages.push(WeightPage { first_expert, end_expert, first_column, num_columns: columns, bytes });
        }
    }
    Ok(pages)
}
