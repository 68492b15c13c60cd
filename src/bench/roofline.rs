//! What this device can do at best, measured in the same run as what it is compared with.

use crate::context::{Context, Engine};
use crate::cpu;
use crate::error::Result;
use crate::gpu::harness::{Harness, Output};
use crate::kernels::Stage;
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::routing::{Routing, Scores};
use crate::model::weights::{MoeWeights, WeightFormat};
use crate::plan::{LayerPlan, MatmulRequest};
use crate::reference::permute::tiles;
use std::time::{Duration, Instant};

/// Runs of a dense matmul, of which the fastest counts.
const DENSE_RUNS: usize = 3;

/// A device's ceilings.
#[derive(Clone, Debug, PartialEq)]
pub struct Roofline {
    /// 10^9 f32 operations per second.
    pub gflops: f64,
    /// 10^9 bytes read per second.
    pub gbytes_per_s: f64,
    /// How they were measured.
    pub how: String,
}

/// Measures the device's ceilings, in about a second.
pub fn roofline(context: &Context) -> Result<Roofline> {
    match context.engine() {
        Engine::Gpu(gpu) => Ok(Roofline {
            gflops: pollster::block_on(gpu.peak_flops())? / 1e9,
            gbytes_per_s: pollster::block_on(gpu.read_bandwidth())? / 1e9,
            how: "multiply-adds in registers and reads of 64 MiB, in plain kernels".to_owned(),
        }),
        Engine::Cpu => {
            let cpu::Roofline { gflops, gbytes_per_s } = cpu::roofline();
            let how = "a dense matmul of the gemm crate and reads of 256 MiB, on all threads".to_owned();
            Ok(Roofline { gflops, gbytes_per_s, how })
        }
    }
}

/// Time of a dense matmul `[m, k] x [n, k]^T`: on a GPU by the grouped matmul's own kernel with one expert, on the CPU
/// by the matmul crate. `None` where the weights do not fit one page.
pub fn dense_matmul_time(
    context: &Context,
    m: u32,
    n: u32,
    k: u32,
    format: WeightFormat,
) -> Result<Option<Duration>> {
    let gpu = match context.engine() {
        Engine::Gpu(gpu) => gpu,
        Engine::Cpu => return Ok(Some(cpu_dense(m as usize, n as usize, k as usize))),
    };
    let routing = Routing { scores: Scores::Softmax, renormalize: true };
    let Ok(config) = MoeConfig::new(n, k, 1, 1, routing, Activation::Swiglu) else { return Ok(None) };
    let Ok(plan) = LayerPlan::new(&config, format, gpu.profile(), &MatmulRequest::default()) else { return Ok(None) };
    if plan.down_pages().len() > 1 || plan.max_tokens() < m {
        return Ok(None);
    }
    let weights = |len: u32| vec![0.5f32; len as usize];
    let weights = MoeWeights {
        router: weights(n),
        router_bias: None,
        gate_proj: weights(n * k),
        up_proj: weights(n * k),
        down_proj: weights(n * k),
    };
    let pass = plan.plan(m)?;
    let x = vec![0.25f32.to_bits(); m as usize * k.next_multiple_of(4) as usize];
    let mut tile_words: Vec<u32> =
        tiles(&[0, m], pass.matmul.tile_m()).iter().flat_map(|t| [t.expert, t.first_row, t.num_rows]).collect();
    tile_words.resize(pass.params.num_tile_slots as usize * 3, 1);
    let experts = vec![0; m as usize];
    let inputs = [("x", x.as_slice()), ("tiles", &tile_words), ("topk_experts", &experts)];
    let outputs = [Output::poisoned("expert_out", m as usize * n.next_multiple_of(4) as usize)];
    let times = pollster::block_on(async {
        let harness = Harness::new(gpu, &plan, &weights).await?;
        harness.time(&pass, Stage::Down, &inputs, &outputs, DENSE_RUNS).await
    })?;
    Ok(times.into_iter().min())
}

fn cpu_dense(m: usize, n: usize, k: usize) -> Duration {
    let (a, b, mut c) = (vec![0.25f32; m * k], vec![0.5f32; k * n], vec![0.0f32; m * n]);
    let mut best = Duration::MAX;
    for _ in 0..=DENSE_RUNS {
        let start = Instant::now();
        cpu::dense_matmul([m, n, k], &a, &b, &mut c);
        best = best.min(start.elapsed());
    }
    best
}
