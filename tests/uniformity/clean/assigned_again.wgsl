// The variable held a lane id, and holds a constant when it decides.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn assigned_again(@builtin(local_invocation_index) lane: u32) {
    var n = lane;
    tile[n] = n;
    n = 3u;
    if n > 2u {
        workgroupBarrier();
    }
    out[lane] = tile[0];
}
