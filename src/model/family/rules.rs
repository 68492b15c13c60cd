//! The sections of a description, and the layer that they and a configuration amount to.
//! Unknown keys and values are errors.

use super::gguf::GgufRules;
use super::layout::{self, FUSED, Layout};
use super::setting::{Scope, Setting};
use crate::error::{Error, Result};
use crate::model::activation::{Activation, Form, Function};
use crate::model::config::{LayerExtras, MoeConfig, Norm, SharedExperts, SharedGate, SpecialKind};
use crate::model::routing::{
    Capacity, CapacityLimit, GroupScore, Groups, Masked, Noise, Priority, RankBy, Renormalize, Routing, Scores,
    Selection,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Rules {
    pub name: String,
    pub detect: Detect,
    sizes: Sizes,
    routing: RoutingRules,
    experts: ExpertRules,
    shared: Option<SharedRules>,
    pub gguf: Option<GgufRules>,
    pub tensors: BTreeMap<String, Layout>,
}

/// A family that has a name and a reason only.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Unsupported {
    pub name: String,
    pub detect: Detect,
    pub unsupported: String,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Detect {
    pub model_type: Vec<String>,
}

type Optional<T> = Option<Setting<T>>;

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sizes {
    hidden_size: Setting<u32>,
    intermediate_size: Setting<u32>,
    num_experts: Setting<u32>,
    top_k: Optional<u32>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RoutingRules {
    scores: Setting<Scores>,
    rank_by: Optional<RankBy>,
    select: Optional<Select>,
    jitter: Optional<f64>,
    vocab_size: Optional<u32>,
    num_groups: Optional<u32>,
    keep_groups: Optional<u32>,
    group_score: Optional<GroupScore>,
    masked_groups: Optional<Masked>,
    renormalize: Setting<bool>,
    renormalize_epsilon: Optional<f64>,
    renormalize_floor: Optional<f64>,
    renormalize_p: Optional<f64>,
    scale: Optional<f64>,
    logit_scale: Optional<f64>,
    logit_softcap: Optional<f64>,
    weigh: Optional<Weigh>,
    capacity: Option<CapacityRules>,
    noise: Optional<NoiseKind>,
    noise_epsilon: Optional<f64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CapacityRules {
    number: Optional<u32>,
    factor: Optional<f64>,
    fraction: Optional<f64>,
    round: Optional<Round>,
    minimum: Optional<u32>,
    per: Optional<Per>,
    priority: Optional<Priority>,
    renormalize_after: Optional<bool>,
    dropped: Optional<Dropped>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpertRules {
    activation: Setting<String>,
    form: Optional<FormName>,
    limit: Optional<f64>,
    alpha: Optional<f64>,
    gate_cap: Optional<f64>,
    up_cap: Optional<f64>,
    special: Option<SpecialRules>,
    latent_size: Optional<u32>,
    router_norm: Option<NormRules>,
    expert_norm: Option<NormRules>,
    expert_out_norm: Option<NormRules>,
    routed_norm: Option<NormRules>,
    output_norm: Option<NormRules>,
    routed_scale: Optional<f64>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SpecialRules {
    count: Setting<u32>,
    kind: Optional<SpecialKind>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { epsilon = 1e-6 }")]
struct NormRules {
    epsilon: Setting<f64>,
    #[serde(default)]
    scale_first: bool,
    #[serde(default)]
    plus_one: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct SharedRules {
    num: Optional<u32>,
    width: Setting<u32>,
    activation: Optional<String>,
    form: Optional<FormName>,
    limit: Optional<f64>,
    alpha: Optional<f64>,
    gate_cap: Optional<f64>,
    up_cap: Optional<f64>,
    gate: Optional<SharedGate>,
    combine: Optional<Combine>,
}

macro_rules! words {
    ($(#[$doc:meta] $name:ident { $($word:ident),* })*) => { $(
        #[$doc]
        #[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
        #[serde(rename_all = "snake_case")]
        enum $name { $($word),* }
    )* };
}

words! {
    /// Who is chosen; what it takes beside is in other keys.
    Select { TopK, Sparsemixer, TokenTable, Given, Dense, ExpertChoice }
    /// What a weight multiplies.
    Weigh { Output, Input }
    /// Of a fraction of the tokens.
    Round { Up, Down }
    /// What a capacity is counted in.
    Per { Batch, Sequence }
    /// What a dropped assignment adds.
    Dropped { Zero, PassThrough }
    /// Randomness in training.
    NoiseKind { None, Jitter, NoisyTopK, RandomSecond }
    /// How gate and up meet.
    FormName { Gated, Plain, Clamped, ClampedAfter, GptOss, SoftCapped }
    /// How shared and routed experts meet.
    Combine { Add, Average }
}

/// The five norms, by the name of their tensor.
pub(crate) const NORMS: [&str; 5] = ["router_norm", "expert_norm", "expert_out_norm", "routed_norm", "output_norm"];

/// Names of functions in configurations, and ours.
const FUNCTIONS: [(&str, Function); 17] = [
    ("silu", Function::Silu),
    ("swish", Function::Silu),
    ("swiglu", Function::Silu),
    ("gelu", Function::Gelu),
    ("geglu", Function::Gelu),
    ("gelu_python", Function::Gelu),
    ("gelu_tanh", Function::GeluTanh),
    ("gelu_new", Function::GeluTanh),
    ("gelu_fast", Function::GeluTanh),
    ("gelu_pytorch_tanh", Function::GeluTanh),
    ("gelu_quick", Function::GeluQuick),
    ("quick_gelu", Function::GeluQuick),
    ("relu", Function::Relu),
    ("relu2", Function::Relu2),
    ("relu_2", Function::Relu2),
    ("relu_squared", Function::Relu2),
    ("squared_relu", Function::Relu2),
];

fn value<T: DeserializeOwned>(setting: &Optional<T>, field: &str, scope: Scope, without: T) -> Result<T> {
    setting.as_ref().map_or(Ok(without), |setting| setting.value(field, scope))
}

fn optional<T: DeserializeOwned>(setting: &Optional<T>, scope: Scope) -> Result<Option<T>> {
    setting.as_ref().map_or(Ok(None), |setting| setting.optional(scope))
}

/// A number that is there and not zero.
fn nonzero(setting: &Optional<f64>, scope: Scope) -> Result<Option<f64>> {
    Ok(optional(setting, scope)?.filter(|&number| number != 0.0))
}

impl Rules {
    /// The layer that the configuration describes.
    pub fn moe_config(&self, scope: Scope) -> Result<MoeConfig> {
        let sizes = &self.sizes;
        let hidden_size = sizes.hidden_size.value("hidden_size", scope)?;
        let intermediate_size = sizes.intermediate_size.value("intermediate_size", scope)?;
        let special = match &self.experts.special {
            Some(special) => special.count.optional(scope)?.unwrap_or(0),
            None => 0,
        };
        let num_experts = sizes.num_experts.value("num_experts", scope)?.saturating_add(special);
        let select = value(&self.routing.select, "select", scope, Select::TopK)?;
        let top_k = match (select, &sizes.top_k) {
            (Select::Dense | Select::ExpertChoice, None) => num_experts,
            (_, Some(top_k)) => top_k.value("top_k", scope)?,
            (_, None) => return Err(Error::config("top_k", "missing", "a setting in [sizes]: experts for each token")),
        };
        let routing = self.routing.routing(scope, select, num_experts, top_k)?;
        MoeConfig::new(hidden_size, intermediate_size, num_experts, top_k, routing, self.experts.activation(scope)?)?
            .with_extras(self.extras(scope, special)?)
    }

    fn extras(&self, scope: Scope, special_experts: u32) -> Result<LayerExtras> {
        let experts = &self.experts;
        let norm = |rules: &Option<NormRules>, field| {
            let norm = |rules: &NormRules| {
                let epsilon = rules.epsilon.value(field, scope)? as f32;
                Ok(Norm { epsilon, scale_first: rules.scale_first })
            };
            rules.as_ref().map(norm).transpose()
        };
        let special_kind = match &experts.special {
            Some(special) => value(&special.kind, "special.kind", scope, SpecialKind::Identity)?,
            None => SpecialKind::Identity,
        };
        Ok(LayerExtras {
            special_experts,
            special_kind,
            latent_size: optional(&experts.latent_size, scope)?.filter(|&size| size > 0),
            router_norm: norm(&experts.router_norm, "router_norm.epsilon")?,
            expert_norm: norm(&experts.expert_norm, "expert_norm.epsilon")?,
            expert_out_norm: norm(&experts.expert_out_norm, "expert_out_norm.epsilon")?,
            routed_norm: norm(&experts.routed_norm, "routed_norm.epsilon")?,
            output_norm: norm(&experts.output_norm, "output_norm.epsilon")?,
            routed_scale: value(&experts.routed_scale, "routed_scale", scope, 1.0)? as f32,
            shared: self.shared.as_ref().map(|shared| shared.shared(scope, experts)).transpose()?.flatten(),
        })
    }

    /// Scores, who is chosen and what is around that, in a few words.
    pub fn summary(&self) -> String {
        let routing = &self.routing;
        let word = |value: Option<serde_json::Value>| match value {
            Some(serde_json::Value::String(word)) => word,
            _ => "configured".to_owned(),
        };
        let mut words = vec![word(routing.scores.literal().and_then(|scores| serde_json::to_value(scores).ok()))];
        match routing.select_literal() {
            Some(Select::TopK) => {}
            Some(select) => words.push(words_of(&format!("{select:?}"))),
            None => words.push("configured selection".to_owned()),
        }
        let any = |slot| self.tensors.values().any(|layout| layout.has(slot));
        for (there, what) in [
            (any("selection_bias"), "selection bias"),
            (routing.num_groups.is_some(), "groups"),
            (routing.capacity.is_some(), "capacity"),
            (self.experts.special.is_some(), "special experts"),
            (self.experts.latent_size.is_some(), "latent"),
            (self.shared.is_some(), "shared"),
        ] {
            words.extend(there.then(|| what.to_owned()));
        }
        words.join(", ")
    }

    /// The norm's weight is stored minus one.
    pub fn is_stored_minus_one(&self, norm: &str) -> bool {
        self.norms().iter().any(|(name, rules)| *name == norm && rules.as_ref().is_some_and(|rules| rules.plus_one))
    }

    fn norms(&self) -> [(&'static str, &Option<NormRules>); 5] {
        let experts = &self.experts;
        let rules = [
            &experts.router_norm,
            &experts.expert_norm,
            &experts.expert_out_norm,
            &experts.routed_norm,
            &experts.output_norm,
        ];
        let mut norms = [("", &None); 5];
        for (norm, named) in norms.iter_mut().zip(NORMS.into_iter().zip(rules)) {
            *norm = named;
        }
        norms
    }

    /// What types cannot say. An error is a section, a key in it, and what is wrong.
    pub fn check(&self) -> Result<(), (String, &'static str, String)> {
        self.routing.check().map_err(|(key, message)| ("routing".to_owned(), key, message))?;
        self.experts.check().map_err(|(key, message)| ("experts".to_owned(), key, message))?;
        if let Some(shared) = &self.shared {
            shared.check().map_err(|(key, message)| ("shared".to_owned(), key, message))?;
        }
        if self.sizes.top_k.is_none()
            && !matches!(self.routing.select_literal(), Some(Select::Dense | Select::ExpertChoice) | None)
        {
            return Err(("sizes".to_owned(), "top_k", "top_k is missing: experts for each token".to_owned()));
        }
        if self.tensors.is_empty() {
            return Err((String::new(), "tensors", "no layout: add a section such as [tensors.hub]".to_owned()));
        }
        match (&self.gguf, self.tensors.keys().find(|name| layout::is_of_gguf(name))) {
            (Some(_), None) => {
                let message = "[gguf] needs a layout [tensors.gguf]: the names of tensors in such a file";
                return Err(("gguf".to_owned(), "architecture", message.to_owned()));
            }
            (None, Some(name)) => {
                let message = "this layout needs [gguf]: what the metadata of such a file mean";
                return Err((format!("tensors.{name}"), "prefix", message.to_owned()));
            }
            _ => {}
        }
        for (name, layout) in &self.tensors {
            let section = format!("tensors.{name}");
            layout.check().map_err(|(key, message)| (section.clone(), key, message))?;
            self.check_layout(layout).map_err(|(key, message)| (section, key, message))?;
        }
        Ok(())
    }

    /// A layout must not name what the other sections do not mention, nor leave out what they need.
    fn check_layout(&self, layout: &Layout) -> Result<(), (&'static str, String)> {
        for (norm, rules) in self.norms() {
            if layout.has(norm) && rules.is_none() {
                return Err((norm, format!("{norm} needs {norm} = {{ epsilon = ... }} in [experts]")));
            }
        }
        for latent in ["latent_in", "latent_out"] {
            match (layout.has(latent), self.experts.latent_size.is_some()) {
                (true, false) => return Err((latent, format!("{latent} needs latent_size in [experts]"))),
                (false, true) => {
                    return Err(("prefix", format!("this layout must name {latent}: [experts] has latent_size")));
                }
                _ => {}
            }
        }
        let shared = ["shared_gate_proj", "shared_up_proj", "shared_gate_up_proj", "shared_down_proj", "shared_gate"];
        match &self.shared {
            None => {
                if let Some(slot) = shared.into_iter().find(|slot| layout.has(slot)) {
                    return Err((slot, format!("{slot} needs a section [shared]")));
                }
                if layout.shared_gate_in_router {
                    return Err(("shared_gate_in_router", "shared_gate_in_router needs a section [shared]".to_owned()));
                }
            }
            Some(rules) => {
                if !layout.has("shared_down_proj") {
                    return Err((
                        "prefix",
                        "this layout must name shared_down_proj: there is a section [shared]".to_owned(),
                    ));
                }
                let there = layout.has("shared_gate") || layout.shared_gate_in_router;
                let gated = rules.gate.as_ref().is_some_and(|gate| gate.literal() != Some(SharedGate::None));
                if there && !gated {
                    return Err((
                        "shared_gate",
                        "shared_gate needs gate in [shared]: sigmoid, joint or mix".to_owned(),
                    ));
                }
                if gated && !there {
                    let message =
                        "this layout must name shared_gate, or say shared_gate_in_router: [shared] has a gate";
                    return Err(("prefix", message.to_owned()));
                }
            }
        }
        let gated = |form: Option<&Setting<FormName>>| {
            form.map_or(Some(FormName::Gated), Setting::literal).is_some_and(|form| form != FormName::Plain)
        };
        let own = self.experts.form.as_ref();
        let of_shared = self.shared.as_ref().map(|shared| shared.form.as_ref().or(own));
        for ([fused, gate, up], form) in [(FUSED[0], Some(own)), (FUSED[2], of_shared)] {
            if form.is_some_and(gated) && layout.has(up) && !layout.has(gate) && !layout.has(fused) {
                let message = format!(
                    "{up} without {gate}: experts of any form but plain have a gate; name it, or say form = \"plain\""
                );
                return Err((up, message));
            }
        }
        let plain = |form: &Optional<FormName>| form.as_ref().and_then(Setting::literal) == Some(FormName::Plain);
        let gateless = [
            plain(&self.experts.form),
            plain(&self.experts.form),
            self.shared.as_ref().is_some_and(|shared| plain(&shared.form)),
        ];
        for ([fused, gate, _], _) in FUSED.into_iter().zip(gateless).filter(|(_, gateless)| *gateless) {
            if let Some(slot) = [fused, gate].into_iter().find(|slot| layout.has(slot)) {
                return Err((slot, format!("{slot} has no place in experts of form plain, which have no gate")));
            }
        }
        Ok(())
    }
}

impl RoutingRules {
    fn select_literal(&self) -> Option<Select> {
        self.select.as_ref().map_or(Some(Select::TopK), Setting::literal)
    }

    fn routing(&self, scope: Scope, select: Select, num_experts: u32, top_k: u32) -> Result<Routing> {
        let scores = self.scores.value("scores", scope)?;
        let renormalize = if self.renormalize.value("renormalize", scope)? {
            Some(Renormalize {
                p: value(&self.renormalize_p, "renormalize_p", scope, 1.0)? as f32,
                epsilon: value(&self.renormalize_epsilon, "renormalize_epsilon", scope, 0.0)? as f32,
                floor: value(&self.renormalize_floor, "renormalize_floor", scope, 0.0)? as f32,
            })
        } else {
            None
        };
        let selection = match select {
            Select::TopK => Selection::TopK,
            Select::Sparsemixer => {
                Selection::Sparsemixer { jitter: value(&self.jitter, "jitter", scope, 0.01)? as f32 }
            }
            Select::TokenTable => Selection::TokenTable {
                vocab_size: match &self.vocab_size {
                    Some(size) => size.value("vocab_size", scope)?,
                    None => {
                        return Err(Error::config(
                            "vocab_size",
                            "missing",
                            "a setting in [routing]: rows of the table",
                        ));
                    }
                },
            },
            Select::Given => Selection::Given,
            Select::Dense => Selection::Dense,
            Select::ExpertChoice => Selection::ExpertChoice,
        };
        let epsilon = || value(&self.noise_epsilon, "noise_epsilon", scope, 0.0);
        let noise = match value(&self.noise, "noise", scope, NoiseKind::None)? {
            NoiseKind::None => Noise::None,
            NoiseKind::Jitter => Noise::Jitter { epsilon: epsilon()? as f32 },
            NoiseKind::NoisyTopK => Noise::NoisyTopK,
            NoiseKind::RandomSecond => Noise::RandomSecond,
        };
        let capacity = self.capacity.as_ref().map(|rules| rules.capacity(scope, num_experts, top_k)).transpose()?;
        Ok(Routing {
            rank_by: value(&self.rank_by, "rank_by", scope, RankBy::Scores)?,
            selection,
            groups: self.groups(scope, scores, select, num_experts)?,
            renormalize,
            scale: value(&self.scale, "scale", scope, 1.0)? as f32,
            logit_scale: value(&self.logit_scale, "logit_scale", scope, 1.0)? as f32,
            logit_softcap: nonzero(&self.logit_softcap, scope)?.map(|cap| cap as f32),
            weigh_input: value(&self.weigh, "weigh", scope, Weigh::Output)? == Weigh::Input,
            capacity: capacity.flatten(),
            noise,
            ..Routing::new(scores, false)
        })
    }

    /// One group, or none, restricts nothing.
    fn groups(&self, scope: Scope, scores: Scores, select: Select, num_experts: u32) -> Result<Option<Groups>> {
        let Some(num_groups) = optional(&self.num_groups, scope)?.filter(|&groups| groups > 1) else {
            return Ok(None);
        };
        if !num_experts.is_multiple_of(num_groups) {
            let expected = format!("a divisor of num_experts, {num_experts}");
            return Err(Error::config("num_groups", num_groups, expected));
        }
        let keep = optional(&self.keep_groups, scope)?.unwrap_or(num_groups);
        // Groups are about top-k, and about hierarchical scores.
        if scores != Scores::Hierarchical && (select != Select::TopK || keep == num_groups) {
            return Ok(None);
        }
        Ok(Some(Groups {
            num_groups,
            keep,
            score: value(&self.group_score, "group_score", scope, GroupScore::Max)?,
            masked: value(&self.masked_groups, "masked_groups", scope, Masked::NegInfinity)?,
        }))
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        let groups = [
            ("keep_groups", self.keep_groups.is_some()),
            ("group_score", self.group_score.is_some()),
            ("masked_groups", self.masked_groups.is_some()),
        ];
        if let Some((key, _)) = groups.into_iter().find(|(_, there)| *there && self.num_groups.is_none()) {
            return Err((key, format!("{key} needs num_groups")));
        }
        let renormalize = [
            ("renormalize_epsilon", self.renormalize_epsilon.is_some()),
            ("renormalize_floor", self.renormalize_floor.is_some()),
            ("renormalize_p", self.renormalize_p.is_some()),
        ];
        if self.renormalize.literal() == Some(false)
            && let Some((key, _)) = renormalize.into_iter().find(|(_, there)| *there)
        {
            return Err((key, format!("{key} has no place where renormalize is false")));
        }
        if let Some(select) = self.select_literal() {
            if self.jitter.is_some() && select != Select::Sparsemixer {
                return Err(("jitter", "jitter needs select = \"sparsemixer\"; noise has noise_epsilon".to_owned()));
            }
            if self.vocab_size.is_some() && select != Select::TokenTable {
                return Err(("vocab_size", "vocab_size needs select = \"token_table\"".to_owned()));
            }
            if self.vocab_size.is_none() && select == Select::TokenTable {
                return Err(("select", "select = \"token_table\" needs vocab_size".to_owned()));
            }
            if self.capacity.is_none() && select == Select::ExpertChoice {
                return Err(("select", "select = \"expert_choice\" needs [routing.capacity]".to_owned()));
            }
        }
        let noise = self.noise.as_ref().map_or(Some(NoiseKind::None), Setting::literal);
        if self.noise_epsilon.is_some() && noise.is_some_and(|noise| noise != NoiseKind::Jitter) {
            return Err(("noise_epsilon", "noise_epsilon needs noise = \"jitter\"".to_owned()));
        }
        if self.scores.literal() == Some(Scores::Hierarchical) && self.num_groups.is_none() {
            return Err(("scores", "scores = \"hierarchical\" needs num_groups".to_owned()));
        }
        if let Some(capacity) = &self.capacity
            && capacity.number.is_none()
            && capacity.factor.is_none()
            && capacity.fraction.is_none()
        {
            return Err(("capacity", "a capacity needs number, factor or fraction".to_owned()));
        }
        Ok(())
    }
}

impl CapacityRules {
    /// The first of fraction, factor and number that is above zero. Without any of them there is no capacity.
    fn capacity(&self, scope: Scope, num_experts: u32, top_k: u32) -> Result<Option<Capacity>> {
        let round_up = value(&self.round, "capacity.round", scope, Round::Up)? == Round::Up;
        let minimum = value(&self.minimum, "capacity.minimum", scope, 0)?;
        let of_tokens = |fraction| CapacityLimit::Fraction { fraction, round_up, minimum };
        let fraction = optional(&self.fraction, scope)?;
        let factor = optional(&self.factor, scope)?.map(|f| f * f64::from(top_k) / f64::from(num_experts.max(1)));
        let number = optional(&self.number, scope)?;
        let shares = [fraction, factor];
        let limit = match (shares.into_iter().flatten().find(|&share| share > 0.0), number) {
            (Some(share), _) => of_tokens(share),
            (None, Some(number)) => CapacityLimit::Number(number),
            // zero and below: an error that names it
            (None, None) => match shares.into_iter().flatten().next() {
                Some(share) => of_tokens(share),
                None => return Ok(None),
            },
        };
        Ok(Some(Capacity {
            limit,
            per_sequence: value(&self.per, "capacity.per", scope, Per::Batch)? == Per::Sequence,
            priority: value(&self.priority, "capacity.priority", scope, Priority::Position)?,
            renormalize_after: value(&self.renormalize_after, "capacity.renormalize_after", scope, false)?,
            pass_through: value(&self.dropped, "capacity.dropped", scope, Dropped::Zero)? == Dropped::PassThrough,
        }))
    }
}

/// The keys of an activation, of routed or of shared experts.
struct ActivationRules<'a> {
    section: &'static str,
    form: &'a Optional<FormName>,
    limit: &'a Optional<f64>,
    alpha: &'a Optional<f64>,
    gate_cap: &'a Optional<f64>,
    up_cap: &'a Optional<f64>,
}

impl ActivationRules<'_> {
    fn activation(&self, function: &Setting<String>, scope: Scope) -> Result<Activation> {
        let name = function.value("activation", scope)?;
        let function = function_named(&name).ok_or_else(|| Error::Unsupported {
            what: format!("the activation {name:?} of {}", scope.config.path.display()),
            by: "by this version".to_owned(),
            hint: format!("known: {}", known_functions()),
        })?;
        let needed = |setting: &Optional<f64>, key: &'static str| match setting {
            Some(setting) => Ok(setting.value(key, scope)? as f32),
            None => Err(Error::config(key, "missing", format!("a setting in {}, which this form needs", self.section))),
        };
        let limit = nonzero(self.limit, scope)?.map(|limit| limit as f32);
        let form = match (value(self.form, "form", scope, FormName::Gated)?, limit) {
            (FormName::Plain, _) => Form::Plain,
            (FormName::Gated | FormName::Clamped | FormName::ClampedAfter, None) | (FormName::Gated, _) => Form::Gated,
            (FormName::Clamped, Some(limit)) => Form::Clamped { limit },
            (FormName::ClampedAfter, Some(limit)) => Form::ClampedAfter { limit },
            (FormName::GptOss, _) => Form::GptOss {
                limit: needed(self.limit, "limit")?,
                alpha: value(self.alpha, "alpha", scope, 1.702)? as f32,
            },
            (FormName::SoftCapped, _) => {
                Form::SoftCapped { gate: needed(self.gate_cap, "gate_cap")?, up: needed(self.up_cap, "up_cap")? }
            }
        };
        Ok(Activation { form, function })
    }

    /// Numbers belong to forms, and forms need theirs.
    fn check(&self) -> Result<(), (&'static str, String)> {
        let Some(form) = self.form.as_ref().map_or(Some(FormName::Gated), Setting::literal) else { return Ok(()) };
        let (limit, alpha, caps) = match form {
            FormName::Gated | FormName::Plain => (false, false, false),
            FormName::Clamped | FormName::ClampedAfter => (true, false, false),
            FormName::GptOss => (true, true, false),
            FormName::SoftCapped => (false, false, true),
        };
        for (key, setting, used, needed) in [
            ("limit", self.limit, limit, true),
            ("alpha", self.alpha, alpha, false),
            ("gate_cap", self.gate_cap, caps, true),
            ("up_cap", self.up_cap, caps, true),
        ] {
            let takers = match key {
                "limit" => "clamped, clamped_after or gpt_oss",
                "alpha" => "gpt_oss",
                _ => "soft_capped",
            };
            match (setting.is_some(), used) {
                (true, false) => return Err((key, format!("{key} needs form {takers}"))),
                (false, true) if needed => return Err(("form", format!("this form needs {key}"))),
                _ => {}
            }
        }
        Ok(())
    }
}

impl ExpertRules {
    fn rules(&self) -> ActivationRules<'_> {
        let ExpertRules { form, limit, alpha, gate_cap, up_cap, .. } = self;
        ActivationRules { section: "[experts]", form, limit, alpha, gate_cap, up_cap }
    }

    fn activation(&self, scope: Scope) -> Result<Activation> {
        self.rules().activation(&self.activation, scope)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        check_function(&self.activation)?;
        self.rules().check()
    }
}

impl SharedRules {
    /// With a form of its own, a shared expert has its own numbers; otherwise those of the routed ones.
    fn rules<'a>(&'a self, experts: &'a ExpertRules) -> ActivationRules<'a> {
        let SharedRules { form, limit, alpha, gate_cap, up_cap, .. } = self;
        if form.is_some() {
            ActivationRules { section: "[shared]", form, limit, alpha, gate_cap, up_cap }
        } else {
            experts.rules()
        }
    }

    fn shared(&self, scope: Scope, experts: &ExpertRules) -> Result<Option<SharedExperts>> {
        let width = self.width.optional(scope)?.unwrap_or(0);
        let num = match &self.num {
            Some(num) => num.optional(scope)?.unwrap_or(0),
            None => 1,
        };
        if width == 0 || num == 0 {
            return Ok(None);
        }
        let function = self.activation.as_ref().unwrap_or(&experts.activation);
        Ok(Some(SharedExperts {
            num,
            intermediate_size: width,
            activation: self.rules(experts).activation(function, scope)?,
            gate: value(&self.gate, "shared.gate", scope, SharedGate::None)?,
            average: value(&self.combine, "shared.combine", scope, Combine::Add)? == Combine::Average,
        }))
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        self.activation.as_ref().map_or(Ok(()), check_function)?;
        let own =
            [("limit", &self.limit), ("alpha", &self.alpha), ("gate_cap", &self.gate_cap), ("up_cap", &self.up_cap)];
        if self.form.is_none() {
            return match own.into_iter().find(|(_, setting)| setting.is_some()) {
                Some((key, _)) => {
                    Err((key, format!("{key} needs a form in [shared]; without one it is that of [experts]")))
                }
                None => Ok(()),
            };
        }
        let SharedRules { form, limit, alpha, gate_cap, up_cap, .. } = self;
        ActivationRules { section: "[shared]", form, limit, alpha, gate_cap, up_cap }.check()
    }
}

/// `TopK` as `top k`
fn words_of(name: &str) -> String {
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

fn function_named(name: &str) -> Option<Function> {
    FUNCTIONS.iter().find(|(known, _)| *known == name).map(|&(_, function)| function)
}

fn known_functions() -> String {
    FUNCTIONS.map(|(name, _)| name).join(", ")
}

fn check_function(function: &Setting<String>) -> Result<(), (&'static str, String)> {
    match function.literal() {
        Some(name) if function_named(&name).is_none() => {
            Err(("activation", format!("unknown activation {name:?}, known: {}", known_functions())))
        }
        _ => Ok(()),
    }
}
