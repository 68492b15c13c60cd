// why: `lane % 3u`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn switch_on_lane(@builtin(local_invocation_index) lane: u32) {
    switch lane % 3u {
        case 0u: {
            tile[lane] = 1u;
        }
        default: {
            workgroupBarrier(); // FAULT barrier
        }
    }
    out[lane] = tile[lane];
}
