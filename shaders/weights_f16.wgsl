// weights_f16: expert weights stored as IEEE half floats, two to a u32. No entry point.
// unpack2x16float is core WGSL: no SHADER_F16 needed.

@group(0) @binding(1) var<storage, read> weights: array<vec2<u32>>; // [page experts, num_columns, 4 * k4]

// Inputs 4*k .. 4*k+3 of packed weight row `row` (row = expert within the page * num_columns + column).
fn load_weights4(row: u32, k: u32) -> vec4<f32> {
    let pairs = weights[row * params.k4 + k];
    return vec4<f32>(unpack2x16float(pairs.x), unpack2x16float(pairs.y));
}

// The same for four neighbouring rows, transposed: result[i] is input 4*k+i of the four columns.
fn load_weights4x4(row: u32, k: u32) -> mat4x4<f32> {
    return transpose(mat4x4<f32>(
        load_weights4(row, k), load_weights4(row + 1u, k), load_weights4(row + 2u, k), load_weights4(row + 3u, k)));
}
