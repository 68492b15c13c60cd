//! A layer small enough to work out by hand: 3 tokens, 4 experts, 2 for each token, hidden size 2, intermediate size 1.
//!
//! **Router.** Logits are `x . router[e] + bias[e]` with router rows (ln 2, 0), (0, ln 2), (0, 0), (-ln 2, -ln 2) and
//! bias (0, 0, 0, ln 4), so that exp(logit) is `2^x0, 2^x1, 1, 4 * 2^(-x0 - x1)`:
//!
//! | token | x       | exp(logits)      | sum    | best two    | their softmax | renormalised  |
//! |-------|---------|------------------|--------|-------------|---------------|---------------|
//! | 0     | (2, 1)  | 4, 2, 1, 1/2     | 15/2   | 0, then 1   | 8/15, 4/15    | 2/3, 1/3      |
//! | 1     | (-1, 3) | 1/2, 8, 1, 1     | 21/2   | 1, then 2   | 16/21, 2/21   | 8/9, 1/9      |
//! | 2     | (0, 0)  | 1, 1, 1, 4       | 7      | 3, then 0   | 4/7, 1/7      | 4/5, 1/5      |
//!
//! Token 1 has a tie of experts 2 and 3, token 2 one of experts 0, 1 and 2: the lowest index wins. The ties are exact in
//! f32 as well: ln 2 ends in three zero bits there, so that three times it is not rounded.
//! Tokens of each expert: 2, 2, 1, 1.
//!
//! **Experts.** Gate rows all read `x0 + x1`, up rows read `x0 - x1` times 1, 2, 3 and 4. With `silu(v) = v / (1 + e^-v)`:
//! token 0 has gate 3 and up 1: `silu(3) = 3 / (1 + e^-3)`, times the expert's factor; token 1 has gate 2 and up -4:
//! `-4 silu(2)`; token 2 has gate 0: all zero. Down rows are (1, e) for expert e, so
//!
//!     y[0] = silu(3) * (2/3 * 1 * (1, 0) + 1/3 * 2 * (1, 1)) = silu(3) * (4/3, 2/3)
//!     y[1] = -4 silu(2) * (8/9 * 2 * (1, 1) + 1/9 * 3 * (1, 2)) = -4 silu(2) * (19/9, 22/9)
//!     y[2] = (0, 0)
//!
//! and without renormalising
//!
//!     y[0] = silu(3) * (8/15 * 1 * (1, 0) + 4/15 * 2 * (1, 1)) = silu(3) * (16/15, 8/15)
//!     y[1] = -4 silu(2) * (16/21 * 2 * (1, 1) + 2/21 * 3 * (1, 2)) = -4 silu(2) * (38/21, 44/21)

mod support;

use support::{assert_close, config, gpu_context, variants};
use wgmoe::{Context, LayerOptions, MoeLayer, MoeWeights, WeightFormat, reference};

const X: [f32; 6] = [2.0, 1.0, -1.0, 3.0, 0.0, 0.0];
const EXPERTS: [u32; 6] = [0, 1, 1, 2, 3, 0];
const TOKENS_PER_EXPERT: [u32; 4] = [2, 2, 1, 1];

/// 3 / (1 + e^-3), with e^-3 = 0.049787068...
const SILU_3: f64 = 2.857_722_380_467_3;
/// 2 / (1 + e^-2), with e^-2 = 0.135335283...
const SILU_2: f64 = 1.761_594_155_955_765;

fn weights() -> MoeWeights {
    let ln2 = std::f32::consts::LN_2;
    MoeWeights {
        router: vec![ln2, 0.0, 0.0, ln2, 0.0, 0.0, -ln2, -ln2],
        router_bias: Some(vec![0.0, 0.0, 0.0, 2.0 * ln2]),
        gate_proj: vec![1.0; 8],
        up_proj: vec![1.0, -1.0, 2.0, -2.0, 3.0, -3.0, 4.0, -4.0],
        down_proj: vec![1.0, 0.0, 1.0, 1.0, 1.0, 2.0, 1.0, 3.0],
        ..MoeWeights::default()
    }
}

/// (renormalise, weights of the choices, y)
fn answers() -> [(bool, [f64; 6], [f64; 6]); 2] {
    let y =
        |a: [f64; 2], b: [f64; 2]| [SILU_3 * a[0], SILU_3 * a[1], -4.0 * SILU_2 * b[0], -4.0 * SILU_2 * b[1], 0.0, 0.0];
    [
        (
            true,
            [2.0 / 3.0, 1.0 / 3.0, 8.0 / 9.0, 1.0 / 9.0, 4.0 / 5.0, 1.0 / 5.0],
            y([4.0 / 3.0, 2.0 / 3.0], [19.0 / 9.0, 22.0 / 9.0]),
        ),
        (
            false,
            [8.0 / 15.0, 4.0 / 15.0, 16.0 / 21.0, 2.0 / 21.0, 4.0 / 7.0, 1.0 / 7.0],
            y([16.0 / 15.0, 8.0 / 15.0], [38.0 / 21.0, 44.0 / 21.0]),
        ),
    ]
}

#[test]
fn the_reference_gives_them() {
    for (renormalize, combine_weights, y) in answers() {
        let forward = reference::moe_forward(&config([2, 1, 4, 2], renormalize), &weights(), &X);
        assert_eq!(forward.router.topk_experts, EXPERTS);
        assert_eq!(forward.permutation.expert_offsets, [0, 2, 4, 5, 6]);
        // Assignments 2t + j by expert: 0 has t0 j0 and t2 j1, 1 has t0 j1 and t1 j0, 2 has t1 j1, 3 has t2 j0.
        assert_eq!(forward.permutation.assignment_of_row, [0, 5, 1, 2, 3, 4]);
        assert_eq!(forward.permutation.row_of_assignment, [0, 2, 3, 4, 5, 1]);
        let to_f32 = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
        // ln 2 itself is rounded to f32.
        assert_close("weights", &to_f32(&forward.router.topk_weights), &combine_weights, |_| 2e-7);
        assert_close("y", &to_f32(&forward.y), &y, |_| 1e-5);
    }
}

fn check(name: &str, context: &Context, options: &LayerOptions) {
    for (renormalize, combine_weights, y) in answers() {
        let config = config([2, 1, 4, 2], renormalize);
        let layer = MoeLayer::with_options(context, config, &weights(), options).expect("the weights are valid");
        // Alone, and as the front of a batch that is sorted.
        for repeats in [1, 15] {
            let got = layer.forward(&X.repeat(repeats)).expect("the input is valid");
            assert_close(name, &got, &y.repeat(repeats), |_| 1e-5);
            let routing = layer.routing().expect("there was a pass");
            assert_eq!(routing.topk_experts, EXPERTS.repeat(repeats), "{name}");
            assert_close(name, &routing.topk_weights, &combine_weights.repeat(repeats), |_| 1e-6);
            assert_eq!(routing.tokens_per_expert, TOKENS_PER_EXPERT.map(|n| n * repeats as u32), "{name}");
        }
    }
}

/// Every expert weight is a small integer, so that storage in these changes nothing.
const EXACT: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16];

#[test]
fn the_cpu_engine_gives_them() {
    for weights in EXACT {
        check("cpu", &Context::cpu(), &LayerOptions { weights, ..LayerOptions::default() });
    }
}

#[test]
fn the_gpu_gives_them() {
    let Some(context) = gpu_context() else { return };
    for matmul in std::iter::once(None).chain(variants(&context).into_iter().map(Some)) {
        for weights in EXACT {
            let name = format!("{matmul:?} {}", weights.name());
            check(&name, &context, &LayerOptions { matmul, weights, ..LayerOptions::default() });
        }
    }
}
