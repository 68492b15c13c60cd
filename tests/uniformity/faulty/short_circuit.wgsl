// why: local_invocation_index
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn short_circuit(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    if group.x > 2u && lane > 3u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
