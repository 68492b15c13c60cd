//! Grids of any size out of three axes of at most 65,535 workgroups.

use crate::error::{Error, Result};

/// `[x, y, 1]` with `x * y >= workgroups` and as few to spare as possible. Kernels unfold it with `flat_group` and
/// return at once where there is nothing left.
pub fn fold(workgroups: u64, max_per_dimension: u32) -> Result<[u32; 3]> {
    let max = u64::from(max_per_dimension);
    let y = workgroups.div_ceil(max).max(1);
    let x = workgroups.div_ceil(y);
    // The flat index has to fit a u32.
    if y > max || x * y > u64::from(u32::MAX) {
        return Err(Error::LimitExceeded {
            what: "workgroups of one dispatch".to_owned(),
            required: workgroups,
            available: (max * max).min(u32::MAX.into()),
            hint: "use fewer tokens at a time",
        });
    }
    Ok([x as u32, y as u32, 1])
}
