//! An MoE layer inside a program that owns its wgpu device: the program creates the buffers and the encoder, records
//! commands of its own before and after the layer, and submits once. The layer neither submits nor waits.
//!
//! ```text
//! cargo run --release --example bring_your_own_device
//! ```

use std::error::Error;
use std::sync::mpsc;
use std::time::Duration;
use wgmoe::wgpu::{self, BufferUsages};
use wgmoe::{Activation, Context, MoeConfig, MoeLayer, MoeWeights, Routing, reference};

const HIDDEN_SIZE: usize = 96;
const INTERMEDIATE_SIZE: usize = 40;
const NUM_EXPERTS: usize = 8;
const TOP_K: usize = 2;
const NUM_TOKENS: usize = 33;

fn main() -> Result<(), Box<dyn Error>> {
    let Some((device, queue)) = pollster::block_on(open())? else {
        if std::env::var_os("WGMOE_REQUIRE_ADAPTER").is_some_and(|value| value == "1") {
            return Err("wgpu found no adapter, and WGMOE_REQUIRE_ADAPTER=1 asks for one".into());
        }
        println!("wgpu found no adapter here, so there is nothing to show; hello_moe runs without one.");
        return Ok(());
    };
    println!("device: {}", device.adapter_info().name);

    let routing = Routing::softmax(true);
    let [h, i, e, k] = [HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K].map(|n| n as u32);
    let config = MoeConfig::new(h, i, e, k, routing, Activation::SWIGLU)?;
    let weights = MoeWeights {
        router: numbers(1, NUM_EXPERTS * HIDDEN_SIZE),
        router_bias: Some(numbers(2, NUM_EXPERTS)),
        gate_proj: numbers(3, NUM_EXPERTS * INTERMEDIATE_SIZE * HIDDEN_SIZE),
        up_proj: numbers(4, NUM_EXPERTS * INTERMEDIATE_SIZE * HIDDEN_SIZE),
        down_proj: numbers(5, NUM_EXPERTS * HIDDEN_SIZE * INTERMEDIATE_SIZE),
        ..MoeWeights::default()
    };

    // The layer shares the program's device.
    let context = Context::from_wgpu(device.clone(), queue.clone());
    let layer = MoeLayer::new(&context, config.clone(), &weights)?;

    // The program's own buffers. x and y need STORAGE; the rest is up to the program.
    let tokens = numbers(6, NUM_TOKENS * HIDDEN_SIZE);
    let bytes = (tokens.len() * size_of::<f32>()) as u64;
    let buffer = |label, usage| {
        device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(label),
            size: bytes,
            usage,
            mapped_at_creation: false,
        })
    };
    let source = buffer("activations", BufferUsages::COPY_SRC | BufferUsages::COPY_DST);
    let x = buffer("x", BufferUsages::STORAGE | BufferUsages::COPY_DST);
    let y = buffer("y", BufferUsages::STORAGE | BufferUsages::COPY_SRC);
    let download = buffer("y on the host", BufferUsages::COPY_DST | BufferUsages::MAP_READ);
    queue.write_buffer(&source, 0, bytemuck::cast_slice(&tokens));

    // One encoder: a command of the program, the layer, another command of the program.
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("program") });
    encoder.copy_buffer_to_buffer(&source, 0, &x, 0, bytes);
    layer.record(&mut encoder, &x, &y, NUM_TOKENS as u32)?;
    encoder.copy_buffer_to_buffer(&y, 0, &download, 0, bytes);
    queue.submit([encoder.finish()]);

    let y = read(&device, &download)?;
    println!("dispatches recorded: {}", layer.pass_stats().dispatches);
    println!("tokens per expert: {:?}", layer.routing()?.tokens_per_expert);

    // The f64 reference says whether it is right.
    let expected = reference::moe_forward(&config, &weights, &tokens).y;
    let largest = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    let error = y.iter().zip(&expected).fold(0.0f64, |most, (&y, want)| {
        let error = (f64::from(y) - want).abs() / largest;
        if error > most || error.is_nan() { error } else { most }
    });
    println!("largest error in relation to the largest output: {error:.1e}");
    if error <= 1e-5 { Ok(()) } else { Err("the result differs from the reference".into()) }
}

/// The program's device, or `None` where there is no adapter.
async fn open() -> Result<Option<(wgpu::Device, wgpu::Queue)>, Box<dyn Error>> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let Ok(adapter) = instance.request_adapter(&wgpu::RequestAdapterOptions::default()).await else {
        return Ok(None);
    };
    // SUBGROUP is optional: with it, the layer has one kernel variant more to choose from.
    let required_features = adapter.features() & wgpu::Features::SUBGROUP;
    let descriptor = wgpu::DeviceDescriptor { label: Some("program"), required_features, ..Default::default() };
    Ok(Some(adapter.request_device(&descriptor).await?))
}

/// The content of a mappable buffer.
fn read(device: &wgpu::Device, buffer: &wgpu::Buffer) -> Result<Vec<f32>, Box<dyn Error>> {
    let (done, mapped) = mpsc::channel();
    buffer.map_async(wgpu::MapMode::Read, .., move |result| {
        // Nobody listens any more only if this function has already failed.
        let _ = done.send(result);
    });
    let timeout = Some(Duration::from_secs(60));
    device.poll(wgpu::PollType::Wait { submission_index: None, timeout })?;
    mapped.try_recv()??;
    let values = bytemuck::pod_collect_to_vec(&buffer.get_mapped_range(..)?);
    buffer.unmap();
    Ok(values)
}

/// `len` numbers from -1 to 1 that look random and are the same every time.
fn numbers(seed: u32, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9);
    let mut next = || {
        // xorshift32 (Marsaglia 2003)
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 * 2.0 - 1.0
    };
    (0..len).map(|_| next()).collect()
}
