//! Which variant of the grouped matmul a pass uses: a pure function of layer, batch and device.

use super::DeviceProfile;
use crate::error::{Error, Result};
use crate::kernels::matmul::{MatmulChoice, MatmulVariant};

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
}

impl MatmulRequest {
    /// The device can run what is asked for.
    pub fn check(&self, device: &DeviceProfile) -> Result<()> {
        let needs_subgroups = match self.choice {
            Some(choice) => choice.needs_subgroups(),
            None => self.variant == Some(MatmulVariant::Subgroup),
        };
        if needs_subgroups && device.subgroup_size.is_none() {
            return Err(Error::Unsupported {
                what: "the subgroup variant".to_owned(),
                by: "on this device (it needs subgroup operations and one fixed subgroup size of at least 4)"
                    .to_owned(),
                hint: "use the tiled or vec variant".to_owned(),
            });
        }
        match self.choice {
            Some(choice) => check_choice(choice, device),
            None => Ok(()),
        }
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

/// The sizes are such that every lane has a place in the tile, and the device has that many lanes.
fn check_choice(choice: MatmulChoice, device: &DeviceProfile) -> Result<()> {
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
        MatmulChoice::Subgroup { subgroup_size } | MatmulChoice::VecSubgroup { subgroup_size, .. } => {
            (Some(subgroup_size) == device.subgroup_size, format!("the device's size, {:?}", device.subgroup_size))
        }
        MatmulChoice::Vec { workgroup_size, k_lanes, .. } => (
            k_lanes.is_power_of_two() && workgroup_size.is_multiple_of(k_lanes) && lanes(workgroup_size.into()),
            format!("k_lanes a power of two that divides workgroup_size, at most {}", device.max_invocations),
        ),
    };
    if valid { Ok(()) } else { Err(Error::config("tile", format!("{choice:?}"), expected)) }
}

/// The table. Rows per expert decide, not tokens; the kind of device decides how tiles are fed.
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
    let assignments = num_tokens.saturating_mul(top_k);
    let rows_per_expert = assignments.div_ceil(num_experts.min(assignments));
    let tiles = match device.subgroup_size {
        Some(subgroup_size) if device.software => MatmulChoice::Subgroup { subgroup_size },
        _ => MatmulChoice::Tiled { tile_m: rows_per_expert.next_power_of_two().clamp(16, 64), tile_n: 64 },
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
