// why: `lane != 3u`
var<workgroup> count: u32;
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn uniform_load(@builtin(local_invocation_index) lane: u32) {
    if lane != 3u {
        out[lane] = workgroupUniformLoad(&count); // FAULT barrier
    }
}
