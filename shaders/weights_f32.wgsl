// weights_f32: expert weights stored as f32. No entry point.
//
// Every weight format is one such file with the same functions. Four columns are packed together, a quad: params.quad_stride
// times 16 bytes, and in it region after region. The first holds the weights themselves in blocks of 4 inputs x 4 columns,
// so that what a lane multiplies at a time is contiguous; what groups of inputs share, if anything, follows.

// A quad: weights [k4, 4 inputs, 4 columns] f32.

const SCALED_K4: u32 = 65536u; // blocks of 4 inputs that share their scales

// What a group of inputs shares: nothing here, so all inputs are one group.
alias Scales = u32;

fn load_scales(quad: u32, k: u32) -> Scales {
    return 0u;
}

// Block k of column quad `quad` (expert within the page * num_columns / 4 + column / 4), of the group whose scales these
// are: result[i] holds input 4*k + i of the four columns.
fn load_weights4x4(quad: u32, k: u32, scales: Scales) -> mat4x4<f32> {
    let block = quad * params.quad_stride / 2u + 2u * k;
    let first = words8(block);
    let second = words8(block + 1u);
    return mat4x4<f32>(
        bitcast<vec4<f32>>(first.low), bitcast<vec4<f32>>(first.high),
        bitcast<vec4<f32>>(second.low), bitcast<vec4<f32>>(second.high));
}
