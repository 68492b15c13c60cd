//! The sizes of a layer and what surrounds its experts, checked once.

use crate::error::{Error, Result};
use crate::model::activation::{Activation, Form};
use crate::model::routing::{Routing, Scores, Selection};
use serde::{Deserialize, Serialize};

/// Most experts in a layer. The router keeps one counter for each in workgroup memory.
pub const MAX_EXPERTS: u32 = 1024;
/// Most experts for a token, unless all are chosen.
pub const MAX_TOP_K: u32 = 32;
/// Most shared experts.
pub const MAX_SHARED: u32 = 32;
/// Largest hidden or intermediate size: several times that of any published layer.
pub const MAX_SIZE: u32 = 1 << 17;

/// A layer's sizes and semantics. Every value of this type describes a layer that can exist, also one that was
/// deserialised: fields have the names of its methods, `routing` and `activation` default to a renormalised softmax and SwiGLU.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked")]
pub struct MoeConfig {
    hidden_size: u32,
    intermediate_size: u32,
    num_experts: u32,
    top_k: u32,
    routing: Routing,
    activation: Activation,
    extras: LayerExtras,
}

/// What only some layers have. The default has nothing of it.
///
/// In the order of the pass, with what is there:
///
/// ```text
/// router input   x, or its norm (router_norm)
/// expert input   x, projected to latent_size, then normed (expert_norm)
/// experts        the last special_experts of num_experts have no weights; each output normed (expert_out_norm)
/// routed         their weighted sum, projected back to hidden_size, normed (routed_norm), times routed_scale
/// y              routed, plus the shared experts on x, plus a bias, normed (output_norm)
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LayerExtras {
    /// The last of the `num_experts` that a token can choose have no weights.
    pub special_experts: u32,
    /// What those do.
    pub special_kind: SpecialKind,
    /// Width of the space that the routed experts work in, with a projection into it and one out of it.
    pub latent_size: Option<u32>,
    /// On what the router reads.
    pub router_norm: Option<Norm>,
    /// On what the experts read.
    pub expert_norm: Option<Norm>,
    /// On the output of each expert, before it is weighted.
    pub expert_out_norm: Option<Norm>,
    /// On the sum of the routed experts.
    pub routed_norm: Option<Norm>,
    /// Factor of that sum.
    pub routed_scale: f32,
    /// Experts that every token uses.
    pub shared: Option<SharedExperts>,
    /// On the layer's output.
    pub output_norm: Option<Norm>,
}

impl Default for LayerExtras {
    fn default() -> Self {
        Self {
            special_experts: 0,
            special_kind: SpecialKind::Identity,
            latent_size: None,
            router_norm: None,
            expert_norm: None,
            expert_out_norm: None,
            routed_norm: None,
            routed_scale: 1.0,
            shared: None,
            output_norm: None,
        }
    }
}

/// What an expert without weights does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SpecialKind {
    /// Returns its input (LongCat's zero-computation experts).
    #[default]
    Identity,
    /// Returns zero: the token skips this part of the layer.
    Zero,
}

/// Division by the root mean square, `v / sqrt(mean(v^2) + epsilon) * weight`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// Added to the mean square.
    pub epsilon: f32,
    /// Multiply by the weight before the division, which then is by the root mean square of the products.
    pub scale_first: bool,
}

/// Experts that every token uses, all of one width.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedExperts {
    /// How many. Several that share one gate, or have none, are the same as one wide one.
    pub num: u32,
    /// Inner width of each.
    pub intermediate_size: u32,
    /// Between their projections.
    pub activation: Activation,
    /// Their weights.
    pub gate: SharedGate,
    /// The output is the mean of routed and shared, not their sum.
    pub average: bool,
}

/// How shared experts are weighted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SharedGate {
    /// By 1.
    #[default]
    None,
    /// By `sigmoid(x . gate)` (Qwen2-MoE).
    Sigmoid,
    /// As if the token had chosen them: `x . gate` is scored as a logit, renormalised and scaled with the choices.
    Joint,
    /// By `g = sigmoid(x . gate)`, and the routed experts by `1 - g` (residual MoE with a coefficient, DeepSpeed-MoE).
    Mix,
}

/// A [`MoeConfig`] before it is checked: what deserialisation and the builder fill in.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    hidden_size: u32,
    intermediate_size: u32,
    num_experts: u32,
    top_k: u32,
    #[serde(default = "usual_routing")]
    routing: Routing,
    #[serde(default)]
    activation: Activation,
    #[serde(default)]
    extras: LayerExtras,
}

fn usual_routing() -> Routing {
    Routing::softmax(true)
}

impl TryFrom<Unchecked> for MoeConfig {
    type Error = Error;

    fn try_from(c: Unchecked) -> Result<Self> {
        Self::new(c.hidden_size, c.intermediate_size, c.num_experts, c.top_k, c.routing, c.activation)?
            .with_extras(c.extras)
    }
}

/// Sizes and semantics by name; see [`MoeConfig::builder`].
#[derive(Clone, Debug)]
#[must_use = "nothing is checked before build"]
pub struct MoeConfigBuilder(Unchecked);

impl MoeConfigBuilder {
    /// Experts that a token can choose, 1 to 1024.
    pub fn num_experts(mut self, num_experts: u32) -> Self {
        self.0.num_experts = num_experts;
        self
    }

    /// Experts for each token, 1 to 32.
    pub fn top_k(mut self, top_k: u32) -> Self {
        self.0.top_k = top_k;
        self
    }

    /// How choices are made and weighted. Without it: softmax over all experts, divided by the sum of the chosen ones.
    pub fn routing(mut self, routing: Routing) -> Self {
        self.0.routing = routing;
        self
    }

    /// What an expert does between its projections. Without it: SwiGLU.
    pub fn activation(mut self, activation: Activation) -> Self {
        self.0.activation = activation;
        self
    }

    /// Experts that every token uses.
    pub fn shared(mut self, shared: SharedExperts) -> Self {
        self.0.extras.shared = Some(shared);
        self
    }

    /// All that surrounds the experts; replaces what [`MoeConfigBuilder::shared`] said.
    pub fn extras(mut self, extras: LayerExtras) -> Self {
        self.0.extras = extras;
        self
    }

    /// Checks all of it.
    ///
    /// # Errors
    /// Those of [`MoeConfig::new`] and [`MoeConfig::with_extras`].
    pub fn build(self) -> Result<MoeConfig> {
        self.0.try_into()
    }
}

impl MoeConfig {
    /// A layer by name, one expert with the usual router and activation until something else is said.
    ///
    /// ```
    /// use wgmoe::{MoeConfig, Routing};
    /// let config = MoeConfig::builder(2048, 768).num_experts(128).top_k(8).routing(Routing::softmax(true)).build()?;
    /// assert_eq!(config.top_k(), 8);
    /// # Ok::<(), wgmoe::Error>(())
    /// ```
    pub fn builder(hidden_size: u32, intermediate_size: u32) -> MoeConfigBuilder {
        MoeConfigBuilder(Unchecked {
            hidden_size,
            intermediate_size,
            num_experts: 1,
            top_k: 1,
            routing: usual_routing(),
            activation: Activation::default(),
            extras: LayerExtras::default(),
        })
    }

    /// Checks the sizes: each at least 1, `hidden_size` and `intermediate_size` at most 2^17,
    /// `num_experts` at most 1024, `top_k` at most `min(num_experts, 32)` unless all experts are chosen.
    /// Checks that `routing` fits them.
    pub fn new(
        hidden_size: u32,
        intermediate_size: u32,
        num_experts: u32,
        top_k: u32,
        routing: Routing,
        activation: Activation,
    ) -> Result<Self> {
        range("hidden_size", hidden_size, MAX_SIZE)?;
        range("intermediate_size", intermediate_size, MAX_SIZE)?;
        range("num_experts", num_experts, MAX_EXPERTS)?;
        let most = if routing.is_dense() { num_experts } else { num_experts.min(MAX_TOP_K) };
        if top_k == 0 || top_k > most {
            return Err(Error::config(
                "top_k",
                top_k,
                format!("1 to {most} (num_experts is {num_experts}, the most is {MAX_TOP_K})"),
            ));
        }
        routing.check(num_experts, top_k)?;
        check_activation("activation", activation)?;
        let extras = LayerExtras::default();
        Ok(Self { hidden_size, intermediate_size, num_experts, top_k, routing, activation, extras })
    }

    /// The same layer with these surroundings, checked.
    pub fn with_extras(mut self, extras: LayerExtras) -> Result<Self> {
        if extras.special_experts >= self.num_experts {
            let expected = format!("below num_experts, {}: one needs weights", self.num_experts);
            return Err(Error::config("special_experts", extras.special_experts, expected));
        }
        if let Some(latent) = extras.latent_size {
            range("latent_size", latent, MAX_SIZE)?;
        }
        if !extras.routed_scale.is_finite() {
            return Err(Error::config("routed_scale", extras.routed_scale, "a finite number"));
        }
        for (field, norm) in [
            ("router_norm", extras.router_norm),
            ("expert_norm", extras.expert_norm),
            ("expert_out_norm", extras.expert_out_norm),
            ("routed_norm", extras.routed_norm),
            ("output_norm", extras.output_norm),
        ] {
            if let Some(Norm { epsilon, .. }) = norm
                && !(epsilon.is_finite() && epsilon >= 0.0)
            {
                return Err(Error::config(field, epsilon, "an epsilon from 0 up"));
            }
        }
        if let Some(shared) = extras.shared {
            range("shared.num", shared.num, MAX_SHARED)?;
            range("shared.intermediate_size", shared.intermediate_size, MAX_SIZE)?;
            check_activation("shared.activation", shared.activation)?;
            let joint = shared.gate == SharedGate::Joint;
            if joint && !matches!(self.routing.scores, Scores::Sigmoid | Scores::SqrtSoftplus | Scores::Raw) {
                let expected = "scores of each expert for itself, such as sigmoid, for a joint gate";
                return Err(Error::config("scores", self.routing.scores.name(), expected));
            }
            if shared.gate == SharedGate::Mix && shared.num != 1 {
                return Err(Error::config("shared.num", shared.num, "1 for a gate that mixes"));
            }
        }
        self.extras = extras;
        Ok(self)
    }

    /// Width of a token.
    pub fn hidden_size(&self) -> u32 {
        self.hidden_size
    }
    /// Inner width of one expert.
    pub fn intermediate_size(&self) -> u32 {
        self.intermediate_size
    }
    /// Experts that a token can choose.
    pub fn num_experts(&self) -> u32 {
        self.num_experts
    }
    /// Experts that have weights: the first ones.
    pub fn num_weighted_experts(&self) -> u32 {
        self.num_experts - self.extras.special_experts
    }
    /// Experts for each token.
    pub fn top_k(&self) -> u32 {
        self.top_k
    }
    /// Width of what the routed experts read and write: `latent_size` or `hidden_size`.
    pub fn expert_size(&self) -> u32 {
        self.extras.latent_size.unwrap_or(self.hidden_size)
    }
    /// How choices are made and weighted.
    pub fn routing(&self) -> Routing {
        self.routing
    }
    /// What an expert does between its projections.
    pub fn activation(&self) -> Activation {
        self.activation
    }
    /// What surrounds the experts.
    pub fn extras(&self) -> &LayerExtras {
        &self.extras
    }
    /// Shared experts whose weight comes from a router row of their own.
    pub fn num_gated_shared(&self) -> u32 {
        self.extras.shared.filter(|shared| shared.gate != SharedGate::None).map_or(0, |shared| shared.num)
    }
    /// Some assignments may be computed by nobody, or by an expert without weights.
    pub fn may_drop(&self) -> bool {
        self.routing.may_drop() || self.extras.special_experts > 0
    }

    /// The same layer with another number of experts. Not where choices come from a table of expert ids, which would
    /// then mean others.
    pub(crate) fn with_num_experts(&self, num_experts: u32) -> Result<Self> {
        if let Selection::TokenTable { .. } = self.routing.selection {
            let expected = "choices that follow from logits, as the token table's ids would no longer fit the experts";
            return Err(Error::config("selection", "token_table", expected));
        }
        let top_k = if self.routing.is_dense() { num_experts } else { self.top_k };
        Self::new(self.hidden_size, self.intermediate_size, num_experts, top_k, self.routing, self.activation)?
            .with_extras(self.extras.clone())
    }

    /// The table of [`Selection::TokenTable`] has this many rows.
    pub(crate) fn vocab_size(&self) -> Option<u32> {
        match self.routing.selection {
            Selection::TokenTable { vocab_size } => Some(vocab_size),
            _ => None,
        }
    }
}

fn range(field: &'static str, found: u32, most: u32) -> Result<()> {
    if (1..=most).contains(&found) { Ok(()) } else { Err(Error::config(field, found, format!("1 to {most}"))) }
}

fn check_activation(field: &'static str, activation: Activation) -> Result<()> {
    let positive = |values: &[f32]| values.iter().all(|v| v.is_finite() && *v > 0.0);
    let fits = match activation.form {
        Form::Plain | Form::Gated => true,
        Form::Clamped { limit } | Form::ClampedAfter { limit } => positive(&[limit]),
        Form::GptOss { limit, alpha } => positive(&[limit, alpha]),
        Form::SoftCapped { gate, up } => positive(&[gate, up]),
    };
    if fits { Ok(()) } else { Err(Error::config(field, format!("{:?}", activation.form), "positive numbers")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer() -> MoeConfig {
        let shared = SharedExperts {
            num: 1,
            intermediate_size: 24,
            activation: Activation::SWIGLU,
            gate: SharedGate::Sigmoid,
            average: false,
        };
        MoeConfig::builder(64, 32).num_experts(8).top_k(2).shared(shared).build().expect("valid")
    }

    #[test]
    fn json_keeps_a_layer() {
        let json = serde_json::to_string(&layer()).expect("no maps with odd keys");
        assert_eq!(serde_json::from_str::<MoeConfig>(&json).expect("just written"), layer());
    }

    #[test]
    fn defaults_need_not_be_written() {
        let short = r#"{"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "top_k": 2}"#;
        let config = MoeConfig::new(64, 32, 8, 2, Routing::softmax(true), Activation::SWIGLU).expect("valid");
        assert_eq!(serde_json::from_str::<MoeConfig>(short).expect("complete"), config);
        assert_eq!(MoeConfig::builder(64, 32).num_experts(8).top_k(2).build().expect("valid"), config);
    }

    #[test]
    fn no_way_around_the_checks() {
        let refused = |json: &str| serde_json::from_str::<MoeConfig>(json).expect_err("not a layer").to_string();
        let too_many = r#"{"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "top_k": 9}"#;
        assert!(refused(too_many).contains("top_k"), "{}", refused(too_many));
        let misspelt = r#"{"hidden_size": 64, "intermediate_size": 32, "num_experts": 8, "topk": 2}"#;
        assert!(refused(misspelt).contains("topk"), "{}", refused(misspelt));
        let shared = SharedExperts { num: 0, ..layer().extras().shared.expect("it has some") };
        let error = MoeConfig::builder(64, 32).shared(shared).build().expect_err("no experts");
        assert!(error.to_string().contains("shared.num"), "{error}");
    }
}
