//! From a kernel to a compiled pipeline, cached by device.

use super::context::Gpu;
use crate::error::{Error, Result};
use crate::kernels::{Access, Kernel};
use std::sync::Arc;

/// A compiled kernel.
pub struct Pipeline {
    pub(super) pipeline: wgpu::ComputePipeline,
    pub(super) layout: wgpu::BindGroupLayout,
    pub(super) kernel: Kernel,
}

/// Compiles `kernel`, or returns the pipeline that exists.
pub(crate) async fn pipeline(gpu: &Gpu, kernel: &Kernel) -> Result<Arc<Pipeline>> {
    let key = format!("{} {:?}", kernel.label, kernel.overrides);
    if let Some(found) = gpu.pipelines().get(&key) {
        return Ok(found.clone());
    }
    dump(kernel);
    let built = gpu.scoped("", |device| build(device, kernel)).await.map_err(|e| refused(kernel, e))?;
    let pipeline = Arc::new(built);
    gpu.pipelines().insert(key, pipeline.clone());
    Ok(pipeline)
}

fn build(device: &wgpu::Device, kernel: &Kernel) -> Pipeline {
    let _span = tracing::debug_span!("compile", kernel = %kernel.label).entered();
    let label = Some(kernel.label.as_str());
    let entries: Vec<_> = kernel
        .bindings
        .iter()
        .map(|binding| wgpu::BindGroupLayoutEntry {
            binding: binding.index,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: match binding.access {
                    Access::Uniform => wgpu::BufferBindingType::Uniform,
                    Access::Read => wgpu::BufferBindingType::Storage { read_only: true },
                    Access::Write => wgpu::BufferBindingType::Storage { read_only: false },
                },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label,
        source: wgpu::ShaderSource::Wgsl(kernel.wgsl().into()),
    });
    let constants: Vec<_> = kernel.overrides.iter().map(|&(name, value)| (name, f64::from(value))).collect();
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label,
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some(kernel.stage.name()),
        compilation_options: wgpu::PipelineCompilationOptions { constants: &constants, ..Default::default() },
        cache: None,
    });
    Pipeline { pipeline, layout, kernel: kernel.clone() }
}

fn refused(kernel: &Kernel, error: Error) -> Error {
    match error {
        Error::Device { message, .. } => Error::Kernel { kernel: kernel.label.clone(), message },
        Error::OutOfMemory { .. } => Error::OutOfMemory { during: format!("compiling {}", kernel.label) },
        other => other,
    }
}

/// With `WGMOE_DUMP_WGSL=dir`, the assembled source of every kernel that is compiled.
fn dump(kernel: &Kernel) {
    if let Some(folder) = std::env::var_os("WGMOE_DUMP_WGSL") {
        let path = std::path::Path::new(&folder).join(format!("{}.wgsl", kernel.label));
        // A debugging aid: a folder that cannot be written must not break the program.
        if let Err(error) = std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(&path, kernel.wgsl())) {
            eprintln!("wgmoe: {}: {error}", path.display());
        }
    }
}

impl Pipeline {
    /// Binds buffers by name. `find` gives the buffer range for each of the kernel's bindings.
    pub(super) async fn bind<'a>(
        &self,
        gpu: &Gpu,
        find: impl Fn(&'static str) -> Option<wgpu::BufferBinding<'a>>,
    ) -> Result<wgpu::BindGroup> {
        let mut entries = Vec::new();
        for binding in &self.kernel.bindings {
            let Some(buffer) = find(binding.name) else {
                let message = format!("no buffer for binding {:?}", binding.name);
                return Err(Error::Kernel { kernel: self.kernel.label.clone(), message });
            };
            let resource = wgpu::BindingResource::Buffer(buffer);
            entries.push(wgpu::BindGroupEntry { binding: binding.index, resource });
        }
        let desc =
            wgpu::BindGroupDescriptor { label: Some(&self.kernel.label), layout: &self.layout, entries: &entries };
        gpu.count_bind_group();
        gpu.scoped(&self.kernel.label, |device| device.create_bind_group(&desc)).await
    }
}
