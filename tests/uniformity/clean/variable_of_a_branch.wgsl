// What is declared and decided under a condition by lane stays there.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn variable_of_a_branch(@builtin(local_invocation_index) lane: u32) {
    if lane > 2u {
        var n = 1u;
        if n > 0u { out[0] = n; }
    }
    workgroupBarrier();
    out[lane] = tile[0];
}
