//! What a plan knows of a device: its limits and the facts that decide between kernel variants.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};

/// No binding may be larger: Vulkan and DX12 stop at 2^31 - 1 bytes, and bindings come in whole words.
const MAX_BINDING: u64 = (1 << 31) - 4;

/// Limits and facts of a device, in plain numbers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceProfile {
    /// Largest storage binding, in bytes.
    pub max_storage_binding: u64,
    /// Largest buffer, in bytes.
    pub max_buffer: u64,
    /// Most workgroups along one axis of a grid.
    pub max_workgroups_per_dimension: u32,
    /// Most invocations of a workgroup.
    pub max_invocations: u32,
    /// Workgroup memory, in bytes.
    pub max_workgroup_storage: u32,
    /// Storage buffers that one kernel can bind.
    pub max_storage_buffers: u32,
    /// The subgroup size, if subgroup operations can be used and there is exactly one size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subgroup_size: Option<u32>,
    /// Whether shaders can use integers of 64 bits.
    pub int64: bool,
    /// A driver that runs shaders on the CPU.
    pub software: bool,
}

impl DeviceProfile {
    /// A device that offers what WebGPU guarantees and nothing more.
    pub fn webgpu_floor() -> Self {
        Self {
            max_storage_binding: 128 << 20,
            max_buffer: 256 << 20,
            max_workgroups_per_dimension: 65_535,
            max_invocations: 256,
            max_workgroup_storage: 16 << 10,
            max_storage_buffers: 8,
            subgroup_size: None,
            int64: false,
            software: false,
        }
    }

    /// Largest buffer that can be bound whole.
    pub fn max_buffer_bytes(&self) -> u64 {
        self.max_storage_binding.min(self.max_buffer).min(MAX_BINDING)
    }

    /// Workgroups worth having in flight: about what the device runs at once.
    pub fn parallel_workgroups(&self) -> u32 {
        if self.software { 4 } else { 64 }
    }

    /// The kernels are written for the WebGPU defaults; a device below them cannot run them.
    pub fn check_floor(&self) -> Result<()> {
        let floor = Self::webgpu_floor();
        let hint = "the kernels need the WebGPU default limits; use another device or the embedded CPU engine";
        for (what, required, available) in [
            ("workgroups per dimension", floor.max_workgroups_per_dimension, self.max_workgroups_per_dimension),
            ("invocations per workgroup", floor.max_invocations, self.max_invocations),
            ("workgroup memory", floor.max_workgroup_storage, self.max_workgroup_storage),
            ("storage buffers per kernel", floor.max_storage_buffers, self.max_storage_buffers),
        ] {
            if available < required {
                let (required, available) = (required.into(), available.into());
                return Err(Error::LimitExceeded { what: what.to_owned(), required, available, hint });
            }
        }
        Ok(())
    }
}
