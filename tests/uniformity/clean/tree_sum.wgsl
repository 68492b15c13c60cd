// A reduction: the loop's bound is a constant, and the condition by lane holds no barrier.
override WG_SIZE: u32 = 64;
var<workgroup> tile: array<f32, WG_SIZE>;
@group(0) @binding(0) var<storage, read_write> out: array<f32>;
@compute @workgroup_size(WG_SIZE)
fn tree_sum(@builtin(local_invocation_index) lane: u32) {
    tile[lane] = out[lane];
    for (var step = WG_SIZE / 2u; step > 0u; step /= 2u) {
        workgroupBarrier();
        if lane < step {
            tile[lane] += tile[lane + step];
        }
    }
    workgroupBarrier();
    out[lane] = tile[0];
}
