//! What the integration tests share: the device, values, comparisons, and the tests that the comparisons can fail.

use std::io::Write;
use wgmoe::{
    Activation, Context, DeviceChoice, LayerFormats, MatmulVariant, MoeConfig, MoeWeights, Routing, WeightFormat, wgpu,
};

/// Every `got[i]` is within `bound(i)` of `want[i]`. Panics with the worst element, measured in bounds.
#[allow(dead_code, reason = "not every test binary compares floats")]
pub fn assert_close(name: &str, got: &[f32], want: &[f64], bound: impl Fn(usize) -> f64) {
    assert_eq!(got.len(), want.len(), "{name}: {} elements, expected {}", got.len(), want.len());
    let mut worst = (0.0, 0);
    let mut failed = 0;
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let difference = (f64::from(got) - want).abs();
        // Written so that NaN on either side, or as a bound, counts as a failure.
        if difference <= bound(i) {
            continue;
        }
        failed += 1;
        let bounds = difference / bound(i);
        let bounds = if bounds.is_nan() { f64::INFINITY } else { bounds };
        if failed == 1 || bounds > worst.0 {
            worst = (bounds, i);
        }
    }
    let (bounds, i) = worst;
    assert!(
        failed == 0,
        "{name}: {failed} of {} elements are out of bounds; the worst is element {i}: {} instead of {} ({bounds:.1} \
         times the bound {:e})",
        got.len(),
        got[i],
        want[i],
        bound(i),
    );
}

/// The floats in a buffer with `BufferUsages::COPY_SRC`, after everything that was submitted before.
#[allow(dead_code, reason = "not every test binary reads buffers of its own")]
pub fn read_buffer(device: &wgpu::Device, queue: &wgpu::Queue, buffer: &wgpu::Buffer) -> Vec<f32> {
    let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
    let desc = wgpu::BufferDescriptor { label: None, size: buffer.size(), usage, mapped_at_creation: false };
    let download = device.create_buffer(&desc);
    let mut encoder = device.create_command_encoder(&Default::default());
    encoder.copy_buffer_to_buffer(buffer, 0, &download, 0, buffer.size());
    queue.submit([encoder.finish()]);
    download.map_async(wgpu::MapMode::Read, .., |result| result.expect("the buffer can be mapped"));
    let timeout = Some(std::time::Duration::from_secs(120));
    device.poll(wgpu::PollType::Wait { submission_index: None, timeout }).expect("the device answers");
    let view = download.get_mapped_range(..).expect("it is mapped");
    bytemuck::pod_collect_to_vec(&view)
}

/// The GPU that tests run on: the one that `WGMOE_ADAPTER` names, or the best there is, with WebGPU's default limits.
///
/// Without any adapter it says so loudly and returns `None`, or fails where `WGMOE_REQUIRE_ADAPTER=1`, so that a
/// pipeline cannot pass by skipping. With `WGMOE_EXPECT_ADAPTER` the name or driver has to contain that text: a test of
/// one driver must not pass on another.
#[allow(dead_code, reason = "not every test binary runs on a GPU")]
pub fn gpu_context() -> Option<Context> {
    let choice = DeviceChoice::from_env();
    let context = Context::new(&choice).unwrap_or_else(|error| panic!("WGMOE_ADAPTER={choice}: {error}"));
    let device = context.device();
    let facts = format!("{} ({}, {}, {})", device.name, device.driver, device.backend, device.kind);
    if context.gpu().is_none() {
        let required = std::env::var("WGMOE_REQUIRE_ADAPTER").is_ok_and(|value| value == "1");
        assert!(!required, "WGMOE_REQUIRE_ADAPTER=1, but {}", context.choice_reason());
        println!("SKIPPED: no GPU adapter ({})", context.choice_reason());
        // Beside the captured output of a passing test, so that nobody takes a skipped test for a passed one.
        let _ = writeln!(std::io::stderr(), "SKIPPED: no GPU adapter");
        return None;
    }
    println!("adapter: {facts}");
    if let Ok(expected) = std::env::var("WGMOE_EXPECT_ADAPTER") {
        let found = facts.to_lowercase().contains(&expected.to_lowercase());
        assert!(found, "WGMOE_EXPECT_ADAPTER={expected}, but the adapter is {facts}");
    }
    Some(context)
}

/// The variants of the grouped matmul that `context` can run.
#[allow(dead_code, reason = "not every test binary runs on a GPU")]
pub fn variants(context: &Context) -> Vec<MatmulVariant> {
    let has_subgroups = context.gpu().is_some_and(|gpu| gpu.profile().subgroup_size.is_some());
    let runs = |v: &MatmulVariant| *v != MatmulVariant::Subgroup || has_subgroups;
    MatmulVariant::ALL.iter().copied().filter(runs).collect()
}

/// A small generator: the same values on every machine.
#[allow(dead_code, reason = "not every test binary makes values")]
pub struct Values(pub u64);

#[allow(dead_code, reason = "not every test binary makes values")]
impl Values {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    pub fn below(&mut self, end: usize) -> usize {
        self.next() as usize % end
    }

    /// Between -1 and 1.
    pub fn even(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.next() as f32 / (1u64 << 30) as f32 - 1.0).collect()
    }

    /// Between -1 and 1, one in sixteen ten times as large, so that no softmax is flat.
    pub fn floats(&mut self, len: usize) -> Vec<f32> {
        let mut float =
            || (self.next() as f32 / (1u64 << 30) as f32 - 1.0) * if self.below(16) == 0 { 10.0 } else { 1.0 };
        (0..len).map(|_| float()).collect()
    }

    /// Weights whose products with [`Values::floats`] stay near 1; no router bias.
    pub fn weights(&mut self, config: &MoeConfig) -> MoeWeights {
        let [h, i, e] = [config.hidden_size(), config.intermediate_size(), config.num_experts()].map(|n| n as usize);
        let scale = |values: Vec<f32>, fan_in: usize| -> Vec<f32> {
            values.into_iter().map(|v| v / (fan_in as f32).sqrt()).collect()
        };
        // Outliers in x and router both would make logits of 16 and more, whose rounding to f32 moves their softmax by
        // 2e-6: then two experts that nearly cancel show the rounding of a logit and nothing else.
        let router = scale(self.even(e * h), h);
        let mut scaled = |len, fan_in| scale(self.floats(len), fan_in);
        MoeWeights {
            router,
            router_bias: None,
            gate_proj: scaled(e * i * h, h),
            up_proj: scaled(e * i * h, h),
            down_proj: scaled(e * h * i, i),
            ..MoeWeights::default()
        }
    }
}

/// `[hidden_size, intermediate_size, num_experts, top_k]`
#[allow(dead_code, reason = "not every test binary makes layers")]
pub fn config([hidden, intermediate, experts, top_k]: [u32; 4], renormalize: bool) -> MoeConfig {
    let routing = Routing::softmax(renormalize);
    MoeConfig::new(hidden, intermediate, experts, top_k, routing, Activation::SWIGLU).expect("the sizes are valid")
}

/// The formats that hold rows of this layer's lengths.
#[allow(dead_code, reason = "not every test binary stores weights in every way")]
pub fn formats(config: &MoeConfig) -> Vec<WeightFormat> {
    WeightFormat::ALL.iter().copied().filter(|&format| LayerFormats::from(format).check(config).is_ok()).collect()
}

/// For comparing floats bit by bit: NaN equals itself, and -0 is not 0.
#[allow(dead_code, reason = "not every test binary compares bits")]
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Panics with the first element whose bits differ.
#[allow(dead_code, reason = "not every test binary compares bits")]
pub fn assert_same_bits(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}: {} elements, expected {}", got.len(), want.len());
    let differing = (0..got.len()).filter(|&i| got[i].to_bits() != want[i].to_bits()).collect::<Vec<_>>();
    if let Some(&first) = differing.first() {
        panic!(
            "{name}: {} of {} elements differ in their bits; the first is element {first}: {:e} instead of {:e}",
            differing.len(),
            got.len(),
            got[first],
            want[first]
        );
    }
}

mod tests {
    use super::{assert_close, assert_same_bits};

    const WANT: [f64; 3] = [1.0, -2.0, 3.0];

    fn check(got: &[f32]) {
        assert_close("test", got, &WANT, |_| 1e-6);
    }

    #[test]
    fn equal_values_pass() {
        check(&[1.0, -2.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "1 of 3 elements are out of bounds; the worst is element 1: 2 instead of -2")]
    fn a_flipped_element_fails() {
        check(&[1.0, 2.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "the worst is element 2")]
    fn a_value_just_past_the_bound_fails() {
        check(&[1.0, -2.0, 3.000_002]);
    }

    #[test]
    #[should_panic(expected = "the worst is element 0: NaN")]
    fn nan_fails() {
        check(&[f32::NAN, -2.0, 3.0]);
    }

    #[test]
    #[should_panic(expected = "the worst is element 0")]
    fn nan_in_the_expectation_fails() {
        assert_close("test", &[1.0], &[f64::NAN], |_| 1.0);
    }

    #[test]
    #[should_panic(expected = "2 elements, expected 3")]
    fn a_short_buffer_fails() {
        check(&[1.0, -2.0]);
    }

    #[test]
    fn equal_bits_pass() {
        assert_same_bits("test", &[1.0, f32::NAN], &[1.0, f32::NAN]);
    }

    #[test]
    #[should_panic(expected = "1 of 2 elements differ in their bits; the first is element 1: -0e0 instead of 0e0")]
    fn another_zero_fails() {
        assert_same_bits("test", &[1.0, -0.0], &[1.0, 0.0]);
    }

    #[test]
    #[should_panic(expected = "1 elements, expected 2")]
    fn fewer_bits_fail() {
        assert_same_bits("test", &[1.0], &[1.0, 0.0]);
    }
}
