// why: atomic
var<workgroup> ticket: atomic<u32>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn atomic_ticket(@builtin(local_invocation_index) lane: u32) {
    let mine = atomicAdd(&ticket, 1u);
    if mine == 63u {
        storageBarrier(); // FAULT barrier
        out[lane] = 1u;
    }
}
