//! The buffers that a layer keeps on a device, to the byte: what `gpu/weights.rs`, `gpu/layer.rs` and `gpu/layer/host.rs`
//! create for it, known before anything is created.

use super::variant::FEW_TOKENS;
use super::{LayerPlan, pad4};
use crate::error::Result;
use crate::kernels::router;
use serde::Serialize;

/// What a buffer is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// The layer's weights.
    Weights,
    /// Between the stages of a pass, and their parameters.
    Scratch,
    /// Input and output, on the device and on their way.
    InputOutput,
}

/// One buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Allocation {
    /// What it is for.
    pub purpose: Purpose,
    /// What dispatches call it.
    pub name: &'static str,
    /// Its size.
    pub bytes: u64,
}

/// Bytes by purpose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DeviceBytes {
    /// [`Purpose::Weights`]
    pub weights: u64,
    /// [`Purpose::Scratch`]
    pub scratch: u64,
    /// [`Purpose::InputOutput`]
    pub input_output: u64,
}

impl DeviceBytes {
    /// Sums up buffers.
    pub fn of(allocations: &[Allocation]) -> Self {
        let mut bytes = Self::default();
        allocations.iter().for_each(|allocation| bytes.add(allocation.purpose, allocation.bytes));
        bytes
    }

    pub(crate) fn add(&mut self, purpose: Purpose, bytes: u64) {
        match purpose {
            Purpose::Weights => self.weights += bytes,
            Purpose::Scratch => self.scratch += bytes,
            Purpose::InputOutput => self.input_output += bytes,
        }
    }

    /// All of them.
    pub fn total(&self) -> u64 {
        self.weights + self.scratch + self.input_output
    }
}

/// Uniforms of one pass share a buffer; each starts at a multiple of this.
pub(crate) const UNIFORM_ALIGNMENT: u64 = 256;

impl LayerPlan {
    /// Tokens that buffers are made for when `num_tokens` come first: a power of two, so that growing batches do not
    /// reallocate each time.
    pub(crate) fn capacity(&self, num_tokens: u32) -> u32 {
        let tokens = num_tokens.min(self.max_tokens());
        tokens.checked_next_power_of_two().unwrap_or(u32::MAX).min(self.max_tokens())
    }

    /// Every buffer that the layer keeps after a forward of `num_tokens` tokens by its own router. What a layer with only
    /// some of its experts on the device needs to bring others in is not counted.
    ///
    /// # Errors
    /// Those of [`LayerPlan::plan`].
    pub fn allocations(&self, num_tokens: u32) -> Result<Vec<Allocation>> {
        let c = self.config();
        let capacity = self.capacity(num_tokens);
        let mut all: Vec<Allocation> = Vec::new();
        let mut add = |purpose, name, bytes| all.push(Allocation { purpose, name, bytes });
        for matrix in self.matrices() {
            matrix.pages.iter().for_each(|page| add(Purpose::Weights, matrix.name, page.bytes));
        }
        for (name, words) in self.vectors() {
            add(Purpose::Weights, name, words * 4);
        }
        for buffer in self.scratch(capacity) {
            add(Purpose::Scratch, buffer.name, buffer.bytes);
        }
        add(Purpose::Scratch, "identity", u64::from(FEW_TOKENS * c.top_k()) * 4);
        let mut sizes: Vec<u32> = self.passes(num_tokens).map(|(_, tokens)| tokens).collect();
        sizes.sort_unstable();
        sizes.dedup();
        for tokens in sizes {
            add(Purpose::Scratch, "params", self.plan(tokens)?.dispatches.len() as u64 * UNIFORM_ALIGNMENT);
        }
        let tokens = u64::from(capacity) * u64::from(c.hidden_size()) * 4;
        // y comes back with the status words.
        for (name, bytes) in [("x", tokens), ("y", tokens), ("x upload", tokens), ("y download", tokens + 16)] {
            add(Purpose::InputOutput, name, bytes);
        }
        if self.places().is_some() {
            add(Purpose::InputOutput, "choices", u64::from(capacity) * u64::from(c.top_k()) * 4);
        }
        Ok(all)
    }

    /// Words of everything that is no packed matrix.
    fn vectors(&self) -> Vec<(&'static str, u64)> {
        let (c, tensors, extras) = (self.config(), self.tensors(), self.config().extras());
        let [h, d, e, weighted] =
            [c.hidden_size(), c.expert_size(), c.num_experts(), c.num_weighted_experts()].map(u64::from);
        let padded = |n: u32| u64::from(pad4(n));
        let columns = padded(c.intermediate_size()) * if c.activation().is_gated() { 2 } else { 1 };
        let table = c.vocab_size().map_or(0, u64::from) * u64::from(c.top_k());
        [
            (true, "router_weights", u64::from(router::num_rows(c)) * padded(c.hidden_size())),
            (true, "router_vectors", 3 * e),
            (tensors.up_bias, "gate_up_bias", weighted * columns),
            (tensors.down_bias, "down_bias", weighted * padded(c.expert_size())),
            (tensors.output_bias, "output_bias", padded(c.hidden_size())),
            (table > 0, "table", table),
            (extras.router_norm.is_some(), "router_norm", h),
            (extras.expert_norm.is_some(), "expert_norm", d),
            (extras.expert_out_norm.is_some(), "expert_out_norm", d),
            (extras.routed_norm.is_some(), "routed_norm", h),
            (extras.output_norm.is_some(), "output_norm", h),
            (self.places().is_some(), "place_of_expert", e),
        ]
        .into_iter()
        .filter_map(|(there, name, words)| there.then_some((name, words)))
        .collect()
    }
}
