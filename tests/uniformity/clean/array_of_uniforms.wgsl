// An array of which every element is the same for all.
@group(0) @binding(0) var<storage, read> counts: array<u32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn array_of_uniforms(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    var ends: array<u32, 4>;
    for (var i = 0u; i < 4u; i++) {
        ends[i] = counts[4u * group.x + i];
    }
    for (var i = 0u; i < ends[3]; i++) {
        tile[lane] = ends[i % 4u];
        workgroupBarrier();
    }
    out[lane] = tile[0];
}
