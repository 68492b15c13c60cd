//! What this device can do at best, measured in the same run as what it is compared with.

use crate::context::{Context, Engine};
use crate::cpu;
use crate::error::Result;
use crate::gpu::harness::{Harness, Output};
use crate::kernels::Stage;
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use crate::model::weights::MoeWeights;
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
    /// 10^9 bytes read per second from the largest buffer that was probed: the device's memory.
    pub gbytes_per_s: f64,
    /// (bytes, 10^9 bytes per second) of each buffer size that was probed, ascending: small ones stay in caches, and so
    /// do the weights of a small pass that is repeated.
    pub bandwidths: Vec<(u64, f64)>,
    /// How they were measured.
    pub how: String,
}

impl Roofline {
    /// The rate at which a pass that moves `bytes` bytes can read at best: that of the largest buffer no larger than
    /// that.
    pub fn bandwidth_for(&self, bytes: f64) -> f64 {
        let fits = self.bandwidths.iter().rev().find(|&&(size, _)| size as f64 <= bytes);
        fits.or(self.bandwidths.first()).map_or(self.gbytes_per_s, |&(_, rate)| rate)
    }
}

/// Buffers that the read probe reads, ascending, all within every device's binding limit.
const GPU_SIZES: [u64; 3] = [8 << 20, 32 << 20, 128 << 20];

/// Rounds of all probes, of which the best counts: what disturbs one probe is over in the next round.
const GPU_ROUNDS: usize = 4;

/// Measures the device's ceilings, in about three seconds.
pub fn roofline(context: &Context) -> Result<Roofline> {
    match context.engine() {
        Engine::Gpu(gpu) => {
            let mut gflops = 0.0f64;
            let mut bandwidths = GPU_SIZES.map(|bytes| (bytes, 0.0f64));
            for _ in 0..GPU_ROUNDS {
                gflops = gflops.max(pollster::block_on(gpu.peak_flops())? / 1e9);
                for (bytes, best) in &mut bandwidths {
                    *best = best.max(pollster::block_on(gpu.read_bandwidth(*bytes))? / 1e9);
                }
            }
            Ok(Roofline {
                gflops,
                gbytes_per_s: bandwidths[GPU_SIZES.len() - 1].1,
                bandwidths: bandwidths.into(),
                how: "multiply-adds in registers and reads of 128 MiB, in plain kernels".to_owned(),
            })
        }
        Engine::Cpu => {
            let cpu::Roofline { gflops, bandwidths } = cpu::roofline();
            let gbytes_per_s = bandwidths.last().map_or(0.0, |&(_, rate)| rate);
            let how = "a dense matmul of the gemm crate and reads of 256 MiB, on all threads".to_owned();
            Ok(Roofline { gflops, gbytes_per_s, bandwidths, how })
        }
    }
}

/// Time of a dense matmul `[m, k] x [n, k]^T`: on a GPU by the grouped matmul's own kernel with one expert, on the CPU
/// by the matmul crate. `None` where the weights do not fit one page.
pub fn dense_matmul_time(context: &Context, m: u32, n: u32, k: u32, format: WeightFormat) -> Result<Option<Duration>> {
    let gpu = match context.engine() {
        Engine::Gpu(gpu) => gpu,
        Engine::Cpu => return Ok(Some(cpu_dense(m as usize, n as usize, k as usize))),
    };
    let routing = Routing::softmax(true);
    let Ok(config) = MoeConfig::new(n, k, 1, 1, routing, Activation::SWIGLU) else { return Ok(None) };
    let Ok(plan) = LayerPlan::new(&config, format, gpu.profile(), &MatmulRequest::default()) else { return Ok(None) };
    if plan.pages("down_weights").len() > 1 || plan.max_tokens() < m {
        return Ok(None);
    }
    let weights = |len: u32| vec![0.5f32; len as usize];
    let weights = MoeWeights {
        router: weights(n),
        router_bias: None,
        gate_proj: weights(n * k),
        up_proj: weights(n * k),
        down_proj: weights(n * k),
        ..MoeWeights::default()
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
