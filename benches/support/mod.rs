//! What both benches share: the devices, and layers that have been checked before anybody times them.

use std::time::Duration;
use wgmoe::bench::presets::SMALL;
use wgmoe::bench::{Workload, verify};
use wgmoe::{Context, DeviceChoice, LayerOptions, MoeLayer, WeightFormat};

/// Decode: a few tokens at a time. Prefill: a whole prompt.
pub const BATCHES: [(&str, u32); 4] = [("decode", 1), ("decode", 16), ("prefill", 128), ("prefill", 512)];

/// Storage of the expert weights.
const WEIGHTS: WeightFormat = WeightFormat::F16;

/// The device that `WGMOE_ADAPTER` means (by default the best one), and the embedded CPU engine.
pub fn contexts() -> Vec<(&'static str, Context)> {
    let chosen =
        Context::with_all_limits(&DeviceChoice::from_env()).expect("the device that WGMOE_ADAPTER means opens");
    println!("device: {} ({})", chosen.device().name, chosen.choice_reason());
    if chosen.gpu().is_some() {
        return vec![("gpu", chosen), ("cpu", Context::cpu())];
    }
    let required = std::env::var_os("WGMOE_REQUIRE_ADAPTER").is_some_and(|value| value == "1");
    assert!(!required, "WGMOE_REQUIRE_ADAPTER=1, but there is no adapter: {}", chosen.choice_reason());
    vec![("cpu", chosen)]
}

/// A layer of the small preset with made-up weights.
pub struct Subject {
    workload: Workload,
    layer: MoeLayer,
}

impl Subject {
    pub fn new(context: &Context) -> Self {
        let workload =
            Workload::new(SMALL.config().expect("the preset is valid"), 0.0, 1).expect("50 million weights fit");
        let options = LayerOptions { weights: WEIGHTS, ..Default::default() };
        let layer = MoeLayer::with_options(context, workload.config.clone(), &workload.weights, &options)
            .unwrap_or_else(|error| panic!("{}: {error}", context.device().name));
        Self { workload, layer }
    }

    /// The layer with `num_tokens` tokens resident on the device. Panics if what it computes for them is wrong:
    /// a wrong result has no speed.
    pub fn checked(&self, num_tokens: u32) -> &MoeLayer {
        let x = self.workload.input(num_tokens).expect("the input fits");
        let y = self.layer.forward(&x).unwrap_or_else(|error| panic!("{num_tokens} tokens: {error}"));
        let routing = self.layer.routing().expect("the routing of a pass that worked");
        let verification = verify::verify(&self.workload.config, &self.workload.weights, &x, &y, &routing);
        if let Some(reason) = verification.reason {
            panic!("{num_tokens} tokens: the result is wrong, so there is nothing to time: {reason}");
        }
        self.layer.upload(&x).expect("the input fits the device: forward has just used it");
        &self.layer
    }
}

/// Measuring time of one benchmark: enough for a median, little enough for all of them to be done in minutes.
pub const MEASUREMENT_TIME: Duration = Duration::from_secs(2);
/// Time of its first runs, which are not counted.
pub const WARM_UP_TIME: Duration = Duration::from_millis(500);
