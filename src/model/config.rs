//! The sizes of a layer, checked once.

use crate::error::{Error, Result};
use crate::model::activation::Activation;
use crate::model::routing::Routing;

/// Most experts in a layer. The router keeps one counter for each in workgroup memory.
pub const MAX_EXPERTS: u32 = 1024;
/// Most experts for a token.
pub const MAX_TOP_K: u32 = 32;
/// Largest hidden or intermediate size: several times that of any published layer.
pub const MAX_SIZE: u32 = 1 << 17;

/// A layer's sizes and semantics. Every value of this type describes a layer that can exist.
#[derive(Clone, Debug, PartialEq)]
pub struct MoeConfig {
    hidden_size: u32,
    intermediate_size: u32,
    num_experts: u32,
    top_k: u32,
    routing: Routing,
    activation: Activation,
}

impl MoeConfig {
    /// Checks the sizes: each at least 1, `hidden_size` and `intermediate_size` at most 2^17,
    /// `num_experts` at most 1024, `top_k` at most `min(num_experts, 32)`.
    pub fn new(
        hidden_size: u32,
        intermediate_size: u32,
        num_experts: u32,
        top_k: u32,
        routing: Routing,
        activation: Activation,
    ) -> Result<Self> {
        let range = |field, found: u32, most: u32| {
            if (1..=most).contains(&found) { Ok(()) } else { Err(Error::config(field, found, format!("1 to {most}"))) }
        };
        range("hidden_size", hidden_size, MAX_SIZE)?;
        range("intermediate_size", intermediate_size, MAX_SIZE)?;
        range("num_experts", num_experts, MAX_EXPERTS)?;
        if top_k == 0 || top_k > num_experts.min(MAX_TOP_K) {
            return Err(Error::config(
                "top_k",
                top_k,
                format!("1 to {} (num_experts is {num_experts}, the most is {MAX_TOP_K})", num_experts.min(MAX_TOP_K)),
            ));
        }
        Ok(Self { hidden_size, intermediate_size, num_experts, top_k, routing, activation })
    }

    /// Width of a token.
    pub fn hidden_size(&self) -> u32 {
        self.hidden_size
    }
    /// Inner width of one expert.
    pub fn intermediate_size(&self) -> u32 {
        self.intermediate_size
    }
    /// Experts in the layer.
    pub fn num_experts(&self) -> u32 {
        self.num_experts
    }
    /// Experts for each token.
    pub fn top_k(&self) -> u32 {
        self.top_k
    }
    /// How choices are made and weighted.
    pub fn routing(&self) -> Routing {
        self.routing
    }
    /// What an expert does between its projections.
    pub fn activation(&self) -> Activation {
        self.activation
    }
}
