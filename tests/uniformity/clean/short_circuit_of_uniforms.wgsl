// Both sides are the same for all, also where the second is not looked at.
struct Params { rows: u32, last: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn short_circuit_of_uniforms(@builtin(local_invocation_index) lane: u32) {
    tile[lane] = lane;
    if params.rows > 2u && (params.last < 9u || params.last > 90u) {
        workgroupBarrier();
    }
    out[lane] = tile[0];
}
