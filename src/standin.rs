//! STANDIN for what the lead writes: roofline, dense_matmul_time, check_kernels. Never merged.
#![allow(missing_docs)]
use crate::{Context, Result, WeightFormat};
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Roofline {
    pub gflops: f64,
    pub gbytes_per_s: f64,
    pub how: String,
}
pub fn roofline(_: &Context) -> Result<Roofline> {
    let r = crate::cpu::roofline();
    Ok(Roofline {
        gflops: r.gflops,
        gbytes_per_s: r.gbytes_per_s,
        how: "dense matmul of the gemm crate, streaming reads".into(),
    })
}
pub fn dense_matmul_time(_: &Context, m: u32, n: u32, k: u32, _: WeightFormat) -> Result<Option<Duration>> {
    Ok(Some(Duration::from_secs_f64(2.0 * f64::from(m) * f64::from(n) * f64::from(k) / 100e9)))
}
pub struct KernelCheck {
    pub kernel: String,
    pub shape: String,
    pub max_rel_error: f64,
    pub passed: bool,
    pub reason: Option<String>,
}
pub fn check_kernels(_: &Context, progress: &mut dyn FnMut(usize, usize, &str)) -> Result<Vec<KernelCheck>> {
    progress(0, 2, "cpu.f32");
    let k = |kernel: &str, shape: &str| KernelCheck {
        kernel: kernel.into(),
        shape: shape.into(),
        max_rel_error: 3e-8,
        passed: true,
        reason: None,
    };
    Ok(vec![k("cpu.f32", "t7 h33 i17 e5 k2"), k("cpu.f16", "t7 h33 i17 e5 k2")])
}
