// why: subgroup_id differs between subgroups
enable subgroups;
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn barrier_by_subgroup(@builtin(subgroup_id) which: u32, @builtin(local_invocation_index) lane: u32) {
    if which == 0u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
