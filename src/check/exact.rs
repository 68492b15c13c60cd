//! Layers of small integers, whose sums f32 does not round: every bit of the output has to be right, on every device.
//!
//! Inputs and weights are integers from -4 to 4, but for one or two weights of each group that shares a scale: those make
//! the scale a power of two, so that the format holds all of them. Experts have ReLU, and the weights of choices are powers
//! of two. The case is exact if no sum of magnitudes reaches 2^24 units; inputs are thinned out until that is so.

use super::case::Case;
use super::draw::Draw;
use super::verdict::compare_bits;
use super::{CheckKind, KernelCheck, Progress, choices, label, with_read_widths};
use crate::context::{Context, Engine};
use crate::error::Result;
use crate::gpu::Gpu;
use crate::gpu::harness::Harness;
use crate::kernels::Stage;
use crate::kernels::matmul::MatmulChoice;
use crate::layer::{LayerOptions, MoeLayer};
use crate::model::activation::{Activation, Function};
use crate::model::batch::{Batch, Front};
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use crate::model::weights::MoeWeights;
use crate::plan::MatmulRequest;
use crate::reference;

/// f32 holds every integer up to this.
const LARGEST: f64 = (1u64 << 24) as f64;
/// Weights of choices are multiples of this.
const UNIT_WEIGHT: f64 = 0.5;
/// (tokens, experts, top_k) of the layers: one token, few, and more than a tile.
const TOKENS: [(u32, u32, u32); 3] = [(1, 5, 2), (13, 4, 3), (37, 3, 1)];
/// Layers of each format on the CPU engine, which has no variants.
const CPU_LAYERS: u64 = 20;

/// Small integers through every kernel variant, stage by stage, and through whole layers.
///
/// # Errors
/// What the device reports; a bit that is wrong is no error.
pub fn check_exact(context: &Context, progress: Progress<'_>) -> Result<Vec<KernelCheck>> {
    let mut checks = Vec::new();
    match context.engine() {
        Engine::Gpu(gpu) => {
            let total = WeightFormat::ALL.len() * TOKENS.len();
            for (f, &format) in WeightFormat::ALL.iter().enumerate() {
                for (t, &sizes) in TOKENS.iter().enumerate() {
                    let done = f * TOKENS.len() + t;
                    progress(done, total, &format!("integers, {}", format.name()));
                    let layer = Integers::new(format, sizes, Function::Relu, false, done as u64)?;
                    pollster::block_on(check_stages(&layer, gpu, &mut checks))?;
                    // Of whole layers, those whose kernels are compiled by now.
                    if format == WeightFormat::F32 {
                        checks.push(layer.check(context)?);
                    }
                }
            }
            progress(total, total, "");
        }
        Engine::Cpu => {
            let formats = WeightFormat::every();
            for (f, &format) in formats.iter().enumerate() {
                progress(f, formats.len(), &format!("integers, {}", format.name()));
                for n in 0..CPU_LAYERS {
                    let sizes = TOKENS[n as usize % TOKENS.len()];
                    // Products of two sums leave no room for large weights.
                    let small = is_small(format);
                    let function = if small && n % 3 == 0 { Function::Relu2 } else { Function::Relu };
                    let gated = small && n % 2 == 1;
                    let layer = Integers::new(format, sizes, function, gated, f as u64 * CPU_LAYERS + n)?;
                    checks.push(layer.check(context)?);
                }
            }
            progress(formats.len(), formats.len(), "");
        }
    }
    Ok(checks)
}

/// Down in every variant, gate_up in every variant for one format and in one variant for every format (its activation is
/// compiled into it, and drivers take long to compile), combine and permute once.
async fn check_stages(layer: &Integers, gpu: &Gpu, checks: &mut Vec<KernelCheck>) -> Result<()> {
    let device = gpu.profile();
    let case = Case::exact(&layer.config, &layer.weights, layer.format, layer.batch())?;
    let tokens = case.num_tokens();
    let harness = Harness::new(gpu, &case.plan(device, &MatmulRequest::default())?, case.weights).await?;
    let one = MatmulChoice::Tiled { tile_m: 16, tile_n: 64 };
    for (profile, choice) in with_read_widths(device, &choices(device, case.config, tokens)) {
        let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
        let plan = case.plan(&profile, &request)?.plan(tokens)?;
        for stage in [Stage::Permute, Stage::GateUp, Stage::Down, Stage::DownCombine, Stage::Combine] {
            let due = match stage {
                Stage::GateUp => layer.format == WeightFormat::F32 || choice == one,
                Stage::Permute | Stage::Combine => choice == one,
                _ => true,
            };
            let Some(dispatch) = plan.dispatches.iter().find(|d| due && d.kernel.stage == stage) else { continue };
            let verdict = case.check(&harness, &plan, stage).await?;
            let label = label(stage, &dispatch.kernel.label, choice);
            checks.push(KernelCheck::new(CheckKind::Exact, label, case.shape(), verdict));
        }
    }
    Ok(())
}

/// A layer of small integers with its input.
pub(super) struct Integers {
    pub config: MoeConfig,
    pub weights: MoeWeights,
    pub format: WeightFormat,
    x: Vec<f32>,
    /// `[num_tokens, top_k]`
    experts: Vec<i32>,
    /// Powers of two.
    choice_weights: Vec<f32>,
}

impl Integers {
    pub fn new(
        format: WeightFormat,
        (tokens, e, k): (u32, u32, u32),
        function: Function,
        gated: bool,
        index: u64,
    ) -> Result<Self> {
        let mut draw = Draw::new(1, 3, index);
        let block = format.block();
        let length = |draw: &mut Draw| if block == 1 { draw.between(20, 140) } else { block * (128 / block).max(1) };
        let (h, i) = (length(&mut draw), length(&mut draw));
        let activation = if gated { Activation::gated(function) } else { Activation::plain(function) };
        let config = MoeConfig::new(h, i, e, k, Routing::softmax(true), activation)?;
        let mut matrices = |rows: u32, inputs: u32| -> Vec<f32> {
            (0..e).flat_map(|_| matrix(format, rows as usize, inputs as usize, &mut draw)).collect()
        };
        let weights = MoeWeights {
            gate_proj: if gated { matrices(i, h) } else { Vec::new() },
            up_proj: matrices(i, h),
            down_proj: matrices(h, i),
            router: vec![0.0; (e * h) as usize],
            ..MoeWeights::default()
        };
        let mut experts = Vec::new();
        for _ in 0..tokens {
            let mut ids: Vec<i32> = (0..e as i32).collect();
            draw.shuffle(&mut ids);
            experts.extend(&ids[..k as usize]);
        }
        let choice_weights = (0..tokens * k).map(|_| draw.pick(&[UNIT_WEIGHT as f32, 1.0, 2.0])).collect();
        // Where weights are large, few inputs are all that leaves room for them.
        let one_in = if is_small(format) { 1 } else { 8 };
        let x = (0..tokens * h).map(|_| if draw.once_in(one_in) { draw.integer(4) } else { 0.0 }).collect();
        let mut layer = Self { config, weights, format, x, experts, choice_weights };
        while layer.largest_sum() > LARGEST {
            layer.x.iter_mut().for_each(|v| *v = if draw.once_in(2) { 0.0 } else { *v });
        }
        Ok(layer)
    }

    pub fn batch(&self) -> Batch<'_> {
        let front = Front::Assignments { experts: &self.experts, weights: &self.choice_weights };
        Batch { front, ..Batch::from(&self.x) }
    }

    /// Of the magnitudes that any output adds up, in units of which all of them are multiples.
    fn largest_sum(&self) -> f64 {
        let abs = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<f32>>();
        let weights = MoeWeights {
            gate_proj: abs(&self.weights.gate_proj),
            up_proj: abs(&self.weights.up_proj),
            down_proj: abs(&self.weights.down_proj),
            ..self.weights.clone()
        };
        let x = abs(&self.x);
        let sums = reference::moe_forward(&self.config, &weights, Batch { x: &x, ..self.batch() });
        let largest = |values: &[f64]| values.iter().fold(0.0, |most: f64, &v| most.max(v));
        largest(&sums.intermediate).max(largest(&sums.expert_out)).max(largest(&sums.y) / UNIT_WEIGHT)
    }

    /// The whole layer, as a program uses it.
    fn check(&self, context: &Context) -> Result<KernelCheck> {
        let case = Case::exact(&self.config, &self.weights, self.format, self.batch())?;
        let options = LayerOptions { weights: self.format, ..LayerOptions::default() };
        let layer = MoeLayer::with_options(context, self.config.clone(), &self.weights, &options)?;
        let y = layer.forward_batch(&self.batch())?;
        let verdict = compare_bits(&y, &case.expected.y);
        Ok(KernelCheck::new(CheckKind::Exact, format!("layer.{}", self.format.name()), case.shape(), verdict))
    }
}

/// The format holds integers from -4 to 4 without others beside them.
fn is_small(format: WeightFormat) -> bool {
    matches!(format, WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 | WeightFormat::Mxfp4)
}

/// Integers `[rows, inputs]` that the format holds: from -4 to 4, but where its scales need others.
fn matrix(format: WeightFormat, rows: usize, inputs: usize, draw: &mut Draw) -> Vec<f32> {
    let mut values: Vec<f32> = (0..rows * inputs).map(|_| draw.integer(4)).collect();
    for (r, row) in values.chunks_exact_mut(inputs).enumerate() {
        match format {
            WeightFormat::Int8(groups) | WeightFormat::Int4(groups) => {
                let is_byte = matches!(format, WeightFormat::Int8(_));
                for group in row.chunks_mut(groups.size() as usize) {
                    match (groups.has_zero_points(), is_byte) {
                        // Codes have a step of 1: the range is as wide as they are many, or its larger end is the last code.
                        (true, true) => mark(group, &[-127.0, 128.0], draw),
                        (true, false) => mark(group, &[-7.0, 8.0], draw),
                        (false, true) => mark(group, &[127.0], draw),
                        (false, false) => mark(group, &[7.0], draw),
                    }
                }
            }
            WeightFormat::Nvfp4 => {
                for (g, group) in row.chunks_mut(16).enumerate() {
                    // The largest of the matrix makes its scale 2^-7, and 3 a group's own scale 1/2.
                    if r == 0 && g == 0 {
                        group.fill(0.0);
                        mark(group, &[21.0], draw);
                    } else {
                        group.iter_mut().for_each(|v| *v = v.clamp(-3.0, 3.0));
                        mark(group, &[3.0], draw);
                    }
                }
            }
            // 448 / 2^6
            WeightFormat::Fp8 => row.chunks_mut(128).for_each(|group| mark(group, &[7.0], draw)),
            WeightFormat::Q4_0 => {
                for group in row.chunks_mut(32) {
                    group.iter_mut().for_each(|v| *v = v.clamp(-3.0, 3.0));
                    mark(group, &[-4.0], draw);
                }
            }
            WeightFormat::Q8_0 => row.chunks_mut(32).for_each(|group| mark(group, &[127.0], draw)),
            WeightFormat::Q4K => {
                for block in row.chunks_mut(256) {
                    for (g, group) in block.chunks_mut(32).enumerate() {
                        // Scales are 63 and 1 times 1, minima 63 and 4 times 1.
                        if g == 0 {
                            group.fill(0.0);
                            mark(group, &[-63.0, 882.0], draw);
                        } else {
                            mark(group, &[-4.0, 11.0], draw);
                        }
                    }
                }
            }
            WeightFormat::Q6K => {
                for block in row.chunks_mut(256) {
                    for (g, group) in block.chunks_mut(16).enumerate() {
                        // Scales are -128 and 16 times 2^-7.
                        group.iter_mut().for_each(|v| *v = v.clamp(-3.0, 3.0));
                        mark(group, &[if g == 0 { 32.0 } else { -4.0 }], draw);
                    }
                }
            }
            _ => {} // those hold all of them
        }
    }
    values
}

/// Puts these in different places of a group.
fn mark(group: &mut [f32], marks: &[f32], draw: &mut Draw) {
    let mut places: Vec<usize> = (0..group.len()).collect();
    draw.shuffle(&mut places);
    marks.iter().zip(places).for_each(|(&mark, place)| group[place] = mark);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// That it is exact in f32 is what makes every order of summation give the same bits: here, another one does.
    #[test]
    fn integer_layers_are_exact_in_every_format() {
        for (f, format) in WeightFormat::every().into_iter().enumerate() {
            for (t, &sizes) in TOKENS.iter().enumerate() {
                let layer =
                    Integers::new(format, sizes, Function::Relu, is_small(format) && t % 2 == 1, (f * 10 + t) as u64)
                        .expect("sound");
                let case = Case::exact(&layer.config, &layer.weights, format, layer.batch());
                let case = case.unwrap_or_else(|error| panic!("{format}: {error}"));
                assert!(layer.largest_sum() <= LARGEST);
                let [h, i] = [layer.config.hidden_size(), layer.config.intermediate_size()].map(|n| n as usize);
                let rows = case.expected.intermediate.chunks_exact(i).zip(case.expected.expert_out.chunks_exact(h));
                for (row, (v, out)) in rows.enumerate() {
                    let expert = case.expected.permutation.expert_of_row(row);
                    for (column, &out) in out.iter().enumerate() {
                        let w = &layer.weights.down_proj[(expert * h + column) * i..][..i];
                        let backwards = v.iter().zip(w).rev().fold(0.0f32, |sum, (&v, &w)| sum + v as f32 * w);
                        assert_eq!(f64::from(backwards), out, "{format} row {row} column {column}");
                    }
                }
                assert!(case.expected.y.iter().any(|&v| v != 0.0), "{format}: nothing but zeros");
            }
        }
    }
}
