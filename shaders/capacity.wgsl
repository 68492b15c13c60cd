// capacity: assignments beyond what an expert takes are dropped.
//
//     kept_experts[a] = topk_experts[a], or DROPPED if its expert has taken capacity others that go first
//
// Who goes first: earlier tokens (BY_POSITION); all first choices, then all second choices, ... (BY_CHOICE), or within
// these the tokens with the larger key (BY_SCORE); or the larger weight (BY_WEIGHT, where each expert chooses).
//
// CPU twin   src/reference/capacity.rs
// Mapping    workgroup = one expert and one sequence of the batch
// Grid       [num_experts * num_tokens / tokens_per_sequence], folded
// Requires   WG_SIZE a power of two; choice j is expert j for BY_WEIGHT
// Numerics   integers; keys are compared as ordered integers, ties go to the earlier token: no order of execution matters

struct CapacityParams {
    num_tokens: u32,
    tokens_per_sequence: u32,
    num_experts: u32,
    top_k: u32,
    capacity: u32,
    keys_at: u32, // where the keys begin
}

@group(0) @binding(0) var<uniform>             params:       CapacityParams;
@group(0) @binding(1) var<storage, read>       topk_experts: array<u32>;         // [num_tokens, top_k]
@group(0) @binding(2) var<storage, read>       keys:         array<f32>;         // [keys_at] unused, [num_tokens] or [num_tokens, top_k]
@group(0) @binding(3) var<storage, read_write> kept_experts: array<u32>;         // [num_tokens, top_k]
@group(0) @binding(4) var<storage, read_write> status:       array<atomic<u32>>; // [1] assignments dropped

const BY_POSITION: u32 = 0u;
const BY_CHOICE: u32 = 1u;
const BY_SCORE: u32 = 2u;
const BY_WEIGHT: u32 = 3u;
const DROPPED: u32 = 0xffffffffu;

override WG_SIZE: u32 = 256;
override PRIORITY: u32 = BY_POSITION;

var<workgroup> scratch: array<u32, WG_SIZE>;

struct Range { first_token: u32, expert: u32 }

@compute @workgroup_size(WG_SIZE)
fn capacity(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.y * groups.x + group.x;
    let range = Range((index / params.num_experts) * params.tokens_per_sequence, index % params.num_experts);
    if range.first_token >= params.num_tokens { return; }
    if range.expert == 0u { keep_nobodys(range.first_token, lane); }

    let tokens = params.tokens_per_sequence;
    if PRIORITY == BY_POSITION {
        take_in_order(range, 0u, tokens * params.top_k, 0u, params.capacity, lane);
        return;
    }
    var left = params.capacity;
    let first_choice = select(0u, range.expert, PRIORITY == BY_WEIGHT);
    let end_choice = select(params.top_k, range.expert + 1u, PRIORITY == BY_WEIGHT);
    for (var j = first_choice; j < end_choice; j++) {
        let wanted = count_above(range, j, 0u, lane);
        if PRIORITY == BY_CHOICE || wanted <= left {
            take_in_order(range, j * tokens, (j + 1u) * tokens, 0u, left, lane);
        } else {
            let limit = key_of_rank(range, j, left, lane);
            take_in_order(range, j * tokens, (j + 1u) * tokens, limit, left - count_above(range, j, limit + 1u, lane), lane);
        }
        left -= min(left, wanted);
    }
}

// Assignments of no expert belong to the workgroups of expert 0.
fn keep_nobodys(first_token: u32, lane: u32) {
    for (var i = lane; i < params.tokens_per_sequence * params.top_k; i += WG_SIZE) {
        let a = first_token * params.top_k + i;
        if topk_experts[a] >= params.num_experts { kept_experts[a] = DROPPED; }
    }
}

// Assignment number i: token by token, or choice by choice.
fn assignment(range: Range, i: u32) -> u32 {
    if PRIORITY == BY_POSITION { return range.first_token * params.top_k + i; }
    let tokens = params.tokens_per_sequence;
    return (range.first_token + i % tokens) * params.top_k + i / tokens;
}

// 1 at least: 0 is below every key.
fn key_of(a: u32) -> u32 {
    var value = 0.0;
    if PRIORITY == BY_SCORE { value = keys[params.keys_at + a / params.top_k]; }
    if PRIORITY == BY_WEIGHT { value = keys[params.keys_at + a]; }
    let bits = bitcast<u32>(value);
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u { return 1u; }
    if magnitude == 0u { return 0x80000000u; }
    return select(bits | 0x80000000u, ~bits, bits >= 0x80000000u);
}

// Assignments begin..end of the expert, in order: those with a key above `limit` are kept, and of those at it the first
// `at_limit`. limit 0: every key counts as at it.
fn take_in_order(range: Range, begin: u32, end: u32, limit: u32, at_limit: u32, lane: u32) {
    var before = 0u;
    for (var round = begin; round < end; round += WG_SIZE) {
        let i = round + lane;
        var mine = false;
        var a = 0u;
        var key = 0u;
        if i < end {
            a = assignment(range, i);
            mine = topk_experts[a] == range.expert;
            if mine && limit > 0u { key = key_of(a); }
        }
        let candidate = mine && key == limit;
        // inclusive prefix sum of the candidates
        workgroupBarrier();
        scratch[lane] = select(0u, 1u, candidate);
        workgroupBarrier();
        for (var distance = 1u; distance < WG_SIZE; distance *= 2u) {
            var earlier = 0u;
            if lane >= distance { earlier = scratch[lane - distance]; }
            workgroupBarrier();
            scratch[lane] += earlier;
            workgroupBarrier();
        }
        if mine {
            let rank = before + scratch[lane]; // from 1
            let kept = key > limit || (candidate && rank <= at_limit);
            kept_experts[a] = select(DROPPED, range.expert, kept);
            if !kept { atomicAdd(&status[1], 1u); }
        }
        before += scratch[WG_SIZE - 1u];
    }
}

// Assignments of the expert among choices j whose key is at least `least`.
fn count_above(range: Range, j: u32, least: u32, lane: u32) -> u32 {
    let tokens = params.tokens_per_sequence;
    var count = 0u;
    for (var i = j * tokens + lane; i < (j + 1u) * tokens; i += WG_SIZE) {
        let a = assignment(range, i);
        if topk_experts[a] == range.expert && (least == 0u || key_of(a) >= least) { count++; }
    }
    workgroupBarrier();
    scratch[lane] = count;
    workgroupBarrier();
    for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
        if lane < half { scratch[lane] += scratch[lane + half]; }
        workgroupBarrier();
    }
    // The same for every lane: what depends on it may hold barriers.
    return workgroupUniformLoad(&scratch[0]);
}

// The largest key that at least `rank` assignments reach, bit by bit. More than `rank` exist.
fn key_of_rank(range: Range, j: u32, rank: u32, lane: u32) -> u32 {
    var key = 0u;
    for (var bit = 0x80000000u; bit > 0u; bit /= 2u) {
        if count_above(range, j, key | bit, lane) >= rank { key |= bit; }
    }
    return key;
}
