//! Which variant of the grouped matmul a pass uses: a pure function of layer, batch and device.

use super::DeviceProfile;
use super::tuned::{ShapeClass, TunedChoices};
use crate::error::{Error, Result};
use crate::kernels::matmul::{MatmulChoice, MatmulVariant};
use crate::model::formats::WeightFormat;
use std::sync::Arc;

/// Up to this many tokens, sorting costs more than it saves: four dispatches do without it.
pub const FEW_TOKENS: u32 = 16;
/// Up to this many rows for each expert, the matmul is a handful of matrix-vector products.
const FEW_ROWS: u32 = 2;

/// What a caller asks of the choice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MatmulRequest {
    /// Use this variant whatever the batch: then a token's bits do not depend on the batch size either.
    /// `None` lets rows per expert decide.
    pub variant: Option<MatmulVariant>,
    /// Use exactly this choice. For tests and tuning; takes precedence.
    pub choice: Option<MatmulChoice>,
    /// Where neither is given, what was measured goes before the table.
    pub tuned: Option<Arc<TunedChoices>>,
}

impl MatmulRequest {
    /// The device can run what is asked for.
    pub fn check(&self, device: &DeviceProfile) -> Result<()> {
        if self.choice.is_none() && self.variant == Some(MatmulVariant::Subgroup) && device.subgroup_size.is_none() {
            return Err(no_subgroups());
        }
        if let Some(choice) = self.choice {
            check_choice(choice, device)?;
        }
        self.tuned.as_ref().map_or(Ok(()), |tuned| tuned.check(device))
    }

    /// The caller said which variant, whatever the batch.
    pub fn is_pinned(&self) -> bool {
        self.variant.is_some() || self.choice.is_some()
    }

    /// What was measured for this work, where the caller left it open.
    pub(super) fn tuned(&self, shape: ShapeClass, format: WeightFormat) -> Option<MatmulChoice> {
        if self.is_pinned() { None } else { self.tuned.as_ref()?.get(shape, format) }
    }

    /// A pass of `num_tokens` tokens can run what is asked for.
    pub fn check_tokens(&self, num_tokens: u32) -> Result<()> {
        match self.choice {
            Some(choice) if !choice.sorted() && num_tokens > FEW_TOKENS => Err(Error::config(
                "tile",
                format!("{choice:?} for {num_tokens} tokens"),
                format!("sorted: true above {FEW_TOKENS} tokens"),
            )),
            _ => Ok(()),
        }
    }
}

fn no_subgroups() -> Error {
    Error::Unsupported {
        what: "the subgroup variant".to_owned(),
        by: "on this device (it needs subgroup operations and one fixed subgroup size of at least 4)".to_owned(),
        hint: "use the tiled or vec variant".to_owned(),
    }
}

/// The sizes are such that every lane has a place in the tile, and the device has that many lanes and as much
/// workgroup memory.
pub(crate) fn check_choice(choice: MatmulChoice, device: &DeviceProfile) -> Result<()> {
    if choice.needs_subgroups() && device.subgroup_size.is_none() {
        return Err(no_subgroups());
    }
    let lanes = |n: u64| (1..=u64::from(device.max_invocations)).contains(&n);
    let (valid, expected) = match choice {
        MatmulChoice::Tiled { tile_m, tile_n } => (
            tile_m >= 4
                && tile_n >= 4
                && tile_m.is_multiple_of(4)
                && tile_n.is_multiple_of(4)
                && lanes(u64::from(tile_m) * u64::from(tile_n) / 16),
            format!("tile_m and tile_n multiples of 4, tile_m * tile_n / 16 at most {}", device.max_invocations),
        ),
        MatmulChoice::TiledTall { tile_m, tile_n } => (
            tile_m >= 8
                && tile_n >= 4
                && tile_m.is_multiple_of(8)
                && tile_n.is_multiple_of(4)
                && lanes(u64::from(tile_m) * u64::from(tile_n) / 32),
            format!("tile_m a multiple of 8 and tile_n of 4, tile_m * tile_n / 32 at most {}", device.max_invocations),
        ),
        MatmulChoice::Subgroup { subgroup_size } | MatmulChoice::VecSubgroup { subgroup_size, .. } => {
            (Some(subgroup_size) == device.subgroup_size, format!("the device's size, {:?}", device.subgroup_size))
        }
        MatmulChoice::Vec { workgroup_size, k_lanes, .. } => (
            k_lanes.is_power_of_two() && workgroup_size.is_multiple_of(k_lanes) && lanes(workgroup_size.into()),
            format!("k_lanes a power of two that divides workgroup_size, at most {}", device.max_invocations),
        ),
    };
    if !valid {
        return Err(Error::config("tile", format!("{choice:?}"), expected));
    }
    let (required, available) = (choice.workgroup_bytes(), device.max_workgroup_storage.into());
    if required > available {
        return Err(Error::LimitExceeded {
            what: format!("workgroup memory of {choice:?}"),
            required,
            available,
            hint: "use smaller tiles, or open the device with all its limits (Context::with_all_limits)",
        });
    }
    Ok(())
}

/// Assignments by experts that can have one, rounded up.
pub(super) fn rows_per_expert(top_k: u32, num_experts: u32, num_tokens: u32) -> u32 {
    let assignments = num_tokens.saturating_mul(top_k).max(1);
    assignments.div_ceil(num_experts.clamp(1, assignments))
}

/// Every choice that could be the fastest for such a pass on this device, the table's own one first. Each of them can
/// run there: it fits the limits, and needs a sort where the batch needs one. (Software drivers' budget of rounds is
/// that of the layer, whatever the choice: a layer beyond it has no plan.)
pub fn candidates(top_k: u32, num_experts: u32, num_tokens: u32, device: &DeviceProfile) -> Vec<MatmulChoice> {
    let rows = rows_per_expert(top_k, num_experts, num_tokens);
    let mut all = vec![choose(top_k, num_experts, num_tokens, device, &MatmulRequest::default())];
    all.extend(device.subgroup_size.map(|subgroup_size| MatmulChoice::Subgroup { subgroup_size }));
    for sorted in [false, true] {
        if rows > VEC_MOST_ROWS {
            break;
        }
        all.extend(device.subgroup_size.map(|subgroup_size| MatmulChoice::VecSubgroup { subgroup_size, sorted }));
        let sizes = if device.software { SOFTWARE_VECS } else { VECS };
        all.extend(sizes.iter().map(|&(workgroup_size, k_lanes)| MatmulChoice::Vec {
            workgroup_size,
            k_lanes,
            sorted,
        }));
    }
    // A tile that is twice as high as there are rows is mostly idle.
    let tiles = match (device.software, device.subgroup_size) {
        (true, Some(_)) => SOFTWARE_TILE,
        (true, None) => SOFTWARE_TILES,
        (false, _) => TILES,
    };
    let due = tiles.iter().filter(|(tile_m, _)| *tile_m <= (2 * rows.min(1 << 16)).max(16));
    for &(tile_m, tile_n) in due {
        all.push(MatmulChoice::Tiled { tile_m, tile_n });
        if !device.software && tile_m > 16 {
            all.push(MatmulChoice::TiledTall { tile_m, tile_n });
        }
    }
    all.retain(|&choice| (choice.sorted() || num_tokens <= FEW_TOKENS) && check_choice(choice, device).is_ok());
    let mut seen = std::collections::HashSet::new();
    all.retain(|&choice| seen.insert(choice));
    all
}

/// Above this many rows for each expert, tiles of four rows read and decode every weight too often.
const VEC_MOST_ROWS: u32 = 32;
/// (workgroup_size, k_lanes): from many columns to long sums.
const VECS: &[(u32, u32)] = &[(64, 4), (64, 8), (64, 16), (64, 32), (64, 64), (128, 16), (128, 32), (256, 32)];
/// The same where barriers are expensive: no shared sums, only more or fewer columns.
const SOFTWARE_VECS: &[(u32, u32)] = &[(8, 1), (32, 1), (128, 1)];
/// (tile_m, tile_n): at most the 256 lanes and 16 KiB that every device has.
const TILES: &[(u32, u32)] =
    &[(16, 64), (16, 128), (32, 64), (32, 128), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64)];
/// Workgroup memory is memory there: the shape hardly matters.
const SOFTWARE_TILES: &[(u32, u32)] = &[(16, 64), (32, 64), (64, 64)];
/// Beside register tiles they take six to ten times as long (lavapipe, 128 tokens): one shows whether that holds.
const SOFTWARE_TILE: &[(u32, u32)] = &[(16, 64)];

/// The table, for work that nobody measured. Rows per expert decide, not tokens; the kind of device decides how tiles
/// are fed.
///
/// Measured with `wgmoe tune` on lavapipe (2026-11-25; f16 and int4; 1 to 512 tokens; the layers `small` and
/// `qwen3-30b-a3b`): the best choice is at most 1.16 times as fast, with a sort at 16 tokens. On SwiftShader (`small`, 1 to
/// 16 tokens, a busy machine) 1.0 to 1.12 times in 10 or more rounds, and 1.22 times in 5 (int4, 16 tokens, with a sort).
pub fn choose(
    top_k: u32,
    num_experts: u32,
    num_tokens: u32,
    device: &DeviceProfile,
    request: &MatmulRequest,
) -> MatmulChoice {
    if let Some(choice) = request.choice {
        return choice;
    }
    let rows_per_expert = rows_per_expert(top_k, num_experts, num_tokens);
    let tiles = match device.subgroup_size {
        Some(subgroup_size) if device.software => MatmulChoice::Subgroup { subgroup_size },
        // Enough rows for eight in each lane (docs/performance.md: a prediction).
        _ if rows_per_expert > 32 => MatmulChoice::TiledTall { tile_m: 64, tile_n: 64 },
        _ => MatmulChoice::Tiled { tile_m: rows_per_expert.next_power_of_two().clamp(16, 32), tile_n: 64 },
    };
    match request.variant {
        Some(MatmulVariant::Vec) => vec(num_tokens, device),
        Some(MatmulVariant::Tiled) if tiles.variant() == MatmulVariant::Tiled => tiles,
        Some(MatmulVariant::Tiled) => MatmulChoice::Tiled { tile_m: 32, tile_n: 64 },
        Some(MatmulVariant::Subgroup) => match device.subgroup_size {
            Some(subgroup_size) => MatmulChoice::Subgroup { subgroup_size },
            None => tiles, // MatmulRequest::check has refused this
        },
        None if num_tokens <= FEW_TOKENS || rows_per_expert <= FEW_ROWS => vec(num_tokens, device),
        None => tiles,
    }
}

/// For matrices that every token is multiplied by. The request's variant and sizes hold here too.
pub fn choose_dense(num_tokens: u32, device: &DeviceProfile, request: &MatmulRequest) -> MatmulChoice {
    choose(1, 1, num_tokens, device, request).dense()
}

fn vec(num_tokens: u32, device: &DeviceProfile) -> MatmulChoice {
    let sorted = num_tokens > FEW_TOKENS;
    match (device.software, device.subgroup_size) {
        (true, Some(subgroup_size)) => MatmulChoice::VecSubgroup { subgroup_size, sorted },
        // Barriers are expensive in software: no sharing of sums, just enough lanes to fill a vector unit.
        (true, None) => MatmulChoice::Vec { workgroup_size: 8, k_lanes: 1, sorted },
        (false, _) => MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted },
    }
}
