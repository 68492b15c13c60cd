// weights_f32: expert weights stored as f32. No entry point.
// Every weight format is one such file with the same function load_weights4.

@group(0) @binding(1) var<storage, read> weights: array<vec4<f32>>; // [page experts, num_columns, 4 * k4]

// Inputs 4*k .. 4*k+3 of packed weight row `row` (row = expert within the page * num_columns + column).
fn load_weights4(row: u32, k: u32) -> vec4<f32> {
    return weights[row * params.k4 + k];
}

// The same for four neighbouring rows, transposed: result[i] is input 4*k+i of the four columns.
fn load_weights4x4(row: u32, k: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        load_weights4(row, k), load_weights4(row + 1u, k), load_weights4(row + 2u, k), load_weights4(row + 3u, k)));
}
