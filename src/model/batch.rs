//! What a pass gets: activations, and for some routers more than that.

use crate::error::{Error, Result};
use crate::model::config::{MoeConfig, SharedGate};
use crate::model::routing::{NonFinite, Selection};
use crate::model::weights::check_finite;

/// The input of one pass. `Batch::from(&x[..])` is all that most layers need.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch<'a> {
    /// `[num_tokens, hidden_size]`
    pub x: &'a [f32],
    /// Tokens of each sequence of the batch, which all have the same length; `None`: the batch is one sequence. Only a
    /// capacity per sequence and the statistics look at it.
    pub tokens_per_sequence: Option<u32>,
    /// `[num_tokens]`, for routers that choose by a token table.
    pub token_ids: Option<&'a [u32]>,
    /// `[num_tokens, top_k]`, for routers whose choices are given; -1: nobody.
    pub experts: Option<&'a [i32]>,
    /// Turns the router's noise on. The same seed gives the same noise.
    pub seed: Option<u64>,
    /// Who routes.
    pub front: Front<'a>,
}

/// Where a pass begins: a router that is a network of its own can stand in front of the layer.
#[derive(Clone, Copy, Debug, Default)]
pub enum Front<'a> {
    /// With the layer's own router.
    #[default]
    Router,
    /// With these logits, after scale and cap: `[num_tokens, num_experts]`. Scores, selection, weights and capacity
    /// are the layer's. Minus infinity masks an expert.
    Logits(&'a [f32]),
    /// With these choices and final weights, each `[num_tokens, top_k]`; expert -1: nobody. No capacity is applied.
    Assignments {
        /// Below `num_experts`, or -1.
        experts: &'a [i32],
        /// Of each choice.
        weights: &'a [f32],
    },
}

impl<'a> From<&'a [f32]> for Batch<'a> {
    fn from(x: &'a [f32]) -> Self {
        Self { x, ..Self::default() }
    }
}

impl<'a, const N: usize> From<&'a [f32; N]> for Batch<'a> {
    fn from(x: &'a [f32; N]) -> Self {
        Self { x, ..Self::default() }
    }
}

impl<'a> From<&'a Vec<f32>> for Batch<'a> {
    fn from(x: &'a Vec<f32>) -> Self {
        Self { x, ..Self::default() }
    }
}

impl Batch<'_> {
    /// The number of tokens, if everything that `config` needs is there, has the right length and is in range, and all
    /// numbers are finite.
    pub fn check(&self, config: &MoeConfig) -> Result<u32> {
        self.check_for(config, NonFinite::Error)
    }

    /// As [`Batch::check`]; only [`NonFinite::Error`] asks for finite activations and logits.
    pub(crate) fn check_for(&self, config: &MoeConfig, non_finite: NonFinite) -> Result<u32> {
        let must_be_finite = non_finite == NonFinite::Error;
        let [h, e, k] = [config.hidden_size(), config.num_experts(), config.top_k()].map(|n| n as usize);
        if !self.x.len().is_multiple_of(h) || u32::try_from(self.x.len() / h).is_err() {
            let (shape, expected) = (format!("[num_tokens, {h}]"), self.x.len().div_ceil(h) * h);
            return Err(Error::LengthMismatch { tensor: "x", shape, expected, found: self.x.len() });
        }
        if must_be_finite {
            check_finite("x", self.x)?;
        }
        let tokens = self.x.len() / h;
        let length = |tensor, found: usize, columns: usize| {
            let shape = format!("[{tokens}, {columns}]");
            if found == tokens * columns {
                Ok(())
            } else {
                Err(Error::LengthMismatch { tensor, shape, expected: tokens * columns, found })
            }
        };
        let ids = |field, experts: &[i32]| match experts.iter().find(|&&id| id < -1 || id >= e as i32) {
            Some(id) => Err(Error::config(field, id, format!("-1 for nobody, or an expert from 0 to {}", e - 1))),
            None => Ok(()),
        };
        if let Some(sequence) = self.tokens_per_sequence
            && (sequence == 0 || !tokens.is_multiple_of(sequence as usize))
        {
            return Err(Error::config("tokens_per_sequence", sequence, format!("a divisor of the {tokens} tokens")));
        }
        match self.front {
            Front::Router => {}
            Front::Logits(logits) => {
                length("logits", logits.len(), e)?;
                let bad = logits.iter().position(|l| l.is_nan() || *l == f32::INFINITY);
                if let Some(index) = bad.filter(|_| must_be_finite) {
                    return Err(Error::NonFinite { tensor: "logits".to_owned(), index, value: logits[index] });
                }
            }
            Front::Assignments { experts, weights } => {
                length("experts", experts.len(), k)?;
                length("weights", weights.len(), k)?;
                check_finite("weights", weights)?;
                ids("experts", experts)?;
                if config.extras().shared.is_some_and(|shared| shared.gate == SharedGate::Joint) {
                    return Err(Error::Unsupported {
                        what: "assignments from the caller".to_owned(),
                        by: "by a layer that weights shared experts together with the chosen ones".to_owned(),
                        hint: "give logits instead".to_owned(),
                    });
                }
                return Ok(tokens as u32);
            }
        }
        match (config.routing().selection, self.token_ids, self.experts) {
            (Selection::TokenTable { vocab_size }, Some(token_ids), _) => {
                length("token_ids", token_ids.len(), 1)?;
                if let Some(id) = token_ids.iter().find(|&&id| id >= vocab_size) {
                    return Err(Error::config("token_ids", id, format!("below the table's {vocab_size} rows")));
                }
            }
            (Selection::TokenTable { .. }, None, _) => {
                return Err(Error::config("token_ids", "missing", "one for each token: this layer routes by them"));
            }
            (Selection::Given, _, Some(experts)) => {
                length("experts", experts.len(), k)?;
                ids("experts", experts)?;
            }
            (Selection::Given, _, None) => {
                return Err(Error::config(
                    "experts",
                    "missing",
                    "top_k for each token: this layer is told its choices",
                ));
            }
            _ => {}
        }
        Ok(tokens as u32)
    }
}
