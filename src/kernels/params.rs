//! The uniforms: the same structs as in the WGSL files.

use bytemuck::{Pod, Zeroable};

/// Uniform of permute and combine (`shaders/moe_params.wgsl`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct MoeParams {
    /// Rows of x and y.
    pub num_tokens: u32,
    /// Width of a row of y.
    pub hidden_size: u32,
    /// Experts that a token can choose.
    pub num_experts: u32,
    /// The first of them, which have weights.
    pub num_weighted: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// `num_tokens * top_k`
    pub num_assignments: u32,
    /// Length of the tile list.
    pub num_tile_slots: u32,
    /// Rows in a tile.
    pub tile_m: u32,
    /// Elements from one row of `expert_out` to the next.
    pub hidden_stride: u32,
    /// Column of `y` that the first column of `expert_out` is.
    pub first_column: u32,
    /// Assignments that one workgroup of permute places.
    pub chunk_len: u32,
    /// Elements from one row of what experts read to the next.
    pub in_stride: u32,
    /// Elements of such a row.
    pub in_width: u32,
    /// Shared experts.
    pub num_shared: u32,
    /// Elements from one row of `shared_out` to the next.
    pub out_stride: u32,
    /// Factor of the routed experts.
    pub routed_scale: f32,
    /// Factor of the shared experts.
    pub shared_scale: f32,
}

/// Uniform of the router (`shaders/router_params.wgsl`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct RouterParams {
    /// Rows of x.
    pub num_tokens: u32,
    /// Width of a token.
    pub hidden_size: u32,
    /// Experts that a token can choose.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// Rows of the router's weights: experts, then shared experts, groups, noise.
    pub num_rows: u32,
    /// Rows before this one are given.
    pub first_row: u32,
    /// Shared experts with a gate.
    pub num_shared: u32,
    /// Groups of experts.
    pub num_groups: u32,
    /// Groups that a token keeps.
    pub keep_groups: u32,
    /// The rank of an expert in any other group, as bits.
    pub masked_bits: u32,
    /// A quiet NaN.
    pub nan_bits: u32,
    /// 1: divide a token's weights by their norm.
    pub renormalize: u32,
    /// Of this pass.
    pub noise_key: u32,
    /// Of this pass in the batch.
    pub first_token: u32,
    /// Of every weight.
    pub scale: f32,
    /// Of every logit.
    pub logit_scale: f32,
    /// 0: no cap.
    pub logit_softcap: f32,
    /// Exponent of the norm.
    pub norm_p: f32,
    /// Added to the norm.
    pub norm_epsilon: f32,
    /// Least value of the norm.
    pub norm_floor: f32,
    /// Half the width of the noise on the input.
    pub jitter: f32,
    /// Half the width of what sparsemixer calls close.
    pub close: f32,
}

/// Uniform of the grouped matmul; one for each stage and weight page (`shaders/matmul_params.wgsl`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct MatmulParams {
    /// Tiles launched.
    pub num_tile_slots: u32,
    /// Workgroups side by side for one tile.
    pub num_column_tiles: u32,
    /// First expert of this weight page.
    pub first_expert: u32,
    /// One past its last expert.
    pub end_expert: u32,
    /// Column of the output that this page's first column is; wraps where that is below 0.
    pub first_column: u32,
    /// Packed columns of this page.
    pub num_columns: u32,
    /// First column of this page that is due.
    pub begin_column: u32,
    /// One past the last that is due.
    pub end_column: u32,
    /// Inputs of a weight row, in vec4.
    pub k4: u32,
    /// vec4s of 16 bytes from four packed columns to the next four.
    pub quad_stride: u32,
    /// Elements from one input row to the next.
    pub x_stride: u32,
    /// Elements from one output row to the next.
    pub out_stride: u32,
    /// Rows; of dense tiles: rows of one expert.
    pub num_assignments: u32,
    /// Experts that have weights.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// Rows in a tile, where tiles are made on the spot.
    pub tile_m: u32,
    /// Elements from one expert's bias to the next.
    pub bias_stride: u32,
    /// Packed column that the output's first column is.
    pub slice_column: u32,
    /// First number of the activation.
    pub limit: f32,
    /// Second number of the activation.
    pub alpha: f32,
}

/// Uniform of `shaders/capacity.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct CapacityParams {
    /// Tokens.
    pub num_tokens: u32,
    /// Tokens of each sequence.
    pub tokens_per_sequence: u32,
    /// Experts that a token can choose.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// Assignments that an expert takes of a sequence.
    pub capacity: u32,
    /// Where the keys begin in their buffer.
    pub keys_at: u32,
}

/// Uniform of `shaders/norm.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct NormParams {
    /// Rows.
    pub num_rows: u32,
    /// Elements of a row.
    pub width: u32,
    /// Elements from one row of the input to the next.
    pub v_stride: u32,
    /// Elements from one row of the output to the next.
    pub normed_stride: u32,
    /// Added to the mean square.
    pub epsilon: f32,
}

/// Uniform of `shaders/token_statistics.wgsl` and `shaders/expert_statistics.wgsl`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
pub struct StatisticsParams {
    /// Tokens.
    pub num_tokens: u32,
    /// Tokens of each sequence.
    pub tokens_per_sequence: u32,
    /// Experts that a token can choose.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
}

/// The uniform of one dispatch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Uniform {
    /// Of permute and combine.
    Moe(MoeParams),
    /// Of the router and what else is about choices.
    Router(RouterParams),
    /// Of the grouped matmul.
    Matmul(MatmulParams),
    /// Of capacity.
    Capacity(CapacityParams),
    /// Of norms.
    Norm(NormParams),
    /// Of the statistics.
    Statistics(StatisticsParams),
}

impl Uniform {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Uniform::Moe(params) => bytemuck::bytes_of(params),
            Uniform::Router(params) => bytemuck::bytes_of(params),
            Uniform::Matmul(params) => bytemuck::bytes_of(params),
            Uniform::Capacity(params) => bytemuck::bytes_of(params),
            Uniform::Norm(params) => bytemuck::bytes_of(params),
            Uniform::Statistics(params) => bytemuck::bytes_of(params),
        }
    }
}
