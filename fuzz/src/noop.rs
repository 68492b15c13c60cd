//! A device without a driver.

use std::sync::OnceLock;
use wgmoe::{Context, wgpu};

/// A device that does nothing, for files that are of a device.
pub fn device() -> &'static Context {
    static DEVICE: OnceLock<Context> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let noop = wgpu::NoopBackendOptions { enable: true, ..Default::default() };
        let backend_options = wgpu::BackendOptions { noop, ..Default::default() };
        let backends = wgpu::Backends::NOOP;
        let descriptor = wgpu::InstanceDescriptor {
            backends,
            backend_options,
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        };
        let instance = wgpu::Instance::new(descriptor);
        let adapter = block_on(instance.request_adapter(&Default::default())).expect("noop is always there");
        let (device, queue) = block_on(adapter.request_device(&Default::default())).expect("noop can be opened");
        Context::from_wgpu(device, queue)
    })
}

/// For futures that are ready at once, as those of noop are.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}
