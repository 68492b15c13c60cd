// reduce: sums over lanes, in an order that does not depend on the batch. No entry point.

override K_LANES: u32 = 8; // neighbouring lanes that share a result: a power of two, at most WG_SIZE

var<workgroup> scratch_sums: array<vec4<f32>, WG_SIZE>;

// Adds up the partial sums of the K_LANES lanes that share a result; lane 0 of them gets the total.
// Every lane of the workgroup has to call it.
fn reduce_k_lanes(partial: vec4<f32>, lane: u32) -> vec4<f32> {
    if K_LANES == 1u { return partial; }
    workgroupBarrier();
    scratch_sums[lane] = partial;
    workgroupBarrier();
    for (var half = K_LANES / 2u; half > 0u; half /= 2u) {
        if lane % K_LANES < half { scratch_sums[lane] += scratch_sums[lane + half]; }
        workgroupBarrier();
    }
    return scratch_sums[lane];
}
