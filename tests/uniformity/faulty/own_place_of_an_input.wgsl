// why: local_invocation_index
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read> counts: array<u32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn own_place_of_an_input(@builtin(local_invocation_index) lane: u32) {
    for (var i = 0u; i < counts[lane]; i++) {
        tile[lane] = i;
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
