//! Adaptive mixtures of local experts: every expert answers every question, and a gate says how much each answer
//! counts. This is where mixtures of experts began.
//!
//! Jacobs, Jordan, Nowlan and Hinton, "Adaptive Mixtures of Local Experts", Neural Computation 3(1), 1991.
//!
//! The function to imitate has two regimes, a line each, which meet with a jump at 0. Two linear experts know one line
//! each, and the gate knows which side of 0 it is on. The weights are written down here; the paper learns them.
//!
//! ```text
//! cargo run --release --example adaptive_mixture
//! ```

use std::error::Error;
use wgmoe::{Activation, Context, DeviceChoice, Function, MoeConfig, MoeLayer, MoeWeights, Routing, Scores, Selection};

/// (slope, offset) of each expert's line.
const LINES: [(f32, f32); 2] = [(0.5, 2.0), (-1.5, 0.5)];
/// How sharply the gate turns at 0.
const STEEPNESS: f32 = 3.0;

fn main() -> Result<(), Box<dyn Error>> {
    // Dense: top_k is the number of experts, and choice j is expert j. The weights are a softmax and stay as they are.
    let routing = Routing { selection: Selection::Dense, ..Routing::new(Scores::Softmax, false) };
    // A token is (x, 1), so that a matrix has an offset.
    let config = MoeConfig::new(2, 2, 2, 2, routing, Activation::plain(Function::Relu))?;
    let weights = MoeWeights {
        router: vec![-STEEPNESS, 0.0, STEEPNESS, 0.0],
        // relu(v) - relu(-v) = v makes a linear expert of one with an activation.
        up_proj: LINES.iter().flat_map(|&(a, b)| [a, b, -a, -b]).collect(),
        down_proj: LINES.iter().flat_map(|_| [1.0, -1.0, 0.0, 0.0]).collect(),
        ..MoeWeights::default()
    };
    let context = Context::new(&DeviceChoice::from_env())?;
    let layer = MoeLayer::new(&context, config, &weights)?;

    let xs: Vec<f32> = (-8..=8).map(|n| n as f32 / 4.0).collect();
    let tokens: Vec<f32> = xs.iter().flat_map(|&x| [x, 1.0]).collect();
    let y = layer.forward(&tokens)?;
    let gates = layer.routing()?.topk_weights;

    println!("device: {}\n", context.device().name);
    println!("    x   target   gate 0   gate 1   mixture");
    let mut worst = 0.0f64;
    for ((&x, gates), y) in xs.iter().zip(gates.chunks_exact(2)).zip(y.chunks_exact(2)) {
        let target = line(usize::from(x > 0.0), x);
        println!("{x:5.2}   {target:6.3}   {:6.3}   {:6.3}   {:7.3}", gates[0], gates[1], y[0]);
        // The paper's equations, by hand: a softmax gate, and the ensemble weighted by it.
        let logits = [-STEEPNESS, STEEPNESS].map(|row| f64::from(row * x).exp());
        let by_hand = [0, 1].map(|e| logits[e] / (logits[0] + logits[1]));
        let ensemble = by_hand[0] * line(0, x) + by_hand[1] * line(1, x);
        let errors = [
            f64::from(y[0]) - ensemble,
            f64::from(gates[0]) - by_hand[0],
            f64::from(gates[1]) - by_hand[1],
            f64::from(gates[0] + gates[1]) - 1.0,
        ];
        worst = errors.into_iter().map(f64::abs).fold(worst, larger);
    }
    println!("\nFar from 0 one expert answers alone; near it both are blended. No expert is ever left out,");
    println!("which is what makes the gate differentiable, and what sparse mixtures gave up for speed.");
    println!("largest difference from the equations: {worst:.1e}");
    if worst <= 1e-5 { Ok(()) } else { Err("the layer differs from the paper's equations".into()) }
}

/// The larger error, where NaN is the largest.
fn larger(a: f64, b: f64) -> f64 {
    if b > a || b.is_nan() { b } else { a }
}

/// What expert `e` knows.
fn line(e: usize, x: f32) -> f64 {
    let (slope, offset) = LINES[e];
    f64::from(slope) * f64::from(x) + f64::from(offset)
}
