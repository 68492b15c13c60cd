// why: `mine` belongs to each invocation
var<private> mine: u32;
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn private_variable(@builtin(local_invocation_index) lane: u32) {
    mine = lane;
    if mine > 1u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
