// store_plain: there is no gate; packed columns are those of up_proj. No entry point.

@group(0) @binding(5) var<storage, read_write> intermediate: array<vec4<f32>>; // [num_rows, out_stride]

fn store_activated(row: u32, column: u32, sums: vec4<f32>) {
    let activated = vec4<f32>(function_of(sums.xy), function_of(sums.zw));
    intermediate[(row * params.out_stride + column) / 4u] = activated;
}
