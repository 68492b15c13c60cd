//! From (layer, weight format, device facts, number of tokens) to everything a pass needs: buffer sizes, weight pages,
//! the variant and grid of each kernel, FLOPs and bytes. Pure: no GPU, no wgpu types, so it is tested by the million.

pub mod cost;
pub mod device;
pub mod grid;
pub mod pages;
pub mod variant;

use crate::error::{Error, Result};
use crate::kernels::matmul::MatmulChoice;
use crate::kernels::params::{MatmulParams, MoeParams};
use crate::kernels::{Input, Kernel, Stage, combine, down, gate_up, permute, router};
use crate::model::config::MoeConfig;
use crate::model::weights::WeightFormat;
pub use cost::StageCost;
pub use device::DeviceProfile;
use pages::WeightPage;
use std::ops::Range;
pub use variant::MatmulRequest;

/// Bits of the NaN that marks a token without a valid routing.
const QUIET_NAN: u32 = 0x7fc0_0000;
/// Most slices of `expert_out`: with more, a second pass over the rest of the tokens costs less.
const MAX_SLICES: u32 = 8;
/// Bytes of an entry of the tile list.
const TILE_BYTES: u64 = 12;

/// What depends on the layer and the device, but not on the batch.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    config: MoeConfig,
    format: WeightFormat,
    device: DeviceProfile,
    request: MatmulRequest,
    gate_up_pages: Vec<WeightPage>,
    down_pages: Vec<WeightPage>,
    max_tokens: u32,
}

/// One pass over at most [`LayerPlan::max_tokens`] tokens.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Tokens of the pass.
    pub num_tokens: u32,
    /// The grouped matmul's variant and tile sizes.
    pub matmul: MatmulChoice,
    /// Uniform of router, permute and combine.
    pub params: MoeParams,
    /// Kernels in the order in which they run.
    pub dispatches: Vec<Dispatch>,
    /// FLOPs and least bytes of each stage that runs.
    pub stages: Vec<StageCost>,
}

/// One dispatch of a pass.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// What runs.
    pub kernel: Kernel,
    /// The uniform of router, permute and combine.
    pub params: MoeParams,
    /// Workgroups, folded.
    pub grid: [u32; 3],
    /// The grouped matmul's uniform and weight page, if it is one.
    pub matmul: Option<(MatmulParams, usize)>,
}

/// A buffer that a pass needs between its stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScratchBuffer {
    /// The name that kernels bind it by.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
}

/// The next multiple of 4: rows are padded to whole vec4.
pub(crate) fn pad4(n: u32) -> u32 {
    n.next_multiple_of(4)
}

impl LayerPlan {
    /// Pages and limits of a layer on a device. Fails if not even one token, or one weight column, fits the device.
    pub fn new(
        config: &MoeConfig,
        format: WeightFormat,
        device: &DeviceProfile,
        request: &MatmulRequest,
    ) -> Result<Self> {
        device.check_floor()?;
        request.check(device)?;
        check_rounds(config, device)?;
        let limit = device.max_buffer_bytes();
        let page = |rows: u32, inputs: u32| {
            let row_bytes = u64::from(pad4(inputs)) * u64::from(format.bits()) / 8;
            pages::weight_pages(config.num_experts(), rows, row_bytes, limit)
        };
        let router_bytes = u64::from(config.num_experts()) * u64::from(pad4(config.hidden_size())) * 4;
        if router_bytes > limit {
            return Err(over_limit("the router's weights", router_bytes, limit));
        }
        let mut plan = Self {
            config: config.clone(),
            format,
            device: device.clone(),
            request: request.clone(),
            gate_up_pages: page(2 * pad4(config.intermediate_size()), config.hidden_size())?,
            down_pages: page(pad4(config.hidden_size()), config.intermediate_size())?,
            max_tokens: 0,
        };
        plan.max_tokens = plan.find_max_tokens(limit)?;
        Ok(plan)
    }

    /// Most tokens of one pass: larger batches run as several. Every binding stays within the device's limits, hence
    /// below 2^31 bytes, so no element index can overflow a u32.
    pub fn max_tokens(&self) -> u32 {
        self.max_tokens
    }

    /// The layer.
    pub fn config(&self) -> &MoeConfig {
        &self.config
    }

    /// How expert weights are stored.
    pub fn format(&self) -> WeightFormat {
        self.format
    }

    /// Pages of the packed gate and up projections.
    pub fn gate_up_pages(&self) -> &[WeightPage] {
        &self.gate_up_pages
    }

    /// Pages of the packed down projection.
    pub fn down_pages(&self) -> &[WeightPage] {
        &self.down_pages
    }

    /// Bytes of all weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        let c = &self.config;
        let pages = self.gate_up_pages.iter().chain(&self.down_pages).map(|p| p.bytes).sum::<u64>();
        pages + u64::from(c.num_experts()) * (u64::from(pad4(c.hidden_size())) + 1) * 4
    }

    /// Buffers for passes of up to `num_tokens` tokens.
    pub fn scratch(&self, num_tokens: u32) -> Vec<ScratchBuffer> {
        let c = &self.config;
        let tokens = u64::from(num_tokens);
        let assignments = tokens * u64::from(c.top_k());
        let tile_slots = tile_slots(assignments, c.num_experts(), 4);
        let buffer = |name, bytes: u64| ScratchBuffer { name, bytes: bytes.max(16).next_multiple_of(16) };
        vec![
            buffer("router_logits", tokens * u64::from(c.num_experts()) * 4),
            buffer("topk_experts", assignments * 4),
            buffer("topk_weights", assignments * 4),
            buffer("status", 4),
            buffer("expert_offsets", (u64::from(c.num_experts()) + 1) * 4),
            buffer("assignment_of_row", assignments * 4),
            buffer("row_of_assignment", assignments * 4),
            buffer("tiles", tile_slots * TILE_BYTES),
            buffer("intermediate", assignments * u64::from(pad4(c.intermediate_size())) * 4),
            // Larger ones hold a slice of the columns at a time.
            buffer("expert_out", (assignments * u64::from(pad4(c.hidden_size())) * 4).min(self.limit())),
        ]
    }

    /// Bytes of the largest buffer, in whole vec4.
    fn limit(&self) -> u64 {
        self.device.max_buffer_bytes() / 16 * 16
    }

    /// Columns of `expert_out` that are there at a time: all that fit. Down and combine run once for each slice.
    fn slice_width(&self, num_assignments: u32) -> Result<u32> {
        let hidden = pad4(self.config.hidden_size());
        let limit = self.limit();
        let bytes = |width: u32| u64::from(num_assignments) * u64::from(width) * 4;
        // A multiple of 8, so that a slice never cuts what a lane owns.
        (1..=MAX_SLICES)
            .map(|slices| if slices == 1 { hidden } else { hidden.div_ceil(slices).next_multiple_of(8) })
            .find(|&width| bytes(width) <= limit)
            .ok_or_else(|| over_limit("expert_out", bytes(hidden) / u64::from(MAX_SLICES), limit))
    }

    fn find_max_tokens(&self, limit: u64) -> Result<u32> {
        let largest = |num_tokens: u32| {
            let x = u64::from(num_tokens) * u64::from(self.config.hidden_size()) * 4;
            let mut buffers = self.scratch(num_tokens);
            buffers.push(ScratchBuffer { name: "x", bytes: x });
            buffers.into_iter().max_by_key(|b| b.bytes).unwrap_or(ScratchBuffer { name: "x", bytes: 0 })
        };
        let one = largest(1);
        if one.bytes > limit {
            return Err(over_limit(&format!("{} for one token", one.name), one.bytes, limit));
        }
        // Sizes grow with the number of tokens, so bisect for the last that fits.
        let (mut fits, mut too_many) = (1u32, 1 << 24);
        while too_many - fits > 1 {
            let middle = fits + (too_many - fits) / 2;
            if largest(middle).bytes <= limit && self.plan(middle).is_ok() { fits = middle } else { too_many = middle }
        }
        // Passes over a caller's buffer start at multiples of max_tokens, and offsets have to be multiples of 256 bytes:
        // 64 elements, which are this many tokens.
        let aligned = 64 >> self.config.hidden_size().trailing_zeros().min(6);
        Ok(if fits >= aligned { fits / aligned * aligned } else { fits })
    }

    /// The passes that a batch of `num_tokens` tokens takes: (first token, number of tokens).
    pub fn passes(&self, num_tokens: u32) -> impl Iterator<Item = (u32, u32)> + use<> {
        let max = self.max_tokens;
        (0..num_tokens.div_ceil(max)).map(move |i| (i * max, max.min(num_tokens - i * max)))
    }

    /// One pass over `num_tokens` tokens.
    pub fn plan(&self, num_tokens: u32) -> Result<Plan> {
        let c = &self.config;
        if num_tokens == 0 {
            return Err(Error::config("num_tokens", 0, "at least 1 in a pass"));
        }
        let assignments = u64::from(num_tokens) * u64::from(c.top_k());
        if assignments > permute::MAX_ASSIGNMENTS.into() {
            return Err(over_limit("assignments of one pass", assignments, permute::MAX_ASSIGNMENTS.into()));
        }
        let num_assignments = assignments as u32;
        self.request.check_tokens(num_tokens)?;
        let slice_width = self.slice_width(num_assignments)?;
        let matmul = variant::choose(c, num_tokens, &self.device, &self.request);
        let slots = tile_slots(assignments, c.num_experts(), matmul.tile_m());
        // Without a sort, every assignment is a slot.
        let num_tile_slots = if matmul.sorted() { slots as u32 } else { num_assignments };
        let params = MoeParams {
            num_tokens,
            hidden_size: c.hidden_size(),
            num_experts: c.num_experts(),
            top_k: c.top_k(),
            num_assignments,
            num_tile_slots,
            tile_m: matmul.tile_m(),
            renormalize: c.routing().renormalize.is_some().into(),
            hidden_stride: slice_width,
            chunk_len: permute::chunk_len(num_assignments, self.device.parallel_workgroups()),
            nan_bits: QUIET_NAN,
            first_column: 0,
        };
        Ok(Plan {
            num_tokens,
            matmul,
            params,
            dispatches: self.dispatches(matmul, &params)?,
            stages: cost::stages(c, self.format, num_tokens, matmul.sorted()),
        })
    }

    fn dispatches(&self, matmul: MatmulChoice, params: &MoeParams) -> Result<Vec<Dispatch>> {
        let c = &self.config;
        let input = Input::of_stride(c.hidden_size());
        let plain = |kernel: Kernel, workgroups: u64| {
            let grid = grid::fold(workgroups, self.device.max_workgroups_per_dimension)?;
            Ok::<_, Error>(Dispatch { kernel, params: *params, grid, matmul: None })
        };
        let mut dispatches = vec![plain(
            router::kernel(input, router::WG_SIZE, router::k_lanes(c.num_experts())),
            router::workgroups(params.num_tokens),
        )?];
        if matmul.sorted() {
            let workgroups = permute::workgroups(params.num_assignments, params.chunk_len);
            dispatches.push(plain(permute::kernel(c.num_experts()), workgroups)?);
        }
        let gate_up = gate_up::kernel(matmul, self.format, c.activation(), input);
        let strides = [c.hidden_size(), pad4(c.intermediate_size())];
        let columns = 0..2 * pad4(c.intermediate_size());
        self.matmul_dispatches(&gate_up, &self.gate_up_pages, columns, strides, matmul, params, &mut dispatches)?;
        let down = down::kernel(matmul, self.format);
        let hidden = pad4(c.hidden_size());
        for first_column in (0..hidden).step_by(params.hidden_stride as usize) {
            let end_column = hidden.min(first_column + params.hidden_stride);
            let strides = [pad4(c.intermediate_size()), end_column - first_column];
            let params = MoeParams { hidden_stride: end_column - first_column, first_column, ..*params };
            let columns = first_column..end_column;
            self.matmul_dispatches(&down, &self.down_pages, columns, strides, matmul, &params, &mut dispatches)?;
            let workgroups = combine::workgroups(params.num_tokens, params.hidden_stride);
            dispatches.push(Dispatch { params, ..plain(combine::kernel(), workgroups)? });
        }
        Ok(dispatches)
    }

    /// One dispatch for each page that holds some of `columns`, over all tiles: workgroups whose expert is in another
    /// page return at once. The output's first column is `columns.start`.
    #[expect(clippy::too_many_arguments, reason = "each is a different thing, and there are two calls")]
    fn matmul_dispatches(
        &self,
        kernel: &Kernel,
        pages: &[WeightPage],
        columns: Range<u32>,
        [x_stride, out_stride]: [u32; 2],
        matmul: MatmulChoice,
        params: &MoeParams,
        dispatches: &mut Vec<Dispatch>,
    ) -> Result<()> {
        for (index, page) in pages.iter().enumerate() {
            let begin_column = columns.start.saturating_sub(page.first_column);
            let end_column = columns.end.saturating_sub(page.first_column).min(page.num_columns);
            if begin_column >= end_column {
                continue;
            }
            let num_column_tiles = (end_column - begin_column).div_ceil(matmul.tile_n());
            let uniform = MatmulParams {
                num_tile_slots: params.num_tile_slots,
                num_column_tiles,
                first_expert: page.first_expert,
                end_expert: page.end_expert,
                first_column: page.first_column.wrapping_sub(columns.start),
                num_columns: page.num_columns,
                begin_column,
                end_column,
                k4: x_stride.div_ceil(4),
                x_stride,
                out_stride,
                num_assignments: params.num_assignments,
                num_experts: params.num_experts,
                top_k: params.top_k,
            };
            let workgroups = u64::from(params.num_tile_slots) * u64::from(num_column_tiles);
            let grid = grid::fold(workgroups, self.device.max_workgroups_per_dimension)?;
            dispatches.push(Dispatch { kernel: kernel.clone(), params: *params, grid, matmul: Some((uniform, index)) });
        }
        Ok(())
    }
}

impl Dispatch {
    /// The bytes of its uniform.
    pub(crate) fn uniform(&self) -> &[u8] {
        match &self.matmul {
            Some((params, _)) => bytemuck::bytes_of(params),
            None => bytemuck::bytes_of(&self.params),
        }
    }
}

impl Plan {
    /// Variant and grid of each dispatch, one line each.
    pub fn describe(&self) -> String {
        let line = |d: &Dispatch| format!("{} grid {:?} overrides {:?}", d.kernel.label, d.grid, d.kernel.overrides);
        self.dispatches.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// The stage of each dispatch, in order.
    pub fn stage_of_dispatch(&self) -> impl Iterator<Item = Stage> + '_ {
        self.dispatches.iter().map(|d| d.kernel.stage)
    }
}

/// Whether a device with no more than WebGPU's limits would have to cut this layer into several weight pages, or this
/// batch into several passes, or could not run it at all.
pub fn exceeds_webgpu_limits(config: &MoeConfig, format: WeightFormat, num_tokens: u32) -> bool {
    match LayerPlan::new(config, format, &DeviceProfile::webgpu_floor(), &MatmulRequest::default()) {
        Ok(plan) => plan.gate_up_pages.len() + plan.down_pages.len() > 2 || plan.max_tokens < num_tokens,
        Err(_) => true,
    }
}

/// Most tiles that `assignments` rows can make: `sum of ceil(n_e / tile_m)` over the experts, whatever the routing.
pub fn tile_slots(assignments: u64, num_experts: u32, tile_m: u32) -> u64 {
    let experts = u64::from(num_experts).min(assignments);
    (assignments + experts * (u64::from(tile_m) - 1)) / u64::from(tile_m)
}

/// llvmpipe ends all loops of an invocation, without a word, after 65,535 rounds in total. The longest are those over
/// the inputs: in the tiled matmul two rounds for each vec4, in the router one for each vec4 of a lane's experts.
fn check_rounds(config: &MoeConfig, device: &DeviceProfile) -> Result<()> {
    const MAX_ROUNDS: u64 = 60_000; // leaves room for the short loops
    if !device.software {
        return Ok(());
    }
    let k4 = |inputs: u32| u64::from(inputs.div_ceil(4));
    let router = router::rounds(config.num_experts(), config.hidden_size());
    let matmul = 2 * k4(config.hidden_size()).max(k4(config.intermediate_size()));
    if router.max(matmul) > MAX_ROUNDS {
        return Err(Error::LimitExceeded {
            what: "the longest loop of a kernel, in rounds,".to_owned(),
            required: router.max(matmul),
            available: MAX_ROUNDS,
            hint: "software drivers end longer loops early; use a GPU or the embedded CPU engine",
        });
    }
    Ok(())
}

fn over_limit(what: &str, required: u64, available: u64) -> Error {
    let hint = "open the device with all its limits (Context::with_all_limits), or use smaller sizes or fewer tokens";
    Error::LimitExceeded { what: what.to_owned(), required, available, hint }
}
