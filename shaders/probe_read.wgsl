// probe_read: reads a large buffer once: the bandwidth ceiling that bench measures against.
//
//     out[i] = sum of every vec4 of data that invocation i reads
//
// CPU twin   none: only its time is used
// Mapping    each workgroup reads a block of neighbouring vec4s, eight loads in flight in each invocation: side by side
//            with its neighbours' (LANE_STRIDE 1, LOAD_STRIDE WG_SIZE) or a run of its own (LANE_STRIDE 8, LOAD_STRIDE 1)
// Grid       [workgroups]
// Requires   the length of data a multiple of 8 * workgroups * WG_SIZE vec4s
// Numerics   not looked at

@group(0) @binding(0) var<storage, read_write> out:  array<vec4<f32>>; // [workgroups * WG_SIZE]
@group(0) @binding(1) var<storage, read>       data: array<vec4<f32>>; // [any]

override WG_SIZE: u32 = 64;
override LANE_STRIDE: u32 = 1;
override LOAD_STRIDE: u32 = 64;

@compute @workgroup_size(WG_SIZE)
fn probe_read(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let index = group.x * WG_SIZE + lane;
    let block = arrayLength(&data) / groups.x;
    let first = group.x * block + lane * LANE_STRIDE;
    let s = LOAD_STRIDE;
    var sum = vec4<f32>(0.0);
    for (var i = first; i < first + block; i += 8u * WG_SIZE) {
        sum += ((data[i] + data[i + s]) + (data[i + 2u * s] + data[i + 3u * s]))
            + ((data[i + 4u * s] + data[i + 5u * s]) + (data[i + 6u * s] + data[i + 7u * s]));
    }
    out[index] = sum;
}
