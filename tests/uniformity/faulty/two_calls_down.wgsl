// why: `outer` is called here
// why: `odd`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
fn inner(odd: bool) {
    if odd {
        workgroupBarrier(); // FAULT barrier
    }
}
fn outer(value: u32) {
    inner((value & 1u) == 1u);
}
@compute @workgroup_size(64)
fn two_calls_down(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    outer(group.x);
    if group.y == 0u {
        outer(lane);
    }
    out[lane] = tile[lane];
}
