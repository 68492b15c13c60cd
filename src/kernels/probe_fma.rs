//! Not part of the pass: how many multiply-adds the device can do. See `shaders/probe_fma.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;
/// FLOPs of one round of `probe_fma`'s loop: 8 steps of 8 chains of 4 multiply-adds.
pub const ROUND_FLOPS: u64 = 8 * 8 * 4 * 2;

/// `loops` rounds of multiply-adds in each invocation.
pub fn kernel(loops: u32) -> Kernel {
    Kernel {
        stage: Stage::ProbeFma,
        label: "probe_fma".to_owned(),
        parts: vec![wgsl!("probe_fma")],
        bindings: vec![bind(0, "out", Access::Write)], // [workgroups * WG_SIZE] vec4
        overrides: vec![("WG_SIZE", WG_SIZE), ("LOOPS", loops)],
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
