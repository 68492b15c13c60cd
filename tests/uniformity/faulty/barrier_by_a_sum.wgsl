// why: the result of a subgroup operation
enable subgroups;
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn barrier_by_a_sum(@builtin(local_invocation_index) lane: u32) {
    let sum = subgroupAdd(lane);
    if sum > 100u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
