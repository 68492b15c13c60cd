// matmul_params: the uniform of the grouped matmul, and the arithmetic that its variants share.
// No entry point. Rust side: src/kernels/params.rs, compared field by field in tests/shader_contract.rs.

struct MatmulParams {
    num_tile_slots: u32,   // tiles launched: an upper bound, whatever the routing
    num_column_tiles: u32, // workgroups side by side for one tile
    first_expert: u32,     // experts of this weight page: first_expert..end_expert
    end_expert: u32,
    first_column: u32,     // column of the output that this page's first column is; wraps where that is below 0
    num_columns: u32,      // packed columns of this page
    begin_column: u32,     // columns of this page that are due: begin_column..end_column
    end_column: u32,
    k4: u32,               // inputs of a weight row, in vec4
    quad_stride: u32,      // vec4s of 16 bytes from four packed columns to the next four
    x_stride: u32,         // elements from one input row to the next
    out_stride: u32,       // elements from one output row to the next
    num_assignments: u32,  // rows; of the dense tiles: rows of one expert
    num_experts: u32,      // experts that have weights
    top_k: u32,
    tile_m: u32,           // rows in a tile, where tiles are made on the spot
    bias_stride: u32,      // elements from one expert's bias to the next
    slice_column: u32,     // packed column that the output's first column is
    limit: f32,            // numbers of the activation
    alpha: f32,
}

// Columns that one lane owns. gate_up packs (gate i, up i, gate i+1, up i+1) into them, so that the
// activation finds both of its operands in the same lane.
const LANE_COLUMNS: u32 = 4u;
