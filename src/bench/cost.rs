//! What a whole forward pass must do whatever the kernels are: the yardstick for the roofline.
//!
//! The plan knows what each stage of *our* pass moves. Here is the part that no implementation could avoid, so that
//! a fraction of the roofline means the same for every variant and every device.

use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;

/// Work that a pass cannot avoid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    /// Multiplications and additions of the matmuls:
    /// `2 * tokens * top_k * 3 * hidden_size * intermediate_size + 2 * tokens * hidden_size * num_experts`, with 2 for 3
    /// where experts have no gate, and as much for shared experts.
    pub flops: f64,
    /// Bytes that must cross the memory bus once: the experts that got a token, shared ones, the router, `x` and `y`.
    pub bytes: f64,
}

impl Cost {
    /// Of one pass over `num_tokens` tokens of which `active_experts` experts got at least one.
    pub fn of_forward(config: &MoeConfig, format: WeightFormat, num_tokens: u32, active_experts: u32) -> Cost {
        let [h, e, k] = [config.hidden_size(), config.num_experts(), config.top_k()].map(f64::from);
        let tokens = f64::from(num_tokens);
        let quads = |columns: f64, inputs: u32| columns / 4.0 * format.quad_bytes(inputs) as f64;
        // Of an expert of this width: FLOPs for a token, and bytes.
        let expert = |width: u32, is_gated: bool| {
            let inner = if is_gated { 2.0 } else { 1.0 };
            let (flops, w) = (2.0 * (inner + 1.0) * h * f64::from(width), f64::from(width));
            (flops, inner * quads(w, config.hidden_size()) + quads(h, width))
        };
        let (flops, bytes) = expert(config.intermediate_size(), config.activation().is_gated());
        let (shared_flops, shared_bytes) = config.extras().shared.map_or((0.0, 0.0), |shared| {
            let (flops, bytes) = expert(shared.intermediate_size, shared.activation.is_gated());
            (f64::from(shared.num) * flops, f64::from(shared.num) * bytes)
        });
        Cost {
            flops: tokens * (k * flops + shared_flops) + 2.0 * tokens * h * e,
            bytes: f64::from(active_experts) * bytes + shared_bytes + 4.0 * (h * e + 2.0 * tokens * h),
        }
    }

    /// The speed that a device with these peaks could reach at best, in GFLOP/s:
    /// its arithmetic peak, or what its memory can feed.
    pub fn attainable_gflops(&self, peak_gflops: f64, peak_gbytes_per_s: f64) -> f64 {
        peak_gflops.min(self.flops / self.bytes * peak_gbytes_per_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Function, LayerExtras, Routing, SharedExperts, SharedGate};

    fn config() -> MoeConfig {
        let routing = Routing::softmax(true);
        MoeConfig::new(10, 7, 5, 2, routing, Activation::SWIGLU).expect("valid sizes")
    }

    #[test]
    fn counted_by_hand() {
        let cost = Cost::of_forward(&config(), WeightFormat::F16, 3, 4);
        // 3 tokens x 2 experts x (3 matmuls x 10 x 7) multiply-adds, and 3 x 10 x 5 for the router.
        assert_eq!(cost.flops, (2 * 3 * 2 * 3 * 10 * 7 + 2 * 3 * 10 * 5) as f64);
        // 4 experts x 2 bytes x weights: 2 x 7 rows of 10, which are stored as 12, and 10 rows of 7, stored as 8. 50
        // router weights, 30 inputs and 30 outputs of 4 bytes.
        assert_eq!(cost.bytes, (4 * 2 * (14 * 12 + 10 * 8) + 4 * (50 + 30 + 30)) as f64);
    }

    #[test]
    fn experts_without_gates_and_shared_ones_count_as_what_they_are() {
        let shared = SharedExperts {
            num: 2,
            intermediate_size: 8,
            activation: Activation::SWIGLU,
            gate: SharedGate::None,
            average: false,
        };
        let routing = Routing::softmax(true);
        let config = MoeConfig::new(12, 4, 5, 2, routing, Activation::plain(Function::Relu)).expect("valid sizes");
        let config =
            config.with_extras(LayerExtras { shared: Some(shared), ..LayerExtras::default() }).expect("a layer");
        let cost = Cost::of_forward(&config, WeightFormat::F32, 3, 1);
        assert_eq!(cost.flops, (3 * (2 * 2 * 2 * 12 * 4 + 2 * 2 * 3 * 12 * 8) + 2 * 3 * 12 * 5) as f64);
        assert_eq!(cost.bytes, (4 * (2 * 12 * 4 + 2 * 3 * 12 * 8 + 12 * 5 + 2 * 3 * 12)) as f64);
    }

    #[test]
    fn the_lower_roof_counts() {
        let cost = Cost { flops: 100.0, bytes: 50.0 };
        assert_eq!(cost.attainable_gflops(1000.0, 10.0), 20.0);
        assert_eq!(cost.attainable_gflops(5.0, 10.0), 5.0);
    }
}
