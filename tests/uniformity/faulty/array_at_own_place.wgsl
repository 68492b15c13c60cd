// why: `n` gets a value
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn array_at_own_place(@builtin(local_invocation_index) lane: u32) {
    var n = array<u32, 4>();
    n[lane % 4u] = 2u;
    if n[0] > 1u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
