// why: `lane < 32u`
// why: local_invocation_index
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn if_lane(@builtin(local_invocation_index) lane: u32) {
    tile[lane] = lane;
    if lane < 32u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[63u - lane];
}
