// Each workgroup takes one case; a break within it is the same for all.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn switch_of_a_workgroup(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    switch group.x % 3u {
        case 0u: {
            tile[lane] = lane;
            workgroupBarrier();
            if group.y == 1u { break; }
            workgroupBarrier();
        }
        case 1u, 2u: {
            storageBarrier();
        }
        default: {}
    }
    workgroupBarrier();
    out[lane] = tile[0];
}
