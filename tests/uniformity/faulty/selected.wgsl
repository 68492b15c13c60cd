// why: local_invocation_index
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn selected(@builtin(local_invocation_index) lane: u32) {
    let width = select(1u, 2u, lane > 3u);
    if width > 1u {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[0];
}
