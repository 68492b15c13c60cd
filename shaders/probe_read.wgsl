// probe_read: reads a large buffer once: the bandwidth ceiling that bench measures against.
//
//     out[i] = sum of every vec4 of data whose index is i modulo the number of invocations
//
// CPU twin   none: only its time is used
// Mapping    neighbouring invocations read neighbouring vec4s, eight loads in flight each
// Grid       [workgroups]
// Requires   the length of data a multiple of 8 * workgroups * WG_SIZE vec4s
// Numerics   not looked at

@group(0) @binding(0) var<storage, read_write> out:  array<vec4<f32>>; // [workgroups * WG_SIZE]
@group(0) @binding(1) var<storage, read>       data: array<vec4<f32>>; // [any]

override WG_SIZE: u32 = 64;

@compute @workgroup_size(WG_SIZE)
fn probe_read(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x * WG_SIZE + lane;
    let n = groups.x * WG_SIZE;
    var sum = vec4<f32>(0.0);
    for (var i = index; i < arrayLength(&data); i += 8u * n) {
        sum += ((data[i] + data[i + n]) + (data[i + 2u * n] + data[i + 3u * n]))
            + ((data[i + 4u * n] + data[i + 5u * n]) + (data[i + 6u * n] + data[i + 7u * n]));
    }
    out[index] = sum;
}
