//! Calls to a device that fail on purpose: what a program does when its device fails can be tried without one that does.

use super::context::lock;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no memory for what is to be created.
    OutOfMemory,
    /// The driver refuses what it is asked for: a buffer, a kernel, a submission, a mapping.
    Refused,
    /// The device is lost, as after a driver reset, and stays lost.
    Lost,
    /// A wait for the device runs out of time.
    NoAnswer,
}

/// Calls that can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    /// Creating, finishing, submitting, mapping.
    Make,
    Wait,
}

impl Fault {
    fn can_hit(self, call: Call) -> bool {
        match self {
            Fault::OutOfMemory | Fault::Refused => call == Call::Make,
            Fault::Lost => true,
            Fault::NoAnswer => call == Call::Wait,
        }
    }
}

/// Counts calls, and knows which is to fail.
#[derive(Default)]
pub(super) struct Injection {
    /// The fault, and the calls that it can hit before it does.
    pending: Mutex<Option<(Fault, u64)>>,
    made: AtomicU64,
    waited: AtomicU64,
}

impl Injection {
    pub(super) fn set(&self, fault: Fault, after: u64) {
        *lock(&self.pending) = Some((fault, after));
    }

    pub(super) fn clear(&self) {
        *lock(&self.pending) = None;
    }

    pub(super) fn calls(&self, fault: Fault) -> u64 {
        let count = |call, counter: &AtomicU64| if fault.can_hit(call) { counter.load(Ordering::Relaxed) } else { 0 };
        count(Call::Make, &self.made) + count(Call::Wait, &self.waited)
    }

    /// Counts a call. The fault that hits it, once.
    pub(super) fn hit(&self, call: Call) -> Option<Fault> {
        let counter = if call == Call::Make { &self.made } else { &self.waited };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut pending = lock(&self.pending);
        match &mut *pending {
            Some((fault, after)) if fault.can_hit(call) => {
                if *after > 0 {
                    *after -= 1;
                    return None;
                }
                pending.take().map(|(fault, _)| fault)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_hits_once_and_only_what_it_can() {
        let injection = Injection::default();
        injection.set(Fault::NoAnswer, 1);
        let calls = [Call::Make, Call::Wait, Call::Make, Call::Wait, Call::Wait];
        assert_eq!(calls.map(|call| injection.hit(call)), [None, None, None, Some(Fault::NoAnswer), None]);
        let counts = [Fault::OutOfMemory, Fault::NoAnswer, Fault::Lost].map(|fault| injection.calls(fault));
        assert_eq!(counts, [2, 3, 5]);
        injection.set(Fault::Lost, 0);
        assert_eq!(injection.hit(Call::Wait), Some(Fault::Lost));
        injection.set(Fault::Refused, 0);
        injection.clear();
        assert_eq!(injection.hit(Call::Make), None);
    }
}
