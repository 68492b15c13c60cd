//! Not part of the pass: how fast the device reads. See `shaders/probe_read.wgsl`.

use super::{Access, Kernel, Stage, bind, wgsl};

/// Lanes of one workgroup.
pub const WG_SIZE: u32 = 64;

/// Reads a buffer once: each load side by side with the neighbouring lanes', or each lane a run of its own.
pub fn kernel(own_runs: bool) -> Kernel {
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
