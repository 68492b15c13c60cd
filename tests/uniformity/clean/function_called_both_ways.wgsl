// The function has no barrier for those who call it by lane; the other call is uniform.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
fn meet(really: bool) -> u32 {
    if really {
        workgroupBarrier();
    }
    return tile[0];
}
@compute @workgroup_size(64)
fn function_called_both_ways(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    tile[lane] = lane;
    out[lane] = meet(group.x == 0u);
}
