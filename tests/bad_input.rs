//! Everything that a caller can get wrong ends in a typed error that says what was found, on every engine alike.

mod support;

use support::{Values, config, gpu_context, read_buffer};
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest};
use wgmoe::wgpu;
use wgmoe::{
    Activation, Context, DeviceChoice, Error, LayerOptions, MatmulChoice, MatmulVariant, MoeConfig, MoeLayer,
    MoeWeights, Result, Routing, Scores, WeightFormat,
};

/// The engines that there are: the CPU always, a GPU where there is one.
fn engines() -> Vec<Context> {
    std::iter::once(Context::cpu()).chain(gpu_context()).collect()
}

/// Hidden 4, intermediate 3, 2 experts, top-1.
fn small() -> (MoeConfig, MoeWeights) {
    let config = config([4, 3, 2, 1], true);
    let weights = Values(1).weights(&config);
    (config, weights)
}

fn small_layer(context: &Context) -> MoeLayer {
    let (config, weights) = small();
    MoeLayer::new(context, config, &weights).expect("the weights are valid")
}

/// Passes if the error is what `pattern` says; shows the result if not.
macro_rules! assert_error {
    ($result:expr, $pattern:pat $(if $guard:expr)?) => {{
        let result = $result.map(|_| "a value");
        assert!(matches!(&result, Err($pattern) $(if $guard)?), "{}: {result:?}", stringify!($pattern));
        // The message is for people: it is not empty and on few lines.
        let message = result.unwrap_err().to_string();
        assert!(message.len() > 10 && message.lines().count() < 10, "{message:?}");
    }};
}

#[test]
fn sizes_that_no_layer_has() {
    let new = |h, i, e, k| {
        let routing = Routing::softmax(true);
        MoeConfig::new(h, i, e, k, routing, Activation::SWIGLU)
    };
    for (field, sizes) in [
        ("hidden_size", [0, 1, 1, 1]),
        ("hidden_size", [(1 << 17) + 1, 1, 1, 1]),
        ("intermediate_size", [1, 0, 1, 1]),
        ("intermediate_size", [1, u32::MAX, 1, 1]),
        ("num_experts", [1, 1, 0, 1]),
        ("num_experts", [1, 1, 1025, 1]),
        ("top_k", [1, 1, 8, 0]),
        ("top_k", [1, 1, 8, 9]),
        ("top_k", [1, 1, 1024, 33]),
        ("top_k", [1, 1, 8, u32::MAX]),
    ] {
        let [h, i, e, k] = sizes;
        assert_error!(new(h, i, e, k), Error::InvalidConfig { field: found, .. } if *found == field);
    }
    new(1 << 17, 1 << 17, 1024, 32).expect("the largest sizes are sizes");
}

#[test]
fn weights_of_wrong_lengths_or_values() {
    let (config, good) = small();
    type Tensor = fn(&mut MoeWeights) -> &mut Vec<f32>;
    let tensors: [(&str, Tensor); 5] = [
        ("router", |w| &mut w.router),
        ("router_bias", |w| w.router_bias.get_or_insert_with(|| vec![0.0; 2])),
        ("gate_proj", |w| &mut w.gate_proj),
        ("up_proj", |w| &mut w.up_proj),
        ("down_proj", |w| &mut w.down_proj),
    ];
    for context in engines() {
        let build = |weights: &MoeWeights, format| {
            let options = LayerOptions { weights: format, ..LayerOptions::default() };
            MoeLayer::with_options(&context, config.clone(), weights, &options)
        };
        for (name, tensor) in tensors {
            type Change = fn(&mut Vec<f32>);
            let lengths: [Change; 3] = [|t| t.truncate(1), |t| t.push(0.0), |t| t.clear()];
            for change in lengths {
                let mut weights = good.clone();
                change(tensor(&mut weights));
                let length = tensor(&mut weights).len();
                assert_error!(
                    build(&weights, WeightFormat::F32),
                    Error::LengthMismatch { tensor, found, .. } if *tensor == name && *found == length
                );
            }
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut weights = good.clone();
                tensor(&mut weights)[1] = bad;
                for &format in WeightFormat::ALL {
                    assert_error!(
                        build(&weights, format),
                        Error::NonFinite { tensor, index: 1, value }
                            if tensor == name && value.to_bits() == bad.to_bits()
                    );
                }
            }
            // The largest f16 is 65504; router weights and bias are always stored as f32.
            let mut weights = good.clone();
            tensor(&mut weights)[1] = -70_000.0;
            build(&weights, WeightFormat::F32).expect("f32 holds it");
            if name.ends_with("_proj") {
                assert_error!(
                    build(&weights, WeightFormat::F16),
                    Error::NotRepresentable { tensor, index: 1, format: "f16", .. } if tensor == name
                );
                tensor(&mut weights)[1] = 65_504.0;
            }
            build(&weights, WeightFormat::F16).expect("f16 holds it");
        }
    }
}

#[test]
fn inputs_of_wrong_lengths_or_values() {
    for context in engines() {
        let layer = small_layer(&context);
        let mut y = vec![7.0; 8];
        for length in [1, 3, 5, 9] {
            let x = vec![1.0; length];
            assert_error!(layer.forward(&x), Error::LengthMismatch { tensor: "x", found, .. } if *found == length);
            assert_error!(layer.upload(&x), Error::LengthMismatch { tensor: "x", .. });
        }
        for (x, y) in [(8, 4), (4, 8), (8, 0), (0, 4)] {
            let result = layer.forward_into(&vec![1.0; x], &mut vec![0.0; y]);
            assert_error!(
                result,
                Error::LengthMismatch { tensor: "y", expected, found, .. } if (*expected, *found) == (x, y)
            );
        }
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = [1.0; 8];
            x[5] = bad;
            assert_error!(layer.forward_into(&x, &mut y), Error::NonFinite { tensor, index: 5, .. } if tensor == "x");
            assert_error!(layer.upload(&x), Error::NonFinite { tensor, index: 5, .. } if tensor == "x");
        }
        assert_eq!(y, [7.0; 8], "an error leaves y alone");
        layer.forward_into(&[1.0; 8], &mut y).expect("the layer works after errors");
        assert!(y.iter().all(|v| v.is_finite() && *v != 7.0));
    }
}

#[test]
fn finite_inputs_whose_logits_overflow() {
    let (config, mut weights) = small();
    weights.router = [[1e30; 4], [-1e30; 4]].concat();
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("the weights are finite");
        // Logits of the tokens: infinite, 4e30, NaN (infinity - infinity), -4e30.
        let nan = [3e38, -3e38, 3e38, -3e38];
        let x = [[1e30; 4], [1.0; 4], nan, [-1.0; 4]].concat();
        assert_error!(layer.forward(&x), Error::NonFiniteLogits { num_tokens } if (1..=2).contains(num_tokens));
        assert_error!(layer.forward(&x[..4]), Error::NonFiniteLogits { num_tokens: 1 });
        let y = layer.forward(&x[4..8]).expect("huge logits are not infinite ones");
        assert!(y.iter().all(|v| v.is_finite()));
    }
}

/// What the last pass of a recorded batch does with such a token is its own row of NaN: other rows have the bits they
/// have without it.
#[test]
fn a_broken_token_spoils_no_other_row() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("it is a GPU");
    let mut values = Values(3);
    let config = config([12, 8, 6, 3], true);
    let weights = values.weights(&config);
    for num_tokens in [5, 40] {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("the weights are valid");
        let good = values.floats(num_tokens * 12);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
            let mut x = good.clone();
            x[3 * 12..4 * 12].fill(bad);
            let y = run_recorded(&layer, gpu.device(), gpu.queue(), &x);
            let expected = run_recorded(&layer, gpu.device(), gpu.queue(), &good);
            for (t, (y, expected)) in y.chunks_exact(12).zip(expected.chunks_exact(12)).enumerate() {
                if t == 3 {
                    assert!(y.iter().all(|v| !v.is_finite()), "{bad}: {y:?}");
                } else {
                    support::assert_same_bits(&format!("{bad}: token {t} of {num_tokens}"), y, expected);
                }
            }
            run_recorded(&layer, gpu.device(), gpu.queue(), &x);
            let routing = layer.routing().expect("there was a pass");
            for experts in routing.topk_experts.chunks_exact(3) {
                let distinct: std::collections::BTreeSet<_> = experts.iter().collect();
                assert!(distinct.len() == 3 && experts.iter().all(|&e| e < 6), "{bad}: {experts:?}");
            }
        }
    }
}

fn run_recorded(layer: &MoeLayer, device: &wgpu::Device, queue: &wgpu::Queue, x: &[f32]) -> Vec<f32> {
    use wgpu::BufferUsages as Usage;
    let buffer = |usage| {
        let size = (x.len() * 4) as u64;
        device.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let from = buffer(Usage::STORAGE | Usage::COPY_DST);
    queue.write_buffer(&from, 0, bytemuck::cast_slice(x));
    let to = buffer(Usage::STORAGE | Usage::COPY_SRC);
    let mut encoder = device.create_command_encoder(&Default::default());
    let num_tokens = (x.len() / layer.config().hidden_size() as usize) as u32;
    layer.record(&mut encoder, &from, &to, num_tokens).expect("the buffers fit");
    queue.submit([encoder.finish()]);
    read_buffer(device, queue, &to)
}

/// Minus infinity masks an expert, on both engines: weight 0 and no error, as long as another expert is left.
#[test]
fn a_masked_expert_has_no_weight() {
    let config = config([4, 3, 3, 3], true);
    let mut weights = Values(4).weights(&config);
    weights.router = [[0.0; 4], [-1e30; 4], [0.0; 4]].concat();
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("the weights are finite");
        let y = layer.forward(&[1e30, 1e30, 1e30, 1e30]);
        // The experts themselves may overflow on such an input; the routing may not.
        match y {
            Ok(_) => {
                let routing = layer.routing().expect("there was a pass");
                assert_eq!(routing.topk_experts, [0, 2, 1], "{}", context.device().name);
                assert_eq!(routing.topk_weights, [0.5, 0.5, 0.0], "{}", context.device().name);
            }
            Err(error) => panic!("{}: {error}", context.device().name),
        }
    }
}

#[test]
fn devices_that_do_not_exist() {
    for choice in [DeviceChoice::Index(999), DeviceChoice::Name("no such adapter".to_owned())] {
        let opened = Context::new(&choice).map(|context| context.device().clone());
        assert_error!(opened, Error::NoDevice { wanted, .. } if *wanted == choice.to_string());
    }
    assert_eq!("17".parse(), Ok(DeviceChoice::Index(17)));
    assert_eq!(" auto ".parse(), Ok(DeviceChoice::Auto));
    assert_eq!("cpu".parse(), Ok(DeviceChoice::Cpu));
    assert_eq!("Some Name".parse(), Ok(DeviceChoice::Name("Some Name".to_owned())));
    let cpu = Context::new(&DeviceChoice::Cpu).expect("the CPU engine is always there");
    assert!(cpu.gpu().is_none());
}

#[test]
fn layers_that_do_not_fit_the_device() {
    let Some(context) = gpu_context() else { return };
    let (config, weights) = small();
    for limit in [0, 1, 4, 16, 60] {
        let options = LayerOptions { max_binding_bytes: Some(limit), ..LayerOptions::default() };
        let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options);
        assert_error!(layer, Error::LimitExceeded { available, .. } if *available == limit);
    }
    // Enough for a page of 8 columns, but not for a token.
    let wide = support::config([4, 64, 2, 2], true);
    let options = LayerOptions { max_binding_bytes: Some(256), ..LayerOptions::default() };
    let layer = MoeLayer::with_options(&context, wide.clone(), &Values(2).weights(&wide), &options);
    assert_error!(layer, Error::LimitExceeded { .. });
    let floor = DeviceProfile::webgpu_floor();
    for device in [
        DeviceProfile { max_workgroups_per_dimension: 65_534, ..floor.clone() },
        DeviceProfile { max_invocations: 128, ..floor.clone() },
        DeviceProfile { max_workgroup_storage: 16_383, ..floor.clone() },
        DeviceProfile { max_storage_buffers: 7, ..floor.clone() },
    ] {
        assert_error!(plan(&config, &device, MatmulRequest::default()), Error::LimitExceeded { .. });
    }
}

fn plan(config: &MoeConfig, device: &DeviceProfile, request: MatmulRequest) -> Result<LayerPlan> {
    LayerPlan::new(config, WeightFormat::F32, device, &request)
}

/// Sizes whose loops llvmpipe would end early, with a wrong result.
#[test]
fn loops_that_software_drivers_end_early() {
    let gpu = DeviceProfile { max_storage_binding: 1 << 30, max_buffer: 1 << 30, ..DeviceProfile::webgpu_floor() };
    let software = DeviceProfile { software: true, ..gpu.clone() };
    for (sizes, fits) in [
        ([100_000, 8, 4, 1], true),
        ([8, 100_000, 4, 1], true),
        ([130_000, 8, 4, 1], false),
        ([8, 130_000, 4, 1], false),
        ([16_384, 8, 1024, 1], true),
        ([80_000, 8, 1024, 1], false),
    ] {
        let config = config(sizes, true);
        plan(&config, &gpu, MatmulRequest::default()).expect("a GPU runs it");
        let result = plan(&config, &software, MatmulRequest::default());
        if fits {
            result.unwrap_or_else(|error| panic!("{sizes:?}: {error}"));
        } else {
            assert_error!(result, Error::LimitExceeded { .. });
        }
    }
}

/// The longest loops that are let through.
#[test]
fn the_longest_loops_run_to_their_end() {
    let Some(context) = gpu_context() else { return };
    // Ones everywhere: a sum of n ones is n, and what a loop left out is missing.
    for (sizes, tokens) in [([119_996, 4, 2, 1], 1), ([4, 119_996, 2, 1], 1), ([4, 119_996, 2, 1], 20)] {
        let [h, i, e, _] = sizes.map(|n| n as usize);
        let config = config(sizes, true);
        let weights = MoeWeights {
            router: vec![0.0; e * h],
            router_bias: None,
            gate_proj: vec![1.0 / 64.0; e * i * h],
            up_proj: vec![1.0 / 64.0; e * i * h],
            down_proj: vec![1.0; e * h * i],
            ..MoeWeights::default()
        };
        for matmul in support::variants(&context) {
            let options = LayerOptions { matmul: Some(matmul), ..LayerOptions::default() };
            let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("it fits");
            let y = layer.forward(&vec![1.0; tokens * h]).expect("the input is valid");
            let sum = h as f64 / 64.0;
            let expected = i as f64 * sum * sum / (1.0 + (-sum).exp());
            support::assert_close(matmul.name(), &y, &vec![expected; y.len()], |_| 1e-4 * expected);
        }
    }
}

#[test]
fn variants_and_tiles_that_the_device_cannot_run() {
    let (config, _) = small();
    let floor = DeviceProfile::webgpu_floor();
    let request = MatmulRequest { variant: Some(MatmulVariant::Subgroup), choice: None };
    assert_error!(plan(&config, &floor, request.clone()), Error::Unsupported { .. });
    let device = DeviceProfile { subgroup_size: Some(8), ..floor };
    plan(&config, &device, request).expect("the device has subgroups");

    let tiled = |tile_m, tile_n| MatmulChoice::Tiled { tile_m, tile_n };
    let vec = |workgroup_size, k_lanes| MatmulChoice::Vec { workgroup_size, k_lanes, sorted: true };
    let most = u32::MAX - 3;
    let mut bad = vec![tiled(0, 64), tiled(64, 0), tiled(2, 64), tiled(30, 64), tiled(64, 66), tiled(128, 64)];
    bad.extend([tiled(most, most), vec(0, 1), vec(64, 0), vec(64, 3), vec(16, 32), vec(512, 1), vec(u32::MAX, 1)]);
    bad.extend([0, 4, 16].map(|subgroup_size| MatmulChoice::Subgroup { subgroup_size }));
    bad.extend([0, 4, 16].map(|subgroup_size| MatmulChoice::VecSubgroup { subgroup_size, sorted: true }));
    for choice in bad {
        let request = MatmulRequest { variant: None, choice: Some(choice) };
        assert_error!(plan(&config, &device, request), Error::InvalidConfig { field: "tile", .. });
    }
    for choice in MatmulChoice::examples() {
        if choice != (MatmulChoice::Subgroup { subgroup_size: 4 }) {
            let request = MatmulRequest { variant: None, choice: Some(choice) };
            let plan = plan(&config, &device, request).expect("the examples are valid");
            let passes = plan.passes(100).count();
            assert_eq!(passes > 1, !choice.sorted(), "without a sort, 16 tokens are the most");
            assert_eq!(plan.plan(17).is_err(), !choice.sorted());
        }
    }
    assert!("wide".parse::<MatmulVariant>().is_err());
}

#[test]
fn calls_out_of_order() {
    for context in engines() {
        let layer = small_layer(&context);
        assert_error!(layer.upload(&[]), Error::InvalidConfig { field: "num_tokens", .. });
        assert_eq!(layer.routing().expect("no pass is an empty one").num_tokens, 0);
        if context.gpu().is_some() {
            assert_error!(layer.run_resident(), Error::Device { .. });
            assert_error!(layer.profile(), Error::Device { .. });
        }
        assert_error!(layer.plan(0), Error::InvalidConfig { field: "num_tokens", .. });
        layer.upload(&[1.0; 8]).expect("two tokens");
        layer.run_resident().expect("they are there");
        assert_eq!(layer.routing().expect("there was a pass").num_tokens, 2);
    }
    let Some(context) = gpu_context() else { return };
    let layer = small_layer(&Context::cpu());
    let device = context.gpu().expect("it is a GPU").device();
    let desc =
        wgpu::BufferDescriptor { label: None, size: 64, usage: wgpu::BufferUsages::STORAGE, mapped_at_creation: false };
    let (x, y) = (device.create_buffer(&desc), device.create_buffer(&desc));
    let mut encoder = device.create_command_encoder(&Default::default());
    assert_error!(layer.record(&mut encoder, &x, &y, 4), Error::Unsupported { .. });
}

/// The resident input is the one that was uploaded, whatever ran in between.
#[test]
fn resident_passes_leave_the_callers_buffers_alone() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("it is a GPU");
    let layer = small_layer(&context);
    let (x, other) = ([1.0, -2.0, 0.5, 3.0], [-1.0, 0.25, 2.0, -3.0]);
    layer.forward(&x).expect("the input is valid");
    let routing = layer.routing().expect("there was a pass");
    layer.upload(&x).expect("one token");
    run_recorded(&layer, gpu.device(), gpu.queue(), &other);
    assert_ne!(layer.routing().expect("there was a pass").router_logits, routing.router_logits);
    layer.run_resident().expect("it is still there");
    assert_eq!(layer.routing().expect("there was a pass"), routing);
}
