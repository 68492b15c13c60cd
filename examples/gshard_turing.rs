//! Two layers from before mixtures were in every language model: GShard's, which gives some tokens a second expert by
//! lot, and DeepSpeed-MoE's (of Microsoft's Turing models), where a dense part works beside one routed expert and
//! later layers have more experts.
//!
//! Lepikhin et al., "GShard: Scaling Giant Models with Conditional Computation and Automatic Sharding", 2020,
//! arXiv:2006.16668. Rajbhandari et al., "DeepSpeed-MoE: Advancing Mixture-of-Experts Inference and Training to Power
//! Next-Generation AI Scale", 2022, arXiv:2201.05596.
//!
//! ```text
//! cargo run --release --example gshard_turing
//! ```

use std::error::Error;
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, Context, DROPPED, DeviceChoice, ExtraWeights, Function, LayerExtras,
    MoeConfig, MoeLayer, MoeWeights, Noise, Priority, Routing, SharedExperts, SharedGate, reference,
};

const HIDDEN_SIZE: usize = 32;
const INTERMEDIATE_SIZE: usize = 16;
const NUM_TOKENS: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    let context = Context::new(&DeviceChoice::from_env())?;
    println!("device: {}", context.device().name);
    let x = numbers(1, NUM_TOKENS * HIDDEN_SIZE);
    gshard(&context, &x)?;
    residual_pyramid(&context, &x)
}

/// Top-2, first choices before second ones, and the second choice kept with probability `2 * weight`.
fn gshard(context: &Context, x: &[f32]) -> Result<(), Box<dyn Error>> {
    let capacity = Capacity {
        // 2 * tokens / experts, for 8 experts
        limit: CapacityLimit::Fraction { fraction: 2.0 / 8.0, round_up: true, minimum: 4 },
        per_sequence: false,
        priority: Priority::Choice,
        renormalize_after: false,
        pass_through: false,
    };
    let routing = Routing { capacity: Some(capacity), noise: Noise::RandomSecond, ..Routing::softmax(true) };
    let (config, weights) = layer(8, 2, routing, None)?;
    let layer = MoeLayer::new(context, config.clone(), &weights)?;
    println!("\nGShard: 8 experts, top-2, {} assignments", 2 * NUM_TOKENS);
    for seed in [None, Some(1), Some(2)] {
        let batch = Batch { seed, ..Batch::from(x) };
        let y = layer.forward_batch(&batch)?;
        let routing = layer.routing()?;
        let dropped = |j| routing.topk_experts.iter().skip(j).step_by(2).filter(|&&e| e == DROPPED).count();
        let unlikely: f64 = routing.topk_weights.chunks_exact(2).map(|w| 1.0 - f64::from(2.0 * w[1]).min(1.0)).sum();
        let seed = seed.map_or("no seed".to_owned(), |seed| format!("seed {seed} "));
        println!(
            "{seed}: {} first and {} second choices dropped; {unlikely:.0} second ones by lot, if there is a seed",
            dropped(0),
            dropped(1)
        );
        check("GShard", &y, &reference::moe_forward(&config, &weights, batch).y)?;
    }
    Ok(())
}

/// Residual layers, one with a plain sum and one with a learnt coefficient, and twice the experts in the later ones.
fn residual_pyramid(context: &Context, x: &[f32]) -> Result<(), Box<dyn Error>> {
    println!("\nresidual pyramid: every token has the dense part and one expert of");
    let mut stream = x.to_vec();
    let mut expected: Vec<f64> = x.iter().map(|&v| f64::from(v)).collect();
    for (num_experts, gate) in [(4, SharedGate::None), (4, SharedGate::Mix), (8, SharedGate::Mix)] {
        let (config, weights) = layer(num_experts, 1, Routing::softmax(false), Some(gate))?;
        let layer = MoeLayer::new(context, config, &weights)?;
        let y = layer.forward(&stream)?;
        let routing = layer.routing()?;
        let share = match gate {
            SharedGate::Mix => {
                // The paper's coefficient is a softmax over two logits, (routed, dense). That is a sigmoid of their
                // difference, which is the row that this layer wants.
                let mean = routing.shared_weights.iter().sum::<f32>() / NUM_TOKENS as f32;
                format!("mixed with it, which counts {mean:.2} on average")
            }
            _ => "added to it".to_owned(),
        };
        println!("{num_experts:3} experts, {share}; tokens per expert {:?}", routing.tokens_per_expert);

        let wanted = residual_by_hand(&weights, &stream, gate);
        check("residual", &y, &wanted)?;
        stream.iter_mut().zip(&y).for_each(|(stream, y)| *stream += y);
        expected.iter_mut().zip(&wanted).for_each(|(stream, y)| *stream += y);
    }
    check("the whole pyramid", &stream, &expected)
}

/// `dense(x) + p * expert(x)`, or with a coefficient `g * dense(x) + (1 - g) * p * expert(x)`, in plain loops.
fn residual_by_hand(w: &MoeWeights, x: &[f32], gate: SharedGate) -> Vec<f64> {
    let mut y = Vec::new();
    for token in x.chunks_exact(HIDDEN_SIZE) {
        let logits: Vec<f64> = w.router.chunks_exact(HIDDEN_SIZE).map(|row| dot(row, token)).collect();
        let expert = (0..logits.len()).fold(0, |best, e| if logits[e] > logits[best] { e } else { best });
        let p = logits[expert].exp() / logits.iter().map(|l| l.exp()).sum::<f64>();
        let size = HIDDEN_SIZE * INTERMEDIATE_SIZE;
        let at = expert * size;
        let routed = mlp(&w.up_proj[at..][..size], &w.down_proj[at..][..size], token);
        let dense = mlp(&w.extras.shared_up_proj, &w.extras.shared_down_proj, token);
        let (of_dense, of_routed) = match &w.extras.shared_gate {
            Some(row) if gate == SharedGate::Mix => {
                let g = 1.0 / (1.0 + (-dot(row, token)).exp());
                (g, (1.0 - g) * p)
            }
            _ => (1.0, p),
        };
        y.extend(dense.iter().zip(&routed).map(|(dense, routed)| of_dense * dense + of_routed * routed));
    }
    y
}

/// `down relu(up x)`
fn mlp(up: &[f32], down: &[f32], x: &[f32]) -> Vec<f64> {
    let inner: Vec<f64> = up.chunks_exact(x.len()).map(|row| dot(row, x).max(0.0)).collect();
    let dot = |row: &[f32]| row.iter().zip(&inner).map(|(&w, v)| f64::from(w) * v).sum();
    down.chunks_exact(inner.len()).map(dot).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

/// A layer with made-up weights; with a gate, also a dense part of the experts' size.
fn layer(
    experts: u32,
    top_k: u32,
    routing: Routing,
    gate: Option<SharedGate>,
) -> wgmoe::Result<(MoeConfig, MoeWeights)> {
    let relu = Activation::plain(Function::Relu);
    let [h, i] = [HIDDEN_SIZE, INTERMEDIATE_SIZE].map(|n| n as u32);
    let shared =
        gate.map(|gate| SharedExperts { num: 1, intermediate_size: i, activation: relu, gate, average: false });
    let extras = LayerExtras { shared, ..LayerExtras::default() };
    let config = MoeConfig::new(h, i, experts, top_k, routing, relu)?.with_extras(extras)?;
    let matrix = |seed, count: usize| -> Vec<f32> {
        numbers(seed, count * HIDDEN_SIZE * INTERMEDIATE_SIZE).iter().map(|w| w * 0.3).collect()
    };
    let has_shared = usize::from(gate.is_some());
    let extras = ExtraWeights {
        shared_up_proj: matrix(5, has_shared),
        shared_down_proj: matrix(6, has_shared),
        shared_gate: (gate == Some(SharedGate::Mix)).then(|| numbers(7, HIDDEN_SIZE)),
        ..ExtraWeights::default()
    };
    let weights = MoeWeights {
        router: numbers(2, experts as usize * HIDDEN_SIZE).iter().map(|w| w * 0.5).collect(),
        up_proj: matrix(3, experts as usize),
        down_proj: matrix(4, experts as usize),
        extras,
        ..MoeWeights::default()
    };
    Ok((config, weights))
}

/// Fails if an element is further off than 1e-5 of the largest.
fn check(name: &str, got: &[f32], want: &[f64]) -> Result<(), Box<dyn Error>> {
    let largest = want.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    // A NaN is not within anything, so it fails.
    let within = |(got, want): (&f32, &f64)| (f64::from(*got) - want).abs() <= 1e-5 * largest;
    match got.iter().zip(want).position(|pair| !within(pair)) {
        None => Ok(()),
        Some(at) => Err(format!("{name}: element {at} is {}, expected {}", got[at], want[at]).into()),
    }
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
