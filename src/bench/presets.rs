//! Real layers with their sizes, routers and published weight formats, and which of them suit a device.
//!
//! A preset is a workload, not a model: its weights are made up, and a capacity counts over the whole batch. Where a
//! published layer can be read from a file, `wgmoe run` and `wgmoe check` take it as it is.

use crate::DeviceInfo;
use crate::bench::workload::Biases;
use crate::error::Result;
use crate::model::activation::{Activation, Form, Function};
use crate::model::config::{LayerExtras, MoeConfig, SharedExperts, SharedGate};
use crate::model::formats::WeightFormat;
use crate::model::routing::{
    Capacity, CapacityLimit, GroupScore, Groups, Masked, Priority, RankBy, Renormalize, Routing, Scores, Selection,
};

/// One layer's sizes and semantics under a model's name.
#[derive(Clone, Copy, Debug, PartialEq)]
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
    /// The router.
    pub routing: Routing,
    /// What an expert does between its projections.
    pub activation: Activation,
    /// Experts that every token uses.
    pub shared: Option<SharedExperts>,
    /// Biases of router and experts.
    pub biases: Biases,
    /// How the model's experts were published.
    pub weights: WeightFormat,
}

/// hidden_size, intermediate_size, num_experts, top_k of bf16 SwiGLU experts.
const fn preset(name: &'static str, [h, i, e, k]: [u32; 4], routing: Routing) -> Preset {
    Preset {
        name,
        hidden_size: h,
        intermediate_size: i,
        num_experts: e,
        top_k: k,
        routing,
        activation: Activation::SWIGLU,
        shared: None,
        biases: Biases::NONE,
        weights: WeightFormat::Bf16,
    }
}

impl Preset {
    /// Published in another format than bf16.
    const fn stored(mut self, weights: WeightFormat) -> Preset {
        self.weights = weights;
        self
    }

    /// With one expert of this width that every token uses: several without gates, or with a common one, are the same.
    const fn sharing(mut self, intermediate_size: u32, gate: SharedGate) -> Preset {
        self.shared =
            Some(SharedExperts { num: 1, intermediate_size, activation: self.activation, gate, average: false });
        self
    }

    /// With a bias that selects experts, and does not weigh them.
    const fn selecting_by_bias(mut self) -> Preset {
        self.biases.selection = true;
        self
    }

    const fn with_activation(mut self, activation: Activation) -> Preset {
        self.activation = activation;
        self
    }
}

/// Weights that sum to one, and weights as they are.
const SOFTMAX: Routing = Routing::softmax(true);
const SOFTMAX_AS_IS: Routing = Routing::softmax(false);
/// Softmax over the chosen: gpt-oss, Granite.
const SOFTMAX_OF_CHOSEN: Routing = Routing::new(Scores::SoftmaxSelected, false);
/// The best expert by its logit; its sigmoid multiplies what the expert reads.
const LLAMA_4: Routing = Routing { rank_by: RankBy::Logits, weigh_input: true, ..Routing::new(Scores::Sigmoid, false) };
/// The best four of eight groups by the sum of their two best experts.
const DEEPSEEK_GROUPS: Groups =
    Groups { num_groups: 8, keep: 4, score: GroupScore::SumTop2, masked: Masked::NegInfinity };
/// An expert takes 64 tokens, the first that come; the others pass it by.
const SWITCH: Routing = Routing {
    capacity: Some(Capacity {
        limit: CapacityLimit::Number(64),
        per_sequence: true,
        priority: Priority::Position,
        renormalize_after: false,
        pass_through: false,
    }),
    ..Routing::softmax(false)
};
const PHI: Routing =
    Routing { rank_by: RankBy::Logits, selection: Selection::Sparsemixer { jitter: 0.01 }, ..Routing::softmax(false) };
const ERNIE: Routing =
    Routing { renormalize: Some(Renormalize { p: 1.0, epsilon: 0.0, floor: 1e-12 }), ..Routing::softmax(true) };
const GPT_OSS: Activation = Activation { form: Form::GptOss { limit: 7.0, alpha: 1.702 }, function: Function::Silu };

/// DeepSeek-V3's scores: each expert's sigmoid, normalised over the chosen, times `scale`.
const fn sigmoid(scale: f32) -> Routing {
    let sum = Renormalize { p: 1.0, epsilon: 1e-20, floor: 0.0 };
    Routing { renormalize: Some(sum), scale, ..Routing::new(Scores::Sigmoid, true) }
}

const fn gpt_oss(name: &'static str, num_experts: u32) -> Preset {
    let mut preset = preset(name, [2880, 2880, num_experts, 4], SOFTMAX_OF_CHOSEN).with_activation(GPT_OSS);
    preset.biases = Biases { router: true, selection: false, experts: true };
    preset.stored(WeightFormat::Mxfp4)
}

/// The workload of software adapters and the CPU engine: small enough for two cores, large enough to need every stage.
pub const SMALL: Preset = preset("small", [1024, 512, 32, 4], SOFTMAX).stored(WeightFormat::F16);

/// Every preset, by name: hidden_size, intermediate_size, num_experts, top_k.
pub const ALL: &[Preset] = &[
    SMALL,
    preset("dbrx", [6144, 10752, 16, 4], SOFTMAX),
    preset("deepseek-v2-lite", [2048, 1408, 64, 6], SOFTMAX_AS_IS).sharing(2 * 1408, SharedGate::None),
    preset("deepseek-v3", [7168, 2048, 256, 8], Routing { groups: Some(DEEPSEEK_GROUPS), ..sigmoid(2.5) })
        .selecting_by_bias()
        .sharing(2048, SharedGate::None)
        .stored(WeightFormat::Fp8),
    preset("ernie-4.5-21b-a3b", [2560, 1536, 64, 6], ERNIE).selecting_by_bias().sharing(2 * 1536, SharedGate::None),
    preset("glm-4.5-air", [4096, 1408, 128, 8], sigmoid(1.0)).selecting_by_bias().sharing(1408, SharedGate::None),
    preset("glm-4.6", [5120, 1536, 160, 8], sigmoid(2.5)).selecting_by_bias().sharing(1536, SharedGate::None),
    gpt_oss("gpt-oss-20b", 32),
    gpt_oss("gpt-oss-120b", 128),
    preset("granite-3-1b-a400m", [1024, 512, 32, 8], SOFTMAX_OF_CHOSEN),
    preset("granite-3-3b-a800m", [1536, 512, 40, 8], SOFTMAX_OF_CHOSEN),
    preset("granite-4-h-small", [4096, 768, 72, 10], SOFTMAX_OF_CHOSEN).sharing(1536, SharedGate::None),
    preset("hunyuan-a13b", [4096, 3072, 64, 8], SOFTMAX).sharing(3072, SharedGate::None),
    preset("jamba-v0.1", [4096, 14336, 16, 2], SOFTMAX_AS_IS),
    preset("kimi-k2", [7168, 2048, 384, 8], sigmoid(2.827))
        .selecting_by_bias()
        .sharing(2048, SharedGate::None)
        .stored(WeightFormat::Fp8),
    preset("lfm2-8b-a1b", [2048, 1792, 32, 4], sigmoid(1.0)).selecting_by_bias(),
    preset("llama-4-maverick", [5120, 8192, 128, 1], LLAMA_4).sharing(8192, SharedGate::None),
    preset("llama-4-scout", [5120, 8192, 16, 1], LLAMA_4).sharing(8192, SharedGate::None),
    preset("minimax-m2", [3072, 1536, 256, 8], sigmoid(1.0)).selecting_by_bias().stored(WeightFormat::Fp8),
    preset("mixtral-8x7b", [4096, 14336, 8, 2], SOFTMAX),
    preset("nemotron-3-nano-30b-a3b", [2688, 1856, 128, 6], sigmoid(2.5))
        .with_activation(Activation::plain(Function::Relu2))
        .selecting_by_bias()
        .sharing(3712, SharedGate::None),
    preset("olmoe-1b-7b", [2048, 1024, 64, 8], SOFTMAX_AS_IS),
    preset("phi-3.5-moe", [4096, 6400, 16, 2], PHI),
    preset("qwen1.5-moe-a2.7b", [2048, 1408, 60, 4], SOFTMAX_AS_IS).sharing(5632, SharedGate::Sigmoid),
    preset("qwen3-30b-a3b", [2048, 768, 128, 8], SOFTMAX),
    preset("qwen3-235b-a22b", [4096, 1536, 128, 8], SOFTMAX),
    preset("qwen3-next-80b-a3b", [2048, 512, 512, 10], SOFTMAX).sharing(512, SharedGate::Sigmoid),
    preset("qwen3.5-35b-a3b", [2048, 512, 256, 8], SOFTMAX).sharing(512, SharedGate::Sigmoid),
    preset("switch-base-8", [768, 3072, 8, 1], SWITCH)
        .with_activation(Activation::plain(Function::Relu))
        .stored(WeightFormat::F32),
];

impl Preset {
    /// The preset of that name.
    pub fn find(name: &str) -> Option<Preset> {
        ALL.iter().copied().find(|preset| preset.name == name)
    }

    /// The layer.
    pub fn config(&self) -> Result<MoeConfig> {
        let config = MoeConfig::new(
            self.hidden_size,
            self.intermediate_size,
            self.num_experts,
            self.top_k,
            self.routing,
            self.activation,
        )?;
        config.with_extras(LayerExtras { shared: self.shared, ..LayerExtras::default() })
    }

    /// Expert weights in the layer, shared ones included.
    pub fn num_weights(&self) -> u64 {
        let matrices = if self.activation.is_gated() { 3 } else { 2 };
        let shared = self.shared.map_or(0, |shared| u64::from(shared.num) * u64::from(shared.intermediate_size));
        let width = u64::from(self.intermediate_size) * u64::from(self.num_experts) + shared;
        matrices * u64::from(self.hidden_size) * width
    }

    /// The same with experts halved until `bytes_per_weight` for each weight fit `available` bytes, as long as it stays a
    /// layer: never below `top_k`, nor below what the router's groups need. `None` if even that does not fit.
    pub fn scaled_to(mut self, available: u64, bytes_per_weight: u64) -> Option<Preset> {
        while self.num_weights() * bytes_per_weight > available {
            self.num_experts /= 2;
            self.config().ok()?;
        }
        Some(self)
    }
}

/// A preset with the batch sizes to time it at.
#[derive(Clone, Debug, PartialEq)]
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
    use crate::LayerFormats;

    fn device(kind: &str) -> DeviceInfo {
        let text = String::new;
        DeviceInfo { name: text(), backend: text(), driver: text(), kind: kind.to_owned() }
    }

    #[test]
    fn every_preset_is_a_layer_and_is_found_by_name() {
        for preset in ALL {
            let config = preset.config().expect(preset.name);
            LayerFormats::from(preset.weights).check(&config).expect(preset.name);
            assert_eq!(Preset::find(preset.name), Some(*preset), "names are unique");
        }
        assert_eq!(Preset::find("no-such-model"), None);
    }

    #[test]
    fn weights_are_counted_with_what_is_shared_and_what_has_no_gate() {
        let count = |name| Preset::find(name).expect("a preset").num_weights();
        assert_eq!(count("mixtral-8x7b"), 3 * 4096 * 14336 * 8);
        assert_eq!(count("deepseek-v2-lite"), 3 * 2048 * 1408 * (64 + 2));
        assert_eq!(count("switch-base-8"), 2 * 768 * 3072 * 8);
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
        // Eight groups of at least two experts.
        let deepseek = Preset::find("deepseek-v3").expect("a preset");
        let fewest = Preset { num_experts: 16, ..deepseek };
        assert_eq!(deepseek.scaled_to(fewest.num_weights(), 1), Some(fewest));
        assert_eq!(deepseek.scaled_to(fewest.num_weights() - 1, 1), None);
    }
}
