// why: local_invocation_index
struct Place {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
}
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn struct_of_builtins(place: Place) {
    if place.lane > 3u {
        workgroupBarrier(); // FAULT barrier
    }
    out[place.lane] = tile[0];
}
