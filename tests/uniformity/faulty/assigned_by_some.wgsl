// why: `is_first` is assigned by some invocations only
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn assigned_by_some(@builtin(local_invocation_index) lane: u32) {
    var is_first = false;
    if lane == 0u {
        is_first = true;
    }
    if is_first {
        workgroupBarrier(); // FAULT barrier
    }
    out[lane] = tile[lane];
}
