// why: by this `break`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn before_break_of_next_round(@builtin(local_invocation_index) lane: u32) {
    var n = 0u;
    loop {
        tile[lane] = n;
        workgroupBarrier(); // FAULT barrier
        n++;
        if n > lane {
            break;
        }
    }
    out[lane] = tile[0];
}
