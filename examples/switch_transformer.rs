//! The Switch Transformer's layer: one expert for each token, and no expert takes more than its capacity. What is
//! beyond it is dropped, and such a token gets zero from the layer.
//!
//! Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient
//! Sparsity", 2021, arXiv:2101.03961. The router z-loss is from Zoph et al., "ST-MoE", 2022, arXiv:2202.08906.
//!
//! ```text
//! cargo run --release --example switch_transformer
//! ```

use std::error::Error;
use wgmoe::{
    Activation, Batch, Capacity, CapacityLimit, Context, DROPPED, DeviceChoice, Function, MoeConfig, MoeLayer,
    MoeWeights, Noise, Priority, Routing, Scores,
};

const HIDDEN_SIZE: usize = 32;
const INTERMEDIATE_SIZE: usize = 16;
const NUM_EXPERTS: usize = 8;
const SEQUENCE: usize = 64;
const NUM_TOKENS: usize = 4 * SEQUENCE;

fn main() -> Result<(), Box<dyn Error>> {
    let context = Context::new(&DeviceChoice::from_env())?;
    println!("device: {}", context.device().name);
    let weights = MoeWeights {
        router: numbers(1, NUM_EXPERTS * HIDDEN_SIZE).iter().map(|w| w * 0.3).collect(),
        // Some experts are liked more than others, as in a router that nobody has balanced yet.
        router_bias: Some((0..NUM_EXPERTS).map(|e| e as f32 * 0.1).collect()),
        up_proj: numbers(2, NUM_EXPERTS * INTERMEDIATE_SIZE * HIDDEN_SIZE),
        down_proj: numbers(3, NUM_EXPERTS * HIDDEN_SIZE * INTERMEDIATE_SIZE),
        ..MoeWeights::default()
    };
    let x = numbers(4, NUM_TOKENS * HIDDEN_SIZE);
    let batch = Batch { tokens_per_sequence: Some(SEQUENCE as u32), ..Batch::from(&x) };

    println!("\ncapacity factor   capacity   dropped   tokens per expert");
    let mut fewest = usize::MAX;
    for factor in [0.5, 1.0, 1.25, 1.5, 2.0, 3.0] {
        let layer = MoeLayer::new(&context, config(factor)?, &weights)?;
        let y = layer.forward_batch(&batch)?;
        let routing = layer.routing()?;
        let capacity = (factor * SEQUENCE as f64 / NUM_EXPERTS as f64).ceil() as usize;
        println!("{factor:15}   {capacity:8}   {:7}   {:?}", routing.num_dropped, routing.tokens_per_expert);

        // By hand: in each sequence, the first tokens that want an expert get it.
        let mut taken = [0; NUM_EXPERTS];
        for t in 0..NUM_TOKENS {
            if t % SEQUENCE == 0 {
                taken.fill(0);
            }
            let wanted = best(&routing.router_logits[t * NUM_EXPERTS..][..NUM_EXPERTS]);
            taken[wanted] += 1;
            let beyond = taken[wanted] > capacity;
            let expected = if beyond { DROPPED } else { wanted as u32 };
            let is_zero = y[t * HIDDEN_SIZE..][..HIDDEN_SIZE].iter().all(|v| *v == 0.0);
            if routing.topk_experts[t] != expected || is_zero != beyond {
                return Err(format!("token {t} went to {}, expected {expected}", routing.topk_experts[t]).into());
            }
        }
        if routing.num_dropped > fewest {
            return Err("a larger capacity drops more".into());
        }
        fewest = routing.num_dropped;
    }

    let layer = MoeLayer::new(&context, config(1.25)?, &weights)?;
    layer.forward_batch(&batch)?;
    let statistics = layer.statistics()?;
    println!("\nat capacity factor 1.25:");
    println!("load-balancing loss {:.4} (1 if even)", statistics.switch_load_balancing_loss);
    println!("router z-loss       {:.4}", statistics.router_z_loss);
    println!("entropy             {:.4} of at most {:.4}", statistics.entropy, (NUM_EXPERTS as f64).ln());
    println!("dropped             {} of {NUM_TOKENS}", statistics.num_dropped);

    // Jitter is there for training. It needs a seed, and the same seed gives the same jitter.
    let chosen = |seed| -> wgmoe::Result<Vec<u32>> {
        layer.forward_batch(&Batch { seed, ..batch })?;
        let logits = layer.routing()?.router_logits;
        Ok(logits.chunks_exact(NUM_EXPERTS).map(|row| best(row) as u32).collect())
    };
    let (calm, seven, again, eight) = (chosen(None)?, chosen(Some(7))?, chosen(Some(7))?, chosen(Some(8))?);
    let moved = |to: &[u32]| calm.iter().zip(to).filter(|(a, b)| a != b).count();
    println!("\njitter moves {} tokens to another expert with seed 7, {} with seed 8", moved(&seven), moved(&eight));
    if seven == again && moved(&seven) > 0 && seven != eight { Ok(()) } else { Err("jitter is not the seed's".into()) }
}

/// A layer with this capacity factor, counted by position within each sequence.
fn config(factor: f64) -> wgmoe::Result<MoeConfig> {
    let fraction = factor / NUM_EXPERTS as f64;
    let capacity = Capacity {
        limit: CapacityLimit::Fraction { fraction, round_up: true, minimum: 1 },
        per_sequence: true,
        priority: Priority::Position,
        renormalize_after: false,
        pass_through: false,
    };
    let noise = Noise::Jitter { epsilon: 0.1 };
    // The weight of the only choice is its probability: renormalised it would be 1, and the router could not learn.
    let routing = Routing { capacity: Some(capacity), noise, ..Routing::new(Scores::Softmax, false) };
    let [h, i, e] = [HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS].map(|n| n as u32);
    MoeConfig::new(h, i, e, 1, routing, Activation::plain(Function::Relu))
}

/// The expert with the largest logit.
fn best(logits: &[f32]) -> usize {
    (0..logits.len()).fold(0, |best, e| if logits[e] > logits[best] { e } else { best })
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
