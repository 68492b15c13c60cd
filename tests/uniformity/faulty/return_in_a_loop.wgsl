// why: by this `return`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn return_in_a_loop(@builtin(local_invocation_index) lane: u32) {
    for (var i = 0u; i < 8u; i++) {
        if i == lane {
            return;
        }
    }
    workgroupBarrier(); // FAULT barrier
    out[lane] = tile[0];
}
