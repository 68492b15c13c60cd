// why: `first` is workgroup memory
var<workgroup> first: u32;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn workgroup_memory(@builtin(local_invocation_index) lane: u32) {
    if lane == 0u { first = out[0]; }
    workgroupBarrier();
    if first > 4u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = first;
}
