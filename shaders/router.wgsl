// router: which experts each token gets, and with which weight. One dispatch, nothing leaves the workgroup.
//
//     router_logits[t, e] = x[t, :] . router_weights[e, :] + router_bias[e]
//     topk_experts[t, :]  = the top_k experts with the largest logits, lowest index on a tie
//     topk_weights[t, :]  = softmax(router_logits[t, :]) at those, divided by their sum if renormalize
//
// CPU twin   src/reference/router.rs
// Mapping    workgroup = 4 tokens. First K_LANES lanes share the dot products of 4 tokens x 4 experts; then a
//            quarter of the lanes picks the experts of one token
// Grid       [ceil(num_tokens / 4)], folded
// Requires   num_experts <= 1024, top_k <= 32; WG_SIZE and K_LANES powers of two, K_LANES <= WG_SIZE, WG_SIZE >= 4
// Numerics   f32; every token's sums are formed in the same order wherever it stands in the batch. Ranking uses
//            integer keys, so that NaN and infinities cannot produce an id twice or out of range; such a token's
//            weights are NaN and it is counted in status

@group(0) @binding(0) var<uniform>             params:         MoeParams;
@group(0) @binding(1) var<storage, read>       router_weights: array<vec4<f32>>;   // [num_experts, 4 * ceil(hidden_size / 4)]
@group(0) @binding(3) var<storage, read>       router_bias:    array<f32>;         // [num_experts]
@group(0) @binding(4) var<storage, read_write> router_logits:  array<f32>;         // [num_tokens, num_experts]
@group(0) @binding(5) var<storage, read_write> topk_experts:   array<u32>;         // [num_tokens, top_k]
@group(0) @binding(6) var<storage, read_write> topk_weights:   array<f32>;         // [num_tokens, top_k]
@group(0) @binding(7) var<storage, read_write> status:         array<atomic<u32>>; // [1] tokens with NaN or infinite logits

override WG_SIZE: u32 = 64;

const TOKENS: u32 = 4u;
const EXPERTS: u32 = 4u;

var<workgroup> scratch_keys: array<vec2<u32>, WG_SIZE>;

// Sums of four tokens; each vec4 is four experts.
struct Sums { t0: vec4<f32>, t1: vec4<f32>, t2: vec4<f32>, t3: vec4<f32> }

// Inputs 4*k .. 4*k+3 of four experts, transposed. Past the last expert: that expert again.
fn load_router4x4(first_expert: u32, k4: u32, k: u32) -> mat4x4<f32> {
    let last = params.num_experts - 1u;
    return transpose(mat4x4<f32>(
        router_weights[min(first_expert, last) * k4 + k], router_weights[min(first_expert + 1u, last) * k4 + k],
        router_weights[min(first_expert + 2u, last) * k4 + k], router_weights[min(first_expert + 3u, last) * k4 + k]));
}

fn store_logits(token: u32, first_expert: u32, sums: vec4<f32>) {
    if token >= params.num_tokens { return; }
    for (var i = 0u; i < EXPERTS; i++) {
        let e = first_expert + i;
        if e < params.num_experts { router_logits[token * params.num_experts + e] = sums[i] + router_bias[e]; }
    }
}

// A u32 that orders as the float does: NaN lowest, -0 equal to +0.
fn order_key(value: f32) -> u32 {
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return 0u; }
    if magnitude == 0u { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

// The better of two candidates (key, expert): larger key, then lower expert.
fn better(a: vec2<u32>, b: vec2<u32>) -> vec2<u32> {
    let b_wins = b.x > a.x || (b.x == a.x && b.y < a.y);
    return select(a, b, b_wins);
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
    select_experts(first_token, lane);
}

fn compute_logits(first_token: u32, lane: u32) {
    let h = params.hidden_size;
    let k4 = (h + 3u) / 4u;
    let last_token = params.num_tokens - 1u;
    let alone = first_token == last_token;
    let t1 = min(first_token + 1u, last_token);
    let t2 = min(first_token + 2u, last_token);
    let t3 = min(first_token + 3u, last_token);
    // EXPERTS * (WG_SIZE / K_LANES) experts at a time
    for (var block = 0u; block < params.num_experts; block += EXPERTS * (WG_SIZE / K_LANES)) {
        let first_expert = block + EXPERTS * (lane / K_LANES);
        var sums = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
        if first_expert < params.num_experts {
            if alone {
                for (var k = lane % K_LANES; k < k4; k += K_LANES) {
                    sums.t0 = step(sums.t0, load_input4(first_token, h, k), load_router4x4(first_expert, k4, k));
                }
            } else {
                for (var k = lane % K_LANES; k < k4; k += K_LANES) {
                    let w = load_router4x4(first_expert, k4, k);
                    sums.t0 = step(sums.t0, load_input4(first_token, h, k), w);
                    sums.t1 = step(sums.t1, load_input4(t1, h, k), w);
                    sums.t2 = step(sums.t2, load_input4(t2, h, k), w);
                    sums.t3 = step(sums.t3, load_input4(t3, h, k), w);
                }
            }
        }
        // Barriers inside: every lane takes part, also those without an expert.
        sums.t0 = reduce_k_lanes(sums.t0, lane);
        if !alone {
            sums.t1 = reduce_k_lanes(sums.t1, lane);
            sums.t2 = reduce_k_lanes(sums.t2, lane);
            sums.t3 = reduce_k_lanes(sums.t3, lane);
        }
        if lane % K_LANES == 0u {
            store_logits(first_token, first_expert, sums.t0);
            if !alone {
                store_logits(first_token + 1u, first_expert, sums.t1);
                store_logits(first_token + 2u, first_expert, sums.t2);
                store_logits(first_token + 3u, first_expert, sums.t3);
            }
        }
    }
}

fn select_experts(first_token: u32, lane: u32) {
    let lanes = WG_SIZE / TOKENS; // per token
    let token = first_token + lane / lanes;
    let own = lane % lanes;
    let is_token = token < params.num_tokens;
    let row = min(token, params.num_tokens - 1u) * params.num_experts;

    // Round j takes the best candidate that ranks after the one of round j-1, so nothing needs to be marked.
    var last = vec2<u32>(0xffffffffu, 0u);
    var max_logit = 0.0;
    var total = 0.0;
    var chosen_total = 0.0;
    var broken = false;
    for (var j = 0u; j < params.top_k; j++) {
        var best = vec2<u32>(0u, 0xffffffffu);
        for (var e = own; e < params.num_experts; e += lanes) {
            let candidate = vec2<u32>(order_key(router_logits[row + e]), e);
            let after_last = candidate.x < last.x || (candidate.x == last.x && (j == 0u || candidate.y > last.y));
            if after_last { best = better(best, candidate); }
        }
        workgroupBarrier();
        scratch_keys[lane] = best;
        workgroupBarrier();
        for (var half = lanes / 2u; half > 0u; half /= 2u) {
            if own < half { scratch_keys[lane] = better(scratch_keys[lane], scratch_keys[lane + half]); }
            workgroupBarrier();
        }
        last = scratch_keys[lane - own];
        let logit = router_logits[row + last.y];
        if j == 0u {
            max_logit = logit;
            // sum of exp(logit - max) over all experts, and whether any logit is NaN or +infinity
            var partial = vec2<f32>(0.0);
            for (var e = own; e < params.num_experts; e += lanes) {
                let other = router_logits[row + e];
                let bits = bitcast<u32>(other);
                let bad = (bits & 0x7fffffffu) > 0x7f800000u || bits == 0x7f800000u;
                partial += vec2<f32>(weight_of(other, max_logit), select(0.0, 1.0, bad));
            }
            scratch_sums[lane] = vec4<f32>(partial, 0.0, 0.0);
            workgroupBarrier();
            for (var half = lanes / 2u; half > 0u; half /= 2u) {
                if own < half { scratch_sums[lane] += scratch_sums[lane + half]; }
                workgroupBarrier();
            }
            let sums = scratch_sums[lane - own];
            total = sums.x;
            broken = sums.y > 0.0 || bitcast<u32>(max_logit) == 0xff800000u;
        }
        let weight = weight_of(logit, max_logit) / total;
        chosen_total += weight;
        if is_token && own == 0u {
            topk_experts[token * params.top_k + j] = last.y;
            topk_weights[token * params.top_k + j] = weight;
        }
    }
    if is_token && own == 0u {
        if broken { atomicAdd(&status[0], 1u); }
        for (var j = 0u; j < params.top_k; j++) {
            let a = token * params.top_k + j;
            if params.renormalize != 0u { topk_weights[a] /= chosen_total; }
            if broken { topk_weights[a] = bitcast<f32>(params.nan_bits); }
        }
    }
}

// exp(logit - max), and exactly 0 for a masked (-infinity) logit.
fn weight_of(logit: f32, max_logit: f32) -> f32 {
    if bitcast<u32>(logit) == 0xff800000u { return 0.0; }
    return exp(max(logit - max_logit, -100.0));
}
