//! The uniforms: the same structs as in `shaders/moe_params.wgsl` and `shaders/matmul_params.wgsl`.

use bytemuck::{Pod, Zeroable};

/// Uniform of router, permute and combine.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct MoeParams {
    /// Rows of x and y.
    pub num_tokens: u32,
    /// Width of a token.
    pub hidden_size: u32,
    /// Experts in the layer.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// `num_tokens * top_k`
    pub num_assignments: u32,
    /// Length of the tile list.
    pub num_tile_slots: u32,
    /// Rows in a tile.
    pub tile_m: u32,
    /// 1: divide a token's weights by their sum.
    pub renormalize: u32,
    /// Elements from one row of `expert_out` to the next.
    pub hidden_stride: u32,
    /// Assignments that one workgroup of permute places.
    pub chunk_len: u32,
    /// A quiet NaN.
    pub nan_bits: u32,
    /// Column of `y` that the first column of `expert_out` is.
    pub first_column: u32,
}

/// Uniform of the grouped matmul; one for each stage and weight page.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
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
    /// Length of a packed weight row, in vec4.
    pub k4: u32,
    /// Elements from one input row to the next.
    pub x_stride: u32,
    /// Elements from one output row to the next.
    pub out_stride: u32,
    /// `num_tokens * top_k`
    pub num_assignments: u32,
    /// Experts in the layer.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
}
