//! Choices that were measured on a device, by the shape of the work. What makes them is `crate::tune`; this is what a
//! plan looks them up in.

use super::DeviceProfile;
use super::variant::{self, FEW_TOKENS};
use crate::error::{Error, Result};
use crate::kernels::matmul::MatmulChoice;
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Work that the same choice is best for, as far as we know: a pure function of layer and batch.
///
/// What a choice trades is reuse of a weight against idle lanes, so it depends on how many rows share a weight, and
/// on how long rows and outputs are. Numbers are rounded up to powers of two, the steps in which tiles grow: finer
/// ones would leave most layers without a measurement, and neighbours hardly differ. Few tokens are kept apart,
/// because only they can do without a sort.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShapeClass {
    /// At most [`FEW_TOKENS`] tokens.
    pub few_tokens: bool,
    /// Mean rows of the experts that can have one.
    pub rows_per_expert: u32,
    /// Inputs of an expert: of a layer with a latent space, its size.
    pub hidden_size: u32,
    /// Inner width of an expert.
    pub intermediate_size: u32,
}

impl ShapeClass {
    /// The class of a pass of `num_tokens` tokens.
    pub fn of(config: &MoeConfig, num_tokens: u32) -> Self {
        Self::with_experts(config, config.num_weighted_experts(), num_tokens)
    }

    /// The same for a layer that chooses as if it had this many experts with weights.
    pub(super) fn with_experts(config: &MoeConfig, experts: u32, num_tokens: u32) -> Self {
        let bucket = |n: u32| n.max(1).checked_next_power_of_two().unwrap_or(1 << 31);
        Self {
            few_tokens: num_tokens <= FEW_TOKENS,
            rows_per_expert: bucket(variant::rows_per_expert(config.top_k(), experts, num_tokens)),
            hidden_size: bucket(config.expert_size()),
            intermediate_size: bucket(config.intermediate_size()),
        }
    }

    /// It is the class of something.
    fn check(&self) -> Result<()> {
        for (field, size) in [
            ("rows_per_expert", self.rows_per_expert),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
        ] {
            if !size.is_power_of_two() {
                return Err(Error::config(field, size, "a power of two, as in every shape class"));
            }
        }
        Ok(())
    }
}

impl std::fmt::Display for ShapeClass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let tokens = if self.few_tokens { "few tokens, " } else { "" };
        write!(f, "{tokens}{} rows, {}x{}", self.rows_per_expert, self.hidden_size, self.intermediate_size)
    }
}

/// The best choice of each class and weight format that was measured.
///
/// Of a layer whose projections are stored differently, the format of the first ones counts: they are most of the work.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TunedChoices(HashMap<(ShapeClass, WeightFormat), MatmulChoice>);

impl TunedChoices {
    /// Adds one. `false`: there is one already, and it stays.
    pub fn insert(&mut self, shape: ShapeClass, format: WeightFormat, choice: MatmulChoice) -> bool {
        let is_new = !self.0.contains_key(&(shape, format));
        self.0.entry((shape, format)).or_insert(choice);
        is_new
    }

    /// The choice for this work, if it was measured.
    pub fn get(&self, shape: ShapeClass, format: WeightFormat) -> Option<MatmulChoice> {
        self.0.get(&(shape, format)).copied()
    }

    /// Every one is a choice that the device can run, and that a pass of its class can.
    pub fn check(&self, device: &DeviceProfile) -> Result<()> {
        self.0.iter().try_for_each(|((shape, _), &choice)| check(*shape, choice, device))
    }
}

/// A choice from outside is held to what a caller's own choice is held to.
pub(crate) fn check(shape: ShapeClass, choice: MatmulChoice, device: &DeviceProfile) -> Result<()> {
    shape.check()?;
    if !shape.few_tokens && !choice.sorted() {
        let expected = format!("sorted: true above {FEW_TOKENS} tokens");
        return Err(Error::config("tile", format!("{choice:?} for a class of many tokens"), expected));
    }
    variant::check_choice(choice, device)
}
