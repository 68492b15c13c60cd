// why: `value < 7u`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
fn is_small(value: u32) -> bool {
    if value < 7u {
        return true;
    }
    return false;
}
@compute @workgroup_size(64)
fn returned_by_lane(@builtin(local_invocation_index) lane: u32) {
    if is_small(lane) {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
