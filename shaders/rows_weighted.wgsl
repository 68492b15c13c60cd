// rows_weighted: the weighted sum of a token's expert outputs; every assignment has a row. No entry point.

@group(0) @binding(1) var<storage, read> expert_out:        array<vec4<f32>>; // [num_rows, hidden_stride]
@group(0) @binding(2) var<storage, read> row_of_assignment: array<u32>;       // [num_tokens, top_k]
@group(0) @binding(3) var<storage, read> topk_weights:      array<f32>;       // [num_tokens, top_k]

override WEIGH: u32 = 1; // 0: the experts' input was weighted, not their output

fn routed(token: u32, column4: u32, column: u32) -> vec4<f32> {
    let hidden4 = params.hidden_stride / 4u;
    var sum = vec4<f32>(0.0);
    for (var a = token * params.top_k; a < (token + 1u) * params.top_k; a++) {
        let row = row_of_assignment[a];
        if row == DROPPED { continue; }
        var weight = 1.0;
        if WEIGH != 0u { weight = topk_weights[a]; }
        sum = fma(vec4<f32>(weight), expert_out[row * hidden4 + column4], sum);
    }
    return sum;
}
