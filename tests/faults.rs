//! A device that fails: typed errors within a deadline, never a panic, never a hang.

mod support;

use std::sync::mpsc;
use std::time::{Duration, Instant};
use support::{Values, config, gpu_context};
use wgmoe::wgpu;
use wgmoe::{Context, DeviceChoice, Error, LayerOptions, MatmulVariant, MoeConfig, MoeLayer, MoeWeights, Result};

/// Longer than any wait here may take, on the slowest driver.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `work` on a thread of its own and fails if it does not come back: a hang must not hang the tests.
fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(work()));
    match receiver.recv_timeout(PATIENCE) {
        Ok(result) => {
            thread.join().expect("it has sent its result").expect("somebody receives");
            result
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("no answer after {PATIENCE:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => panic!("it panicked: {:?}", thread.join().err().map(text)),
    }
}

fn text(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or(panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default()
}

fn small() -> (MoeConfig, MoeWeights) {
    let config = config([32, 16, 8, 2], true);
    let weights = Values(1).weights(&config);
    (config, weights)
}

/// Everything that a layer does with its device, once.
fn all_calls(context: &Context, layer: &MoeLayer) -> Vec<(&'static str, Result<()>)> {
    let (config, weights) = small();
    let x = Values(2).floats(20 * 32);
    let gpu = context.gpu().expect("it is a GPU");
    let record = || {
        let desc = wgpu::BufferDescriptor {
            label: None,
            size: 20 * 32 * 4,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: false,
        };
        let (x, y) = (gpu.device().create_buffer(&desc), gpu.device().create_buffer(&desc));
        let mut encoder = gpu.device().create_command_encoder(&Default::default());
        layer.record(&mut encoder, &x, &y, 20)
    };
    vec![
        ("forward", layer.forward(&x).map(drop)),
        ("forward of another size", layer.forward(&x[..10 * 32]).map(drop)),
        ("routing", layer.routing().map(drop)),
        ("upload", layer.upload(&x)),
        ("run_resident", layer.run_resident().map(drop)),
        ("profile", layer.profile().map(drop)),
        ("record", record()),
        ("new", MoeLayer::new(context, config, &weights).map(drop)),
    ]
}

/// A context of its own: a destroyed device must not be one that another test uses.
fn warm_layer(context: &Context) -> MoeLayer {
    let (config, weights) = small();
    let layer = MoeLayer::new(context, config, &weights).expect("the layer is valid");
    layer.forward(&Values(2).floats(20 * 32)).expect("the input is valid");
    layer.upload(&Values(2).floats(20 * 32)).expect("the input is valid");
    layer
}

#[test]
fn a_destroyed_device_is_a_typed_error() {
    let Some(context) = gpu_context() else { return };
    in_time(move || {
        let layer = warm_layer(&context);
        context.gpu().expect("it is a GPU").device().destroy();
        let start = Instant::now();
        for (name, result) in all_calls(&context, &layer) {
            println!("{name}: {result:?}");
            // Recording is only writing down; the caller's submit is what fails.
            assert!(
                name == "record" || matches!(result, Err(Error::DeviceLost { .. } | Error::Device { .. })),
                "{name}"
            );
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
        assert!(matches!(layer.forward(&[1.0; 32]), Err(Error::DeviceLost { .. })), "{:?}", layer.forward(&[1.0; 32]));
        // What needs no device still works.
        assert!(layer.forward(&[]).expect("nothing is valid").is_empty());
        assert!(matches!(layer.forward(&[1.0]), Err(Error::LengthMismatch { .. })));
    });
    // The way out that the message names: a new context.
    let context = Context::new(&DeviceChoice::from_env()).expect("the adapter is still there");
    warm_layer(&context);
}

/// On a caller's device nobody but the caller handles errors; wgpu's own handler panics.
#[test]
fn a_callers_destroyed_device_is_a_typed_error_without_a_handler() {
    let Some(context) = gpu_context() else { return };
    let wanted = context.device().clone();
    in_time(move || {
        let mut desc = wgpu::InstanceDescriptor::new_without_display_handle();
        desc.backends = wgpu::Backends::PRIMARY;
        let adapters = pollster::block_on(wgpu::Instance::new(desc).enumerate_adapters(wgpu::Backends::all()));
        let adapter = adapters.into_iter().find(|adapter| adapter.get_info().name == wanted.name);
        let adapter = adapter.expect("the adapter is still there");
        let (device, queue) = pollster::block_on(adapter.request_device(&Default::default())).expect("it opens");
        let context = Context::from_wgpu(device.clone(), queue);
        let layer = warm_layer(&context);
        device.destroy();
        for (name, result) in all_calls(&context, &layer) {
            println!("{name}: {result:?}");
            assert!(name == "record" || result.is_err(), "{name} succeeded on a destroyed device");
        }
    });
}

#[test]
fn a_wait_ends_at_its_deadline() {
    let Some(context) = gpu_context() else { return };
    in_time(move || {
        let gpu = context.gpu().expect("it is a GPU").clone();
        let (config, weights) = small();
        let x = Values(2).floats(3000 * 32);
        let options = LayerOptions { matmul: Some(MatmulVariant::Tiled), ..LayerOptions::default() };
        let layer = MoeLayer::with_options(&context, config, &weights, &options).expect("the layer is valid");
        let expected = layer.forward(&x).expect("the input is valid");
        for deadline in [Duration::ZERO, Duration::from_nanos(1), Duration::from_micros(50)] {
            gpu.set_deadline(deadline);
            let start = Instant::now();
            for (name, result) in
                [("forward", layer.forward(&x).map(drop)), ("run_resident", layer.run_resident().map(drop))]
            {
                println!("{name} within {deadline:?}: {result:?} after {:?}", start.elapsed());
                match result {
                    Err(Error::Timeout { .. }) => {}
                    // What a timed-out forward leaves is no resident input.
                    Err(Error::Device { .. }) if name == "run_resident" => {}
                    // A fast device may be done before anybody asks.
                    Ok(()) if deadline > Duration::ZERO => {}
                    other => panic!("{name} within {deadline:?}: {other:?}"),
                }
            }
        }
        // The device is not to blame: with time enough, the layer works as before.
        gpu.set_deadline(PATIENCE);
        support::assert_same_bits("after timeouts", &layer.forward(&x).expect("there is time"), &expected);
    });
}

/// Threads that share a layer wait for each other; none gets another's result.
#[test]
fn threads_may_share_a_layer() {
    let Some(context) = gpu_context() else { return };
    in_time(move || {
        let layer = warm_layer(&context);
        std::thread::scope(|scope| {
            for seed in 10..14 {
                let layer = &layer;
                scope.spawn(move || {
                    let x = Values(seed).floats((1 + 7 * seed as usize) * 32);
                    let expected = layer.forward(&x).expect("the input is valid");
                    for run in 0..10 {
                        let y = layer.forward(&x).expect("the input is valid");
                        support::assert_same_bits(&format!("thread {seed} run {run}"), &y, &expected);
                    }
                });
            }
        });
    });
}

/// Only what WebGPU guarantees is asked for, so that what runs here runs on any device.
#[test]
fn the_device_is_opened_at_the_floor() {
    let Some(context) = gpu_context() else { return };
    let limits = context.gpu().expect("it is a GPU").device().limits();
    let floor = wgpu::Limits::default();
    assert_eq!(limits.max_storage_buffer_binding_size, floor.max_storage_buffer_binding_size);
    assert_eq!(limits.max_compute_workgroup_storage_size, floor.max_compute_workgroup_storage_size);
    assert_eq!(limits.max_compute_invocations_per_workgroup, floor.max_compute_invocations_per_workgroup);
    assert_eq!(limits.max_storage_buffers_per_shader_stage, floor.max_storage_buffers_per_shader_stage);
    // With all limits, the same layer gives the same bits.
    let all = Context::with_all_limits(&DeviceChoice::from_env()).expect("the adapter is still there");
    let x = Values(3).floats(50 * 32);
    let [at_floor, at_most] = [&context, &all].map(|c| warm_layer(c).forward(&x).expect("the input is valid"));
    support::assert_same_bits("all limits", &at_most, &at_floor);
}
