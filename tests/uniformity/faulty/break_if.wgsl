// why: `n > lane`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn break_if(@builtin(local_invocation_index) lane: u32) {
    var n = 0u;
    loop {
        tile[lane] = n;
        continuing {
            n++;
            workgroupBarrier(); // FAULT barrier
            break if n > lane;
        }
    }
    out[lane] = tile[0];
}
