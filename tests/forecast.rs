//! A forecast's bytes are those that a layer then has on its device, to the byte.

mod support;

use support::{Values, gpu_context};
use wgmoe::forecast::{DeviceFacts, forecast};
use wgmoe::plan::{DeviceBytes, LayerPlan, MatmulRequest};
use wgmoe::{
    Activation, Context, GpuMemory, LayerExtras, LayerOptions, MoeConfig, MoeLayer, Norm, Routing, SharedExperts,
    SharedGate, WeightFormat,
};

fn config() -> MoeConfig {
    MoeConfig::new(96, 40, 6, 2, Routing::softmax(true), Activation::SWIGLU).expect("valid sizes")
}

/// What a plan says, and what is there after a forward.
fn both(context: &Context, format: WeightFormat, tokens: u32, options: LayerOptions) -> [DeviceBytes; 2] {
    let config = config();
    let weights = Values(7).weights(&config);
    let options = LayerOptions { weights: format, ..options };
    let layer = MoeLayer::with_options(context, config.clone(), &weights, &options).expect("a small layer");
    let x = Values(8).floats(tokens as usize * 96);
    layer.forward(&x).expect("it runs");
    let gpu = context.gpu().expect("a GPU");
    let mut device = gpu.profile().clone();
    if let Some(most) = options.max_binding_bytes {
        device.max_storage_binding = most;
    }
    let mut plan = LayerPlan::new(&config, format, &device, &MatmulRequest::default()).expect("it has a plan");
    if let GpuMemory::Bytes(bytes) = options.gpu_memory {
        plan = plan.with_gpu_memory(bytes).expect("one expert fits");
    }
    let planned = DeviceBytes::of(&plan.allocations(tokens).expect("it has a plan"));
    [planned, layer.device_bytes()]
}

#[test]
fn bytes_are_those_that_a_layer_allocates() {
    let Some(context) = gpu_context() else { return };
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
        for tokens in [1, 3, 16, 17, 100] {
            let [planned, there] = both(&context, format, tokens, LayerOptions::default());
            assert_eq!(planned, there, "{format}, {tokens} tokens");
        }
    }
}

#[test]
fn bytes_of_pages_and_passes_and_of_a_part_of_the_experts() {
    let Some(context) = gpu_context() else { return };
    // Weights in pages, tokens in several passes of two sizes.
    let options = LayerOptions { max_binding_bytes: Some(1 << 14), ..LayerOptions::default() };
    let [planned, there] = both(&context, WeightFormat::F16, 100, options);
    assert_eq!(planned, there);
    let options = LayerOptions { gpu_memory: GpuMemory::Bytes(100_000), ..LayerOptions::default() };
    let [planned, there] = both(&context, WeightFormat::F32, 9, options);
    assert_eq!(planned, there);
    let [all, _] = both(&context, WeightFormat::F32, 9, LayerOptions::default());
    assert!(planned.weights < all.weights, "{planned:?} {all:?}");
}

#[test]
fn bytes_of_what_surrounds_experts() {
    let Some(context) = gpu_context() else { return };
    let norm = Norm { epsilon: 1e-6, scale_first: false };
    let shared = SharedExperts {
        num: 2,
        intermediate_size: 24,
        activation: Activation::SWIGLU,
        gate: SharedGate::Sigmoid,
        average: false,
    };
    let extras = LayerExtras { output_norm: Some(norm), shared: Some(shared), ..LayerExtras::default() };
    let config = config().with_extras(extras).expect("valid");
    let mut weights = Values(9).weights(&config);
    let mut values = Values(10);
    weights.extras.shared_gate_proj = values.even(2 * 24 * 96);
    weights.extras.shared_up_proj = values.even(2 * 24 * 96);
    weights.extras.shared_down_proj = values.even(2 * 96 * 24);
    weights.extras.shared_gate = Some(values.even(2 * 96));
    weights.extras.output_norm = Some(vec![1.0; 96]);
    let layer = MoeLayer::new(&context, config.clone(), &weights).expect("a small layer");
    layer.forward(&values.floats(20 * 96)).expect("it runs");
    let device = context.gpu().expect("a GPU").profile();
    let plan = LayerPlan::new(&config, WeightFormat::F32, device, &MatmulRequest::default()).expect("it has a plan");
    assert_eq!(DeviceBytes::of(&plan.allocations(20).expect("a plan")), layer.device_bytes());
}

#[test]
fn weights_of_the_cpu_engine() {
    let context = Context::cpu();
    let config = config();
    let weights = Values(7).weights(&config);
    let facts = DeviceFacts { cpu_engine: true, ..DeviceFacts::built_in("webgpu-defaults").expect("built in") };
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
        let options = LayerOptions { weights: format, ..LayerOptions::default() };
        let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("a small layer");
        let found = forecast(&facts, &config, format, 5, None).expect("it fits");
        assert_eq!(found.bytes.weights, layer.device_bytes().weights, "{format}");
        assert_eq!((found.dispatches, found.matmul.as_str()), (0, "cpu"));
    }
}
