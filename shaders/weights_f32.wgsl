// weights_f32: expert weights stored as f32. No entry point.
//
// Every weight format is one such file with the same functions. Four columns are packed together, a quad: params.quad_stride
// vec4 long, and in it region after region. The first holds the weights themselves in blocks of 4 inputs x 4 columns, so
// that what a lane multiplies at a time is contiguous; what groups of inputs share, if anything, follows.

@group(0) @binding(1) var<storage, read> weights: array<vec4<f32>>; // [page experts, num_columns / 4, k4, 4 inputs, 4 columns]

// What a group of inputs shares: nothing here, so all inputs are one group.
alias Scales = u32;

fn load_scales(quad: u32, k: u32) -> Scales {
    return 0u;
}

// Block k of column quad `quad` (expert within the page * num_columns / 4 + column / 4), of the group whose scales these
// are: result[i] holds input 4*k + i of the four columns.
fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let block = quad * params.quad_stride + k * 4u;
    return mat4x4<f32>(weights[block], weights[block + 1u], weights[block + 2u], weights[block + 3u]);
}
