// why: `counts` is a storage buffer that is written
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> counts: array<u32>;
@compute @workgroup_size(64)
fn storage_that_is_written(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    let count = counts[group.x];
    counts[group.x + lane] = 1u;
    for (var i = 0u; i < count; i++) {
        workgroupBarrier(); // FAULT barrier
        counts[lane] = tile[i];
    }
}
