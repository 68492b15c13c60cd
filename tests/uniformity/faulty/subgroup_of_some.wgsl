// why: subgroup_invocation_id
enable subgroups;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn subgroup_of_some(@builtin(subgroup_invocation_id) lane: u32) {
    if lane > 1u {
        out[lane] = subgroupAdd(lane); // FAULT subgroup
    }
}
