// why: `i < lane`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn loop_per_lane(@builtin(local_invocation_index) lane: u32) {
    for (var i = 0u; i < lane; i++) {
        tile[lane] = i;
        workgroupBarrier(); // FAULT barrier
        out[lane] = tile[0];
    }
}
