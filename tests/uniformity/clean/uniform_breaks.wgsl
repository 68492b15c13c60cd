// Loops that all lanes leave at the same round, by break, by return and by break if.
struct Params { rows: u32, last: u32 }
@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn uniform_breaks(@builtin(local_invocation_index) lane: u32) {
    var row = 0u;
    loop {
        if row == params.last { break; }
        tile[lane] = row;
        workgroupBarrier();
        if row > params.rows { return; }
        continuing {
            row++;
            workgroupBarrier();
            break if row == 9u;
        }
    }
    workgroupBarrier();
    out[lane] = tile[0];
}
