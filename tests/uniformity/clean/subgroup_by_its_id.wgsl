// Subgroups go different ways, each of them as a whole, and their number is the same for all.
enable subgroups;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn subgroup_by_its_id(
    @builtin(subgroup_id) which: u32,
    @builtin(num_subgroups) num: u32,
    @builtin(local_invocation_index) lane: u32,
) {
    if which == 1u {
        out[lane] = subgroupAdd(lane);
    }
    if num > 2u {
        workgroupBarrier();
    }
}
