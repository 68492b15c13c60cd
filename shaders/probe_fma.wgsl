// probe_fma: as many multiply-adds as the device can do: the compute ceiling that bench measures against.
//
//     out[i] = the end of eight chains of LOOPS * 8 dependent vec4 multiply-adds
//
// CPU twin   none: only its time is used
// Mapping    one invocation = eight independent chains, enough to hide the latency of a multiply-add
// Grid       [workgroups]
// Requires   nothing
// Numerics   values stay finite: each step halves and adds one

@group(0) @binding(0) var<storage, read_write> out: array<vec4<f32>>; // [workgroups * WG_SIZE]

override WG_SIZE: u32 = 64;
override LOOPS: u32 = 256;

struct Chains {
    c0: vec4<f32>, c1: vec4<f32>, c2: vec4<f32>, c3: vec4<f32>, c4: vec4<f32>, c5: vec4<f32>, c6: vec4<f32>, c7: vec4<f32>,
}

fn advance(c: Chains, half: vec4<f32>, one: vec4<f32>) -> Chains {
    return Chains(
        fma(c.c0, half, one), fma(c.c1, half, one), fma(c.c2, half, one), fma(c.c3, half, one),
        fma(c.c4, half, one), fma(c.c5, half, one), fma(c.c6, half, one), fma(c.c7, half, one));
}

@compute @workgroup_size(WG_SIZE)
fn probe_fma(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) lane: u32) {
    let index = group.x * WG_SIZE + lane;
    // From memory, so that no compiler can work the result out in advance.
    let start = out[index];
    let half = vec4<f32>(0.5) + start;
    let one = vec4<f32>(1.0) + start;
    var c = Chains(start, start + 1.0, start + 2.0, start + 3.0, start + 4.0, start + 5.0, start + 6.0, start + 7.0);
    for (var i = 0u; i < LOOPS; i++) {
        c = advance(advance(advance(advance(c, half, one), half, one), half, one), half, one);
        c = advance(advance(advance(advance(c, half, one), half, one), half, one), half, one);
    }
    out[index] = c.c0 + c.c1 + c.c2 + c.c3 + c.c4 + c.c5 + c.c6 + c.c7;
}
