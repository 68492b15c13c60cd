//! What the experts of a layer do: who gets which tokens, with which weights, what each adds to the output, and which of
//! them are alike.
//!
//! Everything is a pure function of what a pass decided ([`RoutingDecision`]), of the layer's weights and of its output,
//! so it holds for any device. [`Inspection`] is what `wgmoe inspect` shows, as data: other programs read it as JSON.
//!
//! Words, as they are used here:
//!
//! - The *load* of an expert is the number of its assignments: of tokens that it computes for.
//! - An expert is *dead* if its load is 0, and *hot* if it is at least [`HOT`] times the mean load.
//! - *Entropy* is in bits. That of a token is the entropy of its weights divided by their sum: 0 if one expert has all the
//!   weight, `log2(top_k)` if all have the same. That of the load is the entropy of the shares of the load: at most
//!   `log2(num_experts)`.
//! - *Contributions*: a token's experts are added up to a sum, `s_t = sum over e of c_te`, where `c_te` is the expert's
//!   output times its weight. The *norm* of an expert's contribution is `sqrt(sum over t of |c_te|^2)`; its *share* is
//!   `sum over t of <c_te, s_t> / sum over t of |s_t|^2`. Shares add up to 1, and are negative for an expert that the others
//!   outweigh. Shared experts and what comes after the sum are no part of it.
//! - *Similarity* of two experts is the cosine of the angle between their weights, each taken as one long vector. Experts
//!   that compute the same with their rows in another order are not similar in this sense.

mod experts;
pub mod routing;

use crate::error::{Error, Result};
use crate::gpu::DeviceInfo;
use crate::model::checkpoint::LayerSource;
use crate::model::config::MoeConfig;
use crate::model::routing::RoutingDecision;
use crate::trace::{Trace, TraceLayer};
use serde::Serialize;

/// Version of what `wgmoe inspect --json` writes.
pub const SCHEMA: u32 = 1;
/// An expert is hot from this many times the mean load on.
pub const HOT: f64 = 2.0;
/// Bins of a histogram of weights.
pub const BINS: usize = 20;

/// Layers of a model on some input.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// Version of the format.
    pub schema: u32,
    /// The checkpoint.
    pub file: String,
    /// The model family's name.
    pub family: String,
    /// Where the passes ran.
    pub device: DeviceInfo,
    /// Where the activations come from.
    pub input: String,
    /// Every layer got the same activations; otherwise each its own.
    pub same_input: bool,
    /// Tokens of the input.
    pub num_tokens: usize,
    /// A text for each token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<Vec<String>>,
    /// What the words mean, for whoever only has this file.
    pub definitions: Vec<Definition>,
    /// Ascending.
    pub layers: Vec<LayerInspection>,
}

/// A word that an [`Inspection`] uses.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Definition {
    /// The word.
    pub word: &'static str,
    /// Its meaning.
    pub meaning: &'static str,
}

/// The words of the [module](self), for people.
pub const DEFINITIONS: &[Definition] = &[
    Definition { word: "load", meaning: "assignments that an expert computes" },
    Definition { word: "dead", meaning: "an expert without load" },
    Definition { word: "hot", meaning: "an expert with at least 2 times the mean load" },
    Definition {
        word: "entropy of a token",
        meaning: "in bits, of its weights divided by their sum: 0 if one expert has all, log2(top_k) if all have the same",
    },
    Definition {
        word: "entropy of the load",
        meaning: "in bits, of the experts' shares of it: at most log2(num_experts)",
    },
    Definition {
        word: "contribution",
        meaning: "an expert's output times its weight; its share is how much of the sum of all routed experts it makes, \
                  measured along that sum: shares add up to 1 and can be negative",
    },
    Definition {
        word: "similarity",
        meaning: "cosine between the weights of two experts, gate, up and down as one long vector: 1 is the same, 0 unrelated",
    },
];

/// One layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerInspection {
    /// Number of the layer in its model.
    pub layer: u32,
    /// Width of a token.
    pub hidden_size: u32,
    /// Inner width of one expert.
    pub intermediate_size: u32,
    /// Experts that a token can choose.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// How experts are stored.
    pub weights: String,
    /// Who has how much to do.
    pub load: Load,
    /// Entropy of each token's weights, in bits: `[num_tokens]`
    pub token_entropy: Vec<f64>,
    /// The same, summed up.
    pub entropy: Distribution,
    /// Weights of the first choices, of the second, and so on: `[top_k]`
    pub weights_by_rank: Vec<Distribution>,
    /// Tokens that chose both: `[num_experts][num_experts]`, the load in the diagonal.
    pub coactivation: Vec<Vec<u32>>,
    /// What each expert adds: `[num_experts]`
    pub contributions: Contributions,
    /// Which experts are alike; `None` where there are fewer than two with weights.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub similarity: Option<Similarity>,
    /// Experts of each token, best first, -1 for nobody: `[num_tokens][top_k]`
    pub experts: Vec<Vec<i32>>,
    /// Their weights: `[num_tokens][top_k]`
    pub expert_weights: Vec<Vec<f32>>,
    /// Tokens of each expert, those with the largest weight first: `[num_experts][..]`
    pub tokens_of_expert: Vec<Vec<u32>>,
    /// What a capacity would drop, if one was asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity: Option<CapacityWhatIf>,
}

/// How the assignments are spread over the experts.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Load {
    /// `[num_experts]`
    pub tokens_per_expert: Vec<u32>,
    /// Assignments that nobody computes.
    pub dropped: u32,
    /// Mean of the loads.
    pub mean: f64,
    /// The largest load by the mean; 1 if even.
    pub max_over_mean: f64,
    /// Standard deviation of the loads by their mean; 0 if even.
    pub coefficient_of_variation: f64,
    /// In bits.
    pub entropy: f64,
    /// `log2(num_experts)`: that of an even load.
    pub max_entropy: f64,
    /// Experts without load, ascending.
    pub dead: Vec<u32>,
    /// Experts with at least [`HOT`] times the mean load, the busiest first.
    pub hot: Vec<u32>,
}

/// Numbers, summed up.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Distribution {
    /// How many.
    pub count: usize,
    /// Their mean.
    pub mean: f64,
    /// The smallest.
    pub min: f64,
    /// A tenth is no larger.
    pub p10: f64,
    /// Half are no larger.
    pub median: f64,
    /// Nine tenths are no larger.
    pub p90: f64,
    /// The largest.
    pub max: f64,
    /// Numbers in each of [`BINS`] equal parts of `histogram_from..=histogram_to`.
    pub histogram: Vec<u32>,
    /// Where the histogram begins.
    pub histogram_from: f64,
    /// Where it ends.
    pub histogram_to: f64,
}

/// What the experts add to the output.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Contributions {
    /// Norm of each expert's contributions: `[num_experts]`
    pub norm: Vec<f64>,
    /// Each expert's share of the routed experts' sum, 1 together: `[num_experts]`
    pub share: Vec<f64>,
    /// Norm of the routed experts' sum, over all tokens.
    pub routed_norm: f64,
    /// Norm of the layer's output, as the device computed it, over all tokens.
    pub output_norm: f64,
}

/// How alike the experts' weights are.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Similarity {
    /// Cosines, `[num_weighted_experts][num_weighted_experts]`, 1 in the diagonal.
    pub cosine: Vec<Vec<f32>>,
    /// Mean of what is beside the diagonal.
    pub mean: f64,
    /// The two experts that are most alike.
    pub most_alike: [u32; 2],
    /// Weights of each expert that were compared.
    pub weights_compared: u64,
    /// Weights that each expert has: more, if only a sample of the rows was compared.
    pub weights_of_expert: u64,
}

/// What would be dropped if each expert took no more than its capacity, earlier tokens first.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CapacityWhatIf {
    /// Times the mean load.
    pub factor: f64,
    /// `ceil(factor * top_k * num_tokens / num_experts)`
    pub capacity: u32,
    /// Assignments of each expert beyond it: `[num_experts]`
    pub dropped_per_expert: Vec<u32>,
    /// All of them.
    pub dropped: u32,
    /// By all assignments.
    pub share: f64,
    /// Tokens that would lose all of their experts.
    pub tokens_without_expert: u32,
    /// The least factor that drops nothing.
    pub factor_without_drops: f64,
}

/// What to look at beside the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Options {
    /// Compare no more than this many rows of each matrix, spread evenly, where all would take too long.
    pub similarity_rows: Option<u32>,
    /// A capacity factor: what would it drop?
    pub capacity: Option<f64>,
}

/// Looks at one layer: at what it decided for `x [num_tokens, hidden_size]` (`routing`), at what it made of it
/// (`y [num_tokens, hidden_size]`), and at its experts, which are read from `source` one by one, in the format that they are
/// converted to, if they are. `progress(done, total)` counts experts.
///
/// # Errors
/// Lengths that do not fit, a factor that is not positive, what is wrong with the files, too little memory.
pub fn layer(
    number: u32,
    source: &mut LayerSource<'_>,
    [x, y]: [&[f32]; 2],
    routing: &RoutingDecision,
    options: Options,
    mut progress: impl FnMut(u64, u64),
) -> Result<LayerInspection> {
    let config = source.config().clone();
    check(&config, [x, y], routing)?;
    if let Some(factor) = options.capacity.filter(|factor| !(factor.is_finite() && *factor > 0.0)) {
        return Err(Error::config("capacity", factor, "a positive factor of the mean load"));
    }
    let weights_name = source.formats()?.name();
    let rows = options.similarity_rows.map(|rows| rows.max(1) as usize);
    let (weights, mut experts) = source.parts()?;
    let layer = experts::Layer { config: &config, weights, x, routing };
    let (contributions, similarity) = experts::examine(&layer, &mut experts, rows, &mut progress)?;
    let squares: f64 = y.iter().map(|&v| f64::from(v).powi(2)).sum();
    let token_entropy = routing::token_entropies(routing);
    let top_k = config.top_k() as usize;
    Ok(LayerInspection {
        layer: number,
        hidden_size: config.hidden_size(),
        intermediate_size: config.intermediate_size(),
        num_experts: config.num_experts(),
        top_k: config.top_k(),
        weights: weights_name,
        load: routing::load(routing),
        entropy: routing::distribution(&token_entropy, 0.0, f64::from(config.top_k()).log2()),
        token_entropy,
        weights_by_rank: routing::weights_by_rank(routing),
        coactivation: routing::coactivation(routing),
        contributions: Contributions { output_norm: squares.sqrt(), ..contributions },
        similarity,
        experts: signed(routing).chunks(top_k).map(<[i32]>::to_vec).collect(),
        expert_weights: routing.topk_weights.chunks(top_k).map(<[f32]>::to_vec).collect(),
        tokens_of_expert: routing::tokens_of_expert(routing),
        capacity: options.capacity.map(|factor| routing::capacity(routing, factor)),
    })
}

fn check(config: &MoeConfig, [x, y]: [&[f32]; 2], routing: &RoutingDecision) -> Result<()> {
    let [h, e, k] = [config.hidden_size(), config.num_experts(), config.top_k()].map(|n| n as usize);
    let tokens = routing.num_tokens;
    for (tensor, found, rows, columns) in [
        ("x", x.len(), tokens, h),
        ("y", y.len(), tokens, h),
        ("topk_experts", routing.topk_experts.len(), tokens, k),
        ("topk_weights", routing.topk_weights.len(), tokens, k),
        ("tokens_per_expert", routing.tokens_per_expert.len(), 1, e),
    ] {
        let expected = rows * columns;
        if found != expected {
            return Err(Error::LengthMismatch { tensor, shape: format!("[{rows}, {columns}]"), expected, found });
        }
    }
    if tokens == 0 {
        return Err(Error::config("num_tokens", 0, "at least 1: nothing can be said of no tokens"));
    }
    Ok(())
}

/// The experts of each token as signed numbers: -1 for nobody.
fn signed(routing: &RoutingDecision) -> Vec<i32> {
    routing.topk_experts.iter().map(|&e| i32::try_from(e).unwrap_or(-1)).collect()
}

impl Inspection {
    /// Its routing, to be replayed.
    pub fn trace(&self) -> Trace {
        let layer = |layer: &LayerInspection| TraceLayer {
            layer: layer.layer,
            num_experts: layer.num_experts,
            top_k: layer.top_k,
            experts: layer.experts.concat(),
            weights: Some(layer.expert_weights.concat()),
        };
        Trace {
            source: format!("{} on {}", self.input, self.file),
            labels: self.labels.clone(),
            layers: self.layers.iter().map(layer).collect(),
        }
    }
}
