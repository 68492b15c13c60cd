// why: `limit` gets a value
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn variable_holds_lane(@builtin(local_invocation_index) lane: u32) {
    var limit = 8u;
    out[lane] = limit;
    limit = limit + lane;
    let half = limit / 2u;
    if half > 4u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[lane];
}
