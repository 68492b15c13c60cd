//! Real layers with their sizes, and which of them suit a device.
//!
//! Sizes are those of the routed experts of one layer. Shared experts, router biases and group limits of the real
//! models are left out: a preset is a workload, not a model.

use crate::DeviceInfo;
use crate::error::Result;
use crate::model::activation::Activation;
use crate::model::config::MoeConfig;
use crate::model::routing::Routing;

/// One layer's sizes under a model's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preset {
    /// Name on the command line.
    pub name: &'static str,
    /// Width of a token.
    pub hidden_size: u32,
    /// Inner width of one expert.
    pub intermediate_size: u32,
    /// Experts in the layer.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// Whether the model divides a token's weights by their sum.
    pub renormalize: bool,
}

/// Shorthand that keeps the table below one line a model.
const fn preset(name: &'static str, h: u32, i: u32, e: u32, k: u32, renormalize: bool) -> Preset {
    Preset { name, hidden_size: h, intermediate_size: i, num_experts: e, top_k: k, renormalize }
}

/// The workload of software adapters and the CPU engine: small enough for two cores, large enough to need every stage.
pub const SMALL: Preset = preset("small", 1024, 512, 32, 4, true);

/// Every preset, by name: hidden_size, intermediate_size, num_experts, top_k, renormalize.
pub const ALL: &[Preset] = &[
    SMALL,
    preset("dbrx", 6144, 10752, 16, 4, true),
    preset("deepseek-v2-lite", 2048, 1408, 64, 6, false),
    preset("deepseek-v3", 7168, 2048, 256, 8, true),
    preset("ernie-4.5-21b-a3b", 2560, 1536, 64, 6, true),
    preset("glm-4.5-air", 4096, 1408, 128, 8, true),
    preset("gpt-oss-20b", 2880, 2880, 32, 4, true),
    preset("gpt-oss-120b", 2880, 2880, 128, 4, true),
    preset("granite-3-1b-a400m", 1024, 512, 32, 8, true),
    preset("jamba-v0.1", 4096, 14336, 16, 2, false),
    preset("kimi-k2", 7168, 2048, 384, 8, true),
    preset("lfm2-8b-a1b", 2048, 1792, 32, 4, true),
    preset("llama-4-scout", 5120, 8192, 16, 1, false),
    preset("minimax-m2", 3072, 1536, 256, 8, true),
    preset("mixtral-8x7b", 4096, 14336, 8, 2, true),
    preset("olmoe-1b-7b", 2048, 1024, 64, 8, false),
    preset("phi-3.5-moe", 4096, 6400, 16, 2, false),
    preset("qwen1.5-moe-a2.7b", 2048, 1408, 60, 4, false),
    preset("qwen3-30b-a3b", 2048, 768, 128, 8, true),
    preset("qwen3-235b-a22b", 4096, 1536, 128, 8, true),
    preset("qwen3-next-80b-a3b", 2048, 512, 512, 10, true),
];

impl Preset {
    /// The preset of that name.
    pub fn find(name: &str) -> Option<Preset> {
        ALL.iter().copied().find(|preset| preset.name == name)
    }

    /// The layer: SwiGLU experts behind a softmax router.
    pub fn config(&self) -> Result<MoeConfig> {
        let routing = Routing::softmax(self.renormalize);
        MoeConfig::new(
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
            self.top_k,
            routing,
            Activation::SWIGLU,
        )
    }

    /// Expert weights in the layer.
    pub fn num_weights(&self) -> u64 {
        [3, self.hidden_size, self.intermediate_size, self.num_experts].into_iter().map(u64::from).product()
    }

    /// The same with experts halved until `bytes_per_weight` for each weight fit `available` bytes, never below
    /// `top_k`. `None` if even that does not fit.
    pub fn scaled_to(mut self, available: u64, bytes_per_weight: u64) -> Option<Preset> {
        while self.num_weights() * bytes_per_weight > available {
            if self.num_experts / 2 < self.top_k {
                return None;
            }
            self.num_experts /= 2;
        }
        Some(self)
    }
}

/// A preset with the batch sizes to time it at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// The layer.
    pub preset: Preset,
    /// Tokens of each row.
    pub tokens: Vec<u32>,
}

/// What `wgmoe bench` times when nothing is asked for: sized so that the whole run stays under a minute.
pub fn defaults_for(device: &DeviceInfo) -> Vec<Choice> {
    let choice = |name, tokens: &[u32]| Preset::find(name).map(|preset| Choice { preset, tokens: tokens.to_vec() });
    let choices = match device.kind.as_str() {
        "discrete" => {
            vec![choice("qwen3-30b-a3b", &[1, 16, 128, 512, 2048, 8192]), choice("mixtral-8x7b", &[1, 16, 512, 4096])]
        }
        "integrated" | "virtual" => vec![choice("olmoe-1b-7b", &[1, 16, 128, 512, 2048])],
        _ => vec![choice(SMALL.name, DEFAULT_TOKENS)],
    };
    choices.into_iter().flatten().collect()
}

/// Batch sizes where none are given: one token, a small batch, and two where matmuls dominate.
pub const DEFAULT_TOKENS: &[u32] = &[1, 16, 128, 512];

#[cfg(test)]
mod tests {
    use super::*;

    fn device(kind: &str) -> DeviceInfo {
        let text = String::new;
        DeviceInfo { name: text(), backend: text(), driver: text(), kind: kind.to_owned() }
    }

    #[test]
    fn every_preset_is_a_layer_and_is_found_by_name() {
        for preset in ALL {
            assert!(preset.config().is_ok(), "{preset:?}");
            assert_eq!(Preset::find(preset.name), Some(*preset), "names are unique");
        }
        assert_eq!(Preset::find("no-such-model"), None);
    }

    #[test]
    fn every_kind_of_device_has_defaults() {
        for kind in ["discrete", "integrated", "virtual", "software", "cpu-engine", "other", "something new"] {
            let choices = defaults_for(&device(kind));
            assert!(!choices.is_empty() && choices.iter().all(|c| !c.tokens.is_empty()), "{kind}");
        }
        assert_eq!(defaults_for(&device("discrete")).len(), 2, "both names exist");
        assert_eq!(defaults_for(&device("integrated")).len(), 1, "the name exists");
    }

    #[test]
    fn scaling_keeps_the_layer_valid() {
        let mixtral = Preset::find("mixtral-8x7b").expect("a preset");
        assert_eq!(mixtral.scaled_to(u64::MAX, 1), Some(mixtral));
        assert_eq!(mixtral.scaled_to(mixtral.num_weights() * 4 - 1, 4).map(|p| p.num_experts), Some(4));
        assert_eq!(mixtral.scaled_to(1, 4), None);
    }
}
