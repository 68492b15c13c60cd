// router: which experts each token gets, and with which weight. One dispatch, nothing leaves the workgroup.
//
//     router_logits[t, e] = finish_logit(x[t, :] . router_weights[e, :])         products_*.wgsl, logits_*.wgsl
//     topk_experts[t, :]  = the top_k experts with the best ranks                ranks_*.wgsl, groups_*.wgsl, choose_*.wgsl
//     topk_weights[t, :]  = their scores, normalised and scaled                  scores.wgsl, weigh_*.wgsl
//
// CPU twin   src/reference/router.rs
// Mapping    workgroup = 4 tokens. First all lanes make their logits; then a quarter of the lanes picks the experts of
//            one token. Loops over experts have as many rounds for every lane: Microsoft's FXC takes barriers after or
//            around a loop of a lane's own length for divergent
// Grid       [ceil(num_tokens / 4)], folded
// Requires   num_experts <= 1024; WG_SIZE a power of two, at least 4
// Numerics   f32; every token's sums are formed in the same order wherever it stands in the batch. Ranking uses
//            integer keys, so that NaN and infinities cannot produce an id twice or out of range. A token with NaN or
//            infinite logits or weights is counted in status; its weights are NaN, or nobody computes it (DROP_BROKEN)

@group(0) @binding(0) var<uniform>             params:         RouterParams;
@group(0) @binding(3) var<storage, read>       router_vectors: array<f32>;         // [bias, selection bias, scale][num_experts]
@group(0) @binding(4) var<storage, read_write> router_logits:  array<f32>;         // [num_tokens, num_experts], then other rows and ranks
@group(0) @binding(5) var<storage, read_write> topk_experts:   array<u32>;         // [num_tokens, top_k]
@group(0) @binding(6) var<storage, read_write> topk_weights:   array<f32>;         // [num_tokens, top_k]
@group(0) @binding(7) var<storage, read_write> status:         array<atomic<u32>>; // [0] tokens with NaN or infinite logits, [4 + t] which

override WG_SIZE: u32 = 64;

const TOKENS: u32 = 4u;

// The token that a lane works on once logits are there, one of WG_SIZE / TOKENS lanes for each.
struct Place {
    token: u32,
    row: u32, // where its logits begin
    own: u32, // this lane among those of the token
    is_token: bool,
}

// What scores need to know of all logits of a token.
struct Row {
    max: f32,
    total: f32, // sum of exp(logit - max)
    broken: bool,
}

@compute @workgroup_size(WG_SIZE)
fn router(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let first_token = flat_group(group, groups) * TOKENS;
    if first_token >= params.num_tokens { return; }
    compute_logits(first_token, lane);
    storageBarrier();
    workgroupBarrier();

    let lanes = WG_SIZE / TOKENS;
    let token = first_token + lane / lanes;
    let row = min(token, params.num_tokens - 1u) * params.num_experts;
    let at = Place(token, row, lane % lanes, token < params.num_tokens);
    adjust_logits(at);
    let before = before_choice(at, lane);
    choose(at, lane);
    let after = after_choice(at, lane, before);
    if at.is_token && at.own == 0u {
        if weigh(at, after) {
            atomicAdd(&status[0], 1u);
            if DROP_BROKEN != 0u { atomicStore(&status[4u + at.token], 1u); }
        }
    }
}

// Takes the dot product of a token and a row of router_weights.
fn store_product(token: u32, row: u32, product: f32) {
    if row < params.num_experts {
        router_logits[token * params.num_experts + row] = finish_logit(product, row);
    } else if row < params.num_rows {
        router_logits[other_logit(token, row)] = product;
    }
}

// Where the logit of a router row that is not an expert's lies.
fn other_logit(token: u32, row: u32) -> u32 {
    let others = params.num_rows - params.num_experts;
    return params.num_tokens * params.num_experts + token * others + (row - params.num_experts);
}

// Where the ranks of a token begin, if there are any. The score of its first choice follows all ranks.
fn ranks_at(at: Place) -> u32 {
    return params.num_tokens * params.num_rows + at.row;
}

// A u32 that orders as the float does: NaN lowest, -0 equal to +0.
fn order_key(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return 0u; }
    if magnitude == 0u { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

fn is_neg_infinity(value: f32) -> bool {
    return bitcast<u32>(value) == 0xff800000u;
}

// Everything scores need, given the largest logit. Barriers inside.
fn row_totals(at: Place, lane: u32, max: f32) -> Row {
    // sum of exp(logit - max) over all experts, and whether any logit is NaN or +infinity
    var partial = vec2<f32>(0.0);
    for (var begin = 0u; begin < params.num_experts; begin += WG_SIZE / TOKENS) {
        let e = begin + at.own;
        if e < params.num_experts {
            let logit = router_logits[at.row + e];
            let bits = bitcast<u32>(logit);
            let bad = (bits & 0x7fffffffu) > 0x7f800000u || bits == 0x7f800000u;
            partial += vec2<f32>(weight_of(logit, max), select(0.0, 1.0, bad));
        }
    }
    workgroupBarrier();
    scratch_sums[lane] = vec4<f32>(partial, 0.0, 0.0);
    workgroupBarrier();
    for (var half = WG_SIZE / TOKENS / 2u; half > 0u; half /= 2u) {
        if at.own < half { scratch_sums[lane] += scratch_sums[lane + half]; }
        workgroupBarrier();
    }
    let sums = scratch_sums[lane - at.own];
    return Row(max, sums.x, sums.y > 0.0 || is_neg_infinity(max));
}

// The largest logit of a token. Barriers inside.
fn row_max(at: Place, lane: u32) -> f32 {
    var max = router_logits[at.row];
    for (var begin = 0u; begin < params.num_experts; begin += WG_SIZE / TOKENS) {
        // The last expert is looked at by all that have none left.
        let logit = router_logits[at.row + min(begin + at.own, params.num_experts - 1u)];
        if order_key(logit) > order_key(max) { max = logit; }
    }
    workgroupBarrier();
    scratch_sums[lane].x = max;
    workgroupBarrier();
    for (var half = WG_SIZE / TOKENS / 2u; half > 0u; half /= 2u) {
        if at.own < half {
            let other = scratch_sums[lane + half].x;
            if order_key(other) > order_key(scratch_sums[lane].x) { scratch_sums[lane].x = other; }
        }
        workgroupBarrier();
    }
    return scratch_sums[lane - at.own].x;
}

// exp(logit - max), and exactly 0 for a masked (-infinity) logit.
fn weight_of(logit: f32, max_logit: f32) -> f32 {
    if is_neg_infinity(logit) { return 0.0; }
    return exp(max(logit - max_logit, -100.0));
}
