//! Kernels outside of the pass that measure what the device can do at best. See `shaders/probe_*.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;
/// FLOPs of one round of `probe_fma`'s loop: 8 steps of 8 chains of 4 multiply-adds.
pub const FMA_ROUND_FLOPS: u64 = 8 * 8 * 4 * 2;

/// `loops` rounds of multiply-adds in each invocation.
pub fn fma(loops: u32) -> Kernel {
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

/// Reads a buffer once: each load side by side with the neighbouring lanes', or each lane a run of its own.
pub fn read(own_runs: bool) -> Kernel {
    Kernel {
        stage: Stage::ProbeRead,
        label: "probe_read".to_owned(),
        parts: vec![wgsl!("probe_read")],
        bindings: vec![
            bind(0, "out", Access::Write), // [workgroups * WG_SIZE] vec4
            bind(1, "data", Access::Read), // any multiple of 8 * workgroups * WG_SIZE vec4
        ],
        overrides: match own_runs {
            false => vec![("WG_SIZE", WG_SIZE), ("LANE_STRIDE", 1), ("LOAD_STRIDE", WG_SIZE)],
            true => vec![("WG_SIZE", WG_SIZE), ("LANE_STRIDE", 8), ("LOAD_STRIDE", 1)],
        },
        workgroup_size: WG_SIZE,
        needs_subgroups: false,
    }
}
