//! Golden cases: one MoE block with an input and the output that somebody else's implementation computed for it.
//!
//! A case passes if `max |y - y_ref| / max |y_ref|` is within the tolerance, and each token got the same set of
//! experts with the same weights. Order within a token means nothing. Of assignments that nobody computes only the
//! number counts: implementations differ in which weight they still report for them.
//!
//! # Near-ties
//! Two correct implementations can choose differently where two ranks are almost equal, and then whole rows of `y`
//! differ. Such a case proves nothing either way, so it never passes: [`compare`] still reports it as failed, but
//! the reason says that the file's own logits are too close to decide. A useful golden file has no such token.
//! Where groups decide too, nothing is said about ties.

use crate::error::{Error, Result};
use crate::model::batch::Batch;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::MoeConfig;
use crate::model::family::Family;
use crate::model::routing::{DROPPED, RankBy, RoutingDecision, Scores, Selection};
use crate::model::statistics::Statistics;
use crate::model::tensor_file::TensorFile;
use crate::model::weights::MoeWeights;
use crate::reference::router::{Logits, route};
use std::path::{Path, PathBuf};

/// Default bound on `max |y - y_ref| / max |y_ref|` and on each expert weight's absolute error.
pub const TOLERANCE: f64 = 1e-5;
/// Ranks closer than this, relative to the token's largest magnitude, are a near-tie.
const NEAR_TIE: f64 = 1e-5;

const INPUT: &str = "io.hidden_states";
const OUTPUT: &str = "io.output";
const EXPERTS: &str = "io.topk_indices";
const WEIGHTS: &str = "io.topk_weights";
const LOGITS: &str = "io.router_logits";
const TOKEN_IDS: &str = "io.input_ids";
const SHARED_WEIGHTS: &str = "io.shared_gammas";
const BALANCE_LOSS: &str = "aux.load_balancing_loss";
const Z_LOSS: &str = "aux.router_z_loss";

/// A golden file in memory.
#[derive(Clone, Debug)]
pub struct GoldenCase {
    /// Where it comes from.
    pub file: PathBuf,
    /// The family's name.
    pub family: String,
    /// What the configuration calls the model.
    pub model_type: Option<String>,
    /// The layout that the weights were stored in.
    pub layout: String,
    /// Sizes and semantics.
    pub config: MoeConfig,
    /// The block's weights.
    pub weights: MoeWeights,
    /// `[num_tokens, hidden_size]`
    pub x: Vec<f32>,
    /// Rows of `x`.
    pub num_tokens: usize,
    /// Tokens of each sequence, where the input has sequences.
    pub tokens_per_sequence: Option<u32>,
    /// Number of the layer in its model.
    pub layer: u32,
    /// Ids of the tokens: `[num_tokens]`
    pub token_ids: Option<Vec<u32>>,
    /// The choices, for layers that are told them: `[num_tokens, top_k]`
    pub given_experts: Option<Vec<i32>>,
    /// The expected output: `[num_tokens, hidden_size]`
    pub y: Vec<f32>,
    /// Expected choices, order within a token arbitrary, [`DROPPED`] for nobody: `[num_tokens, top_k]`
    pub topk_experts: Option<Vec<u32>>,
    /// Weights of those choices: `[num_tokens, top_k]`
    pub topk_weights: Option<Vec<f32>>,
    /// The other implementation's logits: `[num_tokens, num_experts]`
    pub router_logits: Option<Vec<f32>>,
    /// Weights of shared experts that the router gates: `[num_tokens, num_shared]`
    pub shared_weights: Option<Vec<f32>>,
    /// An auxiliary loss: how unevenly experts are used.
    pub load_balancing_loss: Option<f32>,
    /// An auxiliary loss: how large logits are.
    pub router_z_loss: Option<f32>,
}

impl GoldenCase {
    /// Reads a golden file; the family is detected from its configuration unless one is given.
    ///
    /// # Errors
    /// Those of [`Checkpoint::load_layer`]; [`Error::MissingTensor`] without input or output; [`Error::BadTensor`] if
    /// shapes disagree.
    pub fn read(path: &Path, family: Option<&Family>) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let layer = match checkpoint.metadata("layer_idx") {
            None => 0,
            Some(text) => text.parse().map_err(|_| Error::BadFile {
                path: path.to_owned(),
                message: format!("metadata layer_idx is {text:?}, expected a number"),
            })?,
        };
        let loaded = checkpoint.load_layer(family, layer)?;
        let mut file = TensorFile::open(path)?;
        let [h, top_k, num_experts] =
            [loaded.config.hidden_size(), loaded.config.top_k(), loaded.config.num_experts()].map(|n| n as usize);

        let shape = file.info(INPUT)?.shape.clone();
        if shape.last() != Some(&h) {
            return Err(file.mismatch(INPUT, &format!("[.., hidden_size = {h}]")));
        }
        let num_tokens = shape[..shape.len() - 1].iter().product();
        let mut x = Vec::new();
        file.read_f32(INPUT, 0..num_tokens * h, &mut x)?;
        file.expect(OUTPUT, &shape)?;
        let mut y = Vec::new();
        file.read_f32(OUTPUT, 0..num_tokens * h, &mut y)?;
        let tokens_per_sequence = match shape.as_slice() {
            [.., sequence, _] if shape.len() > 2 => u32::try_from(*sequence).ok(),
            _ => None,
        };
        let topk_experts = read_experts(&mut file, [num_tokens, top_k], num_experts)?;
        let given_experts = topk_experts
            .as_ref()
            .filter(|_| loaded.config.routing().selection == Selection::Given)
            .map(|experts| experts.iter().map(|&e| i32::try_from(e).unwrap_or(-1)).collect());
        let num_shared = loaded.config.num_gated_shared() as usize;
        Ok(Self {
            file: path.to_owned(),
            family: loaded.family,
            model_type: loaded.model_type,
            layout: loaded.layout,
            config: loaded.config,
            weights: loaded.weights,
            x,
            num_tokens,
            layer,
            tokens_per_sequence,
            token_ids: read_token_ids(&mut file, num_tokens)?,
            given_experts,
            y,
            topk_experts,
            topk_weights: read_optional(&mut file, WEIGHTS, [num_tokens, top_k])?,
            router_logits: read_optional(&mut file, LOGITS, [num_tokens, num_experts])?,
            shared_weights: read_optional(&mut file, SHARED_WEIGHTS, [num_tokens, num_shared])?,
            load_balancing_loss: read_number(&mut file, BALANCE_LOSS)?,
            router_z_loss: read_number(&mut file, Z_LOSS)?,
        })
    }

    /// The case's input, as an engine takes it.
    pub fn batch(&self) -> Batch<'_> {
        Batch {
            tokens_per_sequence: self.tokens_per_sequence,
            token_ids: self.token_ids.as_deref(),
            experts: self.given_experts.as_deref(),
            ..Batch::from(&self.x)
        }
    }

    /// What the choices of each token are made by, `[num_tokens, num_experts]`, from the file's own logits. `None`
    /// without logits, and where something else decides too: groups, a table, the caller.
    fn ranks(&self) -> Option<Vec<f64>> {
        let routing = self.config.routing();
        let own = matches!(routing.selection, Selection::TopK | Selection::Sparsemixer { .. });
        let logits = self.router_logits.as_ref().filter(|_| own && routing.groups.is_none())?;
        let experts: Vec<f64> = logits.iter().map(|&l| f64::from(l)).collect();
        let by_logits = routing.rank_by == RankBy::Logits || routing.scores == Scores::SoftmaxSelected;
        let mut ranks = if by_logits {
            experts
        } else {
            let logits =
                Logits { experts, shared: vec![0.0; self.num_tokens * self.config.num_gated_shared() as usize] };
            route(&self.config, &self.weights, logits, &self.batch()).router_probs
        };
        if let Some(bias) = &self.weights.extras.selection_bias {
            for (at, rank) in ranks.iter_mut().enumerate() {
                *rank += f64::from(bias[at % bias.len()]);
            }
        }
        Some(ranks)
    }

    /// The smallest gap between the last chosen and the first rejected rank of any token, relative to the token's
    /// largest magnitude. `None` without logits, if every expert is chosen, or where more than ranks decides.
    pub fn smallest_gap(&self) -> Option<f64> {
        let (num_experts, top_k) = (self.config.num_experts() as usize, self.config.top_k() as usize);
        let ranks = self.ranks().filter(|_| top_k < num_experts)?;
        let gaps = ranks.chunks_exact(num_experts).map(|ranks| {
            let mut sorted = ranks.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            gap(ranks, sorted[top_k - 1], sorted[top_k])
        });
        gaps.min_by(f64::total_cmp)
    }
}

/// The outcome of a comparison.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// `max |y - y_ref| / max |y_ref|`; NaN if either holds one, infinite if lengths differ.
    pub max_rel_error: f64,
    /// The first thing that is wrong, with numbers. `None`: the case passes.
    pub reason: Option<String>,
}

impl Verdict {
    /// Nothing is wrong.
    pub fn passed(&self) -> bool {
        self.reason.is_none()
    }
}

/// Compares an engine's `y [num_tokens, hidden_size]` and routing with the file's.
/// `tolerance` bounds the relative error of `y` and the absolute error of each weight. NaN never passes.
///
/// Routing is looked at first, because a different choice explains a different `y`. What the file does not record is
/// not compared.
pub fn compare(case: &GoldenCase, y: &[f32], routing: &RoutingDecision, tolerance: f64) -> Verdict {
    let (max_rel_error, y_reason) = compare_output(case, y, tolerance);
    Verdict { max_rel_error, reason: compare_routing(case, routing, tolerance).or(y_reason) }
}

fn compare_output(case: &GoldenCase, y: &[f32], tolerance: f64) -> (f64, Option<String>) {
    if y.len() != case.y.len() {
        let reason = format!("y has {} elements, expected {}", y.len(), case.y.len());
        return (f64::INFINITY, Some(reason));
    }
    let scale = case.y.iter().map(|v| f64::from(v.abs())).fold(0.0, f64::max);
    let mut worst = (0.0, 0);
    for (index, (&found, &expected)) in y.iter().zip(&case.y).enumerate() {
        let error = (f64::from(found) - f64::from(expected)).abs();
        if error.is_nan() {
            worst = (error, index);
            break;
        }
        if error > worst.0 {
            worst = (error, index);
        }
    }
    let (error, index) = worst;
    // An expected output of nothing but zeros leaves no scale; then any error at all is infinite.
    let relative = if error == 0.0 { 0.0 } else { error / scale };
    if relative <= tolerance {
        return (relative, None);
    }
    let h = case.config.hidden_size() as usize;
    let reason = format!(
        "y[{}, {}] is {}, expected {}: relative error {relative:.2e}, tolerance {tolerance:.0e}",
        index / h,
        index % h,
        y[index],
        case.y[index]
    );
    (relative, Some(reason))
}

fn compare_routing(case: &GoldenCase, routing: &RoutingDecision, tolerance: f64) -> Option<String> {
    let expected_experts = case.topk_experts.as_ref()?;
    let top_k = case.config.top_k() as usize;
    let lengths = [routing.num_tokens * top_k, routing.topk_experts.len(), routing.topk_weights.len()];
    if lengths.iter().any(|&length| length != expected_experts.len()) {
        return Some(format!(
            "the routing has {} tokens, {} experts and {} weights, expected {} tokens of {top_k}",
            routing.num_tokens, lengths[1], lengths[2], case.num_tokens
        ));
    }
    for t in 0..case.num_tokens {
        let range = t * top_k..(t + 1) * top_k;
        let found = by_expert(&routing.topk_experts[range.clone()]);
        let expected = by_expert(&expected_experts[range.clone()]);
        let experts = |order: &[(u32, usize)]| order.iter().map(|&(expert, _)| expert).collect::<Vec<_>>();
        let [found_set, expected_set] = [experts(&found), experts(&expected)];
        if found_set != expected_set {
            let text = |set: &[u32]| {
                let name = |&e: &u32| if e == DROPPED { "dropped".to_owned() } else { e.to_string() };
                format!("[{}]", set.iter().map(name).collect::<Vec<_>>().join(", "))
            };
            return Some(format!(
                "token {t} got experts {}, expected {}{}",
                text(&found_set),
                text(&expected_set),
                near_tie(case, t, &found_set, &expected_set)
            ));
        }
        let Some(expected_weights) = &case.topk_weights else { continue };
        let computed = found.iter().zip(&expected).filter(|((expert, _), _)| *expert != DROPPED);
        for (&(expert, j), &(_, expected_j)) in computed {
            let weight = routing.topk_weights[range.start + j];
            let expected = expected_weights[range.start + expected_j];
            let error = (f64::from(weight) - f64::from(expected)).abs();
            if error.is_nan() || error > tolerance {
                return Some(format!(
                    "token {t} gives expert {expert} weight {weight}, expected {expected}: error {error:.2e}, \
                     tolerance {tolerance:.0e}"
                ));
            }
        }
    }
    compare_shared(case, routing, tolerance)
}

/// Weights of shared experts that the router gates, if the file has them.
fn compare_shared(case: &GoldenCase, routing: &RoutingDecision, tolerance: f64) -> Option<String> {
    let expected = case.shared_weights.as_ref().filter(|weights| !weights.is_empty())?;
    if routing.shared_weights.len() != expected.len() {
        return Some(format!(
            "the routing has {} shared weights, expected {}",
            routing.shared_weights.len(),
            expected.len()
        ));
    }
    let num_shared = expected.len() / case.num_tokens.max(1);
    for (at, (found, expected)) in routing.shared_weights.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - f64::from(*expected)).abs();
        if error.is_nan() || error > tolerance {
            let (t, s) = (at / num_shared, at % num_shared);
            return Some(format!(
                "token {t} gives shared expert {s} weight {found}, expected {expected}: error {error:.2e}"
            ));
        }
    }
    None
}

/// Compares the file's auxiliary losses, as far as it has any, with those of a pass: the first that is wrong. A file
/// with a z-loss comes from code of the Switch family, whose balance loss is Switch's.
pub fn compare_losses(case: &GoldenCase, statistics: &Statistics, tolerance: f64) -> Option<String> {
    let balance = match case.router_z_loss {
        Some(_) => statistics.switch_load_balancing_loss,
        None => statistics.load_balancing_loss,
    };
    let losses = [
        ("load balancing loss", case.load_balancing_loss, balance),
        ("router z-loss", case.router_z_loss, statistics.router_z_loss),
    ];
    losses.into_iter().find_map(|(name, expected, found)| {
        let expected = f64::from(expected?);
        let error = (found - expected).abs() / expected.abs().max(1.0);
        let fits = error <= tolerance;
        (!fits).then(|| format!("{name} {found}, expected {expected}: relative error {error:.2e}"))
    })
}

/// `(expert, position)` of one token's choices, by expert.
fn by_expert(experts: &[u32]) -> Vec<(u32, usize)> {
    let mut order: Vec<(u32, usize)> = experts.iter().copied().zip(0..).collect();
    order.sort_unstable();
    order
}

/// The end of a sentence about token `t` if every expert that was swapped has a rank close to that of an expert it
/// replaced.
fn near_tie(case: &GoldenCase, t: usize, found: &[u32], expected: &[u32]) -> String {
    let num_experts = case.config.num_experts() as usize;
    let all = case.ranks();
    let Some(ranks) = all.as_ref().and_then(|all| all.get(t * num_experts..(t + 1) * num_experts)) else {
        return String::new();
    };
    let rank = |&&expert: &&u32| ranks.get(expert as usize).copied().unwrap_or(f64::NAN);
    let wrong = found.iter().filter(|expert| !expected.contains(expert)).map(|e| rank(&e));
    let missing: Vec<f64> = expected.iter().filter(|expert| !found.contains(expert)).map(|e| rank(&e)).collect();
    let mut worst: f64 = 0.0;
    for wrong in wrong {
        let nearest = missing.iter().map(|&right| gap(ranks, right, wrong)).fold(f64::INFINITY, f64::min);
        worst = worst.max(nearest);
    }
    // No swapped expert at all means that one was chosen twice: nothing to do with ties.
    if missing.is_empty() || worst >= NEAR_TIE || found.windows(2).any(|pair| pair[0] == pair[1]) {
        return String::new();
    }
    format!(" (a near-tie: the file's own logits differ by {worst:.1e} there, so the case cannot decide who is right)")
}

/// `|a - b|` relative to the token's largest rank.
fn gap(ranks: &[f64], a: f64, b: f64) -> f64 {
    let scale = ranks.iter().map(|v| v.abs()).fold(f64::MIN_POSITIVE, f64::max);
    (a - b).abs() / scale
}

/// A tensor of one element.
fn read_number(file: &mut TensorFile, name: &str) -> Result<Option<f32>> {
    if !file.tensors.contains_key(name) {
        return Ok(None);
    }
    if file.info(name)?.shape.iter().product::<usize>() != 1 {
        return Err(file.mismatch(name, "one number"));
    }
    let mut values = Vec::new();
    file.read_f32(name, 0..1, &mut values)?;
    Ok(values.first().copied())
}

fn read_token_ids(file: &mut TensorFile, num_tokens: usize) -> Result<Option<Vec<u32>>> {
    if !file.tensors.contains_key(TOKEN_IDS) {
        return Ok(None);
    }
    if file.info(TOKEN_IDS)?.shape.iter().product::<usize>() != num_tokens {
        return Err(file.mismatch(TOKEN_IDS, &format!("{num_tokens} ids")));
    }
    let ids = file.read_integers(TOKEN_IDS)?;
    let id = |id: i64| u32::try_from(id).map_err(|_| file.mismatch(TOKEN_IDS, &format!("ids of tokens, not {id}")));
    ids.into_iter().map(id).collect::<Result<_>>().map(Some)
}

fn read_optional(file: &mut TensorFile, name: &str, shape: [usize; 2]) -> Result<Option<Vec<f32>>> {
    if !file.tensors.contains_key(name) {
        return Ok(None);
    }
    file.expect(name, &shape)?;
    let mut values = Vec::new();
    file.read_f32(name, 0..shape[0] * shape[1], &mut values)?;
    Ok(Some(values))
}

fn read_experts(file: &mut TensorFile, shape: [usize; 2], num_experts: usize) -> Result<Option<Vec<u32>>> {
    if !file.tensors.contains_key(EXPERTS) {
        return Ok(None);
    }
    if file.info(EXPERTS)?.shape != shape {
        return Err(file.mismatch(EXPERTS, &format!("shape {shape:?}")));
    }
    let experts = file.read_integers(EXPERTS)?;
    let in_range = |(index, expert): (usize, i64)| match u32::try_from(expert) {
        Ok(expert) if (expert as usize) < num_experts => Ok(expert),
        _ if expert == -1 => Ok(DROPPED),
        _ => Err(file.mismatch(EXPERTS, &format!("0 to {} everywhere (element {index} is {expert})", num_experts - 1))),
    };
    experts.into_iter().enumerate().map(in_range).collect::<Result<_>>().map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::activation::Activation;
    use crate::model::routing::Routing;

    /// 2 tokens, 2 of 3 experts, hidden size 2. Only what [`compare`] looks at is meaningful.
    fn case() -> (GoldenCase, Vec<f32>, RoutingDecision) {
        let routing = Routing::softmax(true);
        let config = MoeConfig::new(2, 1, 3, 2, routing, Activation::SWIGLU).expect("valid sizes");
        let y = vec![1.0, -2.0, 0.5, 0.25];
        let case = GoldenCase {
            file: PathBuf::from("case"),
            family: "test".to_owned(),
            model_type: None,
            layout: "hub".to_owned(),
            layer: 0,
            config,
            weights: MoeWeights {
                router: vec![],
                router_bias: None,
                gate_proj: vec![],
                up_proj: vec![],
                down_proj: vec![],
                ..MoeWeights::default()
            },
            x: vec![0.0; 4],
            num_tokens: 2,
            tokens_per_sequence: None,
            token_ids: None,
            given_experts: None,
            y: y.clone(),
            topk_experts: Some(vec![1, 0, 2, 1]),
            topk_weights: Some(vec![0.75, 0.25, 0.5, 0.5]),
            router_logits: Some(vec![1.0, 2.0, 0.9999999, 0.0, 2.0, 2.0]),
            shared_weights: None,
            load_balancing_loss: None,
            router_z_loss: None,
        };
        // The first token's choices in the other order: the same set.
        let decision = RoutingDecision {
            num_tokens: 2,
            topk_experts: vec![0, 1, 2, 1],
            topk_weights: vec![0.25, 0.75, 0.5, 0.5],
            ..RoutingDecision::default()
        };
        (case, y, decision)
    }

    fn reason(case: &GoldenCase, y: &[f32], routing: &RoutingDecision) -> String {
        compare(case, y, routing, TOLERANCE).reason.expect("this must fail")
    }

    #[test]
    fn the_same_numbers_in_another_order_pass() {
        let (case, y, routing) = case();
        assert_eq!(compare(&case, &y, &routing, TOLERANCE), Verdict { max_rel_error: 0.0, reason: None });
    }

    #[test]
    fn one_flipped_element_fails() {
        let (case, mut y, routing) = case();
        y[3] = -y[3];
        let verdict = compare(&case, &y, &routing, TOLERANCE);
        assert_eq!(verdict.max_rel_error, 0.25);
        assert!(verdict.reason.expect("fails").starts_with("y[1, 1] is -0.25, expected 0.25"));
    }

    #[test]
    fn nan_infinity_and_a_short_buffer_fail() {
        let (case, y, routing) = case();
        for (index, value) in [(0, f32::NAN), (3, f32::NAN), (0, f32::INFINITY)] {
            let mut y = y.clone();
            y[index] = value;
            assert!(!compare(&case, &y, &routing, TOLERANCE).passed(), "{value} at {index}");
        }
        assert!(reason(&case, &y[..3], &routing).contains("y has 3 elements, expected 4"));
        assert!(reason(&case, &[], &routing).contains("y has 0 elements"));
    }

    #[test]
    fn a_zero_output_allows_no_error() {
        let (mut case, _, routing) = case();
        case.y = vec![0.0; 4];
        assert!(compare(&case, &[0.0; 4], &routing, TOLERANCE).passed());
        assert_eq!(compare(&case, &[0.0, 0.0, 0.0, 1e-30], &routing, TOLERANCE).max_rel_error, f64::INFINITY);
    }

    #[test]
    fn a_swapped_expert_fails() {
        let (case, y, mut routing) = case();
        routing.topk_experts[3] = 0;
        let reason = reason(&case, &y, &routing);
        assert_eq!(reason, "token 1 got experts [0, 2], expected [1, 2]");
    }

    #[test]
    fn a_near_tie_fails_too_and_says_why() {
        let (case, y, mut routing) = case();
        routing.topk_experts[0] = 2;
        assert!(reason(&case, &y, &routing).contains("near-tie"));
        routing.topk_experts[0] = 1;
        let twice = reason(&case, &y, &routing);
        assert!(!twice.contains("near-tie"), "an expert chosen twice is no tie: {twice}");
    }

    #[test]
    fn a_wrong_weight_fails() {
        let (case, y, mut routing) = case();
        routing.topk_weights[1] += 1e-4;
        assert!(reason(&case, &y, &routing).contains("token 0 gives expert 1 weight 0.7501, expected 0.75"));
        routing.topk_weights[1] = f32::NAN;
        assert!(reason(&case, &y, &routing).contains("NaN"));
    }

    #[test]
    fn missing_routing_fails() {
        let (case, y, mut routing) = case();
        routing.topk_experts.pop();
        assert!(reason(&case, &y, &routing).contains("3 experts"));
    }
}
