// Who is out of bounds comes along to the barrier.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn flag_instead_of_return(
    @builtin(global_invocation_id) id: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let is_inside = id.x < arrayLength(&out);
    if is_inside { tile[lane] = out[id.x]; }
    workgroupBarrier();
    if !is_inside { return; }
    out[id.x] = tile[63u - lane];
}
