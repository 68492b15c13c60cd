//! Plans of any layer on any device that meets the floor.

use crate::plan_checks::{check_pages, check_plan};
use arbitrary::{Arbitrary, Unstructured};
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest};
use wgmoe::{Activation, Context, Error, MatmulVariant, MoeConfig, Routing, WeightFormat};

#[derive(Arbitrary)]
struct Shape {
    hidden: u32,
    intermediate: u32,
    experts: u16,
    top_k: u8,
    tokens: u32,
    binding: u32,
    buffer: u32,
    subgroup: Option<u8>,
    software: bool,
    variant: Option<u8>,
    format: u8,
    /// Sizes are small, so that all of a pass fits.
    small: bool,
}

/// Grids cover everything once, bindings and indices are within limits, costs add up: [`check_plan`].
pub fn plan(data: &[u8], _: &Context) {
    let Ok(shape) = Shape::arbitrary(&mut Unstructured::new(data)) else { return };
    let formats = WeightFormat::every();
    let format = formats[usize::from(shape.format) % formats.len()];
    let most = if shape.small { 512 } else { 1 << 17 };
    let size = |n: u32| (n % most + 1).next_multiple_of(format.block());
    let experts = u32::from(shape.experts) % 1024 + 1;
    let top_k = u32::from(shape.top_k) % experts.min(32) + 1;
    let routing = Routing::softmax(true);
    let config =
        MoeConfig::new(size(shape.hidden), size(shape.intermediate), experts, top_k, routing, Activation::SWIGLU);
    let Ok(config) = config else { return };
    let device = DeviceProfile {
        max_storage_binding: u64::from(shape.binding >> 1).max(4096),
        max_buffer: u64::from(shape.buffer >> 1).max(4096),
        subgroup_size: shape.subgroup.map(|n| 2 << (n % 7)),
        software: shape.software,
        int64: shape.software,
        ..DeviceProfile::webgpu_floor()
    };
    let variant = shape.variant.map(|n| MatmulVariant::ALL[usize::from(n) % MatmulVariant::ALL.len()]);
    let request = MatmulRequest { variant, ..MatmulRequest::default() };
    let layer = match LayerPlan::new(&config, format, &device, &request) {
        Ok(layer) => layer,
        Err(Error::LimitExceeded { required, available, .. }) => {
            return assert!(required > available, "{required} does fit {available}");
        }
        Err(Error::Unsupported { .. } | Error::InvalidConfig { .. }) => return,
        Err(error) => panic!("{error}"),
    };
    let limit = device.max_buffer_bytes();
    for name in ["gate_up_weights", "down_weights"] {
        let Some(matrix) = layer.matrix(name) else { panic!("{name} is missing") };
        assert!(matrix.pages.iter().all(|page| page.bytes <= limit), "{name}");
        let columns = if name == "down_weights" {
            config.hidden_size().next_multiple_of(4)
        } else {
            2 * config.intermediate_size().next_multiple_of(4)
        };
        check_pages(&matrix.pages, experts, columns, format.quad_bytes(matrix.inputs), limit);
    }
    let tokens = shape.tokens % layer.max_tokens() + 1;
    assert!(layer.scratch(tokens).iter().all(|buffer| buffer.bytes <= limit));
    check_plan(&layer, &layer.plan(tokens).expect("it is at most max_tokens"), &device);
}
