//! The dispatches of a pass, in order. What only some layers have adds dispatches to those that every layer has.

use super::variant;
use super::{Dispatch, LayerPlan, PassKind, QUIET_NAN, STEP_BUFFERS, Step, first_columns, grid, over_limit, pad4};
use crate::error::Result;
use crate::kernels::combine::{Rows, Tail};
use crate::kernels::gate_up::Epilogue;
use crate::kernels::matmul::{MatmulChoice, Tiles};
use crate::kernels::params::{CapacityParams, MatmulParams, MoeParams, NormParams, RouterParams, Uniform};
use crate::kernels::router::{FrontKind, Products};
use crate::kernels::{
    Input, Kernel, Stage, capacity, combine, down, down_combine, drop_rows, gate_up, norm, permute, reweigh, router,
    token_table,
};
use crate::model::activation::Activation;
use crate::model::config::{Norm, SpecialKind};
use crate::model::routing::{Masked, Noise, Selection};
use std::ops::Range;

/// Multiply-adds of a router from which on a dispatch of their own pays.
const MANY_PRODUCTS: u64 = 1 << 22;

/// Workgroups of a matmul on software drivers, at least: some 16 for each of 4 threads.
const WALKERS: u64 = 64;

/// Down and combine are one dispatch: for a single token, whose rows nothing but their weighted sum is made of, where there
/// is enough to do for all of the device although choices follow each other.
pub(super) fn fuses_combine(plan: &LayerPlan, choice: MatmulChoice, num_tokens: u32, kind: PassKind) -> bool {
    let c = &plan.config;
    let columns = pad4(c.expert_size());
    let enough = u64::from(columns.div_ceil(choice.tile_n())) >= u64::from(4 * plan.device.parallel_workgroups());
    num_tokens == 1
        && !choice.sorted()
        && enough
        && rows(plan, kind) == Rows::Weighted(!c.routing().weigh_input)
        && plan.steps().0 == Tail::None
        && c.extras().expert_out_norm.is_none()
        && plan.pages("down_weights").len() == 1
}

/// What combine finds of a token's assignments.
fn rows(plan: &LayerPlan, kind: PassKind) -> Rows {
    let c = &plan.config;
    let weigh = !c.routing().weigh_input;
    // Choices from the caller may be nobody, too.
    if !c.may_drop() && !plan.drops_rows() && kind.front != FrontKind::Assignments {
        return Rows::Weighted(weigh);
    }
    Rows::Dropped {
        weigh,
        special_is_identity: c.extras().special_kind == SpecialKind::Identity,
        pass_through: c.routing().capacity.is_some_and(|capacity| capacity.pass_through),
    }
}

/// Rows of numbers in a buffer.
#[derive(Clone, Copy, Debug)]
struct RowsIn {
    buffer: &'static str,
    stride: u32,
}

/// Adds dispatches one after the other.
struct Builder<'a> {
    plan: &'a LayerPlan,
    params: MoeParams,
    kind: PassKind,
    dispatches: Vec<Dispatch>,
}

/// What a grouped matmul is made of, beside its kernel.
struct Product {
    name: &'static str,
    weights: &'static str,
    /// Packed columns that are due, and that the output's first column is.
    columns: Range<u32>,
    /// Inputs of a packed row.
    inputs: u32,
    bias_stride: u32,
    x_stride: u32,
    out_stride: u32,
    activation: Activation,
    choice: MatmulChoice,
    /// Rows of one expert, for dense tiles.
    dense_experts: Option<u32>,
}

/// Workgroups that between them take all `tiles`, one after the other: enough that those on other threads do not wait for
/// the last one, and so many that none comes near the rounds that software drivers allow: two for each vec4 of inputs, and,
/// without a sort, two for each assignment.
fn walkers(tiles: u64, choice: MatmulChoice, params: &MatmulParams) -> Result<u64> {
    let scan = if choice.sorted() { 0 } else { params.num_assignments };
    let rounds = 2 * u64::from(params.k4) + 2 * u64::from(scan) + 64;
    let most = (super::MAX_ROUNDS / rounds).max(1);
    let walkers = tiles.min(WALKERS.max(tiles.div_ceil(most)));
    // The number after a walker's last tile has to fit a u32, too.
    if tiles + walkers > u32::MAX.into() {
        return Err(over_limit("tiles of one dispatch", tiles, u64::from(u32::MAX) - walkers));
    }
    Ok(walkers)
}

/// All dispatches of a pass.
pub(super) fn dispatches(
    plan: &LayerPlan,
    matmul: MatmulChoice,
    params: &MoeParams,
    kind: PassKind,
) -> Result<Vec<Dispatch>> {
    let c = &plan.config;
    let extras = c.extras();
    let mut builder = Builder { plan, params: *params, kind, dispatches: Vec::new() };
    let x = RowsIn { buffer: "x", stride: c.hidden_size() };
    let experts = builder.route(x, kind)?;
    if matmul.sorted() {
        let workgroups = permute::workgroups(params.num_assignments, params.chunk_len);
        let kernel = permute::kernel(c.num_weighted_experts());
        builder.add("permute", kernel, Uniform::Moe(*params), workgroups, vec![("topk_experts", experts)])?;
    }

    let mut expert_in = x;
    if extras.latent_size.is_some() {
        expert_in = builder.project("latent_in", "latent_in_weights", x, c.hidden_size(), "latent", c.expert_size())?;
    }
    if let Some(norm) = extras.expert_norm {
        expert_in = builder.norm(norm, "expert_norm", expert_in, "expert_in", c.expert_size(), params.num_tokens)?;
    }
    if extras.shared.is_some() {
        builder.shared(x)?;
    }
    builder.experts(matmul, expert_in, experts)?;
    if plan.drops_rows() && router::runs(c, kind.front) {
        let workgroups = params.num_tokens.into();
        builder.add("drop_rows", drop_rows::kernel(), Uniform::Moe(*params), workgroups, Vec::new())?;
    }
    Ok(builder.dispatches)
}

/// The router's dot products are worth a dispatch of their own: software drivers make them several times faster in the
/// grouped matmul. Not where the caller pinned a variant, so that a token's logits do not depend on its batch; nor for
/// little work, nor where expert outputs come in slices, which has enough dispatches already.
pub(super) fn multiplies_before(plan: &LayerPlan, num_tokens: u32, kind: PassKind) -> bool {
    let jitters = kind.noise && matches!(plan.config.routing().noise, Noise::Jitter { .. });
    let pinned = plan.request.is_pinned();
    let has_matrix = !plan.pages("router_matrix").is_empty();
    let c = &plan.config;
    let products = u64::from(num_tokens) * u64::from(router::num_rows(c)) * u64::from(c.hidden_size());
    let assignments = num_tokens.saturating_mul(c.top_k());
    let is_whole = plan.slice_width(assignments).is_ok_and(|width| width == pad4(c.expert_size()));
    let is_much = num_tokens > variant::FEW_TOKENS && products >= MANY_PRODUCTS;
    kind.front == FrontKind::Router && !jitters && !pinned && has_matrix && is_much && is_whole
}

impl Builder<'_> {
    fn add(
        &mut self,
        name: &'static str,
        kernel: Kernel,
        uniform: Uniform,
        workgroups: u64,
        buffers: Vec<(&'static str, &'static str)>,
    ) -> Result<()> {
        let grid = grid::fold(workgroups, self.plan.device.max_workgroups_per_dimension)?;
        self.dispatches.push(Dispatch { name, kernel, uniform, grid, page: 0, buffers });
        Ok(())
    }

    /// Everything up to the final choices; the buffer that holds them.
    fn route(&mut self, x: RowsIn, kind: PassKind) -> Result<&'static str> {
        let (c, params) = (&self.plan.config, self.params);
        let routing = c.routing();
        let uniform = self.router_params(kind);
        let (tokens, assignments) = (u64::from(params.num_tokens), u64::from(params.num_assignments));
        let given = kind.front == FrontKind::Assignments;
        if c.vocab_size().is_some() && !given {
            let workgroups = assignments.div_ceil(token_table::WG_SIZE.into());
            self.add("token_table", token_table::kernel(), Uniform::Router(uniform), workgroups, Vec::new())?;
        }
        if router::runs(c, kind.front) {
            let seen = match c.extras().router_norm {
                Some(norm) => self.norm(norm, "router_norm", x, "router_in", c.hidden_size(), params.num_tokens)?,
                None => x,
            };
            let mut buffers = vec![("x", seen.buffer)];
            let mut products = Products::Fused(Input::of_stride(seen.stride));
            if multiplies_before(self.plan, params.num_tokens, kind) {
                let rows = router::num_rows(c);
                self.project("logits", "router_matrix", seen, c.hidden_size(), "products", rows)?;
                products = Products::Ready;
                buffers = Vec::new();
            }
            // Without a matmul there is little for many lanes to do, and in software barriers between them are slow.
            let has_matmul = products != Products::Ready && uniform.first_row < uniform.num_rows;
            let few_lanes = self.plan.device.software && !has_matmul;
            // The router's own rows are as long as the layer is wide; what follows them in its input is padding.
            let uniform = RouterParams { hidden_size: seen.stride, ..uniform };
            let kernel = router::kernel(
                c,
                self.plan.tensors.selection_bias,
                kind.front,
                kind.noise,
                products,
                if few_lanes { router::FEW_LANES } else { router::WG_SIZE },
                if few_lanes { 1 } else { router::k_lanes(self.plan.nominal_experts) },
            );
            let kernel = if self.plan.drops_rows() { router::dropping(kernel) } else { kernel };
            let workgroups = router::workgroups(params.num_tokens);
            self.add("router", kernel, Uniform::Router(uniform), workgroups, buffers)?;
        }
        let Some(limit) = routing.capacity.filter(|_| !given) else { return Ok("topk_experts") };
        let tokens_per_sequence = match kind.tokens_per_sequence {
            Some(tokens) if limit.per_sequence => tokens,
            _ => params.num_tokens,
        };
        let rounds = capacity::rounds(&limit, routing.selection, tokens_per_sequence, c.top_k());
        if self.plan.device.software && rounds > super::MAX_ROUNDS {
            return Err(over_limit("rounds of the capacity kernel", rounds, super::MAX_ROUNDS));
        }
        let own_weight = routing.selection == Selection::ExpertChoice;
        let first_scores_at = params.num_tokens * (router::num_rows(c) + c.num_experts());
        let uniform_capacity = CapacityParams {
            num_tokens: params.num_tokens,
            tokens_per_sequence,
            num_experts: c.num_experts(),
            top_k: c.top_k(),
            capacity: limit.of_tokens(tokens_per_sequence),
            keys_at: if own_weight { 0 } else { first_scores_at },
        };
        let keys = if own_weight { "topk_weights" } else { "router_logits" };
        let workgroups = u64::from(c.num_experts()) * (tokens / u64::from(tokens_per_sequence.max(1)));
        let kernel = capacity::kernel(&limit, routing.selection);
        self.add("capacity", kernel, Uniform::Capacity(uniform_capacity), workgroups, vec![("keys", keys)])?;
        if limit.renormalize_after {
            let by = routing.renormalize.unwrap_or_default();
            let uniform = RouterParams {
                norm_p: by.p,
                norm_epsilon: by.epsilon,
                norm_floor: by.floor,
                scale: routing.scale,
                ..uniform
            };
            let workgroups = tokens.div_ceil(reweigh::WG_SIZE.into());
            self.add("reweigh", reweigh::kernel(), Uniform::Router(uniform), workgroups, Vec::new())?;
        }
        Ok("kept_experts")
    }

    fn router_params(&self, kind: PassKind) -> RouterParams {
        let c = &self.plan.config;
        let routing = c.routing();
        let by = router::renormalize(c, self.plan.tensors.selection_bias);
        let norm = by.unwrap_or_default();
        let masked = routing.groups.map_or(Masked::NegInfinity, |groups| groups.masked);
        RouterParams {
            num_tokens: self.params.num_tokens,
            hidden_size: c.hidden_size(),
            num_experts: c.num_experts(),
            top_k: c.top_k(),
            num_rows: router::num_rows(c),
            first_row: if kind.front == FrontKind::Router { 0 } else { c.num_experts() },
            num_shared: c.num_gated_shared(),
            num_groups: routing.groups.map_or(1, |groups| groups.num_groups),
            keep_groups: routing.groups.map_or(1, |groups| groups.keep),
            masked_bits: match masked {
                Masked::NegInfinity => f32::NEG_INFINITY.to_bits(),
                Masked::Zero => 0,
            },
            nan_bits: QUIET_NAN,
            renormalize: by.is_some().into(),
            noise_key: 0,
            first_token: 0,
            scale: routing.scale,
            logit_scale: routing.logit_scale,
            logit_softcap: routing.logit_softcap.unwrap_or(0.0),
            norm_p: norm.p,
            norm_epsilon: norm.epsilon,
            norm_floor: norm.floor,
            jitter: if let Noise::Jitter { epsilon } = routing.noise { epsilon } else { 0.0 },
            close: if let Selection::Sparsemixer { jitter } = routing.selection { jitter } else { 0.0 },
        }
    }

    fn norm(
        &mut self,
        norm: Norm,
        weights: &'static str,
        v: RowsIn,
        normed: &'static str,
        width: u32,
        num_rows: u32,
    ) -> Result<RowsIn> {
        // The caller's buffer has no padding.
        let stride = if normed == "y" { width } else { pad4(width) };
        let uniform = NormParams { num_rows, width, v_stride: v.stride, normed_stride: stride, epsilon: norm.epsilon };
        let buffers = vec![("v", v.buffer), ("norm_weights", weights), ("normed", normed)];
        self.add(weights, norm::kernel(norm.scale_first), Uniform::Norm(uniform), num_rows.into(), buffers)?;
        Ok(RowsIn { buffer: normed, stride })
    }

    /// How a grouped matmul reads. Software drivers loop over the lanes for each load: the fewer, the better.
    fn input(&self, choice: MatmulChoice, stride: u32) -> Input {
        let device = &self.plan.device;
        let wide = device.software && device.int64 && choice.needs_subgroups();
        match Input::of_stride(stride) {
            Input::Vec4 if wide => Input::Wide,
            input => input,
        }
    }

    /// All tokens by one matrix.
    fn project(
        &mut self,
        name: &'static str,
        weights: &'static str,
        x: RowsIn,
        inputs: u32,
        out: &'static str,
        outputs: u32,
    ) -> Result<RowsIn> {
        let choice = variant::choose_dense(self.params.num_tokens, &self.plan.device, &self.plan.request);
        let format = self.plan.format_of(weights);
        let kernel = down::kernel(choice, Tiles::Dense, format, false, self.input(choice, x.stride));
        let product = Product {
            name,
            weights,
            columns: 0..pad4(outputs),
            inputs,
            bias_stride: 0,
            x_stride: x.stride,
            out_stride: pad4(outputs),
            activation: Activation::default(),
            choice,
            dense_experts: Some(1),
        };
        self.matmul(&kernel, &product, &[("x", x.buffer), ("expert_out", out)])?;
        Ok(RowsIn { buffer: out, stride: pad4(outputs) })
    }

    fn shared(&mut self, x: RowsIn) -> Result<()> {
        let c = &self.plan.config;
        let Some(shared) = c.extras().shared else { return Ok(()) };
        let choice = variant::choose_dense(self.params.num_tokens, &self.plan.device, &self.plan.request);
        let (formats, input) = (self.plan.formats, self.input(choice, x.stride));
        let inner = pad4(shared.intermediate_size);
        let format = formats.shared_gate_up;
        let kernel = gate_up::kernel(choice, Tiles::Dense, format, shared.activation, Epilogue::default(), input);
        let product = Product {
            name: "shared_gate_up",
            weights: "shared_gate_up_weights",
            columns: 0..first_columns(shared.activation, shared.intermediate_size),
            inputs: c.hidden_size(),
            bias_stride: 0,
            x_stride: x.stride,
            out_stride: inner,
            activation: shared.activation,
            choice,
            dense_experts: Some(shared.num),
        };
        self.matmul(&kernel, &product, &[("x", x.buffer), ("intermediate", "shared_intermediate")])?;
        // Its rows are experts times tokens already: as many rows of one expert after the other.
        let kernel = down::kernel(choice, Tiles::Dense, formats.shared_down, false, self.input(choice, inner));
        let product = Product {
            name: "shared_down",
            weights: "shared_down_weights",
            columns: 0..pad4(c.hidden_size()),
            inputs: shared.intermediate_size,
            x_stride: inner,
            out_stride: pad4(c.hidden_size()),
            activation: Activation::default(),
            ..product
        };
        self.matmul(&kernel, &product, &[("x", "shared_intermediate"), ("expert_out", "shared_out")])
    }

    /// The routed experts, and all that follows them.
    fn experts(&mut self, choice: MatmulChoice, expert_in: RowsIn, topk_experts: &'static str) -> Result<()> {
        let (plan, params) = (self.plan, self.params);
        let c = &plan.config;
        let (extras, tensors) = (c.extras(), plan.tensors);
        let inner = pad4(c.intermediate_size());
        let tiles = if plan.places.is_some() { Tiles::Cached } else { Tiles::Routed };
        let input = self.input(choice, expert_in.stride);
        let epilogue = Epilogue { bias: tensors.up_bias, weigh_input: c.routing().weigh_input };
        let kernel = gate_up::kernel(choice, tiles, plan.formats.gate_up, c.activation(), epilogue, input);
        let first_columns = first_columns(c.activation(), c.intermediate_size());
        let product = Product {
            name: "gate_up",
            weights: "gate_up_weights",
            columns: 0..first_columns,
            inputs: c.expert_size(),
            bias_stride: first_columns,
            x_stride: expert_in.stride,
            out_stride: inner,
            activation: c.activation(),
            choice,
            dense_experts: None,
        };
        let buffers = [("x", expert_in.buffer), ("topk_experts", topk_experts), ("bias", "gate_up_bias")];
        self.matmul(&kernel, &product, &buffers)?;

        let input = self.input(choice, inner);
        let (tail, steps) = plan.steps();
        let expert_size = pad4(c.expert_size());
        let mut step = params;
        step.in_stride = expert_in.stride;
        step.in_width = c.expert_size();
        self.set_tail(&mut step, tail, true);
        // y has no padding, other buffers do.
        let target = if steps.is_empty() { "y" } else { "routed" };
        step.hidden_size = if steps.is_empty() { c.hidden_size() } else { expert_size };
        let rows = rows(plan, self.kind);
        let fused = fuses_combine(plan, choice, params.num_tokens, self.kind);
        if fused {
            let weigh = rows == Rows::Weighted(true);
            let kernel = down_combine::kernel(choice, tiles, plan.formats.down, tensors.down_bias, weigh, input);
            let product = Product {
                name: "down_combine",
                weights: "down_weights",
                columns: 0..expert_size,
                inputs: c.intermediate_size(),
                bias_stride: expert_size,
                x_stride: inner,
                out_stride: step.hidden_size,
                activation: Activation::default(),
                choice,
                dense_experts: None,
            };
            let buffers = [("x", "intermediate"), ("topk_experts", topk_experts), ("bias", "down_bias"), ("y", target)];
            self.matmul(&kernel, &product, &buffers)?;
        }
        let kernel = down::kernel(choice, tiles, plan.formats.down, tensors.down_bias, input);
        let slices = if fused { 0..0 } else { 0..expert_size };
        for first_column in slices.step_by(params.hidden_stride as usize) {
            let end_column = expert_size.min(first_column + params.hidden_stride);
            let product = Product {
                name: "down",
                weights: "down_weights",
                columns: first_column..end_column,
                inputs: c.intermediate_size(),
                bias_stride: expert_size,
                x_stride: inner,
                out_stride: end_column - first_column,
                activation: Activation::default(),
                choice,
                dense_experts: None,
            };
            let buffers = [("x", "intermediate"), ("topk_experts", topk_experts), ("bias", "down_bias")];
            self.matmul(&kernel, &product, &buffers)?;
            let mut expert_out = "expert_out";
            if let Some(norm) = extras.expert_out_norm {
                let out = RowsIn { buffer: "expert_out", stride: expert_size };
                let num_rows = params.num_assignments;
                expert_out =
                    self.norm(norm, "expert_out_norm", out, "expert_out_normed", c.expert_size(), num_rows)?.buffer;
            }
            let uniform = MoeParams { hidden_stride: end_column - first_column, first_column, ..step };
            let mut buffers = vec![
                ("expert_out", expert_out),
                ("topk_experts", topk_experts),
                ("expert_in", expert_in.buffer),
                ("y", target),
            ];
            if !choice.sorted() {
                buffers.push(("row_of_assignment", "identity"));
            }
            let workgroups = combine::workgroups(params.num_tokens, uniform.hidden_stride);
            self.add("combine", combine::kernel(rows, tail), Uniform::Moe(uniform), workgroups, buffers)?;
        }

        let mut current = RowsIn { buffer: target, stride: expert_size };
        let mut unscaled = tail == Tail::None;
        for (index, step) in steps.iter().enumerate() {
            let out = if index + 1 == steps.len() { "y" } else { STEP_BUFFERS[index] };
            current = match *step {
                Step::Project => {
                    self.project("latent_out", "latent_out_weights", current, c.expert_size(), out, c.hidden_size())?
                }
                Step::Norm(name, norm) => self.norm(norm, name, current, out, c.hidden_size(), params.num_tokens)?,
                Step::Tail(tail) => {
                    let hidden = pad4(c.hidden_size());
                    let mut uniform = params;
                    self.set_tail(&mut uniform, tail, unscaled);
                    unscaled = false;
                    uniform.hidden_size = if out == "y" { c.hidden_size() } else { hidden };
                    uniform.hidden_stride = hidden;
                    let workgroups = combine::workgroups(params.num_tokens, hidden);
                    let buffers = vec![("summed", current.buffer), ("y", out)];
                    self.add(
                        "combine",
                        combine::kernel(Rows::Summed, tail),
                        Uniform::Moe(uniform),
                        workgroups,
                        buffers,
                    )?;
                    RowsIn { buffer: out, stride: hidden }
                }
            };
        }
        Ok(())
    }

    /// What a tail needs to know. The first one multiplies the routed experts by their factor.
    fn set_tail(&self, params: &mut MoeParams, tail: Tail, first: bool) {
        let c = &self.plan.config;
        let average = c.extras().shared.is_some_and(|shared| shared.average);
        let half = if average { 0.5 } else { 1.0 };
        params.routed_scale = if first && tail != Tail::None { half * c.extras().routed_scale } else { 1.0 };
        params.shared_scale = half;
        params.num_shared = c.extras().shared.map_or(0, |shared| shared.num);
        params.out_stride = pad4(c.hidden_size());
    }

    /// One dispatch for each page that holds some of the columns, over all tiles: workgroups whose expert is in another
    /// page return at once. The output's first column is the first that is due.
    fn matmul(&mut self, kernel: &Kernel, product: &Product, buffers: &[(&'static str, &'static str)]) -> Result<()> {
        let (plan, params, p) = (self.plan, self.params, product);
        let (num_tile_slots, tile_m) = match p.dense_experts {
            Some(experts) => {
                let tile_m = permute::tile_height(params.num_tokens, p.choice.tile_m());
                (experts * params.num_tokens.div_ceil(tile_m), tile_m)
            }
            None => (params.num_tile_slots, p.choice.tile_m()),
        };
        let [limit, alpha] = p.activation.parameters();
        for (index, page) in plan.pages(p.weights).iter().enumerate() {
            let begin_column = p.columns.start.saturating_sub(page.first_column);
            let end_column = p.columns.end.saturating_sub(page.first_column).min(page.num_columns);
            if begin_column >= end_column {
                continue;
            }
            let num_column_tiles = (end_column - begin_column).div_ceil(p.choice.tile_n());
            let uniform = MatmulParams {
                num_tile_slots,
                num_column_tiles,
                first_expert: page.first_expert,
                end_expert: page.end_expert,
                first_column: page.first_column.wrapping_sub(p.columns.start),
                num_columns: page.num_columns,
                begin_column,
                end_column,
                k4: p.inputs.div_ceil(4),
                quad_stride: (plan.format_of(p.weights).quad_bytes(p.inputs) / 16) as u32,
                x_stride: p.x_stride,
                out_stride: p.out_stride,
                num_assignments: if p.dense_experts.is_some() { params.num_tokens } else { params.num_assignments },
                num_experts: p.dense_experts.unwrap_or(params.num_weighted),
                top_k: params.top_k,
                tile_m,
                bias_stride: p.bias_stride,
                slice_column: p.columns.start,
                limit,
                alpha,
            };
            // A workgroup of the fused kernel goes through all slots.
            let slots = if kernel.stage == Stage::DownCombine { 1 } else { num_tile_slots };
            let tiles = u64::from(slots) * u64::from(num_column_tiles);
            let walks = plan.device.software && kernel.stage != Stage::DownCombine && p.choice.walks();
            let workgroups = if walks { walkers(tiles, p.choice, &uniform)? } else { tiles };
            let grid = grid::fold(workgroups, plan.device.max_workgroups_per_dimension)?;
            let mut buffers = buffers.to_vec();
            buffers.push(("weights", p.weights));
            let uniform = Uniform::Matmul(uniform);
            self.dispatches.push(Dispatch {
                name: p.name,
                kernel: kernel.clone(),
                uniform,
                grid,
                page: index,
                buffers,
            });
        }
        Ok(())
    }
}
