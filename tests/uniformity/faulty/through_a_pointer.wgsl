// why: `bound` gets a value
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
fn raise(bound: ptr<function, u32>, by: u32) {
    *bound = *bound + by;
}
@compute @workgroup_size(64)
fn through_a_pointer(@builtin(local_invocation_index) lane: u32) {
    var bound = 1u;
    raise(&bound, lane);
    if bound > 3u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
