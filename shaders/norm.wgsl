// norm: rows divided by their root mean square.
//
//     normed[r, i] = v[r, i] / sqrt(mean(v[r, :]^2) + epsilon) * norm_weights[i]
//
// with SCALE_FIRST of the products v * norm_weights instead of v.
//
// CPU twin   src/reference/norm.rs
// Mapping    workgroup = one row
// Grid       [num_rows], folded
// Requires   WG_SIZE a power of two
// Numerics   f32; a row's sum is formed in the same order wherever it stands

struct NormParams {
    num_rows: u32,
    width: u32,
    v_stride: u32,      // elements from one row of v to the next
    normed_stride: u32,
    epsilon: f32,
}

@group(0) @binding(0) var<uniform>             params:       NormParams;
@group(0) @binding(1) var<storage, read>       v:            array<f32>; // [num_rows, v_stride]
@group(0) @binding(2) var<storage, read>       norm_weights: array<f32>; // [width]
@group(0) @binding(3) var<storage, read_write> normed:       array<f32>; // [num_rows, normed_stride]

override WG_SIZE: u32 = 64;
override SCALE_FIRST: u32 = 0;

var<workgroup> scratch: array<f32, WG_SIZE>;

@compute @workgroup_size(WG_SIZE)
fn norm(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) lane: u32,
) {
    let row = group.y * groups.x + group.x;
    if row >= params.num_rows { return; }
    let first = row * params.v_stride;
    var sum = 0.0;
    for (var i = lane; i < params.width; i += WG_SIZE) {
        var value = v[first + i];
        if SCALE_FIRST != 0u { value *= norm_weights[i]; }
        sum = fma(value, value, sum);
    }
    scratch[lane] = sum;
    workgroupBarrier();
    for (var half = WG_SIZE / 2u; half > 0u; half /= 2u) {
        if lane < half { scratch[lane] += scratch[lane + half]; }
        workgroupBarrier();
    }
    let root = sqrt(scratch[0] / f32(params.width) + params.epsilon);
    for (var i = lane; i < params.normed_stride; i += WG_SIZE) {
        var value = 0.0; // padding
        if i < params.width { value = v[first + i] * norm_weights[i] / root; }
        normed[row * params.normed_stride + i] = value;
    }
}
