//! Every call to a device is made to fail, one after the other: out of memory, refused, no answer, lost. Each ends in a typed
//! error, nothing is left behind, and the next pass, on a new device where the old one is lost, has the right bits. On a
//! device without a driver (wgpu's noop), where dispatches do nothing but everything else is real, and on a real one.

mod support;

use std::time::{Duration, Instant};
use support::{Values, assert_same_bits, config, gpu_context};
use wgmoe::wgpu;
use wgmoe::{
    Checkpoint, Context, DeviceChoice, Error, ExpertWeights, Fault, Gpu, GpuMemory, LayerOptions, MatmulVariant,
    MoeConfig, MoeLayer, MoeWeights, Result,
};

const H: usize = 32;
/// No error may take longer, however slow the machine.
const PATIENCE: Duration = Duration::from_secs(5);

fn layer_parts() -> (MoeConfig, MoeWeights) {
    let config = config([H as u32, 16, 8, 2], true);
    let weights = Values(1).weights(&config);
    (config, weights)
}

fn options(gpu_memory: GpuMemory) -> LayerOptions {
    LayerOptions { gpu_memory, recoverable: true, matmul: Some(MatmulVariant::Tiled), ..LayerOptions::default() }
}

fn expert() -> ExpertWeights {
    let mut values = Values(77);
    ExpertWeights {
        gate_proj: values.even(16 * H),
        up_proj: values.even(16 * H),
        down_proj: values.even(16 * H),
        router_row: values.even(H),
        ..ExpertWeights::default()
    }
}

/// A device without a driver, and the instance that counts what is alive on it.
struct Noop {
    instance: wgpu::Instance,
    context: Context,
}

impl Noop {
    /// Buffers, bind groups, encoders, command buffers and query sets.
    fn alive(&self) -> [usize; 5] {
        let _ = self.gpu().device().poll(wgpu::PollType::Poll);
        let hub = self.instance.generate_report().expect("it is no browser").hub;
        [hub.buffers, hub.bind_groups, hub.command_encoders, hub.command_buffers, hub.query_sets]
            .map(|of_a_kind| of_a_kind.num_kept_from_user)
    }

    fn gpu(&self) -> Gpu {
        self.context.gpu().expect("it is a GPU").clone()
    }
}

/// What a device of wgpu's noop backend says of itself.
struct Profile {
    name: &'static str,
    limits: wgpu::Limits,
    features: wgpu::Features,
    kind: wgpu::DeviceType,
    subgroup: Option<(u32, u32)>,
}

impl Profile {
    fn new(name: &'static str, binding: u64, subgroup: Option<(u32, u32)>, kind: wgpu::DeviceType) -> Self {
        let limits = wgpu::Limits {
            max_storage_buffer_binding_size: binding,
            max_buffer_size: binding.max(256 << 20),
            ..wgpu::Limits::default()
        };
        let features = if subgroup.is_some() { wgpu::Features::SUBGROUP } else { wgpu::Features::empty() };
        Self { name, limits, features, kind, subgroup }
    }

    fn open(&self, all_limits: bool) -> Result<Noop> {
        let mut desc = wgpu::InstanceDescriptor::new_without_display_handle();
        desc.backends = wgpu::Backends::NOOP;
        desc.backend_options.noop = wgpu::NoopBackendOptions {
            enable: true,
            limits: Some(self.limits.clone()),
            features: Some(self.features),
            device_type: Some(self.kind),
            subgroup_min_size: self.subgroup.map(|(min, _)| min),
            subgroup_max_size: self.subgroup.map(|(_, max)| max),
        };
        let instance = wgpu::Instance::new(desc);
        let adapters = pollster::block_on(instance.enumerate_adapters(wgpu::Backends::NOOP));
        let context = Context::from_adapter(adapters.first().expect("the noop backend is enabled"), all_limits)?;
        Ok(Noop { instance, context })
    }
}

fn profiles() -> Vec<Profile> {
    use wgpu::DeviceType::{Cpu, DiscreteGpu, IntegratedGpu, Other, VirtualGpu};
    vec![
        Profile::new("WebGPU's floor", 128 << 20, None, Other),
        Profile::new("a phone", 256 << 20, Some((16, 16)), IntegratedGpu),
        Profile::new("an integrated GPU of several subgroup sizes", 1 << 30, Some((8, 32)), IntegratedGpu),
        Profile::new("32 lanes, 2 GiB", (2 << 30) - 4, Some((32, 32)), DiscreteGpu),
        Profile::new("64 lanes, 4 GiB", 4 << 30, Some((64, 64)), DiscreteGpu),
        Profile::new("a software driver of 4 lanes", 1 << 30, Some((4, 4)), Cpu),
        Profile::new("a software driver of 8 lanes", 128 << 20, Some((8, 8)), Cpu),
        Profile::new("a virtual one of 128 lanes", 512 << 20, Some((128, 128)), VirtualGpu),
    ]
}

fn floor() -> Noop {
    profiles()[0].open(false).expect("a device with WebGPU's limits opens")
}

/// Buffers, their bytes, bind groups and query sets that are alive on a real device.
fn alive(context: &Context) -> [isize; 4] {
    let (device, queue) = context.gpu().map(|gpu| (gpu.device(), gpu.queue())).expect("it is a GPU");
    // What buffers were filled with at their creation is kept until the next submission.
    queue.submit([]);
    device.poll(wgpu::PollType::Wait { submission_index: None, timeout: Some(PATIENCE) }).expect("it answers");
    let counters = device.get_internal_counters().hal;
    [counters.buffers, counters.buffer_memory, counters.bind_groups, counters.query_sets].map(|c| c.read())
}

/// Builds a layer and does with it all that there is to do, until something fails.
fn live(context: &Context, gpu_memory: GpuMemory) -> Result<MoeLayer> {
    let (config, weights) = layer_parts();
    let mut layer = MoeLayer::with_options(context, config, &weights, &options(gpu_memory))?;
    work(&mut layer)?;
    Ok(layer)
}

/// All that there is to do with a layer. Experts are as before afterwards.
fn work(layer: &mut MoeLayer) -> Result<()> {
    let x = Values(2).floats(20 * H);
    layer.forward(&x)?;
    layer.forward(&x[..3 * H])?;
    layer.routing()?;
    layer.statistics()?;
    layer.forward_with_logits(&x, &Values(3).floats(20 * layer.config().num_experts() as usize))?;
    layer.upload(&x)?;
    layer.run_resident()?;
    layer.status()?;
    layer.profile()?;
    if layer.residency().is_none() {
        let id = layer.add_expert(&expert())?;
        let worked = layer.forward(&x).map(drop);
        // Taking it out again must not hide what failed.
        let removed = layer.remove_expert(id);
        worked.and(removed)?;
    }
    Ok(())
}

#[track_caller]
fn assert_typed(name: &str, fault: Fault, error: &Error) {
    let fits = match fault {
        Fault::OutOfMemory => matches!(error, Error::OutOfMemory { .. }),
        Fault::Refused => matches!(error, Error::Device { .. } | Error::Kernel { .. }),
        Fault::NoAnswer => matches!(error, Error::Timeout { .. }),
        Fault::Lost => matches!(error, Error::DeviceLost { .. }),
    };
    assert!(fits, "{name}, {fault:?}: {error:?}");
    let message = error.to_string();
    assert!(message.len() > 10 && !message.contains("panic"), "{message}");
}

#[test]
fn devices_of_many_kinds_are_planned_for() {
    for profile in profiles() {
        for all_limits in [false, true] {
            let name = format!("{}, all limits: {all_limits}", profile.name);
            let noop = profile.open(all_limits).unwrap_or_else(|error| panic!("{name}: {error}"));
            let (context, gpu) = (&noop.context, noop.gpu());
            let same_size = profile.subgroup.filter(|(min, max)| min == max).map(|(size, _)| size);
            assert_eq!(gpu.profile().subgroup_size, same_size, "{name}");
            let before = noop.alive();
            {
                let (config, weights) = layer_parts();
                let mut layer = MoeLayer::new(context, config.clone(), &weights).expect("it fits");
                for num_tokens in [1, 5, 40, 3000] {
                    let y = layer.forward(&vec![1.0; num_tokens * H]).unwrap_or_else(|error| panic!("{name}: {error}"));
                    assert_eq!(y.len(), num_tokens * H);
                    assert_eq!(layer.pass_stats().readbacks, 0, "{name}");
                }
                work(&mut layer).unwrap_or_else(|error| panic!("{name}: {error}"));
                // Subgroup kernels exist only where every workgroup has subgroups of the same size.
                let options = LayerOptions { matmul: Some(MatmulVariant::Subgroup), ..LayerOptions::default() };
                let subgroup = MoeLayer::with_options(context, config, &weights, &options);
                assert_eq!(subgroup.is_ok(), same_size.is_some(), "{name}: {:?}", subgroup.err());
                assert!(noop.alive()[0] > before[0], "{name}");
            }
            assert_eq!(noop.alive(), before, "{name}: something is left");
        }
    }
}

#[test]
fn a_device_below_webgpus_floor_is_refused() {
    let mut profile = Profile::new("below the floor", 128 << 20, None, wgpu::DeviceType::Other);
    profile.limits.max_storage_buffers_per_shader_stage = 4;
    let error = profile.open(false).err().expect("WebGPU's limits are asked for");
    assert!(matches!(error, Error::DeviceRequest { .. }), "{error:?}");
    let (config, weights) = layer_parts();
    let noop = profile.open(true).expect("it opens with what it has");
    let error = MoeLayer::new(&noop.context, config, &weights).err().expect("four buffers are too few");
    assert!(matches!(&error, Error::LimitExceeded { available: 4, .. }), "{error:?}");
}

/// A sweep over every call of building a layer and working with it: each fails once, then all of it works.
#[test]
fn every_call_may_fail_once() {
    let memory = [GpuMemory::All, GpuMemory::Bytes(3 * 3 * 16 * H as u64 * 4)];
    let mut kinds = 0;
    for gpu_memory in memory {
        for fault in [Fault::OutOfMemory, Fault::Refused, Fault::NoAnswer] {
            let noop = floor();
            let (context, gpu) = (&noop.context, noop.gpu());
            let first = gpu.calls(fault);
            drop(live(context, gpu_memory).expect("nothing fails yet"));
            // The first time compiles kernels; only these calls are not made again.
            let cold = gpu.calls(fault) - first;
            let before = noop.alive();
            drop(live(context, gpu_memory).expect("nothing fails yet"));
            let warm = gpu.calls(fault) - first - cold;
            assert!(fault == Fault::NoAnswer || (warm > 50 && cold > warm), "{fault:?}: {cold}, then {warm}");
            // Bringing experts in is a little of all this, many times over.
            let step = if gpu_memory == GpuMemory::All { 1 } else { 7 };
            for after in (0..warm).step_by(step) {
                let name = format!("call {after} of {warm}, {gpu_memory:?}");
                gpu.fail_call(fault, after);
                let start = Instant::now();
                match live(context, gpu_memory) {
                    Err(error) => assert_typed(&name, fault, &error),
                    Ok(_) => panic!("{name}, {fault:?}: it went unnoticed"),
                }
                assert!(start.elapsed() < PATIENCE, "{name}: {:?}", start.elapsed());
                gpu.fail_no_call();
                assert_eq!(noop.alive(), before, "{name}, {fault:?}: something is left");
                kinds += 1;
            }
            live(context, gpu_memory).unwrap_or_else(|error| panic!("{fault:?}, afterwards: {error}"));
            // Kernels: a new device for each, as each is compiled once.
            for after in (0..cold).step_by(17) {
                let noop = floor();
                let (context, gpu) = (&noop.context, noop.gpu());
                gpu.fail_call(fault, after);
                let error = live(context, gpu_memory).err().unwrap_or_else(|| panic!("{after}: it went unnoticed"));
                assert_typed(&format!("cold call {after} of {cold}"), fault, &error);
                live(context, gpu_memory).unwrap_or_else(|error| panic!("{fault:?}, again: {error}"));
            }
        }
    }
    assert!(kinds > 400, "{kinds} calls were made to fail");
}

/// A layer that failed in the middle of something goes on working.
#[test]
fn a_layer_survives_a_failed_call() {
    for gpu_memory in [GpuMemory::All, GpuMemory::Bytes(3 * 3 * 16 * H as u64 * 4)] {
        let noop = floor();
        let (context, gpu) = (&noop.context, noop.gpu());
        let mut layer = live(context, gpu_memory).expect("nothing fails yet");
        for fault in [Fault::OutOfMemory, Fault::Refused, Fault::NoAnswer] {
            let first = gpu.calls(fault);
            work(&mut layer).expect("nothing fails yet");
            let calls = gpu.calls(fault) - first;
            for after in (0..calls).step_by(2) {
                gpu.fail_call(fault, after);
                let _ = work(&mut layer); // the call may be one that is not made again
                gpu.fail_no_call();
                work(&mut layer)
                    .unwrap_or_else(|error| panic!("{gpu_memory:?}, {fault:?} at {after} of {calls}, then: {error}"));
            }
        }
    }
}

/// The same on a device that computes: what comes after an error has the right bits.
#[test]
fn a_pass_after_a_failed_one_has_the_right_bits() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("it is a GPU").clone();
    let (config, weights) = layer_parts();
    let x = Values(2).floats(20 * H);
    for gpu_memory in [GpuMemory::All, GpuMemory::Bytes(3 * 3 * 16 * H as u64 * 4)] {
        let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options(gpu_memory)).expect("it fits");
        let expected = layer.forward(&x).expect("nothing fails yet");
        let mut failed = 0;
        for fault in [Fault::OutOfMemory, Fault::Refused, Fault::NoAnswer] {
            let first = gpu.calls(fault);
            layer.forward(&x).expect("nothing fails yet");
            for after in 0..gpu.calls(fault) - first {
                gpu.fail_call(fault, after);
                let start = Instant::now();
                if let Err(error) = layer.forward(&x) {
                    assert_typed(&format!("call {after}"), fault, &error);
                    failed += 1;
                }
                assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
                gpu.fail_no_call();
                let y = layer.forward(&x).unwrap_or_else(|error| panic!("{gpu_memory:?}, {fault:?}, {after}: {error}"));
                assert_same_bits(&format!("{gpu_memory:?}, after {fault:?} at call {after}"), &y, &expected);
            }
        }
        assert!(failed >= 10, "{failed} calls failed");
    }
}

/// What a failed layer had on a real device is given back.
#[test]
fn nothing_is_left_of_a_layer_that_failed() {
    let Some(context) = gpu_context() else { return };
    let gpu = context.gpu().expect("it is a GPU").clone();
    drop(live(&context, GpuMemory::All).expect("nothing fails yet"));
    let before = alive(&context);
    let layer = live(&context, GpuMemory::All).expect("nothing fails yet");
    let with_layer = alive(&context);
    // Bind groups went when experts came and went.
    assert!(before.iter().zip(&with_layer).take(2).all(|(before, with)| before < with), "{before:?}, {with_layer:?}");
    drop(layer);
    assert_eq!(alive(&context), before);
    for fault in [Fault::OutOfMemory, Fault::Refused, Fault::NoAnswer] {
        let first = gpu.calls(fault);
        drop(live(&context, GpuMemory::All).expect("nothing fails yet"));
        for after in (0..gpu.calls(fault) - first).step_by(11) {
            gpu.fail_call(fault, after);
            assert!(live(&context, GpuMemory::All).is_err(), "{fault:?}, {after}: it went unnoticed");
            assert_eq!(alive(&context), before, "{fault:?}, {after}: something is left");
        }
    }
}

fn open_again() -> Context {
    Context::new(&DeviceChoice::from_env()).expect("the adapter is still there")
}

/// The device is lost at each of 24 calls, from building the layer to a pass over another number of tokens, and the layer is
/// rebuilt on a new one.
#[test]
fn a_device_may_be_lost_at_any_call() {
    let Some(context) = gpu_context() else { return };
    let (config, weights) = layer_parts();
    let x = Values(2).floats(20 * H);
    let options = options(GpuMemory::All);
    let (passes, expected) = {
        let layer = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("it fits");
        let gpu = context.gpu().expect("it is a GPU");
        let first = gpu.calls(Fault::Lost);
        let expected = layer.forward(&x).expect("nothing fails yet");
        layer.forward(&x[..2 * H]).expect("nothing fails yet");
        (gpu.calls(Fault::Lost) - first, expected)
    };
    assert!(passes >= 24, "{passes} calls");
    for point in 0..24 {
        let after = point * passes / 24;
        let name = format!("lost at call {after} of {passes}");
        let context = open_again();
        let mut layer = MoeLayer::with_options(&context, config.clone(), &weights, &options).expect("it fits");
        context.gpu().expect("it is a GPU").fail_call(Fault::Lost, after);
        let start = Instant::now();
        let error = layer.forward(&x).and_then(|_| layer.forward(&x[..2 * H])).err();
        assert_typed(&name, Fault::Lost, &error.unwrap_or_else(|| panic!("{name}: it went unnoticed")));
        assert_typed(&name, Fault::Lost, &layer.forward(&x).expect_err("it stays lost"));
        assert!(start.elapsed() < PATIENCE, "{name}: {:?}", start.elapsed());
        layer.recover(&open_again()).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_same_bits(&name, &layer.forward(&x).expect("it is new"), &expected);
    }
}

/// Building a layer may meet it, too.
#[test]
fn a_device_may_be_lost_while_a_layer_is_built() {
    let noop = floor();
    drop(live(&noop.context, GpuMemory::All).expect("nothing fails yet"));
    for after in (0..noop.gpu().calls(Fault::Lost)).step_by(7) {
        let noop = floor();
        noop.gpu().fail_call(Fault::Lost, after);
        let start = Instant::now();
        let error = live(&noop.context, GpuMemory::All).err().unwrap_or_else(|| panic!("{after}: it went unnoticed"));
        assert_typed(&format!("lost at call {after}"), Fault::Lost, &error);
        assert!(start.elapsed() < PATIENCE, "{:?}", start.elapsed());
    }
}

/// Experts that came and went are what a layer is rebuilt with; so are the kernels that were chosen for the first number
/// of them.
#[test]
fn a_layer_is_rebuilt_as_it_is_now() {
    let x = Values(2).floats(20 * H);
    for context in std::iter::once(Context::cpu()).chain(gpu_context()) {
        let (config, weights) = layer_parts();
        let open = || if context.gpu().is_some() { open_again() } else { Context::cpu() };
        let mut layer = MoeLayer::with_options(&context, config, &weights, &options(GpuMemory::All)).expect("it fits");
        layer.add_expert(&expert()).expect("it fits");
        layer.remove_expert(2).expect("it is there");
        layer.replace_expert(4, &expert()).expect("it is there");
        let expected = layer.forward(&x).expect("it works");
        for _ in 0..2 {
            layer.recover(&open()).expect("there is a device");
            assert_same_bits(&context.device().name, &layer.forward(&x).expect("it works"), &expected);
        }
        layer.remove_expert(0).expect("a rebuilt layer is like any other");
        // On another engine it is the same layer, if not to the last bit.
        let expected: Vec<f64> = layer.forward(&x).expect("it works").into_iter().map(f64::from).collect();
        layer.recover(&Context::cpu()).expect("it is always there");
        let y = layer.forward(&x).expect("it works");
        let most = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
        support::assert_close("on the CPU engine", &y, &expected, |_| 1e-5 * most);
    }
}

#[test]
fn a_layer_without_a_copy_says_so() {
    let (config, weights) = layer_parts();
    let mut layer = MoeLayer::new(&Context::cpu(), config, &weights).expect("it fits");
    let error = layer.recover(&Context::cpu()).expect_err("there is nothing to rebuild it from");
    assert!(matches!(&error, Error::Unsupported { hint, .. } if hint.contains("recoverable")), "{error:?}");
    layer.forward(&[1.0; H]).expect("it stays as it was");
}

/// Reads that come back short: the file is cut while its experts are on their way.
#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error() {
    let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let whole =
        std::fs::read(golden.join("mixtral__t7_h72_i40_e8k2_hub.safetensors")).expect("it is in the repository");
    let folder = tempfile::tempdir().expect("a temporary folder");
    for context in std::iter::once(Context::cpu()).chain(gpu_context()) {
        for keep in [whole.len() / 2, 100, 0] {
            let path = folder.path().join("layer.safetensors");
            std::fs::write(&path, &whole).expect("writable");
            let checkpoint = Checkpoint::open(&path).expect("it is sound");
            let mut source = checkpoint.layer(None, 0).expect("it has a layer");
            std::fs::OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|file| file.set_len(keep as u64))
                .expect("it can be cut");
            let error = MoeLayer::load(&context, &mut source, &LayerOptions::default(), |_, _| {}).err();
            let error = error.unwrap_or_else(|| panic!("{keep} of {} bytes went unnoticed", whole.len()));
            let message = error.to_string();
            assert!(matches!(error, Error::Io { .. } | Error::BadFile { .. }), "{keep} bytes left: {error:?}");
            assert!(message.contains("layer.safetensors"), "{message}");
        }
    }
}
