//! The router alone, at the numbers of experts of today's layers: what a choice among many costs.
//!
//! The yardstick is the time that the device needs to read the logits once: no router can be faster than that, and a
//! fused one has little reason to be much slower.

use crate::bench::stats::Summary;
use crate::bench::workload::Workload;
use crate::context::{Context, Engine};
use crate::cpu::CpuLayer;
use crate::error::{Error, Result};
use crate::gpu::harness::{Harness, Output};
use crate::kernels::Stage;
use crate::kernels::router::FrontKind;
use crate::layer::MoeLayer;
use crate::model::activation::Activation;
use crate::model::batch::Batch;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::{GroupScore, Groups, Masked, Routing, Scores};
use crate::model::weights::OptionalTensors;
use crate::plan::{LayerPlan, MatmulRequest, PassKind};
use serde::{Deserialize, Serialize};

/// Numbers of experts: Qwen3, DeepSeek-V3, Qwen3-Next, Kimi-K3.
pub const EXPERTS: [u32; 4] = [128, 256, 512, 896];
/// Tokens of each measurement.
pub const TOKENS: u32 = 512;
/// Width of a token.
const HIDDEN_SIZE: u32 = 1024;
/// Experts for each token.
const TOP_K: u32 = 8;
/// Timed runs; the median counts.
const RUNS: usize = 15;

/// Times of one router, as medians in seconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RouterTime {
    /// softmax, or deepseek-v3: sigmoid with a selection bias, the best 4 of 8 groups.
    pub routing: String,
    /// Experts to choose from.
    pub num_experts: u32,
    /// Tokens.
    pub tokens: u32,
    /// The whole router: logits of 1024 inputs, selection, weights.
    pub router_s: f64,
    /// Selection and weights of given logits; absent on the CPU engine.
    pub selection_s: Option<f64>,
    /// Reading the logits once at the device's own rate.
    pub read_s: f64,
}

/// Measures both routers at every number of experts. `gbytes_per_s` is the device's rate of reads that fit its caches.
pub fn router_times(context: &Context, gbytes_per_s: f64) -> Result<Vec<RouterTime>> {
    let mut times = Vec::new();
    for num_experts in EXPERTS {
        for name in ["softmax", "deepseek-v3"] {
            let groups = Groups { num_groups: 8, keep: 4, score: GroupScore::SumTop2, masked: Masked::NegInfinity };
            let routing = match name {
                "softmax" => Routing::softmax(true),
                _ => Routing { groups: Some(groups), scale: 2.5, ..Routing::new(Scores::Sigmoid, true) },
            };
            // Experts as small as they get: they do not run.
            let config = MoeConfig::new(HIDDEN_SIZE, 4, num_experts, TOP_K, routing, Activation::SWIGLU)?;
            let mut workload = Workload::new(config, 0.0, 1)?;
            if name != "softmax" {
                let bias = (0..num_experts).map(|e| (e % 13) as f32 / 130.0 - 0.05).collect();
                workload.weights.extras.selection_bias = Some(bias);
            }
            let (router_s, selection_s) = match context.engine() {
                Engine::Gpu(gpu) => {
                    let tensors = OptionalTensors::of(&workload.weights);
                    let (format, request) = (WeightFormat::F32, MatmulRequest::default());
                    let device = gpu.profile();
                    let plan =
                        LayerPlan::with_tensors(&workload.config, tensors, format, device, &request, num_experts)?;
                    let input = workload.input(TOKENS)?;
                    let x: Vec<u32> = input.iter().map(|v| v.to_bits()).collect();
                    let logits = TOKENS * num_experts;
                    let outputs = [
                        Output::zeroed("router_logits", 2 * logits as usize + TOKENS as usize),
                        Output::zeroed("topk_experts", (TOKENS * TOP_K) as usize),
                        Output::zeroed("topk_weights", (TOKENS * TOP_K) as usize),
                        Output::zeroed("status", 4),
                    ];
                    let harness = pollster::block_on(Harness::new(gpu, &plan, &workload.weights))?;
                    // Given logits are all zero here: choosing takes as long whatever they are.
                    let front = FrontKind::Logits;
                    let pass = plan.plan_pass(TOKENS, PassKind { front, ..PassKind::default() })?;
                    let times = pollster::block_on(harness.time(&pass, Stage::Router, &[("x", &x)], &outputs, RUNS))?;
                    let selection = median(times.iter().map(|t| t.as_secs_f64()))?;
                    // The whole router as the pass runs it: one dispatch, or two where that is faster.
                    let layer = MoeLayer::new(context, workload.config.clone(), &workload.weights)?;
                    layer.upload(&input)?;
                    let mut times = Vec::new();
                    for _ in 0..=RUNS {
                        let stages = layer.profile()?;
                        let router = stages.iter().filter(|stage| ["logits", "router"].contains(&stage.name));
                        times.push(router.map(|stage| stage.seconds).sum::<f64>());
                    }
                    (median(times.into_iter().skip(1))?, Some(selection))
                }
                Engine::Cpu => {
                    let layer = CpuLayer::new(workload.config.clone(), &workload.weights, WeightFormat::F32)?;
                    let x = workload.input(TOKENS)?;
                    let mut y = vec![0.0; x.len()];
                    let mut times = Vec::new();
                    for _ in 0..RUNS {
                        let (_, stages) = layer.forward_profiled(&Batch::from(&x), &mut y)?;
                        times.extend(stages.iter().find(|(name, _)| *name == "router").map(|(_, t)| t.as_secs_f64()));
                    }
                    (median(times.into_iter())?, None)
                }
            };
            let read_s = f64::from(TOKENS * num_experts * 4) / (gbytes_per_s * 1e9);
            times.push(RouterTime {
                routing: name.to_owned(),
                num_experts,
                tokens: TOKENS,
                router_s,
                selection_s,
                read_s,
            });
        }
    }
    Ok(times)
}

fn median(times: impl Iterator<Item = f64>) -> Result<f64> {
    let summary = Summary::of(&times.collect::<Vec<f64>>());
    summary.map(|summary| summary.median_s).ok_or_else(|| Error::config("runs", 0, "at least one timing"))
}
