//! The WGSL in `shaders/` against the Rust lists in `src/kernels/` and the files beside them, without a GPU.
//!
//! Each checker returns what it finds wrong, so that it can be shown to find something.

use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Module, ShaderStage, StorageAccess, TypeInner};
use std::collections::{BTreeMap, BTreeSet};
use std::mem::{offset_of, size_of};
use std::path::{Path, PathBuf};
use wgmoe::kernels::params::{CapacityParams, MatmulParams, MoeParams, NormParams, RouterParams, StatisticsParams};
use wgmoe::kernels::{self, Access, Kernel, Part, Stage};
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest, variant};
use wgmoe::{Activation, LayerFormats, MatmulVariant, MoeConfig, Routing, WeightFormat};

/// What a checker found wrong, one line each.
type Faults = Vec<String>;

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Parsed and validated; the error says in which file and line of `shaders/`.
fn compile(kernel: &Kernel) -> Result<(Module, ModuleInfo), String> {
    let source = kernel.wgsl();
    let at = |line: Option<u32>| match line.map(|line| kernel.locate(line)) {
        Some((file, line)) => format!("{}: shaders/{file}.wgsl:{line}", kernel.label),
        None => kernel.label.clone(),
    };
    let module = naga::front::wgsl::parse_str(&source).map_err(|error| {
        format!("{}: {}", at(error.location(&source).map(|l| l.line_number)), error.emit_to_string(&source))
    })?;
    let mut capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;
    capabilities.set(Capabilities::SUBGROUP, kernel.needs_subgroups);
    capabilities.set(Capabilities::SHADER_INT64, kernel.needs_int64());
    let info = Validator::new(ValidationFlags::all(), capabilities).validate(&module).map_err(|error| {
        format!("{}: {}", at(error.location(&source).map(|l| l.line_number)), error.emit_to_string(&source))
    })?;
    Ok((module, info))
}

/// Probes measure a device and are no part of the pass: they have no reference and no uniform.
fn is_probe(stage: Stage) -> bool {
    matches!(stage, Stage::ProbeFma | Stage::ProbeRead)
}

/// The definition of a stage: a file of its name, or of the stage that it is a part of.
fn twin(name: &str) -> String {
    let twin = match name {
        "token_table" => "router",
        "reweigh" => "capacity",
        "down_combine" => "combine",
        "token_statistics" | "expert_statistics" => "statistics",
        other => other,
    };
    format!("src/reference/{twin}.rs")
}

/// One entry point with the stage's name, and the stage's files.
fn check_names(kernel: &Kernel, module: &Module) -> Faults {
    let name = kernel.stage.name();
    let mut faults = Vec::new();
    let entry_points: Vec<&str> = module.entry_points.iter().map(|e| e.name.as_str()).collect();
    if entry_points != [name] {
        faults.push(format!("entry points {entry_points:?}, expected one called {name:?}"));
    }
    if !kernel.label.starts_with(name) {
        faults.push(format!("the label does not start with {name:?}"));
    }
    if !kernel.parts.iter().any(|part| part.file == name) {
        faults.push(format!("no part called {name:?}"));
    }
    let mut files = vec![format!("shaders/{name}.wgsl"), format!("src/kernels/{name}.rs")];
    // Nobody looks at what a probe computes.
    if !is_probe(kernel.stage) {
        files.push(twin(name));
    }
    for file in files {
        if !repository(&file).is_file() {
            faults.push(format!("no file {file}"));
        }
    }
    faults
}

/// Group 0, and names, numbers and access as in the kernel's list; every binding is used.
fn check_bindings(kernel: &Kernel, module: &Module, info: &ModuleInfo) -> Faults {
    let mut faults = Vec::new();
    let uses = info.get_entry_point(0);
    let mut found = BTreeMap::new();
    for (handle, variable) in module.global_variables.iter() {
        let Some(binding) = &variable.binding else { continue };
        let name = variable.name.clone().unwrap_or_default();
        if binding.group != 0 {
            faults.push(format!("{name} is in group {}", binding.group));
        }
        let access = match variable.space {
            AddressSpace::Uniform => Access::Uniform,
            AddressSpace::Storage { access } if access.contains(StorageAccess::STORE) => Access::Write,
            _ => Access::Read,
        };
        // A part can declare a binding that one of the kernels made of it has no use for; those are not in the list.
        if uses[handle].is_empty() {
            if kernel.bindings.iter().any(|b| b.name == name) {
                faults.push(format!("{name} is bound but never used"));
            }
            continue;
        }
        if let Some((other, _)) = found.insert(binding.binding, (name.clone(), access)) {
            faults.push(format!("{name} and {other} are both binding {}", binding.binding));
        }
    }
    let listed: BTreeMap<_, _> = kernel.bindings.iter().map(|b| (b.index, (b.name.to_owned(), b.access))).collect();
    if found != listed || listed.len() != kernel.bindings.len() {
        faults.push(format!("bindings {found:?} in WGSL, {listed:?} in Rust"));
    }
    let storage = found.values().filter(|(_, access)| *access != Access::Uniform).count();
    let most = DeviceProfile::webgpu_floor().max_storage_buffers as usize;
    if storage > most {
        faults.push(format!("{storage} storage buffers, WebGPU guarantees {most}"));
    }
    faults
}

/// A struct's fields with their offsets, and its size.
type Fields = (Vec<(String, u32)>, u32);

macro_rules! fields {
    ($type:ident: $($field:ident),* $(,)?) => {{
        // Does not compile if a field is missing from the list.
        let $type { $($field: _),* } = $type::default();
        let fields = vec![$((stringify!($field).to_owned(), offset_of!($type, $field) as u32)),*];
        (stringify!($type), (fields, size_of::<$type>() as u32))
    }};
}

/// The Rust structs that uniforms are made of.
fn uniform_structs() -> BTreeMap<&'static str, Fields> {
    BTreeMap::from([
        fields!(MoeParams: num_tokens, hidden_size, num_experts, num_weighted, top_k, num_assignments,
            num_tile_slots, tile_m, hidden_stride, first_column, chunk_len, in_stride, in_width, num_shared,
            out_stride, routed_scale, shared_scale),
        fields!(RouterParams: num_tokens, hidden_size, num_experts, top_k, num_rows, first_row, num_shared,
            num_groups, keep_groups, masked_bits, nan_bits, renormalize, noise_key, first_token, scale, logit_scale,
            logit_softcap, norm_p, norm_epsilon, norm_floor, jitter, close),
        fields!(CapacityParams: num_tokens, tokens_per_sequence, num_experts, top_k, capacity, keys_at),
        fields!(NormParams: num_rows, width, v_stride, normed_stride, epsilon),
        fields!(StatisticsParams: num_tokens, tokens_per_sequence, num_experts, top_k),
        fields!(MatmulParams: num_tile_slots, num_column_tiles, first_expert, end_expert, first_column, num_columns,
            begin_column, end_column, k4, quad_stride,
            x_stride, out_stride, num_assignments, num_experts, top_k, tile_m, bias_stride, slice_column, limit, alpha),
    ])
}

/// The uniform's WGSL struct is the Rust struct of the same name; other uniforms there are none.
fn check_uniforms(kernel: &Kernel, module: &Module) -> Faults {
    let mut faults = Vec::new();
    let mut count = 0;
    for (_, variable) in module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::Uniform) {
        count += 1;
        let ty = &module.types[variable.ty];
        let name = ty.name.as_deref().unwrap_or_default();
        let TypeInner::Struct { members, span } = &ty.inner else {
            faults.push(format!("the uniform {:?} is not a struct", variable.name));
            continue;
        };
        let found: Vec<_> = members.iter().map(|m| (m.name.clone().unwrap_or_default(), m.offset)).collect();
        match uniform_structs().get(name) {
            None => faults.push(format!("no Rust struct for the uniform's type {name:?}")),
            // A uniform binding is rounded up to 16 bytes.
            Some((fields, size)) if *fields == found && size.next_multiple_of(16) == span.next_multiple_of(16) => {}
            Some(fields) => faults.push(format!("{name} is {found:?}, {span} bytes in WGSL, {fields:?} in Rust")),
        }
    }
    let expected = usize::from(!is_probe(kernel.stage));
    if count != expected {
        faults.push(format!("{count} uniforms, expected {expected}"));
    }
    faults
}

/// The same overrides on both sides, and with their values the kernel fits any WebGPU device.
fn check_overrides(kernel: &Kernel, module: &Module, info: &ModuleInfo) -> Faults {
    let mut faults = Vec::new();
    let found: BTreeSet<&str> = module.overrides.iter().filter_map(|(_, o)| o.name.as_deref()).collect();
    let listed: BTreeSet<&str> = kernel.overrides.iter().map(|&(name, _)| name).collect();
    if found != listed || listed.len() != kernel.overrides.len() {
        faults.push(format!("overrides {found:?} in WGSL, {:?} in Rust", kernel.overrides));
    }
    let constants = kernel.overrides.iter().map(|&(name, value)| (name.to_owned(), f64::from(value))).collect();
    let entry_point = Some((ShaderStage::Compute, kernel.stage.name()));
    let resolved = naga::back::pipeline_constants::process_overrides(module, info, entry_point, &constants);
    let (module, _) = match &resolved {
        Ok(resolved) => resolved,
        Err(error) => {
            faults.push(format!("overrides {:?}: {error}", kernel.overrides));
            return faults;
        }
    };
    let floor = DeviceProfile::webgpu_floor();
    let Some(entry_point) = module.entry_points.first() else {
        faults.push(format!("no compute entry point {:?}", kernel.stage.name()));
        return faults;
    };
    let workgroup_size = entry_point.workgroup_size;
    if workgroup_size != [kernel.workgroup_size, 1, 1] {
        faults.push(format!("workgroup size {workgroup_size:?} in WGSL, {} in Rust", kernel.workgroup_size));
    }
    if workgroup_size.iter().product::<u32>() > floor.max_invocations {
        faults.push(format!("workgroup size {workgroup_size:?}, WebGPU guarantees {}", floor.max_invocations));
    }
    let bytes = workgroup_bytes(module);
    if bytes > floor.max_workgroup_storage {
        faults.push(format!("{bytes} bytes of workgroup memory, WebGPU guarantees {}", floor.max_workgroup_storage));
    }
    faults
}

/// Workgroup memory of a resolved module. Vulkan counts each variable rounded up to 16 bytes.
fn workgroup_bytes(module: &Module) -> u32 {
    let workgroup = module.global_variables.iter().filter(|(_, v)| v.space == AddressSpace::WorkGroup);
    workgroup.map(|(_, v)| module.types[v.ty].inner.size(module.to_ctx()).next_multiple_of(16)).sum()
}

/// The first line of every part, the header of every stage file, and a shape on every storage binding.
fn check_text(part: &Part) -> Faults {
    let mut faults = Vec::new();
    let mut header = part.source.lines().take_while(|line| line.starts_with("//"));
    if !header.next().is_some_and(|line| line.starts_with(&format!("// {}: ", part.file))) {
        faults.push(format!("the first line is not \"// {}: ...\"", part.file));
    }
    let is_stage = part.source.contains("@compute");
    let is_probe = part.file.starts_with("probe_");
    if is_stage || is_probe {
        let header: Vec<&str> = header.collect();
        if !header.iter().any(|line| line.starts_with("//     ") && line.contains('=')) {
            faults.push("no equation in the header".to_owned());
        }
        let mut last = 0;
        for field in ["CPU twin", "Mapping", "Grid", "Requires", "Numerics"] {
            let start = format!("// {field}  ");
            match header.iter().position(|line| format!("{line} ").starts_with(&start[..start.len() - 1])) {
                Some(at) if at > last => last = at,
                Some(_) => faults.push(format!("header field {field:?} is out of order")),
                None => faults.push(format!("no header field {field:?}")),
            }
        }
        let twin = if is_probe { "none".to_owned() } else { twin(part.file) };
        if !header.iter().any(|line| line.starts_with("// CPU twin") && line.contains(&twin)) {
            faults.push(format!("the CPU twin is not {twin}"));
        }
    }
    for (number, line) in part.source.lines().enumerate() {
        if line.contains("var<storage") && !line.contains("// [") {
            faults.push(format!("line {}: no shape behind a storage binding", number + 1));
        }
    }
    faults
}

/// Everything that a kernel has to keep.
fn check(kernel: &Kernel) -> Faults {
    let (module, info) = match compile(kernel) {
        Ok(compiled) => compiled,
        Err(error) => return vec![error],
    };
    let mut faults = check_names(kernel, &module);
    if module.entry_points.len() == 1 {
        faults.extend(check_bindings(kernel, &module, &info));
        faults.extend(check_overrides(kernel, &module, &info));
    }
    faults.extend(check_uniforms(kernel, &module));
    for part in &kernel.parts {
        faults.extend(check_text(part).into_iter().map(|fault| format!("shaders/{}.wgsl: {fault}", part.file)));
    }
    faults
}

fn assert_no_faults(faults: impl IntoIterator<Item = (String, Faults)>) {
    let lines: Vec<String> = faults
        .into_iter()
        .flat_map(|(label, faults)| faults.into_iter().map(move |f| format!("{label}: {f}")))
        .collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
}

#[test]
fn every_kernel_keeps_the_contract() {
    let kernels = kernels::all();
    let stages: BTreeSet<Stage> = kernels.iter().map(|kernel| kernel.stage).collect();
    for stage in Stage::ALL {
        assert!(stages.contains(&stage), "no kernel of stage {}", stage.name());
    }
    for kernel in &kernels {
        assert_eq!(kernel.needs_subgroups, kernel.wgsl().contains("subgroup"), "{}", kernel.label);
    }
    assert_no_faults(kernels.iter().map(|kernel| (kernel.label.clone(), check(kernel))));
}

#[test]
fn labels_are_unique() {
    let kernels = kernels::all();
    let labels: BTreeSet<&str> = kernels.iter().map(Kernel::label).collect();
    assert_eq!(labels.len(), kernels.len());
}

#[test]
fn every_wgsl_file_is_a_part_of_some_kernel() {
    let kernels = kernels::all();
    let used: BTreeSet<String> = kernels.iter().flat_map(|k| &k.parts).map(|part| part.file.to_owned()).collect();
    let entries = std::fs::read_dir(repository("shaders")).expect("the folder shaders should be readable");
    let paths = entries.map(|entry| entry.expect("a folder entry").path());
    let files: BTreeSet<String> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "wgsl"))
        .map(|path| path.file_stem().expect("it has a name").to_string_lossy().into_owned())
        .collect();
    assert_eq!(used, files);
}

/// No text belongs to two files, and each file is used as it stands on the disk.
#[test]
fn parts_are_the_files_themselves() {
    for part in kernels::all().iter().flat_map(|kernel| &kernel.parts) {
        let path = repository("shaders").join(part.file).with_extension("wgsl");
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(text == part.source, "{} has changed since it was built in", path.display());
    }
}

/// Devices that differ in everything that the plan looks at.
fn devices() -> Vec<DeviceProfile> {
    let mut devices = Vec::new();
    for software in [false, true] {
        for subgroup_size in [None, Some(4), Some(8), Some(16), Some(32), Some(64), Some(128)] {
            for int64 in [false, true] {
                devices.push(DeviceProfile { software, subgroup_size, int64, ..DeviceProfile::webgpu_floor() });
            }
        }
    }
    devices
}

/// Whatever the plan chooses, on whatever device: the values that it gives the overrides fit every WebGPU device, the
/// workgroup memory of permute at the most experts included.
#[test]
fn every_choice_of_the_plan_fits_the_webgpu_defaults() {
    let mut checked = BTreeSet::new();
    let mut faults = Vec::new();
    let routing = Routing::softmax(true);
    for num_experts in [1, 2, 3, 8, 60, 64, 128, 200, 257, 512, 1024] {
        for hidden_size in [256, 65] {
            let top_k = num_experts.min(8);
            let config = MoeConfig::new(hidden_size, 256, num_experts, top_k, routing, Activation::SWIGLU);
            let config = config.expect("the sizes are valid");
            for device in devices() {
                let variants = std::iter::once(None).chain(MatmulVariant::ALL.iter().copied().map(Some));
                let formats = || WeightFormat::ALL.iter().filter(|f| LayerFormats::from(**f).check(&config).is_ok());
                for (variant, &format) in variants.flat_map(|v| formats().map(move |f| (v, f))) {
                    let request = MatmulRequest { variant, ..MatmulRequest::default() };
                    let Ok(plan) = LayerPlan::new(&config, format, &device, &request) else {
                        assert_eq!((variant, device.subgroup_size), (Some(MatmulVariant::Subgroup), None));
                        continue;
                    };
                    for num_tokens in [1, 16, 17, 100, 1000, 10_000] {
                        let plan = plan.plan(num_tokens).expect("it fits");
                        for dispatch in plan.dispatches {
                            let kernel = dispatch.kernel;
                            let name = format!("{} {:?}", kernel.label, kernel.overrides);
                            if checked.insert(name.clone()) {
                                faults.push((name, check(&kernel)));
                            }
                        }
                    }
                }
            }
        }
    }
    println!("{} kernels", checked.len());
    assert!(checked.iter().any(|name| name.starts_with("permute") && name.contains("(\"NUM_EXPERTS\", 1024)")));
    assert!(checked.len() > 30, "{checked:?}");
    assert_no_faults(faults);
}

/// What the tuner may choose fits every WebGPU device, too, and its workgroup memory is what Rust says it is.
#[test]
fn every_candidate_has_the_workgroup_memory_that_it_says() {
    let config = MoeConfig::new(256, 256, 8, 2, Routing::softmax(true), Activation::SWIGLU).expect("valid sizes");
    let mut checked = BTreeSet::new();
    for (device, num_tokens) in devices().iter().flat_map(|device| [1, 16, 100, 1000].map(|tokens| (device, tokens))) {
        for choice in variant::candidates(2, 8, num_tokens, device) {
            let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
            let plan = LayerPlan::new(&config, WeightFormat::F16, device, &request).and_then(|p| p.plan(num_tokens));
            for dispatch in plan.expect("it fits").dispatches {
                let kernel = dispatch.kernel;
                let is_matmul = matches!(kernel.stage, Stage::GateUp | Stage::Down);
                if !is_matmul || !checked.insert(format!("{} {:?}", kernel.label, kernel.overrides)) {
                    continue;
                }
                assert_no_faults(vec![(kernel.label.clone(), check(&kernel))]);
                let (module, info) = compile(&kernel).expect("it was checked");
                let constants = kernel.overrides.iter().map(|&(name, value)| (name.to_owned(), f64::from(value)));
                let entry_point = Some((ShaderStage::Compute, kernel.stage.name()));
                let constants = constants.collect();
                let resolved =
                    naga::back::pipeline_constants::process_overrides(&module, &info, entry_point, &constants);
                let (module, _) = resolved.expect("it was checked");
                assert_eq!(u64::from(workgroup_bytes(&module)), choice.workgroup_bytes(), "{choice:?}");
            }
        }
    }
    assert!(checked.len() > 30, "{checked:?}");
}

/// Every kernel that a plan can choose is in the list, so that what goes through the list goes through all of them.
#[test]
fn the_list_holds_every_kernel_of_every_plan() {
    let listed: BTreeMap<String, Kernel> = kernels::all().into_iter().map(|k| (k.label.clone(), k)).collect();
    let routing = Routing::softmax(true);
    for hidden_size in [256, 65] {
        let config = MoeConfig::new(hidden_size, 256, 8, 2, routing, Activation::SWIGLU).expect("the sizes are valid");
        for (device, &format) in devices().iter().flat_map(|d| WeightFormat::ALL.iter().map(move |f| (d, f))) {
            for variant in std::iter::once(None).chain(MatmulVariant::ALL.iter().copied().map(Some)) {
                let request = MatmulRequest { variant, ..MatmulRequest::default() };
                let Ok(plan) = LayerPlan::new(&config, format, device, &request) else { continue };
                for num_tokens in [1, 17, 1000] {
                    for dispatch in plan.plan(num_tokens).expect("it fits").dispatches {
                        let kernel = dispatch.kernel;
                        let same = listed.get(&kernel.label).is_some_and(|k| k.parts == kernel.parts);
                        assert!(same, "{} is not in the list", kernel.label);
                    }
                }
            }
        }
    }
}

/// Where `locate` says a line is, the file has that line.
#[test]
fn lines_are_located_in_their_files() {
    for kernel in kernels::all() {
        let source = kernel.wgsl();
        let mut seen = BTreeSet::new();
        for (index, line) in source.lines().enumerate() {
            let (file, number) = kernel.locate(index as u32 + 1);
            let part = kernel.parts.iter().find(|part| part.file == file);
            let part = part.unwrap_or_else(|| panic!("{}: line {} is nowhere", kernel.label, index + 1));
            // One empty line stands between parts.
            let expected = part.source.lines().nth(number as usize - 1).unwrap_or_default();
            assert_eq!(line, expected, "{}: {file}:{number}", kernel.label);
            seen.insert(file);
        }
        assert_eq!(seen.len(), kernel.parts.len());
        assert_eq!(kernel.locate(u32::MAX).0, "");
    }
}

mod checkers_can_fail {
    use super::*;

    fn kernel(label: &str) -> Kernel {
        let found = kernels::all().into_iter().find(|kernel| kernel.label == label);
        found.unwrap_or_else(|| panic!("no kernel {label}"))
    }

    /// `kernel` with `from` replaced in the part `file`.
    fn edited(mut kernel: Kernel, file: &str, from: &str, to: &str) -> Kernel {
        let part = kernel.parts.iter_mut().find(|part| part.file == file).expect("the part is there");
        assert!(part.source.contains(from), "{file} does not contain {from:?}");
        part.source = Box::leak(part.source.replacen(from, to, 1).into_boxed_str());
        kernel
    }

    fn assert_fault(kernel: &Kernel, expected: &str) {
        let faults = check(kernel);
        assert!(faults.iter().any(|f| f.contains(expected)), "no fault contains {expected:?}: {faults:#?}");
    }

    #[test]
    fn on_wgsl_that_does_not_parse_or_validate() {
        // The message names the line of the file, whatever stands before the file in the source.
        let part =
            kernel("combine").parts.into_iter().find(|part| part.file == "combine").expect("it has its own part");
        let line = part.source.lines().position(|line| line.contains("let token = ")).expect("it has a token") + 1;
        for to in ["let token = ;", "let token: f32 = 1u + "] {
            let wrong = edited(kernel("combine"), "combine", "let token = ", to);
            assert_fault(&wrong, &format!("combine.wgsl:{line}"));
        }
        let wrong = edited(kernel("combine"), "moe_params", "return group.y", "return 1.0 * group.y");
        assert_fault(&wrong, "moe_params.wgsl:28");
    }

    #[test]
    fn on_names() {
        assert_fault(&edited(kernel("combine"), "combine", "fn combine(", "fn main("), "expected one called");
        let mut wrong = kernel("combine");
        wrong.label = "kombine".to_owned();
        assert_fault(&wrong, "label");
        let mut wrong = kernel("combine");
        wrong.stage = Stage::Down;
        assert_fault(&wrong, "no part called \"down\"");
    }

    #[test]
    fn on_bindings() {
        for label in ["combine", "router.softmax", "permute", "gate_up.subgroup8.f16", "down.tiled.f32"] {
            let mut wrong = kernel(label);
            wrong.bindings[1].name = "renamed";
            assert_fault(&wrong, "in Rust");
            let mut wrong = kernel(label);
            (wrong.bindings[1].name, wrong.bindings[2].name) = (wrong.bindings[2].name, wrong.bindings[1].name);
            assert_fault(&wrong, "in Rust");
            let mut wrong = kernel(label);
            wrong.bindings[1].access = Access::Write;
            assert_fault(&wrong, "in Rust");
            let mut wrong = kernel(label);
            wrong.bindings.pop();
            assert_fault(&wrong, "in Rust");
            let mut wrong = kernel(label);
            wrong.bindings.push(wrong.bindings[1]);
            assert_fault(&wrong, "in Rust");
        }
        let wrong = edited(kernel("combine"), "rows_weighted", "@group(0) @binding(3)", "@group(1) @binding(3)");
        assert_fault(&wrong, "topk_weights is in group 1");
        let wrong = edited(kernel("combine"), "rows_weighted", "weight = topk_weights[a]", "weight = 2.0");
        assert_fault(&wrong, "topk_weights is bound but never used");
    }

    #[test]
    fn on_uniforms() {
        let swapped = |from: &str, to: &str| edited(kernel("combine"), "moe_params", from, to);
        assert_fault(
            &swapped("    num_tokens: u32,\n    hidden_size: u32,", "    hidden_size: u32,\n    num_tokens: u32,"),
            "MoeParams is",
        );
        assert_fault(&swapped("    num_shared: u32,", "    num_shared: vec4<u32>,"), "MoeParams is");
        assert_fault(&swapped("tile_m: u32, ", "tile_rows: u32, "), "MoeParams is");
        let wrong = edited(kernel("down.tiled.f32"), "matmul_params", "    alpha: f32,\n", "");
        assert_fault(&wrong, "MatmulParams is");
    }

    #[test]
    fn on_overrides() {
        let mut wrong = kernel("combine");
        wrong.overrides[0].0 = "GROUP_SIZE";
        assert_fault(&wrong, "overrides {\"WEIGH\", \"WG_SIZE\"} in WGSL");
        let mut wrong = kernel("router.softmax");
        wrong.overrides.pop();
        assert_fault(&wrong, "in WGSL");
        let mut wrong = kernel("combine");
        wrong.workgroup_size = 128;
        assert_fault(&wrong, "128 in Rust");
        let mut wrong = kernel("combine");
        (wrong.overrides[0].1, wrong.workgroup_size) = (512, 512);
        assert_fault(&wrong, "WebGPU guarantees 256");
        assert_fault(&kernels::permute::kernel(2048), "of workgroup memory");
        assert!(check(&kernels::permute::kernel(1024)).is_empty());
    }

    #[test]
    fn on_text() {
        let text = |from: &str, to: &str| edited(kernel("combine"), "combine", from, to);
        assert_fault(&text("// combine: ", "// combines: "), "the first line");
        for field in ["CPU twin", "Mapping", "Grid", "Requires", "Numerics"] {
            assert_fault(&text(&format!("// {field}"), "// Other"), &format!("no header field {field:?}"));
        }
        assert_fault(&text("// Grid ", "// Numerics  f32\n// Grid "), "out of order");
        assert_fault(&text("src/reference/combine.rs", "src/reference/router.rs"), "the CPU twin is not");
        assert_fault(&text("// [num_tokens, hidden_size]", ""), "no shape");
        assert_fault(&text("//     y[t, :] = finish", "//     y is the sum"), "no equation");
    }
}
