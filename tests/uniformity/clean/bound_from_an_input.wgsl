// A loop whose length is read at one place of a buffer that nobody writes.
@group(0) @binding(0) var<storage, read> counts: array<u32>;
@group(0) @binding(1) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
@compute @workgroup_size(64)
fn bound_from_an_input(@builtin(local_invocation_index) lane: u32, @builtin(workgroup_id) group: vec3<u32>) {
    let end = counts[group.x + 1u];
    for (var i = counts[group.x]; i < end; i++) {
        workgroupBarrier();
        tile[lane] = i;
        workgroupBarrier();
        out[i] = tile[0];
    }
}
