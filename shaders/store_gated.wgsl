// store_gated: packed columns are gate i, up i, gate i+1, up i+1. No entry point.

@group(0) @binding(5) var<storage, read_write> intermediate: array<vec2<f32>>; // [num_rows, out_stride]

fn store_activated(row: u32, column: u32, sums: vec4<f32>) {
    intermediate[(row * params.out_stride + column / 2u) / 2u] = activate(sums.xz, sums.yw);
}
