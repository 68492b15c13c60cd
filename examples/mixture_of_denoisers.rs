//! A mixture of denoisers, as in diffusion models: which expert works on a token is a matter of how noisy it is, not of
//! what is in it.
//!
//! Balaji et al., "eDiff-I: Text-to-Image Diffusion Models with an Ensemble of Expert Denoisers", 2022,
//! arXiv:2211.01324: each expert owns an interval of the noise level. Softly, a small gate reads an embedding of the
//! noise level and blends the two nearest experts.
//!
//! The task has a known answer. For data of variance 1 under noise of deviation sigma the best linear denoiser
//! multiplies by `1 / (1 + sigma^2)`. Each expert multiplies by one number, that of the middle of its interval, so the
//! distance to the best is a distance that routing makes.
//!
//! ```text
//! cargo run --release --example mixture_of_denoisers
//! ```

use std::error::Error;
use wgmoe::{
    Activation, Batch, Context, DeviceChoice, Function, MoeConfig, MoeLayer, MoeWeights, Routing, Scores, Selection,
};

const HIDDEN_SIZE: usize = 8;
const NUM_EXPERTS: usize = 5;
/// Noise levels are spoken of as ln(sigma), here from -SPAN to SPAN.
const SPAN: f64 = 2.0;
const NUM_TOKENS: usize = 200;
/// How quickly the soft gate turns from one expert to the next.
const SHARPNESS: f64 = 10.0;

fn main() -> Result<(), Box<dyn Error>> {
    let context = Context::new(&DeviceChoice::from_env())?;
    println!("device: {}", context.device().name);
    let levels: Vec<f64> = (0..NUM_TOKENS).map(|t| SPAN * ((2 * t + 1) as f64 / NUM_TOKENS as f64 - 1.0)).collect();
    let x = numbers(1, NUM_TOKENS * HIDDEN_SIZE);
    let weights = MoeWeights {
        // Nobody asks the layer's own router.
        router: vec![0.0; NUM_EXPERTS * HIDDEN_SIZE],
        // relu(v) - relu(-v) = v: the first half of the rows is the identity, the second its negative.
        up_proj: (0..NUM_EXPERTS).flat_map(|_| diagonal(1.0, true)).collect(),
        down_proj: (0..NUM_EXPERTS).flat_map(|e| diagonal(best_factor(middle(e)) as f32, false)).collect(),
        ..MoeWeights::default()
    };
    let build = |top_k, selection| -> wgmoe::Result<MoeLayer> {
        // Renormalised: whoever works on a token does so with a weight that sums to one.
        let routing = Routing { selection, ..Routing::new(Scores::Softmax, true) };
        let relu = Activation::plain(Function::Relu);
        let [h, e] = [HIDDEN_SIZE, NUM_EXPERTS].map(|n| n as u32);
        MoeLayer::new(&context, MoeConfig::new(h, 2 * h, e, top_k, routing, relu)?, &weights)
    };

    // Hard: the interval says who.
    let owner: Vec<i32> = levels.iter().map(|&u| owner(u) as i32).collect();
    let hard = build(1, Selection::Given)?;
    let y_hard = hard.forward_batch(&Batch { experts: Some(&owner), ..Batch::from(&x) })?;
    // The same thing in other words: assignments from the caller, with weights.
    let assigned = hard.forward_with_assignments(&x, &owner, &vec![1.0; NUM_TOKENS])?;

    // Soft: a linear gate on (sin u, cos u), whose row for an expert is the embedding of its middle. A logit is then
    // SHARPNESS * cos(u - middle), and the two largest are those of the two nearest middles.
    let gate: Vec<[f64; 2]> = (0..NUM_EXPERTS).map(|e| embedding(middle(e))).collect();
    let logit = |u: f64, e: usize| SHARPNESS * (gate[e][0] * embedding(u)[0] + gate[e][1] * embedding(u)[1]);
    let logits: Vec<f32> =
        levels.iter().flat_map(|&u| (0..NUM_EXPERTS).map(move |e| (u, e))).map(|(u, e)| logit(u, e) as f32).collect();
    let soft = build(2, Selection::TopK)?;
    let y_soft = soft.forward_with_logits(&x, &logits)?;
    let routing = soft.routing()?;

    println!("\nln sigma   owner   soft choices and weights");
    for t in (0..NUM_TOKENS).step_by(20) {
        let (experts, weights) = (&routing.topk_experts[2 * t..][..2], &routing.topk_weights[2 * t..][..2]);
        println!("{:8.2}   {:5}   {experts:?} {weights:.3?}", levels[t], owner[t]);
    }

    let one = vec![best_factor(0.0); NUM_TOKENS];
    let by_owner: Vec<f64> = owner.iter().map(|&e| best_factor(middle(e as usize))).collect();
    let blended: Vec<f64> = levels.iter().map(|&u| blend(&|e| logit(u, e))).collect();
    let times = |factors: &[f64]| -> Vec<f64> {
        x.iter().enumerate().map(|(n, &v)| f64::from(v) * factors[n / HIDDEN_SIZE]).collect()
    };
    let best = times(&levels.iter().map(|&u| best_factor(u)).collect::<Vec<f64>>());
    let wide = |y: &[f32]| y.iter().map(|&v| f64::from(v)).collect::<Vec<f64>>();
    println!("\nroot mean square distance to the best denoiser");
    let errors = [distance(&times(&one), &best), distance(&wide(&y_hard), &best), distance(&wide(&y_soft), &best)];
    println!(
        "one denoiser for all levels: {:.4}\nhard intervals:              {:.4}\nsoft gate:                   {:.4}",
        errors[0], errors[1], errors[2]
    );

    let pairs = [(&y_hard, &by_owner), (&assigned, &by_owner), (&y_soft, &blended)];
    let both = |(y, factors): (&Vec<f32>, &Vec<f64>)| wide(y).into_iter().zip(times(factors)).collect::<Vec<_>>();
    let differences = pairs.into_iter().flat_map(both).map(|(y, want)| (y - want).abs());
    // NaN counts as the largest.
    let worst = differences.fold(0.0, |worst, error| if error > worst || error.is_nan() { error } else { worst });
    println!("largest difference from plain loops: {worst:.1e}");
    let improves = errors[2] < errors[1] && errors[1] < errors[0];
    if improves && worst <= 1e-5 { Ok(()) } else { Err("the mixture is not what it should be".into()) }
}

/// What the best linear denoiser multiplies by, at ln(sigma) = u.
fn best_factor(u: f64) -> f64 {
    1.0 / (1.0 + (2.0 * u).exp())
}

/// The middle of an expert's interval.
fn middle(e: usize) -> f64 {
    SPAN * ((2 * e + 1) as f64 / NUM_EXPERTS as f64 - 1.0)
}

/// Whose interval this level is in.
fn owner(u: f64) -> usize {
    (((u / SPAN + 1.0) / 2.0 * NUM_EXPERTS as f64) as usize).min(NUM_EXPERTS - 1)
}

/// Of a noise level: one pair of a sinusoidal embedding.
fn embedding(u: f64) -> [f64; 2] {
    [u.sin(), u.cos()]
}

/// The factor that a softmax over the two largest logits makes of the experts' factors.
fn blend(logit: &dyn Fn(usize) -> f64) -> f64 {
    let mut order: Vec<usize> = (0..NUM_EXPERTS).collect();
    order.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)));
    let total: f64 = order[..2].iter().map(|&e| logit(e).exp()).sum();
    order[..2].iter().map(|&e| logit(e).exp() / total * best_factor(middle(e))).sum()
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    (a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>() / a.len() as f64).sqrt()
}

/// `factor` times the identity and its negative: below each other `[2 * hidden, hidden]`, or side by side.
fn diagonal(factor: f32, below: bool) -> Vec<f32> {
    let (rows, columns) = if below { (2 * HIDDEN_SIZE, HIDDEN_SIZE) } else { (HIDDEN_SIZE, 2 * HIDDEN_SIZE) };
    let sign = |row: usize, column: usize| if row >= HIDDEN_SIZE || column >= HIDDEN_SIZE { -factor } else { factor };
    let at = |row, column| if row % HIDDEN_SIZE == column % HIDDEN_SIZE { sign(row, column) } else { 0.0 };
    (0..rows).flat_map(|row| (0..columns).map(move |column| at(row, column))).collect()
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
