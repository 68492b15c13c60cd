// why: by this `return`
// why: global_invocation_id
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn after_return(@builtin(global_invocation_id) id: vec3<u32>) {
    if id.x >= arrayLength(&out) {
        return;
    }
    out[id.x] = id.x;
    storageBarrier(); // FAULT barrier
}
