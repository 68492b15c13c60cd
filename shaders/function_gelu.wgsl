// function_gelu: v * (1 + erf(v / sqrt(2))) / 2. No entry point. CPU twin: Function::apply in src/model/activation.rs.

fn function_of(v: vec2<f32>) -> vec2<f32> {
    return 0.5 * v * (vec2<f32>(1.0) + erf(0.70710678 * v));
}

// The error function within one unit in the last place: a polynomial near 0, and 1 - exp(polynomial) further out.
fn erf(v: vec2<f32>) -> vec2<f32> {
    let s = v * v;
    var near = vec2<f32>(-5.96761703e-4);
    near = fma(near, s, vec2<f32>(4.99119423e-3));
    near = fma(near, s, vec2<f32>(-2.67681349e-2));
    near = fma(near, s, vec2<f32>(1.12819925e-1));
    near = fma(near, s, vec2<f32>(-3.76125336e-1));
    near = fma(near, s, vec2<f32>(1.28379166e-1));
    near = fma(near, v, v);
    // From 4 on it is 1 in f32; the bound keeps infinities out of the polynomial.
    let t = min(abs(v), vec2<f32>(4.0));
    let t2 = t * t;
    var far = fma(vec2<f32>(-1.72853470e-5), t, vec2<f32>(3.83197126e-4));
    let u = fma(vec2<f32>(-3.88396438e-3), t, vec2<f32>(2.42546219e-2));
    far = fma(far, t2, u);
    far = fma(far, t, vec2<f32>(-1.06777877e-1));
    far = fma(far, t, vec2<f32>(-6.34846687e-1));
    far = fma(far, t, vec2<f32>(-1.28717512e-1));
    far = fma(far, t, -t);
    far = sign(v) * (vec2<f32>(1.0) - exp(far));
    return select(near, far, abs(v) > vec2<f32>(0.927734375));
}
