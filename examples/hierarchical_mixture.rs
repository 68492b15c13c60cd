//! A hierarchical mixture: one gate chooses between groups of experts, another within each group. An expert's weight
//! is the product of both.
//!
//! Jordan and Jacobs, "Hierarchical Mixtures of Experts and the EM Algorithm", Neural Computation 6(2), 1994.
//!
//! ```text
//! cargo run --release --example hierarchical_mixture
//! ```

use std::error::Error;
use wgmoe::{
    Activation, Context, DeviceChoice, ExtraWeights, GroupScore, Groups, Masked, MoeConfig, MoeLayer, MoeWeights,
    Routing, Scores, Selection, reference,
};

const HIDDEN_SIZE: usize = 16;
const INTERMEDIATE_SIZE: usize = 8;
const NUM_GROUPS: usize = 2;
const GROUP_SIZE: usize = 3;
const NUM_EXPERTS: usize = NUM_GROUPS * GROUP_SIZE;
const NUM_TOKENS: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    // All groups are kept: the tree has no pruned branches.
    let groups = Groups {
        num_groups: NUM_GROUPS as u32,
        keep: NUM_GROUPS as u32,
        score: GroupScore::Max,
        masked: Masked::NegInfinity,
    };
    let routing =
        Routing { selection: Selection::Dense, groups: Some(groups), ..Routing::new(Scores::Hierarchical, false) };
    let [h, i, e] = [HIDDEN_SIZE, INTERMEDIATE_SIZE, NUM_EXPERTS].map(|n| n as u32);
    let config = MoeConfig::new(h, i, e, e, routing, Activation::SWIGLU)?;
    let weights = MoeWeights {
        router: numbers(1, NUM_EXPERTS * HIDDEN_SIZE),
        gate_proj: numbers(2, NUM_EXPERTS * INTERMEDIATE_SIZE * HIDDEN_SIZE),
        up_proj: numbers(3, NUM_EXPERTS * INTERMEDIATE_SIZE * HIDDEN_SIZE),
        down_proj: numbers(4, NUM_EXPERTS * HIDDEN_SIZE * INTERMEDIATE_SIZE),
        extras: ExtraWeights { group_router: Some(numbers(5, NUM_GROUPS * HIDDEN_SIZE)), ..ExtraWeights::default() },
        ..MoeWeights::default()
    };
    let context = Context::new(&DeviceChoice::from_env())?;
    let layer = MoeLayer::new(&context, config.clone(), &weights)?;
    let x = numbers(6, NUM_TOKENS * HIDDEN_SIZE);
    let y = layer.forward(&x)?;
    let flat = layer.routing()?.topk_weights;

    println!("device: {}", context.device().name);
    let group_rows = weights.extras.group_router.as_deref().unwrap_or(&[]);
    let mut worst = 0.0f64;
    for (t, (token, flat)) in x.chunks_exact(HIDDEN_SIZE).zip(flat.chunks_exact(NUM_EXPERTS)).enumerate() {
        println!("\ntoken {t}");
        let top = softmax(&logits(group_rows, token));
        let all = logits(&weights.router, token);
        for (g, top) in top.iter().enumerate() {
            let within = softmax(&all[g * GROUP_SIZE..][..GROUP_SIZE]);
            let flat = &flat[g * GROUP_SIZE..][..GROUP_SIZE];
            println!("  group {g}: {top:.3}  times  {within:.3?}  =  {flat:.3?}");
            for (within, &flat) in within.iter().zip(flat) {
                worst = larger(worst, (f64::from(flat) - top * within).abs());
            }
        }
        worst = larger(worst, (flat.iter().map(|&w| f64::from(w)).sum::<f64>() - 1.0).abs());
    }
    println!("\nThe weights of a token sum to one, so the tree is a mixture again, whose parts are mixtures.");
    println!("largest difference from the product of both softmaxes: {worst:.1e}");

    let expected = reference::moe_forward(&config, &weights, &x).y;
    let largest = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    let errors = y.iter().zip(&expected).map(|(&y, want)| (f64::from(y) - want).abs() / largest);
    let error = errors.fold(0.0, larger);
    println!("largest error of the output in relation to the largest output: {error:.1e}");
    if worst <= 1e-5 && error <= 1e-5 { Ok(()) } else { Err("the layer differs from the definition".into()) }
}

/// `rows [_, hidden_size]` times the token.
fn logits(rows: &[f32], token: &[f32]) -> Vec<f64> {
    let dot = |row: &[f32]| row.iter().zip(token).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
    rows.chunks_exact(token.len()).map(dot).collect()
}

/// The larger error, where NaN is the largest.
fn larger(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let exps: Vec<f64> = logits.iter().map(|l| l.exp()).collect();
    exps.iter().map(|e| e / exps.iter().sum::<f64>()).collect()
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
