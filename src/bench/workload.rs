//! Seeded inputs and weights for a benchmark, with routing as even or as skewed as asked for.
//!
//! Every number is a pure function of (seed, tensor, index), so a workload can be generated in parallel and is the
//! same on every machine.
//!
//! - **Weights** are odd integers from -255 to 255 times a power of two. Every storage format holds them exactly, so
//!   the error that is reported is the kernels' arithmetic and not the rounding of weights, and the reference needs
//!   no second copy of them. The power of two keeps activations near 1 in every stage.
//! - **Routing** is made by the real router from real logits: each token is noise plus a little of the router rows
//!   of the experts that it is meant for. Those are drawn from a Zipf distribution without replacement, so that the
//!   load of the experts follows the skew, and logits have clear gaps: no near-ties that two devices may break
//!   differently. That needs nearly orthogonal router rows: where `num_experts` comes close to `hidden_size`,
//!   the load follows the skew only loosely.

use crate::bench::memory;
use crate::error::{Error, Result};
use crate::model::config::{LayerExtras, MoeConfig};
use crate::model::routing::{Noise, Routing, Scores};
use crate::model::weights::{ExtraWeights, MoeWeights};
use rayon::prelude::*;

/// Length of each router row, and so the size of the logits of noise. Small, because an f32 logit is off by its size
/// times a few units in the last place, and so is the weight that the softmax makes of it, relatively.
const ROUTER_ROW_LENGTH: f32 = 0.25;
/// Logit that a token gets for the first of the experts meant for it, by that of noise.
const FIRST_LOGIT: f32 = 12.0;
/// The last one's logit as a fraction of the first's: far enough from noise, close enough that every choice counts.
const LAST_LOGIT: f32 = 0.75;

/// Largest bias of a logit, and of what sigmoids and an expert's projections give: felt, but no match for a choice.
const BIAS: f32 = 0.05;
/// Largest bias of softmax scores, which are as small as the last choice's share.
const SOFTMAX_BIAS: f32 = 0.001;

/// Which tensor a random number is for: part of the generator's key.
#[derive(Clone, Copy)]
enum Tensor {
    Router = 1,
    Gate,
    Up,
    Down,
    Noise,
    Experts,
    SharedGateProj,
    SharedUp,
    SharedDown,
    SharedGate,
    RouterBias,
    SelectionBias,
    GateBias,
    UpBias,
    DownBias,
}

/// Biases that a layer has. Its configuration does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// Of the router's logits.
    pub router: bool,
    /// Of what experts are ranked by, and not of their weights.
    pub selection: bool,
    /// Of each projection of the experts.
    pub experts: bool,
}

impl Biases {
    /// None at all.
    pub const NONE: Biases = Biases { router: false, selection: false, experts: false };
}

/// A layer's weights together with a source of inputs for it.
#[derive(Debug)]
pub struct Workload {
    /// The layer's sizes.
    pub config: MoeConfig,
    /// Its weights.
    pub weights: MoeWeights,
    /// Exponent of the Zipf distribution over experts: 0 is uniform, 1 gives expert e a share of 1 / (e + 1).
    pub skew: f64,
    seed: u64,
    /// Experts of each token, best first, `[tokens, top_k]`, from the first on and over again, instead of drawn ones.
    recorded: Option<Vec<u32>>,
}

impl Workload {
    /// Generates the weights. `skew` must be finite and not negative.
    pub fn new(config: MoeConfig, skew: f64, seed: u64) -> Result<Workload> {
        if !(skew.is_finite() && skew >= 0.0) {
            return Err(Error::config("skew", skew, "a number from 0 (uniform) up"));
        }
        check_supported(&config)?;
        Self::without_surroundings(config, skew, seed)
    }

    /// As [`Workload::new`] for layers of any kind. What some of them need beside experts and shared experts is not there.
    pub(crate) fn without_surroundings(config: MoeConfig, skew: f64, seed: u64) -> Result<Workload> {
        let [h, i, e] = [config.hidden_size(), config.intermediate_size(), config.num_experts()].map(u64::from);
        let shared = config.extras().shared;
        let s = shared.map_or(0, |shared| u64::from(shared.num) * u64::from(shared.intermediate_size));
        // u128: the largest valid sizes give 2^52 bytes, but the error must be right for whatever sizes come next.
        let wide = |n: u64| u128::from(n);
        let bytes = 4 * wide(h) * (3 * (wide(i) * wide(e) + wide(s)) + wide(e));
        memory::check("the layer's f32 weights", u64::try_from(bytes).unwrap_or(u64::MAX))?;

        let tensor = |tensor, len: u64, fan_in: u64, gain: f32| {
            // Odd integers up to 255 have a mean square of 255 * 257 / 3, close to 148 squared.
            let scale = power_of_two(gain / 148.0 / (fan_in as f32).sqrt());
            random_weights(seed, tensor, len as usize, scale)
        };
        let gated = |is_gated: bool, len: u64| if is_gated { len } else { 0 };
        let (is_gated, shared_is_gated) =
            (config.activation().is_gated(), shared.is_some_and(|shared| shared.activation.is_gated()));
        let gates = u64::from(config.num_gated_shared());
        let shared_width = shared.map_or(1, |shared| u64::from(shared.intermediate_size));
        let weights = MoeWeights {
            router: router_rows(seed, e as usize, h as usize),
            router_bias: None,
            gate_proj: tensor(Tensor::Gate, gated(is_gated, e * i * h), h, 1.0),
            up_proj: tensor(Tensor::Up, e * i * h, h, 1.0),
            // silu(gate) * up of unit normals has a root mean square near 0.6.
            down_proj: tensor(Tensor::Down, e * h * i, i, 1.6),
            extras: ExtraWeights {
                shared_gate_proj: tensor(Tensor::SharedGateProj, gated(shared_is_gated, s * h), h, 1.0),
                shared_up_proj: tensor(Tensor::SharedUp, s * h, h, 1.0),
                shared_down_proj: tensor(Tensor::SharedDown, h * s, shared_width, 1.6),
                shared_gate: (gates > 0).then(|| tensor(Tensor::SharedGate, gates * h, h, 1.0)),
                ..ExtraWeights::default()
            },
        };
        Ok(Workload { config, weights, skew, seed, recorded: None })
    }

    /// The same layer with these biases: small ones, so that tokens still choose the experts that they are meant for.
    pub fn with_biases(mut self, biases: Biases) -> Workload {
        let config = &self.config;
        let [h, i, e] = [config.expert_size(), config.intermediate_size(), config.num_experts()].map(|n| n as usize);
        let bias = |there: bool, tensor, len, largest: f32| {
            there.then(|| random_weights(self.seed, tensor, len, power_of_two(largest / 255.0)))
        };
        let selection = match config.routing().scores {
            Scores::Softmax => SOFTMAX_BIAS,
            _ => BIAS,
        };
        let extras = &mut self.weights.extras;
        self.weights.router_bias = bias(biases.router, Tensor::RouterBias, e, BIAS);
        extras.selection_bias = bias(biases.selection, Tensor::SelectionBias, e, selection);
        extras.gate_bias = bias(biases.experts && config.activation().is_gated(), Tensor::GateBias, e * i, BIAS);
        extras.up_bias = bias(biases.experts, Tensor::UpBias, e * i, BIAS);
        extras.down_bias = bias(biases.experts, Tensor::DownBias, e * h, BIAS);
        self
    }

    /// The same layer with tokens that choose these experts, `[tokens, top_k]`, best first; after the last the first
    /// again.
    pub fn with_choices(mut self, choices: &[i32]) -> Result<Workload> {
        let (e, k) = (self.config.num_experts(), self.config.top_k() as usize);
        if choices.is_empty() || !choices.len().is_multiple_of(k) {
            return Err(Error::config("choices", choices.len(), format!("a multiple of top_k, {k}, from there up")));
        }
        let mut recorded = Vec::with_capacity(choices.len());
        for token in choices.chunks_exact(k) {
            let ids: Vec<u32> = token.iter().filter_map(|&id| u32::try_from(id).ok().filter(|&id| id < e)).collect();
            if ids.len() < k || (0..k).any(|j| ids[..j].contains(&ids[j])) {
                let expected = format!("different experts from 0 to {}: no router chooses nobody, or one twice", e - 1);
                return Err(Error::config("choices", format!("{token:?}"), expected));
            }
            recorded.extend(ids);
        }
        self.recorded = Some(recorded);
        Ok(self)
    }

    /// Whether tokens choose as somebody else's did.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }

    /// The experts that token `t` is meant for, best first.
    pub fn meant_for(&self, t: usize) -> Vec<u32> {
        let shares = zipf(self.config.num_experts() as usize, self.skew);
        self.intended_experts(t, &shares).into_iter().map(|e| e as u32).collect()
    }

    /// Activations `[num_tokens, hidden_size]`. A token is the same in every batch that it is part of.
    pub fn input(&self, num_tokens: u32) -> Result<Vec<f32>> {
        self.input_from(0, num_tokens)
    }

    /// As [`Workload::input`], from token `first_token` on.
    pub fn input_from(&self, first_token: usize, num_tokens: u32) -> Result<Vec<f32>> {
        let hidden_size = self.config.hidden_size() as usize;
        let len = u64::from(num_tokens) * hidden_size as u64;
        memory::check("the input and output", len.saturating_mul(8))?;
        let shares = zipf(self.config.num_experts() as usize, self.skew);
        let mut x = vec![0.0f32; len as usize];
        let tokens = x.par_chunks_exact_mut(hidden_size).enumerate();
        tokens.for_each(|(t, token)| self.fill_token(first_token + t, &shares, token));
        Ok(x)
    }

    fn fill_token(&self, t: usize, shares: &[f64], token: &mut [f32]) {
        let hidden_size = token.len();
        for (h, value) in token.iter_mut().enumerate() {
            *value = unit_noise(random(self.seed, Tensor::Noise, (t * hidden_size + h) as u64));
        }
        let top_k = self.config.top_k() as usize;
        for (j, e) in self.intended_experts(t, shares).into_iter().enumerate() {
            let logit = FIRST_LOGIT * (1.0 - (1.0 - LAST_LOGIT) * j as f32 / top_k as f32);
            let row = &self.weights.router[e * hidden_size..][..hidden_size];
            token.iter_mut().zip(row).for_each(|(value, weight)| *value += logit / ROUTER_ROW_LENGTH * weight);
        }
    }

    /// `top_k` different experts, drawn in proportion to `shares`: the largest of `share^(1/u)`-like keys
    /// (Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir"). Where a token keeps only some groups of
    /// experts, those of the first experts drawn.
    fn intended_experts(&self, t: usize, shares: &[f64]) -> Vec<usize> {
        let top_k = self.config.top_k() as usize;
        if let Some(recorded) = &self.recorded {
            let tokens = recorded.len() / top_k;
            return recorded[t % tokens * top_k..][..top_k].iter().map(|&e| e as usize).collect();
        }
        let key = |e: usize| {
            let bits = random(self.seed, Tensor::Experts, (t * shares.len() + e) as u64);
            let uniform = ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
            uniform.ln() / shares[e]
        };
        let mut keyed: Vec<(f64, usize)> = (0..shares.len()).map(|e| (key(e), e)).collect();
        keyed.sort_by(|a, b| b.0.total_cmp(&a.0));
        let (size, keep) = self
            .config
            .routing()
            .groups
            .map_or((shares.len(), 1), |groups| (shares.len() / groups.num_groups as usize, groups.keep as usize));
        let mut kept: Vec<usize> = Vec::new();
        let mut intended = Vec::with_capacity(top_k);
        for &(_, e) in &keyed {
            let is_kept = kept.contains(&(e / size));
            if !is_kept && kept.len() == keep {
                continue;
            }
            if !is_kept {
                kept.push(e / size);
            }
            intended.push(e);
            if intended.len() == top_k {
                break;
            }
        }
        intended
    }
}

/// Layers whose every tensor is made here.
fn check_supported(config: &MoeConfig) -> Result<()> {
    let extras = config.extras();
    let Routing { scores, noise, selection, .. } = config.routing();
    let plain = LayerExtras { shared: extras.shared, routed_scale: extras.routed_scale, ..LayerExtras::default() };
    let needs_no_more = noise != Noise::NoisyTopK && scores != Scores::Hierarchical;
    if *extras == plain && needs_no_more && !config.routing().choices_are_given() {
        return Ok(());
    }
    Err(Error::Unsupported {
        what: format!("a workload for {selection:?} with {extras:?}"),
        by: "by the generator".to_owned(),
        hint: "it makes layers whose tokens choose by logits, with shared experts and biases at most".to_owned(),
    })
}

/// Share of each expert: `(e + 1)^-skew`, normalised, but never so small that a logarithm divided by it overflows.
pub fn zipf(num_experts: usize, skew: f64) -> Vec<f64> {
    let raw: Vec<f64> = (0..num_experts).map(|e| ((e + 1) as f64).powf(-skew).max(1e-200)).collect();
    let sum: f64 = raw.iter().sum();
    raw.iter().map(|share| share / sum).collect()
}

/// 64 random bits as a function of their address: the finaliser of SplitMix64 (Steele, Lea and Flood 2014) over a
/// counter, so that any element can be computed without the ones before it.
fn random(seed: u64, tensor: Tensor, index: u64) -> u64 {
    let key = mix(seed.wrapping_add(0x9E37_79B9_7F4A_7C15u64.wrapping_mul(tensor as u64)));
    mix(key.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15)))
}

/// The finaliser of SplitMix64.
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Nearly normal, mean 0 and variance 1: the sum of four uniform numbers.
fn unit_noise(bits: u64) -> f32 {
    let sum: i32 = bits.to_le_bytes().chunks_exact(2).map(|b| i32::from(i16::from_le_bytes([b[0], b[1]]))).sum();
    // Each term has a variance of 2^32 / 12; there are four.
    (sum as f32 + 2.0) * (3.0f32.sqrt() / 65536.0)
}

/// Odd integers from -255 to 255 times `scale`, eight to each 64 random bits.
fn random_weights(seed: u64, tensor: Tensor, len: usize, scale: f32) -> Vec<f32> {
    const BLOCK: usize = 1 << 14;
    let mut values = vec![0.0f32; len];
    values.par_chunks_mut(BLOCK).enumerate().for_each(|(block, values)| {
        for (i, eight) in values.chunks_mut(8).enumerate() {
            let bytes = random(seed, tensor, (block * (BLOCK / 8) + i) as u64).to_le_bytes();
            for (value, byte) in eight.iter_mut().zip(bytes) {
                *value = f32::from(2 * i16::from(byte.cast_signed()) + 1) * scale;
            }
        }
    });
    values
}

/// The nearest power of two, in proportion: multiplying by it never rounds.
fn power_of_two(value: f32) -> f32 {
    value.log2().round().exp2()
}

/// `rows` vectors of length [`ROUTER_ROW_LENGTH`], `[rows, width]`.
fn router_rows(seed: u64, rows: usize, width: usize) -> Vec<f32> {
    let mut values = random_weights(seed, Tensor::Router, rows * width, 1.0);
    values.par_chunks_exact_mut(width).for_each(|row| {
        let length = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v *= ROUTER_ROW_LENGTH / length);
    });
    values
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::presets::{self, Preset};
    use crate::reference;
    use crate::{Activation, Batch, Routing, SharedExperts, WeightFormat};

    fn config(h: u32, i: u32, e: u32, k: u32) -> MoeConfig {
        let routing = Routing::softmax(true);
        MoeConfig::new(h, i, e, k, routing, Activation::SWIGLU).expect("valid sizes")
    }

    /// Share of the assignments that each expert gets from the reference router.
    fn observed_load(workload: &Workload, num_tokens: u32) -> Vec<f64> {
        let x = workload.input(num_tokens).expect("fits in memory");
        let routed = reference::router::router(&workload.config, &workload.weights, &Batch::from(&x));
        let mut load = vec![0.0; workload.config.num_experts() as usize];
        routed.topk_experts.iter().for_each(|&e| load[e as usize] += 1.0 / routed.topk_experts.len() as f64);
        load
    }

    #[test]
    fn every_format_holds_the_weights_exactly() {
        let workload = Workload::new(config(300, 70, 3, 2), 0.0, 1).expect("small");
        let rounded = workload.weights.rounded(&workload.config, WeightFormat::F16);
        assert_eq!(rounded.expect("small values"), workload.weights);
        workload.weights.validate(&workload.config, WeightFormat::F16).expect("right lengths, finite");
        let gate = &workload.weights.gate_proj;
        assert!(gate.iter().all(|w| half::bf16::from_f32(*w).to_f32() == *w && *w != 0.0));
    }

    #[test]
    fn activations_stay_near_one_in_every_stage() {
        for (h, i) in [(64, 32), (512, 96)] {
            let workload = Workload::new(config(h, i, 8, 2), 0.0, 2).expect("small");
            let forward =
                reference::moe_forward(&workload.config, &workload.weights, &workload.input(64).expect("small"));
            for stage in [&forward.intermediate, &forward.expert_out, &forward.y] {
                let rms = (stage.iter().map(|v| v * v).sum::<f64>() / stage.len() as f64).sqrt();
                assert!((0.1..10.0).contains(&rms), "hidden_size {h}: root mean square {rms}");
            }
        }
    }

    #[test]
    fn uniform_routing_loads_experts_evenly() {
        let load = observed_load(&Workload::new(config(256, 1, 16, 2), 0.0, 3).expect("small"), 4096);
        assert!(load.iter().all(|share| (share * 16.0 - 1.0).abs() < 0.15), "{load:?}");
    }

    #[test]
    fn skewed_routing_follows_the_zipf_distribution() {
        let load = observed_load(&Workload::new(config(256, 1, 16, 1), 1.0, 4).expect("small"), 8192);
        for (e, (observed, wanted)) in load.iter().zip(zipf(16, 1.0)).enumerate() {
            // Five standard deviations of a binomial share.
            let tolerance = 5.0 * (wanted * (1.0 - wanted) / 8192.0).sqrt();
            assert!((observed - wanted).abs() < tolerance, "expert {e}: {observed}, wanted {wanted}");
        }
    }

    #[test]
    fn extreme_skew_still_gives_every_token_its_experts() {
        let load = observed_load(&Workload::new(config(256, 1, 16, 2), 400.0, 4).expect("small"), 100);
        assert!(load[..2].iter().all(|share| (share - 0.5).abs() < 1e-9), "everyone wants the first two: {load:?}");
    }

    #[test]
    fn logits_have_clear_gaps() {
        let workload = Workload::new(config(1024, 1, 32, 4), 0.0, 5).expect("small");
        let x = workload.input(256).expect("small");
        let logits = reference::router::router_logits(&workload.config, &workload.weights, &Batch::from(&x)).experts;
        for row in logits.chunks_exact(32) {
            let mut sorted = row.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            assert!(sorted[3] - sorted[4] > 0.01, "{sorted:?}");
        }
    }

    #[test]
    fn a_token_is_the_same_in_every_batch_and_another_with_another_seed() {
        let workload = Workload::new(config(32, 8, 4, 2), 0.5, 6).expect("small");
        let (one, many) = (workload.input(1).expect("small"), workload.input(9).expect("small"));
        assert_eq!(one, many[..32]);
        let other = Workload::new(config(32, 8, 4, 2), 0.5, 7).expect("small");
        assert_ne!(workload.weights, other.weights);
        assert_ne!(one, other.input(1).expect("small"));
    }

    /// Tokens of which every one chooses the experts that it is meant for.
    fn assert_as_meant(workload: &Workload, num_tokens: usize) {
        let x = workload.input(num_tokens as u32).expect("fits in memory");
        let routed = reference::router::router(&workload.config, &workload.weights, &Batch::from(&x));
        let top_k = workload.config.top_k() as usize;
        for (t, chosen) in routed.topk_experts.chunks_exact(top_k).enumerate() {
            let (mut chosen, mut meant) = (chosen.to_vec(), workload.meant_for(t));
            chosen.sort_unstable();
            meant.sort_unstable();
            assert_eq!(chosen, meant, "token {t}");
        }
    }

    /// A preset's router, with experts that are as small as they get.
    fn router_of(preset: &Preset) -> Workload {
        let shared = preset.shared.map(|shared| SharedExperts { intermediate_size: 1, ..shared });
        let config = Preset { intermediate_size: 1, shared, ..*preset }.config().expect("still a layer");
        Workload::new(config, 0.0, 7).expect("small").with_biases(preset.biases)
    }

    #[test]
    fn the_routers_of_all_presets_choose_the_experts_that_are_meant() {
        for preset in presets::ALL {
            let workload = router_of(preset);
            workload.weights.validate(&workload.config, WeightFormat::F32).expect(preset.name);
            assert_as_meant(&workload, 24);
        }
    }

    #[test]
    fn recorded_choices_are_made_again() {
        for name in ["olmoe-1b-7b", "gpt-oss-20b"] {
            let workload = router_of(&Preset::find(name).expect("a preset"));
            let (e, k) = (workload.config.num_experts(), workload.config.top_k());
            // A stride that has no divisor in common with the experts.
            let choices: Vec<u32> = (0..5).flat_map(|t| (0..k).map(move |j| (t * 3 + j * 7) % e)).collect();
            let ids: Vec<i32> = choices.iter().map(|&id| id as i32).collect();
            let workload = workload.with_choices(&ids).expect("different experts");
            assert_as_meant(&workload, 12);
            assert_eq!(
                [workload.meant_for(0), workload.meant_for(6)].concat(),
                [&choices[..k as usize], &choices[k as usize..][..k as usize]].concat()
            );
        }
        let bad = |choices: &[i32]| Workload::new(config(8, 8, 4, 2), 0.0, 1).expect("small").with_choices(choices);
        for choices in [&[][..], &[1], &[1, 1], &[0, 4], &[2, -1]] {
            assert!(matches!(bad(choices), Err(Error::InvalidConfig { field: "choices", .. })), "{choices:?}");
        }
        assert!(bad(&[0, 3]).is_ok_and(|workload| workload.is_recorded()));
    }

    #[test]
    fn layers_with_tensors_that_nobody_makes_are_refused() {
        let latent = LayerExtras { latent_size: Some(4), ..LayerExtras::default() };
        let config = config(8, 8, 2, 1).with_extras(latent).expect("a layer");
        assert!(matches!(Workload::new(config, 0.0, 0), Err(Error::Unsupported { .. })));
    }

    #[test]
    fn bad_requests_are_typed_errors() {
        for skew in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(matches!(
                Workload::new(config(8, 8, 2, 1), skew, 0),
                Err(Error::InvalidConfig { field: "skew", .. })
            ));
        }
        let huge = config(1 << 17, 1 << 17, 1024, 1);
        assert!(matches!(Workload::new(huge, 0.0, 0), Err(Error::LimitExceeded { .. })));
    }
}
