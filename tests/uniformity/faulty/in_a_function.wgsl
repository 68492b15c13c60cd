// why: `total` is called here
// why: `lane == 0u`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
fn total() -> u32 {
    workgroupBarrier(); // FAULT barrier
    return tile[0] + tile[1];
}
@compute @workgroup_size(64)
fn in_a_function(@builtin(local_invocation_index) lane: u32) {
    tile[lane] = lane;
    if lane == 0u {
        out[0] = total();
    }
}
