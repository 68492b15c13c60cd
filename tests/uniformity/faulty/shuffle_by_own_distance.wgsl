// why: local_invocation_index
enable subgroups;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn shuffle_by_own_distance(@builtin(local_invocation_index) lane: u32) {
    out[lane] = subgroupShuffleXor(out[lane], lane % 4u); // FAULT subgroup
}
