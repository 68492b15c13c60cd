// A loop of another length in each lane: after it all are together again.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn loop_per_lane_before(@builtin(local_invocation_index) lane: u32) {
    var sum = 0u;
    for (var i = 0u; i < lane; i++) {
        if i == 7u { continue; }
        if sum > 100u { break; }
        sum += i;
    }
    tile[lane] = sum;
    workgroupBarrier();
    out[lane] = tile[0];
}
