// probe_read: reads a large buffer once: the bandwidth ceiling that bench measures against.
//
//     out[i] = sum of every vec4 of data that invocation i reads
//
// CPU twin   none: only its time is used
// Mapping    each workgroup reads a block of neighbouring vec4s, eight loads in flight in each invocation
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
    let block = arrayLength(&data) / groups.x;
    let first = group.x * block + lane;
    var sum = vec4<f32>(0.0);
    for (var i = first; i < first + block; i += 8u * WG_SIZE) {
        sum += ((data[i] + data[i + WG_SIZE]) + (data[i + 2u * WG_SIZE] + data[i + 3u * WG_SIZE]))
            + ((data[i + 4u * WG_SIZE] + data[i + 5u * WG_SIZE]) + (data[i + 6u * WG_SIZE] + data[i + 7u * WG_SIZE]));
    }
    out[index] = sum;
}
