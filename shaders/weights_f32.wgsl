// weights_f32: expert weights stored as f32. No entry point.
// Every weight format is one such file with the same function. Weights come in blocks of 4 columns x 4 inputs, so that
// what a lane multiplies at a time is contiguous, and neighbouring inputs of the same columns follow each other.

@group(0) @binding(1) var<storage, read> weights: array<vec4<f32>>; // [page experts, num_columns / 4, k4, 4 inputs, 4 columns]

// Block k of column quad `quad` (expert within the page * num_columns / 4 + column / 4):
// result[i] holds input 4*k + i of the four columns.
fn load_weights4x4(quad: u32, k: u32) -> mat4x4<f32> {
    let block = (quad * params.k4 + k) * 4u;
    return mat4x4<f32>(weights[block], weights[block + 1u], weights[block + 2u], weights[block + 3u]);
}
