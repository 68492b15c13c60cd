// step: the one multiply-accumulate of every dot product here, so that all of them sum in the same order. No entry point.

// The sums of four columns, plus x[0..4] times their weights. w[k] holds input k of the four columns.
fn step(sums: vec4<f32>, x: vec4<f32>, w: mat4x4<f32>) -> vec4<f32> {
    return fma(x.xxxx, w[0], fma(x.yyyy, w[1], fma(x.zzzz, w[2], fma(x.wwww, w[3], sums))));
}
