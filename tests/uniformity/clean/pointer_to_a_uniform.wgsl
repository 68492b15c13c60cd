// The helper writes what is the same for all.
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
var<workgroup> tile: array<u32, 64>;
fn halve(value: ptr<function, u32>) {
    *value = *value / 2u;
}
@compute @workgroup_size(64)
fn pointer_to_a_uniform(@builtin(local_invocation_index) lane: u32, @builtin(num_workgroups) groups: vec3<u32>) {
    var step = groups.x;
    while step > 0u {
        tile[lane] = step;
        workgroupBarrier();
        halve(&step);
    }
    out[lane] = tile[0];
}
