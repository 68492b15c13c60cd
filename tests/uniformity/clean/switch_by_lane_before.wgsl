// Lanes take different cases, and meet again behind the switch.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn switch_by_lane_before(@builtin(local_invocation_index) lane: u32) {
    switch lane {
        case 0u: {
            if out[lane] > 3u { break; }
            tile[0] = 1u;
        }
        default: {
            tile[lane] = 2u;
        }
    }
    workgroupBarrier();
    out[lane] = tile[0];
}
