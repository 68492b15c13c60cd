//! The WGSL in `shaders/` against the Rust lists in `src/kernels/`, without a GPU.

use std::collections::BTreeSet;
use wgmoe::kernels;

#[test]
fn every_kernel_validates() {
    for kernel in kernels::all() {
        let source = kernel.wgsl();
        let module = naga::front::wgsl::parse_str(&source)
            .unwrap_or_else(|e| panic!("{}: {}", kernel.label, e.emit_to_string_with_path(&source, &kernel.label)));
        let mut validator =
            naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::SUBGROUP);
        validator
            .validate(&module)
            .unwrap_or_else(|e| panic!("{}: {}", kernel.label, e.emit_to_string_with_path(&source, &kernel.label)));
        let _ = BTreeSet::<u32>::new();
    }
}
