// products_ready: the router's dot products, made by the grouped matmul before. For drivers on which a matmul of a few
// tokens at a time is slow. No entry point.

@group(0) @binding(2) var<storage, read> products: array<f32>; // [num_tokens, 4 * ceil(num_rows / 4)]

fn compute_logits(first_token: u32, lane: u32) {
    let stride = (params.num_rows + 3u) / 4u * 4u;
    let end = min(TOKENS, params.num_tokens - first_token) * params.num_rows;
    for (var begin = 0u; begin < end; begin += WG_SIZE) {
        let i = begin + lane;
        let token = first_token + i / params.num_rows;
        let row = i % params.num_rows;
        if i < end { store_product(token, row, products[token * stride + row]); }
    }
}
