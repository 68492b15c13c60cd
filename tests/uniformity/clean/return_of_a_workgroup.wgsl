// A whole workgroup leaves.
struct Params { rows: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn return_of_a_workgroup(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    if group.x >= params.rows {
        return;
    }
    tile[lane] = lane;
    workgroupBarrier();
    out[lane] = tile[63u - lane];
}
