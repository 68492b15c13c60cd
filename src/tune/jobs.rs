//! What to measure: layers of real models, cut to a size that loads in a second, in a way that keeps their shape class.

use crate::DeviceInfo;
use crate::bench::{Preset, memory};
use crate::error::Result;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::plan::ShapeClass;

/// Batch sizes where none are given: decoding, then batches from which each expert gets more and more rows.
pub const DEFAULT_TOKENS: &[u32] = &[1, 4, 16, 64, 128, 512];
/// Weight formats where none are given: floats, and integers, which have to be decoded.
pub const DEFAULT_FORMATS: &[WeightFormat] = &[WeightFormat::F16, WeightFormat::INT4];

/// Expert weights of a layer that software drivers, which compute as fast as the host, are timed with; and others.
const SOFTWARE_WEIGHTS: u64 = 80_000_000;
const DEVICE_WEIGHTS: u64 = 400_000_000;

/// A layer with batches to measure it at.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// What to call it.
    pub layer: String,
    /// The layer.
    pub config: MoeConfig,
    /// Storage of its weights.
    pub weights: WeightFormat,
    /// Tokens of each batch.
    pub tokens: Vec<u32>,
}

impl Job {
    /// Its batches by the class of their work, in ascending order of their tokens. Those of one class are measured
    /// together: there is one choice for them.
    pub fn classes(&self) -> Vec<(ShapeClass, Vec<u32>)> {
        let mut tokens = self.tokens.clone();
        tokens.retain(|&tokens| tokens > 0);
        tokens.sort_unstable();
        tokens.dedup();
        let mut classes: Vec<(ShapeClass, Vec<u32>)> = Vec::new();
        for tokens in tokens {
            let class = ShapeClass::of(&self.config, tokens);
            match classes.iter_mut().find(|(of, _)| *of == class) {
                Some((_, all)) => all.push(tokens),
                None => classes.push((class, vec![tokens])),
            }
        }
        classes
    }
}

/// The presets that are measured where none is given: narrow and wide experts, few and many.
pub fn default_presets(device: &DeviceInfo) -> Vec<Preset> {
    let names: &[&str] = match device.kind.as_str() {
        "software" => &["small", "qwen3-30b-a3b"],
        _ => &["small", "qwen3-30b-a3b", "gpt-oss-20b"],
    };
    names.iter().filter_map(|name| Preset::find(name)).collect()
}

/// Jobs for each of `presets` in each of `formats`.
pub fn jobs(device: &DeviceInfo, presets: &[Preset], formats: &[WeightFormat], tokens: &[u32]) -> Result<Vec<Job>> {
    let most = if device.kind == "software" { SOFTWARE_WEIGHTS } else { DEVICE_WEIGHTS };
    // The f32 weights, and what is packed from them, here and on a device whose memory is the host's.
    let most = memory::available().map_or(most, |available| most.min(available / 16));
    let mut jobs = Vec::new();
    for preset in presets {
        let scaled = scaled(*preset, most);
        let layer = match scaled == *preset {
            true => preset.name.to_owned(),
            false => format!("{} ({} of {} experts)", preset.name, scaled.num_experts, preset.num_experts),
        };
        let config = scaled.config()?;
        for &weights in formats {
            jobs.push(Job { layer: layer.clone(), config: config.clone(), weights, tokens: tokens.to_vec() });
        }
    }
    Ok(jobs)
}

/// Fewer experts, and as many fewer for each token: rows per expert, and so the class of every batch, stay. Cut no
/// further than that allows.
fn scaled(mut preset: Preset, most_weights: u64) -> Preset {
    while preset.num_weights() > most_weights && preset.num_experts.is_multiple_of(2) && preset.top_k.is_multiple_of(2)
    {
        preset.num_experts /= 2;
        preset.top_k /= 2;
    }
    preset
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::presets;

    #[test]
    fn scaling_keeps_the_class_of_every_batch() {
        for &preset in presets::ALL {
            let small = scaled(preset, 1);
            assert!(small.top_k % 2 == 1 || small.num_experts % 2 == 1, "{small:?} could be smaller");
            let [whole, small] = [preset, small].map(|preset| preset.config().expect("presets are layers"));
            for tokens in (1..=20).chain([64, 100, 128, 500, 512, 4096]) {
                assert_eq!(ShapeClass::of(&whole, tokens), ShapeClass::of(&small, tokens), "{preset:?} {tokens}");
            }
        }
    }

    #[test]
    fn batches_of_a_class_are_one() {
        let config = Preset::find("qwen3-30b-a3b").and_then(|preset| preset.config().ok()).expect("a preset");
        let job = Job { layer: String::new(), config, weights: WeightFormat::F16, tokens: vec![64, 16, 4, 0, 1, 4] };
        let classes = job.classes();
        assert_eq!(classes.iter().map(|(_, tokens)| tokens.as_slice()).collect::<Vec<_>>(), [&[1, 4, 16][..], &[64]]);
        assert!(classes[0].0.few_tokens && !classes[1].0.few_tokens);
    }

    #[test]
    fn defaults_are_layers_for_every_kind_of_device() {
        for kind in ["software", "discrete", "something new"] {
            let device = DeviceInfo { kind: kind.to_owned(), ..DeviceInfo::default() };
            let jobs = jobs(&device, &default_presets(&device), DEFAULT_FORMATS, DEFAULT_TOKENS).expect("presets");
            assert!(jobs.len() >= 4 && jobs.iter().all(|job| job.classes().len() >= 4), "{jobs:?}");
        }
    }
}
