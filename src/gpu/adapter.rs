//! Finding a device: what adapters there are, which one a request means, and why.

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::str::FromStr;

/// Which device to use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best there is: discrete, then integrated, then virtual, then software adapters, then the embedded CPU engine.
    #[default]
    Auto,
    /// The embedded CPU engine.
    Cpu,
    /// An adapter by its index in [`adapters`].
    Index(usize),
    /// The first adapter whose name, driver or backend contains this, whatever the case.
    Name(String),
}

impl FromStr for DeviceChoice {
    type Err = Infallible;

    fn from_str(text: &str) -> Result<Self, Infallible> {
        Ok(match text.trim() {
            "" | "auto" => DeviceChoice::Auto,
            "cpu" => DeviceChoice::Cpu,
            other => match other.parse() {
                Ok(index) => DeviceChoice::Index(index),
                Err(_) => DeviceChoice::Name(other.to_owned()),
            },
        })
    }
}

impl DeviceChoice {
    /// What the environment variable `WGMOE_ADAPTER` says; [`DeviceChoice::Auto`] if it is not set.
    pub fn from_env() -> Self {
        let text = std::env::var("WGMOE_ADAPTER").unwrap_or_default();
        text.parse().unwrap_or_else(|never: Infallible| match never {})
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Index(index) => write!(f, "{index}"),
            DeviceChoice::Name(name) => f.write_str(name),
        }
    }
}

/// Who computes, in four words.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// The adapter's name.
    pub name: String,
    /// vulkan, metal, dx12, browser-webgpu, noop, or cpu for the embedded engine.
    pub backend: String,
    /// The driver and its version.
    pub driver: String,
    /// discrete, integrated, virtual, software, other, or cpu-engine.
    pub kind: String,
}

/// What an adapter is and offers.
#[derive(Clone, Debug, Serialize)]
pub struct AdapterFacts {
    /// Its number for [`DeviceChoice::Index`].
    pub index: usize,
    /// Name, backend, driver, kind.
    pub device: DeviceInfo,
    /// Limits that matter here, in bytes or counts.
    pub limits: Vec<(&'static str, u64)>,
    /// Features that the kernels can use.
    pub features: Vec<&'static str>,
    /// Smallest and largest subgroup size, where subgroup operations exist.
    pub subgroup: Option<(u32, u32)>,
}

/// Every adapter of every backend in this build, in the order of their indices.
pub fn adapters() -> Vec<AdapterFacts> {
    pollster::block_on(enumerate()).iter().enumerate().map(|(index, adapter)| facts(index, adapter)).collect()
}

pub(super) async fn enumerate() -> Vec<wgpu::Adapter> {
    instance().enumerate_adapters(wgpu::Backends::all()).await
}

fn instance() -> wgpu::Instance {
    let mut desc = wgpu::InstanceDescriptor::new_without_display_handle();
    desc.backends = wgpu::Backends::PRIMARY;
    // WGPU_VALIDATION=1 and the like turn driver checks on; they stay off by default so that a release and a debug
    // build of a program see the same device.
    desc.flags = wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL.with_env();
    wgpu::Instance::new(desc)
}

fn facts(index: usize, adapter: &wgpu::Adapter) -> AdapterFacts {
    let info = adapter.get_info();
    let limits = adapter.limits();
    let features = adapter.features();
    let named = [
        ("SUBGROUP", wgpu::Features::SUBGROUP),
        ("SHADER_F16", wgpu::Features::SHADER_F16),
        ("TIMESTAMP_QUERY", wgpu::Features::TIMESTAMP_QUERY),
        ("SHADER_INT64", wgpu::Features::SHADER_INT64),
        ("PIPELINE_CACHE", wgpu::Features::PIPELINE_CACHE),
        ("EXPERIMENTAL_COOPERATIVE_MATRIX", wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX),
    ];
    AdapterFacts {
        index,
        device: device_info(&info),
        limits: vec![
            ("max_storage_buffer_binding_size", limits.max_storage_buffer_binding_size),
            ("max_buffer_size", limits.max_buffer_size),
            ("max_compute_workgroup_storage_size", limits.max_compute_workgroup_storage_size.into()),
            ("max_compute_invocations_per_workgroup", limits.max_compute_invocations_per_workgroup.into()),
            ("max_compute_workgroups_per_dimension", limits.max_compute_workgroups_per_dimension.into()),
            ("max_storage_buffers_per_shader_stage", limits.max_storage_buffers_per_shader_stage.into()),
        ],
        features: named.into_iter().filter(|(_, f)| features.contains(*f)).map(|(name, _)| name).collect(),
        subgroup: features
            .contains(wgpu::Features::SUBGROUP)
            .then_some((info.subgroup_min_size, info.subgroup_max_size)),
    }
}

pub(super) fn device_info(info: &wgpu::AdapterInfo) -> DeviceInfo {
    let kind = match info.device_type {
        wgpu::DeviceType::DiscreteGpu => "discrete",
        wgpu::DeviceType::IntegratedGpu => "integrated",
        wgpu::DeviceType::VirtualGpu => "virtual",
        wgpu::DeviceType::Cpu => "software",
        wgpu::DeviceType::Other => "other",
    };
    let driver = format!("{} {}", info.driver, info.driver_info);
    DeviceInfo {
        name: info.name.clone(),
        backend: info.backend.to_str().to_owned(),
        driver: driver.trim().to_owned(),
        kind: kind.to_owned(),
    }
}

/// Lower is better.
fn rank(info: &wgpu::AdapterInfo) -> u32 {
    match info.device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

/// The adapters that `choice` means, best first, and why. None at all is the embedded CPU engine.
pub(crate) async fn select(choice: &DeviceChoice) -> Result<(Vec<wgpu::Adapter>, String)> {
    if *choice == DeviceChoice::Cpu {
        return Ok((Vec::new(), "the embedded CPU engine was asked for".to_owned()));
    }
    let mut all = enumerate().await;
    if *choice == DeviceChoice::Auto {
        // Stable: of two equals the one with the lower index.
        all.sort_by_key(|adapter| rank(&adapter.get_info()));
        let why = match all.len() {
            0 => {
                "no adapter was found (no Vulkan, Metal or DX12 driver), so the embedded CPU engine is used".to_owned()
            }
            1 => "the only adapter".to_owned(),
            count => format!("the best of {count} adapters"),
        };
        return Ok((all, why));
    }
    let position = match choice {
        DeviceChoice::Index(index) => (*index < all.len()).then_some(*index),
        DeviceChoice::Name(part) => all.iter().position(|adapter| matches(&adapter.get_info(), part)),
        DeviceChoice::Auto | DeviceChoice::Cpu => None, // handled above
    };
    match position {
        Some(position) => Ok((vec![all.swap_remove(position)], format!("asked for as \"{choice}\""))),
        None => {
            let described = |(index, adapter): (usize, &wgpu::Adapter)| {
                let info = device_info(&adapter.get_info());
                format!("{index}: {} ({}, {})", info.name, info.backend, info.kind)
            };
            let found = all.iter().enumerate().map(described).collect();
            Err(Error::NoDevice { wanted: choice.to_string(), found })
        }
    }
}

/// Whether an adapter's name, driver or backend contains `part`.
fn matches(info: &wgpu::AdapterInfo, part: &str) -> bool {
    let info = device_info(info);
    let text = format!("{} {} {}", info.name, info.driver, info.backend).to_lowercase();
    // Mesa's driver is called lavapipe everywhere but in what it reports.
    let text = if text.contains("llvmpipe") { text + " lavapipe" } else { text };
    text.contains(&part.to_lowercase())
}
