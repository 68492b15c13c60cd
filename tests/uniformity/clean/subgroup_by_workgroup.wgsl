// All lanes of the workgroup, and so of each subgroup, come along.
enable subgroups;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn subgroup_by_workgroup(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    if group.x > 1u {
        out[lane] = subgroupAdd(lane);
    }
}
