// why: local_invocation_index
var<workgroup> counts: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn uniform_load_of_own_place(@builtin(local_invocation_index) lane: u32) {
    out[lane] = workgroupUniformLoad(&counts[lane]); // FAULT barrier
}
