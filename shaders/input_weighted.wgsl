// input_weighted: experts read their token times its weight (Llama-4). No entry point.
// The projection of a multiple is the multiple of the projection.

@group(0) @binding(7) var<storage, read> topk_weights: array<f32>; // [num_tokens, top_k]

fn weigh_input(row: u32, sums: vec4<f32>) -> vec4<f32> {
    return topk_weights[assignment_of(row)] * sums;
}
