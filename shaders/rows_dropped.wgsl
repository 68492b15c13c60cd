// rows_dropped: the weighted sum of a token's expert outputs, where assignments may have no row: dropped ones, and
// those of experts without weights. No entry point.

@group(0) @binding(1) var<storage, read> expert_out:        array<vec4<f32>>; // [num_rows, hidden_stride]
@group(0) @binding(2) var<storage, read> row_of_assignment: array<u32>;       // [num_tokens, top_k]
@group(0) @binding(3) var<storage, read> topk_weights:      array<f32>;       // [num_tokens, top_k]
@group(0) @binding(5) var<storage, read> topk_experts:      array<u32>;       // [num_tokens, top_k], after capacity
@group(0) @binding(6) var<storage, read> expert_in:         array<f32>;       // [num_tokens, in_stride]

override WEIGH: u32 = 1;             // 0: the experts' input was weighted, not their output
override SPECIAL_IS_IDENTITY: u32 = 1; // experts without weights return their input; 0: nothing
override PASS_THROUGH: u32 = 0;      // 1: so does a dropped assignment

fn routed(token: u32, column4: u32, column: u32) -> vec4<f32> {
    let hidden4 = params.hidden_stride / 4u;
    var sum = vec4<f32>(0.0);
    for (var a = token * params.top_k; a < (token + 1u) * params.top_k; a++) {
        let expert = topk_experts[a];
        var weight = 1.0;
        if WEIGH != 0u { weight = topk_weights[a]; }
        if expert < params.num_weighted {
            sum = fma(vec4<f32>(weight), expert_out[row_of_assignment[a] * hidden4 + column4], sum);
        } else if select(PASS_THROUGH, SPECIAL_IS_IDENTITY, expert < params.num_experts) != 0u {
            sum = fma(vec4<f32>(weight), input4(token, column), sum);
        }
    }
    return sum;
}

fn input4(token: u32, column: u32) -> vec4<f32> {
    var value = vec4<f32>(0.0);
    for (var i = 0u; i < 4u; i++) {
        if column + i < params.in_width { value[i] = expert_in[token * params.in_stride + column + i]; }
    }
    return value;
}
