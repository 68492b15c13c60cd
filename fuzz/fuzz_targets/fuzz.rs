//! All targets in one program, as most of what takes time to build and link is the same: `WGMOE_FUZZ_TARGET` says which
//! one runs.

#![no_main]

use std::sync::OnceLock;
use wgmoe_fuzz::{Target, noop};

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    let target = TARGET.get_or_init(|| {
        let name = std::env::var("WGMOE_FUZZ_TARGET").unwrap_or_default();
        let known: Vec<&str> = wgmoe_fuzz::TARGETS.iter().map(|target| target.name).collect();
        let found = wgmoe_fuzz::TARGETS.iter().find(|target| target.name == name);
        found.unwrap_or_else(|| panic!("WGMOE_FUZZ_TARGET is {name:?}, expected one of {known:?}"))
    });
    (target.run)(data, noop::device());
});
