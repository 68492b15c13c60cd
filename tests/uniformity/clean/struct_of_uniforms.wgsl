// A struct of builtins, none of which differs within a workgroup.
struct Place {
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
}
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn struct_of_uniforms(place: Place, @builtin(local_invocation_index) lane: u32) {
    tile[lane] = lane;
    if place.group.x + 1u == place.groups.x {
        workgroupBarrier();
    }
    out[lane] = tile[0];
}
