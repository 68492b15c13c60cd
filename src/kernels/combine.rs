//! Stage 5: expert outputs back into token order, and what is added to them. See `shaders/combine.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Where the routed experts' sum comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// Weighted here; every assignment has a row. `false`: all weights are 1.
    Weighted(bool),
    /// Weighted here; assignments may have no row.
    Dropped {
        /// Weights are applied here; otherwise they are 1.
        weigh: bool,
        /// Experts without weights return their input, not zero.
        special_is_identity: bool,
        /// Dropped assignments return their token, not zero.
        pass_through: bool,
    },
    /// The sum is there.
    Summed,
}

/// What is done to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Tail {
    /// Nothing.
    None,
    /// A factor.
    Scaled,
    /// A factor, and shared experts.
    Shared,
    /// A factor, and shared experts with weights of their own.
    SharedGated,
    /// A factor, and a bias.
    Bias,
}

/// Rows summed, tail applied.
pub fn kernel(rows: Rows, tail: Tail) -> Kernel {
    let mut parts = vec![wgsl!("moe_params")];
    let mut bindings = vec![bind(0, "params", Access::Uniform)];
    let mut overrides = vec![("WG_SIZE", WG_SIZE)];
    let mut label = "combine".to_owned();
    let experts = [
        bind(1, "expert_out", Access::Read),        // [num_rows, hidden_stride]
        bind(2, "row_of_assignment", Access::Read), // [num_tokens, top_k]
        bind(3, "topk_weights", Access::Read),      // [num_tokens, top_k]
    ];
    match rows {
        Rows::Weighted(weigh) => {
            parts.push(wgsl!("rows_weighted"));
            overrides.push(("WEIGH", weigh.into()));
            bindings.extend(experts);
        }
        Rows::Dropped { weigh, special_is_identity, pass_through } => {
            label.push_str(".dropped");
            parts.push(wgsl!("rows_dropped"));
            overrides.push(("WEIGH", weigh.into()));
            overrides.push(("SPECIAL_IS_IDENTITY", special_is_identity.into()));
            overrides.push(("PASS_THROUGH", pass_through.into()));
            bindings.extend(experts);
        }
        Rows::Summed => {
            label.push_str(".summed");
            parts.push(wgsl!("rows_summed"));
            bindings.push(bind(1, "summed", Access::Read)); // [num_tokens, hidden_stride]
        }
    }
    bindings.push(bind(4, "y", Access::Write)); // [num_tokens, hidden_size]
    if matches!(rows, Rows::Dropped { .. }) {
        bindings.push(bind(5, "topk_experts", Access::Read)); // [num_tokens, top_k]
        bindings.push(bind(6, "expert_in", Access::Read)); // [num_tokens, in_stride]
    }
    let shared_out = bind(7, "shared_out", Access::Read); // [num_shared, num_tokens, out_stride]
    match tail {
        Tail::None => parts.push(wgsl!("tail_none")),
        Tail::Scaled => {
            label.push_str(".scaled");
            parts.push(wgsl!("tail_scaled"));
        }
        Tail::Shared => {
            label.push_str(".shared");
            parts.push(wgsl!("tail_shared"));
            bindings.push(shared_out);
        }
        Tail::SharedGated => {
            label.push_str(".shared_gated");
            parts.push(wgsl!("tail_shared_gated"));
            bindings.extend([shared_out, bind(8, "shared_weights", Access::Read)]); // [num_tokens, num_shared]
        }
        Tail::Bias => {
            label.push_str(".bias");
            parts.push(wgsl!("tail_bias"));
            bindings.push(bind(7, "output_bias", Access::Read)); // [out_stride]
        }
    }
    parts.push(wgsl!("combine"));
    Kernel { stage: Stage::Combine, label, parts, bindings, overrides, workgroup_size: WG_SIZE, needs_subgroups: false }
}

/// Workgroups for `num_tokens` tokens and this many columns.
pub fn workgroups(num_tokens: u32, num_columns: u32) -> u64 {
    u64::from(num_tokens) * u64::from(num_columns.div_ceil(4 * WG_SIZE))
}
