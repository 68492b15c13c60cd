//! The smallest program that runs an MoE layer: made-up weights, sixteen tokens, the best device there is.
//!
//! ```text
//! cargo run --release --example hello_moe
//! WGMOE_ADAPTER=cpu cargo run --release --example hello_moe
//! ```

use wgmoe::{Activation, Context, DeviceChoice, MoeConfig, MoeLayer, MoeWeights, Routing};

const HIDDEN_SIZE: usize = 64;
const INTERMEDIATE_SIZE: usize = 32;
const NUM_EXPERTS: usize = 8;
const TOP_K: usize = 2;
const NUM_TOKENS: usize = 16;

fn main() -> wgmoe::Result<()> {
    let routing = Routing::softmax(true);
    let [h, i, e, k] = [HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS, TOP_K].map(|n| n as u32);
    let config = MoeConfig::new(h, i, e, k, routing, Activation::SWIGLU)?;
    let weights = MoeWeights {
        router: numbers(1, NUM_EXPERTS * HIDDEN_SIZE),
        router_bias: None,
        gate_proj: numbers(2, NUM_EXPERTS * INTERMEDIATE_SIZE * HIDDEN_SIZE),
        up_proj: numbers(3, NUM_EXPERTS * INTERMEDIATE_SIZE * HIDDEN_SIZE),
        down_proj: numbers(4, NUM_EXPERTS * HIDDEN_SIZE * INTERMEDIATE_SIZE),
        ..MoeWeights::default()
    };

    let context = Context::new(&DeviceChoice::from_env())?;
    println!("device: {} ({})", context.device().name, context.choice_reason());

    let layer = MoeLayer::new(&context, config, &weights)?;
    let y = layer.forward(&numbers(5, NUM_TOKENS * HIDDEN_SIZE))?;
    let routing = layer.routing()?;

    println!("tokens per expert: {:?}", routing.tokens_per_expert);
    println!("token 0: experts {:?}, weights {:.3?}", &routing.topk_experts[..TOP_K], &routing.topk_weights[..TOP_K]);
    println!("token 0: y starts with {:.4?}", &y[..4]);
    Ok(())
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
