// why: by this `break`
var<workgroup> tile: array<u32, 64>;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn after_break(@builtin(local_invocation_index) lane: u32) {
    var n = 0u;
    loop {
        if tile[lane] == n {
            break;
        }
        n++;
        workgroupBarrier(); // FAULT barrier
        if n == 9u {
            break;
        }
    }
    out[lane] = n;
}
