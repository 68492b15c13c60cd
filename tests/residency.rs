//! Layers with only some of their experts on the device: same bits, counted hits and misses, typed errors.

mod support;

use support::{Values, assert_same_bits, config, gpu_context, variants};
use wgmoe::plan::LayerPlan;
use wgmoe::{
    Batch, Context, DeviceChoice, Error, GpuMemory, LayerOptions, MoeConfig, MoeLayer, MoeWeights, ResidencyStats,
    Routing, WeightFormat,
};

/// `[hidden_size, intermediate_size, num_experts, top_k]`
const SIZES: [u32; 4] = [64, 32, 16, 3];

/// Bytes of one expert.
fn expert_bytes(config: &MoeConfig, format: WeightFormat) -> u64 {
    let device = wgmoe::plan::DeviceProfile::webgpu_floor();
    LayerPlan::new(config, format, &device, &Default::default()).expect("the plan is possible").expert_bytes()
}

fn layer(context: &Context, config: &MoeConfig, weights: &MoeWeights, options: &LayerOptions) -> MoeLayer {
    MoeLayer::with_options(context, config.clone(), weights, options).expect("the layer is sound")
}

fn stats(layer: &MoeLayer) -> ResidencyStats {
    layer.residency().expect("the layer brings experts in")
}

#[test]
fn bits_are_those_of_a_layer_that_has_all_experts() {
    let Some(context) = gpu_context() else { return };
    let mut values = Values(11);
    let config = config(SIZES, true);
    let weights = values.weights(&config);
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::INT4] {
        let whole = LayerOptions { weights: format, ..LayerOptions::default() };
        let bytes = expert_bytes(&config, format);
        let whole = layer(&context, &config, &weights, &whole);
        assert_eq!(whole.residency(), None);
        for places in [1, 2, 4, 8, 15] {
            let options = LayerOptions {
                weights: format,
                gpu_memory: GpuMemory::Bytes(places * bytes + 1),
                ..LayerOptions::default()
            };
            let cached = layer(&context, &config, &weights, &options);
            for tokens in [1, 2, 5, 40] {
                let x = values.floats(tokens * 64);
                let expected = whole.forward(&x).expect("the pass runs");
                let before = stats(&cached);
                for _ in 0..2 {
                    let y = cached.forward(&x).expect("the pass runs");
                    assert_same_bits(&format!("{format}, {places} places, {tokens} tokens"), &y, &expected);
                }
                assert_eq!(cached.routing().expect("read").topk_experts, whole.routing().expect("read").topk_experts);
                let used = whole.routing().expect("read").tokens_per_expert.iter().filter(|&&n| n > 0).count() as u64;
                let after = stats(&cached);
                assert_eq!(after.passes - before.passes, 2);
                assert_eq!(after.hits + after.misses - before.hits - before.misses, 2 * used);
                assert_eq!(after.uploaded_bytes, after.misses * bytes, "a miss is one expert copied");
                if used <= places {
                    assert!(after.misses - before.misses <= used, "all of them are there the second time");
                }
                assert_eq!(cached.pass_stats().readbacks, 1, "the choices of the router");
            }
            let x = values.floats(5 * 64);
            cached.upload(&x).expect("it fits");
            cached.run_resident().expect("the pass runs");
            cached.run_resident().expect("the pass runs");
            let again = cached.pass_stats();
            assert_eq!(again.allocations, 0, "a pass that is repeated allocates nothing");
        }
    }
}

/// Every variant of the matmul, and experts that are cut into several pages.
#[test]
fn bits_stay_in_every_variant_and_with_small_bindings() {
    let Some(context) = gpu_context() else { return };
    let mut values = Values(12);
    let config = config(SIZES, true);
    let weights = values.weights(&config);
    let x = values.floats(23 * 64);
    for variant in variants(&context) {
        for max_binding_bytes in [None, Some(8 * 1024)] {
            let whole = LayerOptions { matmul: Some(variant), max_binding_bytes, ..LayerOptions::default() };
            let bytes = expert_bytes(&config, WeightFormat::F32);
            let cached = LayerOptions { gpu_memory: GpuMemory::Bytes(5 * bytes), ..whole.clone() };
            let [whole, cached] = [whole, cached].map(|options| layer(&context, &config, &weights, &options));
            let y = cached.forward(&x).expect("the pass runs");
            assert_same_bits(&format!("{variant:?}"), &y, &whole.forward(&x).expect("the pass runs"));
        }
    }
}

#[test]
fn pinned_experts_stay_and_the_least_recently_used_goes() {
    let Some(context) = gpu_context() else { return };
    let mut values = Values(13);
    let config = MoeConfig::new(16, 8, 6, 1, Routing::softmax(true), wgmoe::Activation::SWIGLU).expect("sound");
    let weights = values.weights(&config);
    let bytes = expert_bytes(&config, WeightFormat::F32);
    let options =
        LayerOptions { gpu_memory: GpuMemory::Bytes(3 * bytes), pinned_experts: vec![5], ..LayerOptions::default() };
    let layer = layer(&context, &config, &weights, &options);
    assert_eq!((stats(&layer).places, stats(&layer).pinned), (3, 1));
    let x = values.floats(16);
    let mut misses = Vec::new();
    // Places hold 5 (for good), 0 and 1 at first.
    for expert in [5, 0, 1, 2, 1, 0, 5, 3, 0, 1, 5] {
        let before = stats(&layer).misses;
        layer.forward_with_assignments(&x, &[expert], &[1.0]).expect("the pass runs");
        misses.push(stats(&layer).misses - before);
    }
    assert_eq!(misses, [0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0]);
    let before = stats(&layer);
    layer.forward_with_assignments(&x, &[-1], &[1.0]).expect("the pass runs");
    let after = stats(&layer);
    assert_eq!((after.hits, after.misses, after.rounds), (before.hits, before.misses, before.rounds), "nobody needed");
}

#[test]
fn what_cannot_be_is_refused() {
    let Some(context) = gpu_context() else { return };
    let mut values = Values(14);
    let config = config(SIZES, true);
    let weights = values.weights(&config);
    let bytes = expert_bytes(&config, WeightFormat::F32);
    let make = |gpu_memory: u64, pinned: Vec<u32>| {
        let options = LayerOptions {
            gpu_memory: GpuMemory::Bytes(gpu_memory),
            pinned_experts: pinned,
            ..LayerOptions::default()
        };
        MoeLayer::with_options(&context, config.clone(), &weights, &options)
    };
    let error = make(bytes - 1, vec![]).err().expect("there is no room for one expert");
    assert!(
        matches!(error, Error::LimitExceeded { required, available, .. } if required == bytes && available == bytes - 1)
    );
    let message = make(2 * bytes, vec![3, 4]).err().expect("no place is left").to_string();
    assert!(message.contains("pinned_experts") && message.contains('2'), "{message}");
    let message = make(2 * bytes, vec![16]).err().expect("there is no such expert").to_string();
    assert!(message.contains("16"), "{message}");

    let mut layer = make(2 * bytes, vec![]).expect("sound");
    assert!(matches!(layer.remove_expert(0), Err(Error::Unsupported { .. })));
    let gpu = context.gpu().expect("it is a GPU");
    let mut encoder = gpu.device().create_command_encoder(&Default::default());
    let usage = wgmoe::wgpu::BufferUsages::STORAGE;
    let buffer = || {
        let desc = wgmoe::wgpu::BufferDescriptor { label: None, size: 256, usage, mapped_at_creation: false };
        gpu.device().create_buffer(&desc)
    };
    assert!(matches!(layer.record(&mut encoder, &buffer(), &buffer(), 1), Err(Error::Unsupported { .. })));
    // This device has room for all of them.
    let options = LayerOptions { gpu_memory: GpuMemory::Available, pinned_experts: vec![1], ..LayerOptions::default() };
    let all = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("sound");
    assert_eq!(all.residency(), None);
    // A budget is nothing to the CPU engine: its experts are where the host's are.
    let options = LayerOptions { gpu_memory: GpuMemory::Bytes(1), ..LayerOptions::default() };
    let cpu = Context::new(&DeviceChoice::Cpu).expect("there is always a CPU");
    let cpu = MoeLayer::with_options(&cpu, config.clone(), &weights, &options).expect("sound");
    assert_eq!(cpu.residency(), None);
    assert_eq!(cpu.forward_batch(&Batch::from(&values.floats(64)[..])).expect("the pass runs").len(), 64);
}
