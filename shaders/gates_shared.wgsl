// gates_shared: the router also weights the shared experts, each by a row of its own. No entry point.

const GATE_SIGMOID: u32 = 0u; // by its sigmoid
const GATE_JOINT: u32 = 1u;   // as if it had been chosen
const GATE_MIX: u32 = 2u;     // by its sigmoid, and the routed experts by the rest of 1

override GATE: u32 = GATE_SIGMOID;

@group(0) @binding(8) var<storage, read_write> shared_weights: array<f32>; // [num_tokens, num_shared]

// What shared experts add to the sum of |w|^p.
fn joint_norm(at: Place) -> f32 {
    var sum = 0.0;
    if GATE == GATE_JOINT {
        for (var s = 0u; s < params.num_shared; s++) { sum += power(shared_score(at, s)); }
    }
    return sum;
}

// Stores the weights of the shared experts; `factor` is what choices are multiplied by. Returns a further factor of
// theirs.
fn weigh_shared(at: Place, factor: f32) -> f32 {
    var rest = 1.0;
    for (var s = 0u; s < params.num_shared; s++) {
        var weight = shared_score(at, s);
        if GATE == GATE_JOINT { weight *= factor; }
        if GATE == GATE_MIX { rest = 1.0 - weight; }
        shared_weights[at.token * params.num_shared + s] = weight;
    }
    return rest;
}

fn shared_score(at: Place, s: u32) -> f32 {
    let logit = router_logits[other_logit(at.token, params.num_experts + s)];
    if GATE != GATE_JOINT { return sigmoid(logit); }
    if SCORES == RAW { return logit; }
    return score_alone(logit);
}
