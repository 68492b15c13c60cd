// workgroupUniformLoad makes one value for all out of workgroup memory.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> count: u32;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn uniform_load_decides(@builtin(local_invocation_index) lane: u32) {
    if lane == 0u { count = out[0]; }
    let n = workgroupUniformLoad(&count);
    for (var i = 0u; i < n; i++) {
        tile[lane] = i;
        workgroupBarrier();
    }
    out[lane] = tile[0];
}
