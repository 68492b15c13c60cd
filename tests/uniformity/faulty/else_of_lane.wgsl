// why: `id.x == 0u`
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn else_of_lane(@builtin(local_invocation_id) id: vec3<u32>) {
    if id.x == 0u {
        out[0] = 1u;
    } else {
        storageBarrier(); // FAULT barrier
    }
}
