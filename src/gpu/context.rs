//! One open device, its error channels, its waits, and counts of what was done with it.

use super::adapter::{self, DeviceInfo};
use super::fault::{Call, Fault, Injection};
use super::pipeline::Pipeline;
use crate::error::{Error, Result};
use crate::plan::DeviceProfile;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

/// How long a wait may take before it is given up, unless [`Gpu::set_deadline`] says otherwise.
const DEADLINE: Duration = Duration::from_secs(300);

/// Features that kernels and times make use of where they are there.
const WANTED: [(&str, wgpu::Features); 3] = [
    ("subgroups", wgpu::Features::SUBGROUP),
    ("timestamps", wgpu::Features::TIMESTAMP_QUERY),
    ("int64", wgpu::Features::SHADER_INT64),
];

/// Features to do without, as a list of their names: so that one device can stand for a lesser one.
fn withheld(names: &str) -> Result<wgpu::Features> {
    let mut features = wgpu::Features::empty();
    for name in names.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        let Some((_, feature)) = WANTED.iter().find(|(known, _)| *known == name) else {
            let known = WANTED.map(|(known, _)| known).join(", ");
            return Err(Error::config("WGMOE_WITHHOLD", name, format!("a list of: {known}")));
        };
        features |= *feature;
    }
    Ok(features)
}

/// What `WGMOE_LIMITS` says.
fn asks_for_all_limits(word: &str) -> Result<bool> {
    match word {
        "" => Ok(false),
        "adapter" => Ok(true),
        other => Err(Error::config("WGMOE_LIMITS", other, "adapter, or nothing".to_owned())),
    }
}

/// How long a device that failed is asked whether it is lost.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// An open device. Cheap to clone; all clones are the same device.
#[derive(Clone)]
pub struct Gpu {
    inner: Arc<Inner>,
    counters: Arc<Counters>,
}

struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: DeviceInfo,
    profile: DeviceProfile,
    faults: Arc<Faults>,
    pipelines: Mutex<HashMap<String, Arc<Pipeline>>>,
    deadline: Mutex<Duration>,
    injection: Injection,
}

/// What the device reported outside of any scope of ours.
#[derive(Default)]
struct Faults {
    lost: Mutex<Option<String>>,
    uncaptured: Mutex<Option<wgpu::Error>>,
}

/// Counts of one user of a device.
#[derive(Default)]
struct Counters {
    allocations: AtomicU64,
    bind_groups: AtomicU64,
    readbacks: AtomicU64,
}

/// A lock that a panicking thread cannot poison for the others: what it guards is valid at every step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gpu {
    /// Opens `adapter` with the WebGPU default limits, or with all that it has.
    pub(crate) async fn open(adapter: &wgpu::Adapter, all_limits: bool) -> Result<Self> {
        let info = adapter.get_info();
        let withheld = withheld(&std::env::var("WGMOE_WITHHOLD").unwrap_or_default())?;
        let wanted = WANTED.iter().fold(wgpu::Features::empty(), |all, &(_, feature)| all | feature) - withheld;
        let all_limits = all_limits || asks_for_all_limits(&std::env::var("WGMOE_LIMITS").unwrap_or_default())?;
        let desc = wgpu::DeviceDescriptor {
            label: Some("wgmoe"),
            required_features: adapter.features() & wanted,
            required_limits: if all_limits { adapter.limits() } else { wgpu::Limits::default() },
            ..Default::default()
        };
        let (device, queue) = adapter
            .request_device(&desc)
            .await
            .map_err(|e| Error::DeviceRequest { adapter: info.name.clone(), message: e.to_string() })?;
        let gpu = Self::wrap(device, queue);
        let faults = gpu.inner.faults.clone();
        gpu.inner.device.on_uncaptured_error(Arc::new(move |error| {
            lock(&faults.uncaptured).get_or_insert(error);
        }));
        let faults = gpu.inner.faults.clone();
        gpu.inner.device.set_device_lost_callback(move |reason, message| {
            lock(&faults.lost).get_or_insert(format!("{reason:?}: {message}"));
        });
        Ok(gpu)
    }

    /// Uses a device that the caller opened. Its error and loss handlers are the caller's and stay in place.
    pub fn wrap(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let info = device.adapter_info();
        let limits = device.limits();
        let (min, max) = (info.subgroup_min_size, info.subgroup_max_size);
        let has_subgroups = device.features().contains(wgpu::Features::SUBGROUP) && min == max && min >= 4;
        let profile = DeviceProfile {
            max_storage_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
            max_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
            max_invocations: limits.max_compute_invocations_per_workgroup,
            max_workgroup_storage: limits.max_compute_workgroup_storage_size,
            max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
            subgroup_size: has_subgroups.then_some(min),
            int64: device.features().contains(wgpu::Features::SHADER_INT64),
            software: info.device_type == wgpu::DeviceType::Cpu,
        };
        let info = adapter::device_info(&info);
        let inner = Inner {
            device,
            queue,
            info,
            profile,
            faults: Arc::default(),
            pipelines: Mutex::default(),
            deadline: Mutex::new(DEADLINE),
            injection: Injection::default(),
        };
        Self { inner: Arc::new(inner), counters: Arc::default() }
    }

    /// The same device with counts of its own, so that layers that share it do not count each other's work.
    pub(super) fn counting(&self) -> Self {
        Self { inner: self.inner.clone(), counters: Arc::default() }
    }

    /// The wgpu device.
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// The wgpu queue.
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    /// Name, backend, driver, kind.
    pub fn info(&self) -> &DeviceInfo {
        &self.inner.info
    }

    /// What plans need to know.
    pub fn profile(&self) -> &DeviceProfile {
        &self.inner.profile
    }

    /// Waits end with [`Error::Timeout`] after this long.
    pub fn set_deadline(&self, deadline: Duration) {
        *lock(&self.inner.deadline) = deadline;
    }

    /// Makes a call fail: the one after the next `after` that `fault` can hit, by whichever clone. For tests of what a
    /// program does then; [`Gpu::calls`] says how many there are to try.
    pub fn fail_call(&self, fault: Fault, after: u64) {
        self.inner.injection.set(fault, after);
    }

    /// No call is made to fail any more.
    pub fn fail_no_call(&self) {
        self.inner.injection.clear();
    }

    /// Buffers that are alive on the device, whoever made them, and their bytes, once everything that was submitted is done
    /// and everything that was dropped is gone. 0 where wgpu does not count, as in a browser.
    pub async fn alive(&self) -> Result<(u64, u64)> {
        // What buffers were filled with at their creation is kept until the next submission.
        let done = Signal::default();
        let notify = done.clone();
        self.scoped("submitting nothing", |_| self.queue().submit([])).await?;
        self.queue().on_submitted_work_done(move || notify.set(Ok(())));
        self.wait(&done, "everything that was submitted").await?;
        let counters = self.device().get_internal_counters().hal;
        let count = |value: isize| u64::try_from(value).unwrap_or(0);
        Ok((count(counters.buffers.read()), count(counters.buffer_memory.read())))
    }

    /// Calls to the device so far that `fault` could have hit.
    pub fn calls(&self, fault: Fault) -> u64 {
        self.inner.injection.calls(fault)
    }

    /// Buffers created through this handle and its clones so far.
    pub fn allocations(&self) -> u64 {
        self.counters.allocations.load(Ordering::Relaxed)
    }

    /// Bind groups created through this handle and its clones so far.
    pub(super) fn bind_groups(&self) -> u64 {
        self.counters.bind_groups.load(Ordering::Relaxed)
    }

    pub(super) fn count_bind_group(&self) {
        self.counters.bind_groups.fetch_add(1, Ordering::Relaxed);
    }

    /// Buffers read back to the host through this handle and its clones so far.
    pub fn readbacks(&self) -> u64 {
        self.counters.readbacks.load(Ordering::Relaxed)
    }

    pub(super) fn has_timestamps(&self) -> bool {
        self.device().features().contains(wgpu::Features::TIMESTAMP_QUERY)
    }

    pub(super) fn pipelines(&self) -> MutexGuard<'_, HashMap<String, Arc<Pipeline>>> {
        lock(&self.inner.pipelines)
    }

    /// Kernels that are compiled and would not be compiled again.
    pub fn num_kernels(&self) -> u32 {
        self.pipelines().len() as u32
    }

    /// Every kernel is compiled anew when it is next asked for, as in a program that has just started. Layers keep theirs.
    pub(crate) fn forget_pipelines(&self) {
        self.pipelines().clear();
    }

    /// Runs `create` with every error of the device caught and typed.
    pub(crate) async fn scoped<T>(&self, during: &str, create: impl FnOnce(&wgpu::Device) -> T) -> Result<T> {
        let device = self.device();
        match self.inner.injection.hit(Call::Make) {
            Some(Fault::OutOfMemory) => return Err(Error::OutOfMemory { during: during.to_owned() }),
            Some(Fault::Refused) => {
                let message = "it was made to fail (Gpu::fail_call)".to_owned();
                return Err(Error::Device { during: during.to_owned(), message });
            }
            Some(Fault::Lost) => device.destroy(),
            Some(Fault::NoAnswer) | None => {}
        }
        let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
        let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
        let result = create(device);
        // All three have to be popped, innermost first, before any is looked at.
        let errors = [internal.pop().await, validation.pop().await, memory.pop().await];
        match errors.into_iter().flatten().next() {
            None => Ok(result),
            Some(error) => Err(typed(error, during)),
        }
    }

    /// A buffer, or a typed error. Its content is zero.
    pub(crate) async fn buffer(&self, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.create_buffer(label, bytes, usage, false).await
    }

    /// A buffer that the host can write at once; [`wgpu::Buffer::unmap`] hands it to the device.
    pub(crate) async fn mapped_buffer(
        &self,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        self.create_buffer(label, bytes, usage, true).await
    }

    async fn create_buffer(
        &self,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<wgpu::Buffer> {
        let available = self.device().limits().max_buffer_size;
        if bytes > available {
            return Err(Error::LimitExceeded {
                what: format!("buffer {label}"),
                required: bytes,
                available,
                hint: "use fewer tokens or a device with larger limits",
            });
        }
        self.counters.allocations.fetch_add(1, Ordering::Relaxed);
        let desc = wgpu::BufferDescriptor { label: Some(label), size: bytes, usage, mapped_at_creation };
        self.scoped(&format!("creating buffer {label} of {bytes} bytes"), |device| device.create_buffer(&desc)).await
    }

    /// A buffer with `content`, uploaded at creation.
    pub(crate) async fn filled_buffer(
        &self,
        label: &str,
        content: &[u8],
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let buffer = self.mapped_buffer(label, (content.len() as u64).next_multiple_of(4), usage).await?;
        write_mapped(&buffer, content)?;
        buffer.unmap();
        Ok(buffer)
    }

    /// Whatever went wrong since the last look, outside of scopes.
    pub(crate) fn check(&self, during: &str) -> Result<()> {
        if let Some(message) = lock(&self.inner.faults.lost).clone() {
            return Err(Error::DeviceLost { message });
        }
        match lock(&self.inner.faults.uncaptured).take() {
            Some(error) => Err(typed(error, during)),
            None => Ok(()),
        }
    }

    /// Submits and waits until the device is done.
    pub(crate) async fn run(&self, commands: wgpu::CommandBuffer, during: &'static str) -> Result<()> {
        let done = Signal::default();
        let notify = done.clone();
        self.submit(commands).await?;
        self.queue().on_submitted_work_done(move || notify.set(Ok(())));
        self.wait(&done, during).await?;
        self.check(during)
    }

    /// Submits without waiting. On a device that is lost or destroyed this is a typed error; a caller's own device may
    /// have no handler but wgpu's, which panics.
    pub(crate) async fn submit(&self, commands: wgpu::CommandBuffer) -> Result<()> {
        self.scoped("submitting commands", |_| self.queue().submit([commands])).await?;
        Ok(())
    }

    /// Starts mapping a whole buffer for reading (`Read`) or writing (`Write`). What is wrong with it is reported to the
    /// error scope as well as to the callback, and without a scope to the caller's handler, which may panic.
    pub(crate) async fn map(&self, buffer: &wgpu::Buffer, mode: wgpu::MapMode) -> Result<Signal> {
        if mode == wgpu::MapMode::Read {
            self.counters.readbacks.fetch_add(1, Ordering::Relaxed);
        }
        let done = Signal::default();
        let notify = done.clone();
        self.scoped("mapping a buffer", |_| {
            buffer.map_async(mode, .., move |result| notify.set(result.map_err(|e| e.to_string())));
        })
        .await?;
        Ok(done)
    }

    /// `result`, but if the device is gone, that is the error: what failed because of it says less.
    pub(crate) fn explain<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(Error::Device { .. } | Error::OutOfMemory { .. } | Error::Kernel { .. }) = &result {
            // The loss of a device is reported while it is polled, once nothing is on its way any more.
            #[cfg(not(target_arch = "wasm32"))]
            let _ = self.device().poll(wgpu::PollType::Wait { submission_index: None, timeout: Some(LAST_WORDS) });
            if let Some(message) = lock(&self.inner.faults.lost).clone() {
                return Err(Error::DeviceLost { message });
            }
        }
        result
    }

    /// Waits for `signal`, driving the device, until the deadline.
    pub(crate) async fn wait(&self, signal: &Signal, during: &'static str) -> Result<()> {
        #[cfg(not(target_arch = "wasm32"))]
        {
            let deadline = *lock(&self.inner.deadline);
            let too_late = || Err(Error::Timeout { what: during, seconds: deadline.as_secs() });
            match self.inner.injection.hit(Call::Wait) {
                Some(Fault::NoAnswer) => return too_late(),
                Some(Fault::Lost) => self.device().destroy(),
                Some(Fault::OutOfMemory | Fault::Refused) | None => {}
            }
            let start = std::time::Instant::now();
            while signal.peek().is_none() {
                self.check(during)?;
                let left = deadline.saturating_sub(start.elapsed());
                if left.is_zero() {
                    return too_late();
                }
                // Short slices, so that a lost device is noticed even if its callbacks never come.
                let timeout = Some(left.min(Duration::from_secs(1)));
                match self.device().poll(wgpu::PollType::Wait { submission_index: None, timeout }) {
                    Ok(_) | Err(wgpu::PollError::Timeout) => {}
                    Err(error) => {
                        return Err(Error::Device { during: during.to_owned(), message: error.to_string() });
                    }
                }
            }
        }
        match signal.clone().await {
            Ok(()) => Ok(()),
            Err(message) => {
                self.check(during)?;
                Err(Error::Device { during: during.to_owned(), message })
            }
        }
    }
}

/// Writes the front of a mapped buffer.
pub(crate) fn write_mapped(buffer: &wgpu::Buffer, content: &[u8]) -> Result<()> {
    if content.is_empty() {
        return Ok(());
    }
    let failed = |message: String| Error::Device { during: "writing to a mapped buffer".to_owned(), message };
    let mut view = buffer.get_mapped_range_mut(..).map_err(|e| failed(e.to_string()))?;
    view.slice(..content.len()).copy_from_slice(content);
    Ok(())
}

/// Hands the bytes of a mapped buffer to `read`, then unmaps it.
pub(crate) fn read_mapped<T>(buffer: &wgpu::Buffer, read: impl FnOnce(&[u8]) -> T) -> Result<T> {
    let result = {
        let view = buffer
            .get_mapped_range(..)
            .map_err(|e| Error::Device { during: "reading a mapped buffer".to_owned(), message: e.to_string() })?;
        read(&view)
    };
    buffer.unmap();
    Ok(result)
}

pub(super) fn typed(error: wgpu::Error, during: &str) -> Error {
    let during = during.to_owned();
    match error {
        wgpu::Error::OutOfMemory { .. } => Error::OutOfMemory { during },
        other => Error::Device { during, message: other.to_string() },
    }
}

/// A one-shot result that a callback sets and a task awaits.
#[derive(Clone, Default)]
pub(crate) struct Signal {
    state: Arc<Mutex<SignalState>>,
}

#[derive(Default)]
struct SignalState {
    result: Option<Result<(), String>>,
    waker: Option<Waker>,
}

impl Signal {
    fn set(&self, result: Result<(), String>) {
        let mut state = lock(&self.state);
        state.result = Some(result);
        if let Some(waker) = state.waker.take() {
            waker.wake();
        }
    }

    fn peek(&self) -> Option<Result<(), String>> {
        lock(&self.state).result.clone()
    }
}

impl Future for Signal {
    type Output = Result<(), String>;

    fn poll(self: Pin<&mut Self>, task: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.state);
        match state.result.clone() {
            Some(result) => Poll::Ready(result),
            None => {
                state.waker = Some(task.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_limits_do_not_know_is_no_other_word() {
        assert!(!asks_for_all_limits("").expect("nothing is asked for"));
        assert!(asks_for_all_limits("adapter").expect("it is known"));
        let error = asks_for_all_limits("Adapter").expect_err("it is not known");
        assert!(matches!(&error, Error::InvalidConfig { found, .. } if found == "Adapter"), "{error:?}");
    }

    #[test]
    fn features_are_withheld_by_name() {
        assert_eq!(withheld("").expect("nothing is withheld"), wgpu::Features::empty());
        let two = withheld("int64, subgroups").expect("both are known");
        assert_eq!(two, wgpu::Features::SHADER_INT64 | wgpu::Features::SUBGROUP);
        let error = withheld("subgroups,f64").expect_err("f64 is not known");
        assert!(
            matches!(&error, Error::InvalidConfig { found, expected, .. }
            if found == "f64" && expected.contains("timestamps")),
            "{error:?}"
        );
    }
}
