// Lanes return from the helper at different places, and come back together.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
fn clamped(value: u32) -> u32 {
    if value > 9u {
        return 9u;
    }
    return value;
}
@compute @workgroup_size(64)
fn return_in_a_function(@builtin(local_invocation_index) lane: u32) {
    tile[lane] = clamped(lane);
    workgroupBarrier();
    out[lane] = tile[0];
}
