// why: is assigned by some invocations only
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn through_a_let_pointer(@builtin(local_invocation_index) lane: u32) {
    var n = 0u;
    let there = &n;
    if lane > 2u {
        *there = 1u;
    }
    if n > 0u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
