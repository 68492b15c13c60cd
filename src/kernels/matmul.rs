//! The grouped matmul that gate_up and down share: its variants and their tile sizes.

use super::{Access, Input, Kernel, Part, Stage, bind, wgsl};
use crate::error::Error;
use crate::model::formats::WeightFormat;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

/// Packed columns that one lane owns (`LANE_COLUMNS` in `shaders/matmul_params.wgsl`).
pub const LANE_COLUMNS: u32 = 4;
/// Rows of a tile of the subgroup variant.
const SUBGROUP_ROWS: u32 = 32;
/// Column quads of a lane of the subgroup variant (`QUADS` in `shaders/matmul_subgroup.wgsl`).
const SUBGROUP_QUADS: u32 = 2;
/// Rows of a tile of the vec variant.
pub const VEC_ROWS: u32 = 4;

/// Where tiles come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tiles {
    /// From permute, or found by scanning a few assignments, as the choice says.
    Routed,
    /// As `Routed`, of a layer that has only some of its experts on the device.
    Cached,
    /// Every expert has every token.
    Dense,
}

/// The ways to compute the grouped matmul. All share bindings and reference.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MatmulVariant {
    /// Tiles in workgroup memory: GPUs.
    Tiled,
    /// Register tiles fed by subgroup broadcasts: adapters with a fixed subgroup size, software drivers above all.
    Subgroup,
    /// Matrix-vector: few rows for each expert.
    Vec,
}

impl MatmulVariant {
    /// Every variant.
    pub const ALL: &'static [MatmulVariant] = &[MatmulVariant::Tiled, MatmulVariant::Subgroup, MatmulVariant::Vec];

    /// The name used on the command line and in labels.
    pub fn name(self) -> &'static str {
        match self {
            MatmulVariant::Tiled => "tiled",
            MatmulVariant::Subgroup => "subgroup",
            MatmulVariant::Vec => "vec",
        }
    }
}

impl FromStr for MatmulVariant {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        let known = || MatmulVariant::ALL.iter().map(|v| v.name()).collect::<Vec<_>>().join(", ");
        MatmulVariant::ALL
            .iter()
            .copied()
            .find(|v| v.name() == name)
            .ok_or_else(|| Error::config("matmul", name, format!("one of {}", known())))
    }
}

/// A variant with its sizes: what the plan chooses. As JSON, `{"kind": "tiled", "tile_m": 32, "tile_n": 64}`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum MatmulChoice {
    /// `tile_m` rows by `tile_n` packed columns, both multiples of 4; `tile_m * tile_n / 16` lanes.
    Tiled {
        /// Rows.
        tile_m: u32,
        /// Packed columns.
        tile_n: u32,
    },
    /// As `Tiled`, `tile_m` a multiple of 8: a lane has eight rows instead of four, so that it reads workgroup memory a
    /// third less often for each product. `tile_m * tile_n / 32` lanes.
    TiledTall {
        /// Rows.
        tile_m: u32,
        /// Packed columns.
        tile_n: u32,
    },
    /// 32 rows by `8 * subgroup_size` packed columns.
    Subgroup {
        /// The adapter's one and only subgroup size, at least 4.
        subgroup_size: u32,
    },
    /// 4 rows by `4 * workgroup_size / k_lanes` packed columns.
    Vec {
        /// Lanes.
        workgroup_size: u32,
        /// Lanes that share a dot product.
        k_lanes: u32,
        /// Tiles come from permute; if not, rows are assignments and each workgroup looks for its own tile.
        sorted: bool,
    },
    /// 4 rows by `4 * subgroup_size` packed columns, inputs broadcast in the subgroup.
    VecSubgroup {
        /// The adapter's one and only subgroup size, at least 4.
        subgroup_size: u32,
        /// As for `Vec`.
        sorted: bool,
    },
}

impl MatmulChoice {
    /// One of each kind, for lists and tests.
    pub fn examples() -> Vec<MatmulChoice> {
        vec![
            MatmulChoice::Tiled { tile_m: 32, tile_n: 64 },
            MatmulChoice::TiledTall { tile_m: 64, tile_n: 64 },
            MatmulChoice::Subgroup { subgroup_size: 4 },
            MatmulChoice::Subgroup { subgroup_size: 8 },
            MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: true },
            MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: false },
            MatmulChoice::VecSubgroup { subgroup_size: 8, sorted: true },
            MatmulChoice::VecSubgroup { subgroup_size: 8, sorted: false },
        ]
    }

    /// Which variant it is.
    pub fn variant(self) -> MatmulVariant {
        match self {
            MatmulChoice::Tiled { .. } | MatmulChoice::TiledTall { .. } => MatmulVariant::Tiled,
            MatmulChoice::Subgroup { .. } => MatmulVariant::Subgroup,
            MatmulChoice::Vec { .. } | MatmulChoice::VecSubgroup { .. } => MatmulVariant::Vec,
        }
    }

    /// Most rows of a tile.
    pub fn tile_m(self) -> u32 {
        match self {
            MatmulChoice::Tiled { tile_m, .. } | MatmulChoice::TiledTall { tile_m, .. } => tile_m,
            MatmulChoice::Subgroup { .. } => SUBGROUP_ROWS,
            MatmulChoice::Vec { .. } | MatmulChoice::VecSubgroup { .. } => VEC_ROWS,
        }
    }

    /// Packed columns of a workgroup.
    pub fn tile_n(self) -> u32 {
        match self {
            MatmulChoice::Tiled { tile_n, .. } | MatmulChoice::TiledTall { tile_n, .. } => tile_n,
            MatmulChoice::Subgroup { subgroup_size } => SUBGROUP_QUADS * LANE_COLUMNS * subgroup_size,
            MatmulChoice::VecSubgroup { subgroup_size, .. } => LANE_COLUMNS * subgroup_size,
            MatmulChoice::Vec { workgroup_size, k_lanes, .. } => LANE_COLUMNS * workgroup_size / k_lanes,
        }
    }

    /// Whether rows are sorted by expert, which takes a permute.
    pub fn sorted(self) -> bool {
        !matches!(self, MatmulChoice::Vec { sorted: false, .. } | MatmulChoice::VecSubgroup { sorted: false, .. })
    }

    /// Whether it uses subgroup operations.
    pub fn needs_subgroups(self) -> bool {
        matches!(self, MatmulChoice::Subgroup { .. } | MatmulChoice::VecSubgroup { .. })
    }

    /// Whether a workgroup takes one tile after the other: what software drivers run, and no barriers are in the way.
    pub fn walks(self) -> bool {
        self.needs_subgroups()
    }

    /// Workgroup memory of its kernels, in bytes: `tile_x` and `tile_w` of `shaders/matmul_tiled.wgsl`, or the sums of
    /// `shaders/reduce.wgsl`.
    pub fn workgroup_bytes(self) -> u64 {
        const VEC4: u64 = 16;
        match self {
            MatmulChoice::Tiled { tile_m, tile_n } | MatmulChoice::TiledTall { tile_m, tile_n } => {
                (u64::from(tile_m) * 5 + u64::from(tile_n) * 4) * VEC4
            }
            MatmulChoice::Subgroup { .. } | MatmulChoice::VecSubgroup { .. } => 0,
            MatmulChoice::Vec { workgroup_size, .. } => u64::from(workgroup_size) * VEC4,
        }
    }

    fn workgroup_size(self) -> u32 {
        match self {
            MatmulChoice::Tiled { tile_m, tile_n } => tile_m * tile_n / 16,
            MatmulChoice::TiledTall { tile_m, tile_n } => tile_m * tile_n / 32,
            MatmulChoice::Subgroup { subgroup_size } | MatmulChoice::VecSubgroup { subgroup_size, .. } => subgroup_size,
            MatmulChoice::Vec { workgroup_size, .. } => workgroup_size,
        }
    }

    /// The same sizes for dense tiles, which are neither sorted nor not.
    pub fn dense(self) -> Self {
        match self {
            MatmulChoice::Vec { workgroup_size, k_lanes, .. } => {
                MatmulChoice::Vec { workgroup_size, k_lanes, sorted: true }
            }
            MatmulChoice::VecSubgroup { subgroup_size, .. } => {
                MatmulChoice::VecSubgroup { subgroup_size, sorted: true }
            }
            other => other,
        }
    }

    /// The variant's name and what distinguishes its source.
    pub fn label(self) -> String {
        match self {
            MatmulChoice::Tiled { .. } => "tiled".to_owned(),
            MatmulChoice::TiledTall { .. } => "tiled_tall".to_owned(),
            MatmulChoice::Subgroup { subgroup_size } => format!("subgroup{}", subgroup_size.min(8)),
            MatmulChoice::Vec { sorted: true, .. } => "vec".to_owned(),
            MatmulChoice::Vec { sorted: false, .. } => "vec_unsorted".to_owned(),
            MatmulChoice::VecSubgroup { sorted: true, .. } => "vec_subgroup".to_owned(),
            MatmulChoice::VecSubgroup { sorted: false, .. } => "vec_subgroup_unsorted".to_owned(),
        }
    }

    /// Its sizes in a word: rows x columns of a workgroup's tile, and the lanes that share a sum.
    pub fn sizes(self) -> String {
        let tile = format!("{}x{}", self.tile_m(), self.tile_n());
        match self {
            MatmulChoice::Vec { k_lanes, .. } => format!("{tile}/{k_lanes}"),
            _ => tile,
        }
    }

    /// The kernel of `stage`, whose own files come last; the caller adds the output binding 5.
    pub(super) fn kernel(self, stage: Stage, tiles: Tiles, format: WeightFormat, input: Input, own: &[Part]) -> Kernel {
        let mut parts = vec![wgsl!("moe_params"), wgsl!("matmul_params"), wgsl!("step"), input.part()];
        parts.push(if input.is_wide() { wgsl!("words_64") } else { wgsl!("words_32") });
        parts.extend(weights_parts(format));
        parts.push(match tiles {
            Tiles::Dense => wgsl!("tiles_dense"),
            Tiles::Routed | Tiles::Cached if self.sorted() => wgsl!("tiles_sorted"),
            Tiles::Routed | Tiles::Cached => wgsl!("tiles_unsorted"),
        });
        parts.push(if tiles == Tiles::Cached { wgsl!("experts_cached") } else { wgsl!("experts_whole") });
        match self {
            MatmulChoice::Tiled { .. } => parts.extend([wgsl!("matmul_tiled"), wgsl!("lane_rows_4")]),
            MatmulChoice::TiledTall { .. } => parts.extend([wgsl!("matmul_tiled"), wgsl!("lane_rows_8")]),
            MatmulChoice::Subgroup { subgroup_size } => {
                parts.push(if subgroup_size < 8 { wgsl!("lanes_4") } else { wgsl!("lanes_8") });
                parts.push(wgsl!("matmul_subgroup"));
            }
            MatmulChoice::Vec { .. } => parts.extend([wgsl!("reduce"), wgsl!("matmul_vec")]),
            MatmulChoice::VecSubgroup { .. } => parts.push(wgsl!("matmul_vec_subgroup")),
        }
        if stage != Stage::DownCombine {
            parts.push(if self.walks() { wgsl!("tile_after_tile") } else { wgsl!("one_tile") });
        }
        parts.extend(own);

        let mut bindings = vec![
            bind(0, "params", Access::Uniform),
            bind(1, "weights", Access::Read), // [page experts, num_columns, 4 * k4]
            bind(2, "x", Access::Read),       // [rows, x_stride]
        ];
        match tiles {
            Tiles::Dense => {}
            Tiles::Routed | Tiles::Cached if self.sorted() => {
                bindings.push(bind(3, "tiles", Access::Read)); // [num_tile_slots]
                // Only gate_up asks which assignment a row is.
                if stage == Stage::GateUp {
                    bindings.push(bind(4, "assignment_of_row", Access::Read)); // [num_rows]
                }
            }
            Tiles::Routed | Tiles::Cached => bindings.push(bind(3, "topk_experts", Access::Read)), // [num_tokens, top_k]
        }
        if tiles == Tiles::Cached {
            bindings.push(bind(8, "place_of_expert", Access::Read)); // [num_experts]
        }
        let mut overrides = vec![("WG_SIZE", self.workgroup_size())];
        match self {
            MatmulChoice::Tiled { tile_m, tile_n } | MatmulChoice::TiledTall { tile_m, tile_n } => {
                overrides.extend([("TILE_M", tile_m), ("TILE_N", tile_n)]);
            }
            MatmulChoice::Subgroup { .. } | MatmulChoice::VecSubgroup { .. } => {}
            MatmulChoice::Vec { k_lanes, .. } => overrides.push(("K_LANES", k_lanes)),
        }
        if let WeightFormat::Int8(groups) | WeightFormat::Int4(groups) = format {
            overrides.push(("SCALED_K4", groups.size() / 4));
            overrides.push(("STORED_ZEROS", groups.has_zero_points().into()));
        }
        Kernel {
            stage,
            label: match tiles {
                Tiles::Routed => format!("{}.{}.{}{}", stage.name(), self.label(), format.family(), input.suffix()),
                Tiles::Cached => {
                    format!("{}.cached.{}.{}{}", stage.name(), self.label(), format.family(), input.suffix())
                }
                Tiles::Dense => {
                    format!("{}.dense.{}.{}{}", stage.name(), self.label(), format.family(), input.suffix())
                }
            },
            parts,
            bindings,
            overrides,
            workgroup_size: self.workgroup_size(),
            needs_subgroups: self.needs_subgroups(),
        }
    }
}

/// What loads weights of `format`.
fn weights_parts(format: WeightFormat) -> Vec<Part> {
    match format {
        WeightFormat::F32 => vec![wgsl!("weights_f32"), wgsl!("codes_each")],
        WeightFormat::F16 => vec![wgsl!("weights_f16"), wgsl!("codes_each")],
        WeightFormat::Bf16 => vec![wgsl!("weights_bf16"), wgsl!("codes_each")],
        WeightFormat::Int8(_) => vec![wgsl!("weights_int8"), wgsl!("codes_each")],
        WeightFormat::Int4(_) => vec![wgsl!("nibbles"), wgsl!("weights_int4"), wgsl!("codes_4bit")],
        WeightFormat::Mxfp4 => vec![wgsl!("e2m1"), wgsl!("weights_mxfp4"), wgsl!("codes_4bit")],
        WeightFormat::Nvfp4 => {
            vec![wgsl!("e2m1"), wgsl!("e4m3"), wgsl!("weights_nvfp4"), wgsl!("codes_4bit")]
        }
        WeightFormat::Fp8 => vec![wgsl!("e4m3"), wgsl!("weights_fp8"), wgsl!("codes_each")],
        WeightFormat::Q4_0 => vec![wgsl!("nibbles"), wgsl!("weights_q4_0"), wgsl!("codes_4bit")],
        WeightFormat::Q8_0 => vec![wgsl!("signed_bytes"), wgsl!("weights_q8_0"), wgsl!("codes_each")],
        WeightFormat::Q4K => vec![wgsl!("nibbles"), wgsl!("weights_q4_k"), wgsl!("codes_4bit")],
        WeightFormat::Q6K => vec![wgsl!("nibbles"), wgsl!("signed_bytes"), wgsl!("weights_q6_k")],
    }
}
