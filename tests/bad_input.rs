//! Everything that a caller can get wrong ends in a typed error that says what was found, on every engine alike.

mod support;

use support::{Values, config, gpu_context, read_buffer};
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest};
use wgmoe::wgpu;
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, Context, DROPPED, DeviceChoice, Error, ExtraWeights, Form, Front,
    Function, GroupScore, Groups, LayerExtras, LayerOptions, Masked, MatmulChoice, MatmulVariant, MoeConfig, MoeLayer,
    MoeWeights, Noise, Norm, Priority, Renormalize, Result, Routing, Scores, Selection, SharedExperts, SharedGate,
    WeightFormat,
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
                for format in support::formats(&config) {
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
                    Error::NotRepresentable { tensor, index: 1, format, .. } if tensor == name && format == "f16"
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
    let request = MatmulRequest { variant: Some(MatmulVariant::Subgroup), ..MatmulRequest::default() };
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
        let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
        assert_error!(plan(&config, &device, request), Error::InvalidConfig { field: "tile", .. });
    }
    for choice in MatmulChoice::examples() {
        if choice != (MatmulChoice::Subgroup { subgroup_size: 4 }) {
            let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
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

/// Passes if the error is about this field, and its message says what was found and what would be right.
fn assert_names<T>(result: Result<T>, field: &str, words: &[&str]) {
    let result = result.map(|_| "a value");
    assert!(
        matches!(&result, Err(Error::InvalidConfig { field: found, .. }) if *found == field),
        "{field}: {result:?}"
    );
    let message = result.unwrap_err().to_string();
    for word in words.iter().chain([&field]) {
        assert!(message.contains(word), "no {word:?} in {message:?}");
    }
}

/// Hidden 4, intermediate 3, 6 experts, top-2.
fn routed(routing: Routing) -> Result<MoeConfig> {
    MoeConfig::new(4, 3, 6, 2, routing, Activation::SWIGLU)
}

const GROUPS: Groups = Groups { num_groups: 3, keep: 1, score: GroupScore::Max, masked: Masked::NegInfinity };
const CAPACITY: Capacity = Capacity {
    limit: CapacityLimit::Number(1),
    per_sequence: false,
    priority: Priority::Position,
    renormalize_after: false,
    pass_through: false,
};

#[test]
fn routers_that_contradict_themselves() {
    let plain = Routing::softmax(true);
    let grouped = |groups| routed(Routing { groups: Some(groups), ..plain });
    grouped(GROUPS).expect("one group of two experts is enough for two");
    assert_names(grouped(Groups { num_groups: 4, ..GROUPS }), "num_groups", &["4", "divisor", "6"]);
    assert_names(grouped(Groups { num_groups: 0, ..GROUPS }), "num_groups", &["0", "128"]);
    assert_names(grouped(Groups { num_groups: 12, ..GROUPS }), "num_groups", &["12", "6"]);
    assert_names(grouped(Groups { keep: 4, ..GROUPS }), "keep_groups", &["4", "1 to", "3"]);
    assert_names(grouped(Groups { keep: 0, ..GROUPS }), "keep_groups", &["0", "3"]);
    assert_names(grouped(Groups { num_groups: 6, ..GROUPS }), "top_k", &["2", "at most 1", "1 groups of 1"]);
    let one_each = Groups { num_groups: 6, keep: 2, score: GroupScore::SumTop2, ..GROUPS };
    assert_names(grouped(one_each), "group_score", &["sum_top2", "max"]);
    let given = Routing { groups: Some(GROUPS), selection: Selection::Given, ..plain };
    assert_names(routed(given), "keep_groups", &["1", "3"]);
    assert_names(routed(Routing::new(Scores::Hierarchical, true)), "groups", &["none", "hierarchical"]);

    for selection in [Selection::Dense, Selection::ExpertChoice] {
        let routing = Routing { selection, capacity: Some(CAPACITY), ..plain };
        assert_names(routed(routing), "top_k", &["2", "num_experts", "6"]);
        MoeConfig::new(4, 3, 6, 6, routing, Activation::SWIGLU).expect("all six");
    }
    let expert_choice = Routing { selection: Selection::ExpertChoice, ..plain };
    let result = MoeConfig::new(4, 3, 6, 6, expert_choice, Activation::SWIGLU);
    assert_names(result, "capacity", &["none", "expert choice"]);
    let table = Routing { selection: Selection::TokenTable { vocab_size: 0 }, ..plain };
    assert_names(routed(table), "vocab_size", &["0", "at least 1"]);

    let with = |capacity| routed(Routing { capacity: Some(capacity), renormalize: None, ..plain });
    assert_names(with(Capacity { limit: CapacityLimit::Number(0), ..CAPACITY }), "capacity", &["0", "at least 1"]);
    for fraction in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let limit = CapacityLimit::Fraction { fraction, round_up: true, minimum: 1 };
        assert_names(with(Capacity { limit, ..CAPACITY }), "capacity", &[&fraction.to_string(), "positive"]);
    }
    assert_names(with(Capacity { renormalize_after: true, ..CAPACITY }), "renormalize_after", &["renormalize"]);
}

#[test]
fn numbers_that_no_router_has() {
    let plain = Routing::softmax(true);
    let sum = Renormalize::default();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        let found = bad.to_string();
        let found = [found.as_str()];
        let renormalized = |renormalize| routed(Routing { renormalize: Some(renormalize), ..plain });
        assert_names(renormalized(Renormalize { p: bad, ..sum }), "renormalize.p", &found);
        assert_names(renormalized(Renormalize { epsilon: bad, ..sum }), "renormalize.epsilon", &found);
        assert_names(renormalized(Renormalize { floor: bad, ..sum }), "renormalize.floor", &found);
        assert_names(routed(Routing { logit_softcap: Some(bad), ..plain }), "logit_softcap", &found);
        let sparsemixer = Selection::Sparsemixer { jitter: bad };
        assert_names(routed(Routing { selection: sparsemixer, ..plain }), "selection.jitter", &found);
        assert_names(routed(Routing { noise: Noise::Jitter { epsilon: bad }, ..plain }), "noise.jitter", &["0 to 1"]);
        if bad != -1.0 {
            assert_names(routed(Routing { scale: bad, ..plain }), "scale", &found);
            assert_names(routed(Routing { logit_scale: bad, ..plain }), "logit_scale", &found);
        }
        let config = || routed(plain).expect("valid");
        let norm = Some(Norm { epsilon: bad, scale_first: false });
        let none = LayerExtras::default();
        for (field, extras) in [
            ("router_norm", LayerExtras { router_norm: norm, ..none.clone() }),
            ("expert_norm", LayerExtras { expert_norm: norm, ..none.clone() }),
            ("expert_out_norm", LayerExtras { expert_out_norm: norm, ..none.clone() }),
            ("routed_norm", LayerExtras { routed_norm: norm, ..none.clone() }),
            ("output_norm", LayerExtras { output_norm: norm, ..none.clone() }),
        ] {
            assert_names(config().with_extras(extras), field, &[found[0], "epsilon"]);
        }
        for form in [
            Form::Clamped { limit: bad },
            Form::ClampedAfter { limit: bad },
            Form::GptOss { limit: bad, alpha: 1.0 },
            Form::GptOss { limit: 1.0, alpha: bad },
            Form::SoftCapped { gate: bad, up: 1.0 },
            Form::SoftCapped { gate: 1.0, up: bad },
        ] {
            let activation = Activation { form, function: Function::Silu };
            assert_names(MoeConfig::new(4, 3, 6, 2, plain, activation), "activation", &["positive"]);
        }
    }
    assert_names(routed(Routing { logit_softcap: Some(0.0), ..plain }), "logit_softcap", &["0", "positive"]);
    assert_names(
        routed(Routing { noise: Noise::Jitter { epsilon: 1.5 }, ..plain }),
        "noise.jitter",
        &["1.5", "0 to 1"],
    );
}

const SHARED: SharedExperts = SharedExperts {
    num: 1,
    intermediate_size: 3,
    activation: Activation::SWIGLU,
    gate: SharedGate::None,
    average: false,
};

#[test]
fn surroundings_that_no_layer_has() {
    let with = |extras| routed(Routing::softmax(true)).expect("valid").with_extras(extras);
    let none = LayerExtras::default();
    assert_names(with(LayerExtras { special_experts: 6, ..none.clone() }), "special_experts", &["6", "below"]);
    assert_names(with(LayerExtras { latent_size: Some(0), ..none.clone() }), "latent_size", &["0", "1 to"]);
    assert_names(with(LayerExtras { routed_scale: f32::NAN, ..none.clone() }), "routed_scale", &["NaN", "finite"]);
    let shared = |shared| with(LayerExtras { shared: Some(shared), ..LayerExtras::default() });
    assert_names(shared(SharedExperts { num: 0, ..SHARED }), "shared.num", &["0", "1 to 32"]);
    assert_names(shared(SharedExperts { num: 33, ..SHARED }), "shared.num", &["33", "1 to 32"]);
    assert_names(shared(SharedExperts { intermediate_size: 0, ..SHARED }), "shared.intermediate_size", &["0"]);
    let joint = SharedExperts { gate: SharedGate::Joint, ..SHARED };
    assert_names(shared(joint), "scores", &["softmax", "sigmoid", "joint"]);
    assert_names(shared(SharedExperts { num: 2, gate: SharedGate::Mix, ..SHARED }), "shared.num", &["2", "1", "mixes"]);
    let clamped = Activation { form: Form::Clamped { limit: -1.0 }, function: Function::Silu };
    assert_names(shared(SharedExperts { activation: clamped, ..SHARED }), "shared.activation", &["-1", "positive"]);
}

/// A tensor that the configuration asks for is there, and none that it would leave out.
#[test]
fn tensors_that_are_missing_or_superfluous() {
    let norm = Some(Norm { epsilon: 1e-5, scale_first: false });
    let config = routed(Routing {
        noise: Noise::NoisyTopK,
        groups: Some(Groups { keep: 3, ..GROUPS }),
        ..Routing::new(Scores::Hierarchical, true)
    });
    let everything = config.expect("valid").with_extras(LayerExtras {
        latent_size: Some(5),
        router_norm: norm,
        expert_norm: norm,
        expert_out_norm: norm,
        routed_norm: norm,
        output_norm: norm,
        shared: Some(SharedExperts { gate: SharedGate::Sigmoid, ..SHARED }),
        ..LayerExtras::default()
    });
    let everything = everything.expect("valid");
    let ones = |len| Some(vec![1.0; len]);
    let full = MoeWeights {
        router: vec![1.0; 6 * 4],
        router_bias: ones(6),
        gate_proj: vec![1.0; 6 * 3 * 5],
        up_proj: vec![1.0; 6 * 3 * 5],
        down_proj: vec![1.0; 6 * 3 * 5],
        extras: ExtraWeights {
            selection_bias: ones(6),
            per_expert_scale: ones(6),
            router_noise: ones(6 * 4),
            group_router: ones(3 * 4),
            token_table: None,
            gate_bias: ones(6 * 3),
            up_bias: ones(6 * 3),
            down_bias: ones(6 * 5),
            latent_in: ones(5 * 4),
            latent_out: ones(4 * 5),
            router_norm: ones(4),
            expert_norm: ones(5),
            expert_out_norm: ones(5),
            routed_norm: ones(4),
            output_norm: ones(4),
            output_bias: ones(4),
            shared_gate_proj: vec![1.0; 3 * 4],
            shared_up_proj: vec![1.0; 3 * 4],
            shared_down_proj: vec![1.0; 4 * 3],
            shared_gate: ones(4),
        },
    };
    full.validate(&everything, WeightFormat::F32).expect("everything fits");
    let (plain, least) = (
        routed(Routing::softmax(true)).expect("valid"),
        Values(1).weights(&routed(Routing::softmax(true)).expect("valid")),
    );

    type Tensor = fn(&mut ExtraWeights) -> &mut Option<Vec<f32>>;
    let needed: [(&str, Tensor); 10] = [
        ("router_noise", |x| &mut x.router_noise),
        ("group_router", |x| &mut x.group_router),
        ("latent_in", |x| &mut x.latent_in),
        ("latent_out", |x| &mut x.latent_out),
        ("router_norm", |x| &mut x.router_norm),
        ("expert_norm", |x| &mut x.expert_norm),
        ("expert_out_norm", |x| &mut x.expert_out_norm),
        ("routed_norm", |x| &mut x.routed_norm),
        ("output_norm", |x| &mut x.output_norm),
        ("shared_gate", |x| &mut x.shared_gate),
    ];
    let optional: [(&str, Tensor); 6] = [
        ("selection_bias", |x| &mut x.selection_bias),
        ("per_expert_scale", |x| &mut x.per_expert_scale),
        ("gate_bias", |x| &mut x.gate_bias),
        ("up_bias", |x| &mut x.up_bias),
        ("down_bias", |x| &mut x.down_bias),
        ("output_bias", |x| &mut x.output_bias),
    ];
    for (name, tensor) in needed {
        let mut weights = full.clone();
        *tensor(&mut weights.extras) = None;
        assert_names(weights.validate(&everything, WeightFormat::F32), name, &["missing"]);
        let mut weights = least.clone();
        *tensor(&mut weights.extras) = ones(4);
        assert_names(weights.validate(&plain, WeightFormat::F32), name, &["no use"]);
    }
    for (name, tensor) in needed.into_iter().chain(optional) {
        let mut weights = full.clone();
        tensor(&mut weights.extras).as_mut().expect("it is there").push(1.0);
        let length = tensor(&mut weights.extras).as_ref().map_or(0, Vec::len);
        assert_error!(
            weights.validate(&everything, WeightFormat::F32),
            Error::LengthMismatch { tensor, found, expected, .. }
                if (*tensor, *found, *expected) == (name, length, length - 1)
        );
        let mut weights = full.clone();
        tensor(&mut weights.extras).as_mut().expect("it is there")[2] = f32::NAN;
        assert_error!(
            weights.validate(&everything, WeightFormat::F32),
            Error::NonFinite { tensor, index: 2, .. } if tensor == name
        );
    }
    type Matrix = fn(&mut ExtraWeights) -> &mut Vec<f32>;
    let matrices: [(&str, Matrix); 3] = [
        ("shared_gate_proj", |x| &mut x.shared_gate_proj),
        ("shared_up_proj", |x| &mut x.shared_up_proj),
        ("shared_down_proj", |x| &mut x.shared_down_proj),
    ];
    for (name, matrix) in matrices {
        let mut weights = full.clone();
        matrix(&mut weights.extras).clear();
        assert_names(weights.validate(&everything, WeightFormat::F32), name, &["missing"]);
        let mut weights = least.clone();
        matrix(&mut weights.extras).push(1.0);
        assert_names(weights.validate(&plain, WeightFormat::F32), name, &["no use"]);
    }
    // Half of a pair of biases would be taken for zeros.
    let mut weights = least.clone();
    weights.extras.gate_bias = ones(6 * 3);
    assert_names(weights.validate(&plain, WeightFormat::F32), "gate_bias", &["up_bias"]);
    // A bias of ranks where nobody is ranked.
    let dense = Routing { selection: Selection::Dense, ..Routing::softmax(true) };
    let dense = MoeConfig::new(4, 3, 6, 6, dense, Activation::SWIGLU).expect("valid");
    let mut weights = least.clone();
    weights.extras.selection_bias = ones(6);
    assert_names(weights.validate(&dense, WeightFormat::F32), "selection_bias", &["none"]);
    // A third matrix for experts that have two.
    let two = MoeConfig::new(4, 3, 6, 2, Routing::softmax(true), Activation::plain(Function::Relu)).expect("valid");
    assert_names(least.validate(&two, WeightFormat::F32), "gate_proj", &["no use"]);
}

#[test]
fn token_tables_that_do_not_fit() {
    let selection = Selection::TokenTable { vocab_size: 3 };
    let config = routed(Routing { selection, ..Routing::softmax(true) }).expect("valid");
    let mut weights = Values(1).weights(&config);
    assert_names(weights.validate(&config, WeightFormat::F32), "token_table", &["missing"]);
    weights.extras.token_table = Some(vec![0; 5]);
    assert_error!(
        weights.validate(&config, WeightFormat::F32),
        Error::LengthMismatch { tensor: "token_table", expected: 6, found: 5, .. }
    );
    weights.extras.token_table = Some(vec![0, 1, 2, 6, 4, 5]);
    assert_names(weights.validate(&config, WeightFormat::F32), "token_table", &["6", "below 6"]);
    weights.extras.token_table = Some(vec![0, 1, 2, 3, 4, 5]);
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("it fits");
        let run = |token_ids: Option<&[u32]>| layer.forward_batch(&Batch { token_ids, ..Batch::from(&[1.0; 8]) });
        assert_names(run(None), "token_ids", &["missing", "one for each token"]);
        assert_error!(run(Some(&[1])), Error::LengthMismatch { tensor: "token_ids", expected: 2, found: 1, .. });
        assert_error!(run(Some(&[1; 3])), Error::LengthMismatch { tensor: "token_ids", found: 3, .. });
        assert_names(run(Some(&[1, 3])), "token_ids", &["3", "below", "3 rows"]);
        assert_names(run(Some(&[u32::MAX, 0])), "token_ids", &["4294967295"]);
        run(Some(&[2, 0])).expect("these are in the table");
        assert_eq!(layer.routing().expect("a pass ran").topk_experts, [4, 5, 0, 1]);
        // Logits instead of the router's do not say which row.
        assert_names(layer.forward_with_logits(&[1.0; 4], &[0.0; 6]), "token_ids", &["missing"]);
    }
}

#[test]
fn given_experts_that_do_not_exist() {
    let config = routed(Routing { selection: Selection::Given, ..Routing::softmax(true) }).expect("valid");
    let weights = Values(1).weights(&config);
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        let run = |experts: Option<&[i32]>| layer.forward_batch(&Batch { experts, ..Batch::from(&[1.0; 8]) });
        assert_names(run(None), "experts", &["missing", "top_k"]);
        for bad in [-2, 6, i32::MIN, i32::MAX] {
            assert_names(run(Some(&[0, 1, bad, 2])), "experts", &[&bad.to_string(), "-1", "0 to 5"]);
        }
        for length in [0, 3, 5] {
            let experts = vec![0; length];
            assert_error!(run(Some(&experts)), Error::LengthMismatch { tensor: "experts", expected: 4, found, .. }
                if *found == length);
        }
        // -1 is defined: nobody. A token with nobody is zero.
        let y = run(Some(&[-1, 3, -1, -1])).expect("-1 is nobody");
        assert!(y[..4].iter().all(|v| *v != 0.0), "{y:?}");
        assert_eq!(y[4..], [0.0; 4]);
        let routing = layer.routing().expect("a pass ran");
        assert_eq!(routing.topk_experts, [DROPPED, 3, DROPPED, DROPPED]);
        assert_eq!(routing.num_dropped, 3);
        let alone = run(Some(&[3, -1, -1, -1])).expect("-1 is nobody");
        support::assert_close("the place of nobody", &alone, &y.iter().map(|&v| v.into()).collect::<Vec<_>>(), |_| {
            1e-6
        });
    }
}

#[test]
fn logits_that_are_no_logits() {
    let (config, weights) = small();
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        let x = [1.0, -0.5, 2.0, 0.25, 1.0, -0.5, 2.0, 0.25];
        for length in [0, 2, 3, 5, 8] {
            let logits = vec![0.0; length];
            assert_error!(
                layer.forward_with_logits(&x, &logits),
                Error::LengthMismatch { tensor: "logits", expected: 4, found, .. } if *found == length
            );
        }
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            assert_error!(
                layer.forward_with_logits(&x, &[0.0, 1.0, bad, 0.0]),
                Error::NonFinite { tensor, index: 2, value } if tensor == "logits" && value.to_bits() == bad.to_bits()
            );
        }
        // Minus infinity masks an expert, but not all of a token's.
        let masked = f32::NEG_INFINITY;
        layer.forward_with_logits(&x, &[masked, -3.0, 0.0, masked]).expect("one is left");
        assert_eq!(layer.routing().expect("a pass ran").topk_experts, [1, 0]);
        assert_error!(
            layer.forward_with_logits(&x, &[0.0, 1.0, masked, masked]),
            Error::NonFiniteLogits { num_tokens: 1 }
        );
        layer.forward_with_logits(&x, &[f32::MAX, f32::MIN, 0.0, 1.0]).expect("large is not infinite");
    }
}

#[test]
fn assignments_that_do_not_fit() {
    let (config, weights) = small();
    let routing = Routing::new(Scores::Sigmoid, true);
    let joint = MoeConfig::new(4, 3, 2, 1, routing, Activation::SWIGLU).expect("valid");
    let shared = Some(SharedExperts { gate: SharedGate::Joint, ..SHARED });
    let joint = joint.with_extras(LayerExtras { shared, ..LayerExtras::default() }).expect("valid");
    let mut joint_weights = weights.clone();
    joint_weights.extras = ExtraWeights {
        shared_gate_proj: vec![1.0; 12],
        shared_up_proj: vec![1.0; 12],
        shared_down_proj: vec![1.0; 12],
        shared_gate: Some(vec![1.0; 4]),
        ..ExtraWeights::default()
    };
    for context in engines() {
        let layer = MoeLayer::new(&context, config.clone(), &weights).expect("valid");
        let run = |experts: &[i32], weights: &[f32]| layer.forward_with_assignments(&[1.0; 8], experts, weights);
        assert_error!(run(&[0], &[1.0; 2]), Error::LengthMismatch { tensor: "experts", expected: 2, found: 1, .. });
        assert_error!(run(&[0; 3], &[1.0; 2]), Error::LengthMismatch { tensor: "experts", found: 3, .. });
        assert_error!(run(&[0; 2], &[1.0; 3]), Error::LengthMismatch { tensor: "weights", found: 3, .. });
        assert_error!(run(&[0; 2], &[]), Error::LengthMismatch { tensor: "weights", found: 0, .. });
        for bad in [-2, 2, i32::MIN] {
            assert_names(run(&[0, bad], &[1.0; 2]), "experts", &[&bad.to_string(), "-1", "0 to 1"]);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_error!(
                run(&[0, 1], &[1.0, bad]),
                Error::NonFinite { tensor, index: 1, .. } if tensor == "weights"
            );
        }
        let y = run(&[-1, 1], &[1.0, -2.0]).expect("negative weights are weights");
        assert_eq!(y[..4], [0.0; 4], "nobody");
        assert!(y[4..].iter().all(|v| *v != 0.0), "{y:?}");
        let layer = MoeLayer::new(&context, joint.clone(), &joint_weights).expect("valid");
        let result = layer.forward_with_assignments(&[1.0; 4], &[0], &[1.0]);
        assert_error!(result, Error::Unsupported { hint, .. } if hint.contains("logits"));
    }
}

#[test]
fn sequences_that_do_not_divide_the_batch() {
    for context in engines() {
        let layer = small_layer(&context);
        let x = [1.0; 6 * 4];
        let run = |sequence, front| {
            layer.forward_batch(&Batch { tokens_per_sequence: Some(sequence), front, ..Batch::from(&x) })
        };
        let assignments = Front::Assignments { experts: &[0; 6], weights: &[1.0; 6] };
        for front in [Front::Router, Front::Logits(&[0.0; 12]), assignments] {
            for bad in [0, 4, 7, 12, u32::MAX] {
                assert_names(run(bad, front), "tokens_per_sequence", &[&bad.to_string(), "divisor", "6"]);
            }
            for good in [1, 2, 3, 6] {
                run(good, front).expect("it divides 6");
            }
        }
    }
}
