//! From (layer, weight format, device facts, number of tokens) to everything a pass needs: buffer sizes, weight pages,
//! the variant and grid of each kernel, FLOPs and bytes. Pure: no GPU, no wgpu types, so it is tested by the million.

pub mod cost;
pub mod device;
pub mod grid;
pub mod memory;
pub mod pages;
mod passes;
pub mod predict;
pub mod requests;
pub mod tuned;
pub mod variant;

use crate::error::{Error, Result};
use crate::kernels::combine::Tail;
use crate::kernels::matmul::MatmulChoice;
use crate::kernels::params::{MoeParams, Uniform};
use crate::kernels::router::FrontKind;
use crate::kernels::{Kernel, permute, router};
use crate::model::activation::Activation;
use crate::model::config::{MoeConfig, Norm, SharedGate};
use crate::model::formats::{LayerFormats, WeightFormat};
use crate::model::routing::NonFinite;
use crate::model::weights::OptionalTensors;
pub use cost::StageCost;
pub use device::DeviceProfile;
pub use memory::{Allocation, DeviceBytes, Purpose};
use pages::WeightPage;
pub use requests::StageRequests;
use std::sync::Arc;
pub use tuned::{ShapeClass, TunedChoices};
pub use variant::MatmulRequest;

/// Bits of the NaN that marks a token without a valid routing.
const QUIET_NAN: u32 = 0x7fc0_0000;
/// Most slices of `expert_out`: with more, a second pass over the rest of the tokens costs less.
const MAX_SLICES: u32 = 8;
/// Rounds of all loops of an invocation that software drivers are trusted with; leaves room for the short ones.
const MAX_ROUNDS: u64 = 60_000;
/// Matrices of routed experts.
pub(crate) const ROUTED: [&str; 2] = ["gate_up_weights", "down_weights"];
/// Bytes of what a pass counts.
pub(crate) const STATUS_BYTES: u64 = 16;
/// Bytes of an entry of the tile list.
const TILE_BYTES: u64 = 12;

/// What depends on the layer and the device, but not on the batch.
#[derive(Clone, Debug)]
pub struct LayerPlan {
    config: MoeConfig,
    tensors: OptionalTensors,
    formats: LayerFormats,
    device: DeviceProfile,
    request: MatmulRequest,
    /// Experts that choices of kernels are made for; stays when experts are added or removed, so that others' results
    /// keep their bits.
    nominal_experts: u32,
    non_finite: NonFinite,
    matrices: Vec<Matrix>,
    /// Routed experts that are on the device at a time, if those are not all.
    places: Option<u32>,
    max_tokens: u32,
}

/// A packed matrix of each of some experts, in pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// The name that dispatches bind it by.
    pub name: &'static str,
    /// How it is stored.
    pub format: WeightFormat,
    /// Inputs of a row.
    pub inputs: u32,
    /// Where its parts are.
    pub pages: Vec<WeightPage>,
}

impl Matrix {
    /// Bytes of all pages.
    pub fn bytes(&self) -> u64 {
        self.pages.iter().map(|page| page.bytes).sum()
    }

    /// Experts that have one.
    pub fn num_experts(&self) -> u32 {
        self.pages.last().map_or(0, |page| page.end_expert)
    }

    /// Bytes of four columns.
    pub(crate) fn quad_bytes(&self) -> usize {
        self.format.quad_bytes(self.inputs) as usize
    }
}

/// What distinguishes passes of the same number of tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PassKind {
    /// Who routes.
    pub front: FrontKind,
    /// The router's noise is on.
    pub noise: bool,
    /// Tokens of each sequence; `None`: the batch is one.
    pub tokens_per_sequence: Option<u32>,
}

/// One pass over at most [`LayerPlan::max_tokens`] tokens.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Tokens of the pass.
    pub num_tokens: u32,
    /// The grouped matmul's variant and tile sizes.
    pub matmul: MatmulChoice,
    /// Those were measured to be the best for such work, not taken from the table.
    pub tuned: bool,
    /// Uniform of permute and combine.
    pub params: MoeParams,
    /// Kernels in the order in which they run.
    pub dispatches: Vec<Dispatch>,
    /// FLOPs and least bytes of each stage that runs.
    pub stages: Vec<StageCost>,
}

/// One dispatch of a pass.
#[derive(Clone, Debug)]
pub struct Dispatch {
    /// What it is for, as times and costs call it.
    pub name: &'static str,
    /// What runs.
    pub kernel: Kernel,
    /// Its parameters.
    pub uniform: Uniform,
    /// Workgroups, folded.
    pub grid: [u32; 3],
    /// Page of its weight matrix.
    pub page: usize,
    /// Buffers of bindings that are not called as the binding is.
    pub buffers: Vec<(&'static str, &'static str)>,
}

impl Dispatch {
    /// The buffer that is bound to `binding`: one of [`LayerPlan::scratch`], a tensor of the layer, `x` or `y`.
    pub fn buffer(&self, binding: &'static str) -> &'static str {
        self.buffers.iter().find(|(name, _)| *name == binding).map_or(binding, |&(_, buffer)| buffer)
    }
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
    /// Pages and limits of a layer without optional tensors on a device. Fails if not even one token, or one weight
    /// column, fits the device.
    pub fn new(
        config: &MoeConfig,
        formats: impl Into<LayerFormats>,
        device: &DeviceProfile,
        request: &MatmulRequest,
    ) -> Result<Self> {
        Self::with_tensors(config, OptionalTensors::default(), formats, device, request, config.num_experts())
    }

    /// As [`LayerPlan::new`], with these tensors, and kernels as for a layer of `nominal_experts`.
    pub fn with_tensors(
        config: &MoeConfig,
        tensors: OptionalTensors,
        formats: impl Into<LayerFormats>,
        device: &DeviceProfile,
        request: &MatmulRequest,
        nominal_experts: u32,
    ) -> Result<Self> {
        let formats = formats.into();
        formats.check(config)?;
        device.check_floor()?;
        request.check(device)?;
        let k_lanes = router::k_lanes(nominal_experts);
        check_rounds(config, k_lanes, device)?;
        let limit = device.max_buffer_bytes();
        let router_bytes = u64::from(router::num_rows(config)) * u64::from(pad4(config.hidden_size())) * 4;
        if router_bytes > limit {
            return Err(over_limit("the router's weights", router_bytes, limit));
        }
        let mut plan = Self {
            config: config.clone(),
            tensors,
            formats,
            device: device.clone(),
            request: request.clone(),
            nominal_experts,
            non_finite: NonFinite::default(),
            matrices: matrices(config, &formats, device, config.num_weighted_experts())?,
            places: None,
            max_tokens: 0,
        };
        plan.max_tokens = plan.find_max_tokens(limit)?;
        Ok(plan)
    }

    /// The same layer with this policy for tokens that the router cannot make anything of.
    pub fn with_non_finite(mut self, non_finite: NonFinite) -> Result<Self> {
        self.non_finite = non_finite;
        self.max_tokens = self.find_max_tokens(self.device.max_buffer_bytes())?;
        Ok(self)
    }

    /// What becomes of tokens that the router cannot make anything of.
    pub fn non_finite(&self) -> NonFinite {
        self.non_finite
    }

    /// The same layer with at most `bytes` of routed experts on the device at a time. Where all of them fit, nothing
    /// changes.
    ///
    /// # Errors
    /// [`Error::LimitExceeded`] if not even one expert fits.
    pub fn with_gpu_memory(mut self, bytes: u64) -> Result<Self> {
        let experts = self.config.num_weighted_experts();
        let expert_bytes = self.expert_bytes();
        let places = (bytes / expert_bytes.max(1)).min(experts.into()) as u32;
        if places == experts {
            return Ok(self);
        }
        if places == 0 {
            return Err(Error::LimitExceeded {
                what: "GPU memory for one expert".to_owned(),
                required: expert_bytes,
                available: bytes,
                hint: "allow at least that much, or use a smaller weight format",
            });
        }
        self.matrices = matrices(&self.config, &self.formats, &self.device, places)?;
        self.places = Some(places);
        self.max_tokens = self.find_max_tokens(self.device.max_buffer_bytes())?;
        Ok(self)
    }

    /// Routed experts that are on the device at a time; `None`: all of them.
    pub fn places(&self) -> Option<u32> {
        self.places
    }

    /// Bytes of one routed expert.
    pub fn expert_bytes(&self) -> u64 {
        let routed = self.matrices.iter().filter(|matrix| ROUTED.contains(&matrix.name));
        routed.map(|matrix| matrix.bytes() / u64::from(matrix.num_experts().max(1))).sum()
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

    /// Its optional tensors.
    pub fn tensors(&self) -> OptionalTensors {
        self.tensors
    }

    /// How expert weights are stored.
    pub fn formats(&self) -> LayerFormats {
        self.formats
    }

    /// How the matrix of this name is stored.
    pub(crate) fn format_of(&self, name: &str) -> WeightFormat {
        self.matrix(name).map_or(WeightFormat::F32, |matrix| matrix.format)
    }

    /// The matrix of this name.
    pub fn matrix(&self, name: &str) -> Option<&Matrix> {
        self.matrices.iter().find(|matrix| matrix.name == name)
    }

    /// The same layer with other experts, on the same device with the same kernels.
    pub(crate) fn with_config(&self, config: &MoeConfig) -> Result<Self> {
        let (device, request) = (&self.device, &self.request);
        Self::with_tensors(config, self.tensors, self.formats, device, request, self.nominal_experts)?
            .with_non_finite(self.non_finite)
    }

    /// The same layer with its weights where they are, and other measured choices.
    pub(crate) fn with_tuned(&self, tuned: Arc<TunedChoices>) -> Result<Self> {
        let mut plan = Self { request: MatmulRequest { tuned: Some(tuned), ..self.request.clone() }, ..self.clone() };
        plan.request.check(&plan.device)?;
        plan.max_tokens = plan.find_max_tokens(plan.device.max_buffer_bytes())?;
        Ok(plan)
    }

    /// Every packed matrix of the layer.
    pub fn matrices(&self) -> &[Matrix] {
        &self.matrices
    }

    /// Pages of one of them.
    pub fn pages(&self, name: &str) -> &[WeightPage] {
        self.matrix(name).map_or(&[], |matrix| &matrix.pages)
    }

    /// Bytes of all weights on the device.
    pub fn weight_bytes(&self) -> u64 {
        let c = &self.config;
        let pages = self.matrices.iter().flat_map(|matrix| &matrix.pages).map(|page| page.bytes).sum::<u64>();
        pages + u64::from(router::num_rows(c)) * u64::from(pad4(c.hidden_size())) * 4 + u64::from(c.num_experts()) * 12
    }

    /// Buffers for passes of up to `num_tokens` tokens.
    pub fn scratch(&self, num_tokens: u32) -> Vec<ScratchBuffer> {
        let c = &self.config;
        let extras = c.extras();
        let tokens = u64::from(num_tokens);
        let assignments = tokens * u64::from(c.top_k());
        let tile_slots = tile_slots(assignments, c.num_weighted_experts(), 4);
        let hidden = tokens * u64::from(pad4(c.hidden_size())) * 4;
        let expert = u64::from(pad4(c.expert_size())) * 4;
        let mut logits = u64::from(router::num_rows(c));
        if router::stores_ranks(c, self.tensors.selection_bias) || router::stores_first_scores(c) {
            logits += u64::from(c.num_experts()) + 1;
        }
        let mut buffers = vec![
            ("router_logits", tokens * logits * 4),
            ("topk_experts", assignments * 4),
            ("topk_weights", assignments * 4),
            ("status", STATUS_BYTES + if self.drops_rows() { tokens * 4 } else { 0 }),
            ("expert_offsets", (u64::from(c.num_weighted_experts()) + 1) * 4),
            ("assignment_of_row", assignments * 4),
            ("row_of_assignment", assignments * 4),
            ("tiles", tile_slots * TILE_BYTES),
            ("intermediate", assignments * u64::from(pad4(c.intermediate_size())) * 4),
            // Larger ones hold a slice of the columns at a time.
            ("expert_out", if self.slices() { (assignments * expert).min(self.limit()) } else { assignments * expert }),
        ];
        let mut add = |there: bool, name, bytes| {
            if there {
                buffers.push((name, bytes));
            }
        };
        let rows = u64::from(pad4(router::num_rows(c)));
        add(!self.pages("router_matrix").is_empty(), "products", tokens * rows * 4);
        add(c.routing().capacity.is_some(), "kept_experts", assignments * 4);
        add(c.vocab_size().is_some(), "token_ids", tokens * 4);
        add(extras.router_norm.is_some(), "router_in", hidden);
        add(extras.latent_size.is_some(), "latent", tokens * expert);
        add(extras.expert_norm.is_some(), "expert_in", tokens * expert);
        add(extras.expert_out_norm.is_some(), "expert_out_normed", assignments * expert);
        let (_, steps) = self.steps();
        add(!steps.is_empty(), "routed", tokens * expert);
        for buffer in STEP_BUFFERS.iter().take(steps.len().saturating_sub(1)) {
            add(true, buffer, hidden);
        }
        if let Some(shared) = extras.shared {
            let inner = u64::from(pad4(shared.intermediate_size)) * 4;
            add(true, "shared_intermediate", u64::from(shared.num) * tokens * inner);
            add(true, "shared_out", u64::from(shared.num) * hidden);
            add(shared.gate != SharedGate::None, "shared_weights", u64::from(shared.num) * tokens * 4);
        }
        let whole = |(name, bytes): (_, u64)| ScratchBuffer { name, bytes: bytes.max(16).next_multiple_of(16) };
        buffers.into_iter().map(whole).collect()
    }

    /// Tokens that the router cannot make anything of are dropped.
    fn drops_rows(&self) -> bool {
        self.non_finite == NonFinite::Drop
    }

    /// Expert outputs may be there a slice of the columns at a time: nothing looks at whole rows of them, and experts do
    /// not have to be brought in once more for each slice.
    fn slices(&self) -> bool {
        self.config.extras().expert_out_norm.is_none() && self.places.is_none()
    }

    /// Bytes of the largest buffer, in whole vec4.
    fn limit(&self) -> u64 {
        self.device.max_buffer_bytes() / 16 * 16
    }

    /// Columns of `expert_out` that are there at a time: all that fit. Down and combine run once for each slice.
    fn slice_width(&self, num_assignments: u32) -> Result<u32> {
        let hidden = pad4(self.config.expert_size());
        let limit = self.limit();
        let bytes = |width: u32| u64::from(num_assignments) * u64::from(width) * 4;
        // A multiple of 8, so that a slice never cuts what a lane owns.
        let most = if self.slices() { MAX_SLICES } else { 1 };
        (1..=most)
            .map(|slices| if slices == 1 { hidden } else { hidden.div_ceil(slices).next_multiple_of(8) })
            .find(|&width| bytes(width) <= limit)
            .ok_or_else(|| over_limit("expert_out", bytes(hidden) / u64::from(most), limit))
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

    /// One pass over `num_tokens` tokens by the layer's own router.
    pub fn plan(&self, num_tokens: u32) -> Result<Plan> {
        self.plan_pass(num_tokens, PassKind::default())
    }

    /// One pass over `num_tokens` tokens.
    pub fn plan_pass(&self, num_tokens: u32, kind: PassKind) -> Result<Plan> {
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
        let experts = self.nominal_experts.saturating_sub(c.extras().special_experts).max(1);
        let tuned = self.request.tuned(ShapeClass::with_experts(c, experts, num_tokens), self.formats.gate_up);
        let matmul =
            tuned.unwrap_or_else(|| variant::choose(c.top_k(), experts, num_tokens, &self.device, &self.request));
        let slots = tile_slots(assignments, c.num_weighted_experts(), matmul.tile_m());
        // Without a sort, every assignment is a slot.
        let num_tile_slots = if matmul.sorted() { slots as u32 } else { num_assignments };
        let params = MoeParams {
            num_tokens,
            hidden_size: c.hidden_size(),
            num_experts: c.num_experts(),
            num_weighted: c.num_weighted_experts(),
            top_k: c.top_k(),
            num_assignments,
            num_tile_slots,
            tile_m: matmul.tile_m(),
            hidden_stride: slice_width,
            chunk_len: permute::chunk_len(num_assignments, self.device.parallel_workgroups()),
            ..MoeParams::default()
        };
        Ok(Plan {
            num_tokens,
            matmul,
            tuned: tuned.is_some(),
            params,
            stages: {
                let how = cost::Dispatched {
                    sorted: matmul.sorted(),
                    logits_apart: passes::multiplies_before(self, num_tokens, kind),
                    combine_fused: passes::fuses_combine(self, matmul, num_tokens, kind),
                };
                cost::stages(c, &self.formats, num_tokens, None, how)
            },
            dispatches: passes::dispatches(self, matmul, &params, kind)?,
        })
    }

    /// What is added where a token's routed experts are summed, and what follows.
    fn steps(&self) -> (Tail, Vec<Step>) {
        let extras = self.config.extras();
        let mut steps = Vec::new();
        steps.extend(extras.latent_size.map(|_| Step::Project));
        steps.extend(extras.routed_norm.map(|norm| Step::Norm("routed_norm", norm)));
        match extras.shared {
            Some(shared) if shared.gate == SharedGate::None => steps.push(Step::Tail(Tail::Shared)),
            Some(_) => steps.push(Step::Tail(Tail::SharedGated)),
            None if extras.routed_scale != 1.0 => steps.push(Step::Tail(Tail::Scaled)),
            None => {}
        }
        if self.tensors.output_bias {
            steps.push(Step::Tail(Tail::Bias));
        }
        steps.extend(extras.output_norm.map(|norm| Step::Norm("output_norm", norm)));
        // A projection writes whole vec4; the caller's y may have none to spare.
        if steps.last() == Some(&Step::Project) {
            steps.push(Step::Tail(Tail::None));
        }
        match steps.first().copied() {
            Some(Step::Tail(tail)) => {
                steps.remove(0);
                (tail, steps)
            }
            _ => (Tail::None, steps),
        }
    }
}

/// Something that is done with the sum of a token's routed experts.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    /// Out of the latent space.
    Project,
    /// The name of its weights.
    Norm(&'static str, Norm),
    /// Added on its own, as something stands before it.
    Tail(Tail),
}

/// What each step but the last writes.
const STEP_BUFFERS: [&str; 4] = ["step_1", "step_2", "step_3", "step_4"];

/// The packed matrices of a layer, cut into pages that the device can bind.
///
/// Of routed experts, as many as have a place on the device.
fn matrices(config: &MoeConfig, formats: &LayerFormats, device: &DeviceProfile, experts: u32) -> Result<Vec<Matrix>> {
    let limit = device.max_buffer_bytes();
    let mut matrices = Vec::new();
    let mut add = |name, format: WeightFormat, experts: u32, columns: u32, inputs: u32| {
        let pages = pages::weight_pages(experts, columns, format.quad_bytes(inputs), limit)?;
        matrices.push(Matrix { name, format, inputs, pages });
        Ok::<_, Error>(())
    };
    let [h, d] = [config.hidden_size(), config.expert_size()];
    let columns = first_columns(config.activation(), config.intermediate_size());
    add("gate_up_weights", formats.gate_up, experts, columns, d)?;
    add("down_weights", formats.down, experts, pad4(d), config.intermediate_size())?;
    if let Some(shared) = config.extras().shared {
        let columns = first_columns(shared.activation, shared.intermediate_size);
        add("shared_gate_up_weights", formats.shared_gate_up, shared.num, columns, h)?;
        add("shared_down_weights", formats.shared_down, shared.num, pad4(h), shared.intermediate_size)?;
    }
    if device.software && device.subgroup_size.is_some() {
        add("router_matrix", WeightFormat::F32, 1, pad4(router::num_rows(config)), h)?;
    }
    if let Some(latent) = config.extras().latent_size {
        add("latent_in_weights", WeightFormat::F32, 1, pad4(latent), h)?;
        add("latent_out_weights", WeightFormat::F32, 1, pad4(h), latent)?;
    }
    Ok(matrices)
}

/// Packed columns of an expert's first projections.
fn first_columns(activation: Activation, intermediate_size: u32) -> u32 {
    pad4(intermediate_size) * if activation.is_gated() { 2 } else { 1 }
}

impl Plan {
    /// Variant and grid of each dispatch, one line each.
    pub fn describe(&self) -> String {
        let line = |d: &Dispatch| format!("{} grid {:?} overrides {:?}", d.kernel.label, d.grid, d.kernel.overrides);
        self.dispatches.iter().map(line).collect::<Vec<_>>().join("\n")
    }

    /// What each dispatch is for, in order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.dispatches.iter().map(|d| d.name)
    }
}

/// Whether a device with no more than WebGPU's limits would have to cut this layer into several weight pages, or this
/// batch into several passes, or could not run it at all.
pub fn exceeds_webgpu_limits(config: &MoeConfig, formats: impl Into<LayerFormats>, num_tokens: u32) -> bool {
    match LayerPlan::new(config, formats, &DeviceProfile::webgpu_floor(), &MatmulRequest::default()) {
        Ok(plan) => plan.matrices.iter().any(|matrix| matrix.pages.len() > 1) || plan.max_tokens < num_tokens,
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
fn check_rounds(config: &MoeConfig, k_lanes: u32, device: &DeviceProfile) -> Result<()> {
    if !device.software {
        return Ok(());
    }
    let k4 = |inputs: u32| u64::from(inputs.div_ceil(4));
    let router = router::rounds(router::num_rows(config), config.hidden_size(), k_lanes);
    let shared = config.extras().shared.map_or(0, |shared| shared.intermediate_size);
    let longest = [config.hidden_size(), config.intermediate_size(), config.expert_size(), shared].map(k4);
    let matmul = 2 * longest.into_iter().max().unwrap_or(0);
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
