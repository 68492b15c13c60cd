//! What the dispatches of a pass request from memory, beside the least that their stages have to move.
//!
//! A request is a byte that one workgroup reads or writes. What a workgroup touches more than once counts once: it is in
//! its registers, in workgroup memory or in the cache next to it. What several workgroups touch counts for each of them,
//! though a larger cache may hold it. So this is what a stage would cost a device without caches that workgroups share,
//! and a stage whose requests are many times its least bytes lives on such caches.
//!
//! Uniforms, biases and the router's vectors are left out: a number for each expert or column, beside rows of them.

use super::{Dispatch, Plan, TILE_BYTES};
use crate::kernels::params::{MatmulParams, MoeParams, RouterParams, Uniform};
use crate::kernels::{Stage, combine, router};

/// What one stage requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageRequests {
    /// The stage's name, as dispatches are called.
    pub name: &'static str,
    /// Dispatches of that name.
    pub dispatches: u32,
    /// Bytes read and written.
    pub bytes: u64,
}

/// Rows of each of `num_experts` experts under even routing: as equal as they can be, and none without one if there are
/// enough.
pub fn even_rows(num_assignments: u32, num_experts: u32) -> Vec<u32> {
    let (each, more) = (num_assignments / num_experts.max(1), num_assignments % num_experts.max(1));
    (0..num_experts).map(|expert| each + u32::from(expert < more)).collect()
}

impl Plan {
    /// What the stages of [`Plan::stages`] request, where expert `e` has `rows_of_expert[e]` rows: the tokens per expert
    /// of a pass that ran, or [`even_rows`]. Of a layer that has all its experts on the device.
    pub fn requests(&self, rows_of_expert: &[u32]) -> Vec<StageRequests> {
        let weighted = rows_of_expert.len().min(self.params.num_weighted as usize);
        let rows_of_expert = &rows_of_expert[..weighted];
        let of_stage = |name: &'static str| {
            let dispatches = self.dispatches.iter().filter(|dispatch| dispatch.name == name);
            let bytes = dispatches.clone().map(|dispatch| dispatch_bytes(dispatch, rows_of_expert)).sum();
            StageRequests { name, dispatches: dispatches.count() as u32, bytes }
        };
        self.stages.iter().map(|stage| of_stage(stage.name)).collect()
    }
}

fn dispatch_bytes(dispatch: &Dispatch, rows_of_expert: &[u32]) -> u64 {
    match &dispatch.uniform {
        Uniform::Matmul(params) => matmul_bytes(dispatch, params, rows_of_expert),
        Uniform::Router(params) if dispatch.kernel.stage == Stage::Router => router_bytes(dispatch, params),
        Uniform::Moe(params) if dispatch.kernel.stage == Stage::Permute => {
            permute_bytes(dispatch, params, rows_of_expert)
        }
        Uniform::Moe(params) => combine_bytes(dispatch, params),
        // Norms, capacity and tables: no stage counts them.
        _ => 0,
    }
}

/// Every tile of rows reads the weights of its expert, every tile of columns the rows of its expert.
fn matmul_bytes(dispatch: &Dispatch, p: &MatmulParams, rows_of_expert: &[u32]) -> u64 {
    let has = |binding: &str| dispatch.kernel.bindings.iter().any(|b| b.name == binding);
    let is_dense = !has("tiles") && !has("topk_experts");
    let rows = |expert: u32| match is_dense {
        true => p.num_assignments,
        false => rows_of_expert.get(expert as usize).copied().unwrap_or(0),
    };
    let page = || p.first_expert..p.end_expert;
    let num_rows: u64 = page().map(|expert| u64::from(rows(expert))).sum();
    let num_tiles: u64 = page().map(|expert| u64::from(rows(expert).div_ceil(p.tile_m.max(1)))).sum();
    let columns = u64::from(p.end_column - p.begin_column);
    let column_tiles = u64::from(p.num_column_tiles);

    let weights = num_tiles * columns / 4 * u64::from(p.quad_stride) * 16;
    // Rows of the caller's own end before the last vec4 does.
    let inputs = u64::from((4 * p.k4).min(p.x_stride));
    let x = num_rows * column_tiles * inputs * 4;
    let outputs = if is_gated(dispatch) { columns / 2 } else { columns };
    // A token's experts are summed where they are multiplied.
    let out_rows = if dispatch.kernel.stage == Stage::DownCombine { 1 } else { num_rows };
    let out = out_rows * outputs * 4;
    // Surplus slots look, too. Without a sort, every workgroup looks through the assignments: at most all of them.
    let of_slot = if has("tiles") { TILE_BYTES } else { 4 * u64::from(p.num_assignments) };
    let tiles = if is_dense { 0 } else { u64::from(p.num_tile_slots) * column_tiles * of_slot };
    let mut of_row = 0;
    for binding in ["assignment_of_row", "topk_weights"] {
        of_row += if has(binding) { 4 } else { 0 };
    }
    weights + x + out + tiles + num_rows * column_tiles * of_row
}

/// Two packed columns make one output.
fn is_gated(dispatch: &Dispatch) -> bool {
    dispatch.kernel.parts.iter().any(|part| part.file == "store_gated")
}

/// Every workgroup reads the router's whole matrix, unless the products are there.
fn router_bytes(dispatch: &Dispatch, p: &RouterParams) -> u64 {
    let has = |binding: &str| dispatch.kernel.bindings.iter().any(|b| b.name == binding);
    let [t, h, rows] = [p.num_tokens, p.hidden_size, p.num_rows - p.first_row].map(u64::from);
    let products = if has("products") {
        t * rows
    } else {
        router::workgroups(p.num_tokens) * rows * h.next_multiple_of(4) + t * h
    };
    let logits = t * u64::from(p.num_rows);
    let choices = if has("topk_experts") { 2 * t * u64::from(p.top_k) } else { 0 };
    4 * (products + logits + choices)
}

/// Every workgroup counts all assignments.
fn permute_bytes(dispatch: &Dispatch, p: &MoeParams, rows_of_expert: &[u32]) -> u64 {
    let workgroups: u64 = dispatch.grid.into_iter().map(u64::from).product();
    let num_rows: u64 = rows_of_expert.iter().copied().map(u64::from).sum();
    let assignments = u64::from(p.num_assignments);
    let offsets = u64::from(p.num_weighted) + 1;
    4 * (workgroups * assignments + offsets + assignments + num_rows) + u64::from(p.num_tile_slots) * TILE_BYTES
}

/// Every output is read and written once; the workgroups of a token look up its rows each.
fn combine_bytes(dispatch: &Dispatch, p: &MoeParams) -> u64 {
    let has = |binding: &str| dispatch.kernel.bindings.iter().any(|b| b.name == binding);
    let [t, stride, k] = [p.num_tokens, p.hidden_stride, p.top_k].map(u64::from);
    let width = u64::from(p.hidden_size.saturating_sub(p.first_column).min(p.hidden_stride));
    let lookups = ["row_of_assignment", "topk_weights", "topk_experts"].into_iter().filter(|name| has(name)).count();
    let routed = if has("expert_out") {
        // What has no row reads its token, or nothing: at most as much.
        combine::workgroups(p.num_tokens, p.hidden_stride) * k * lookups as u64 + t * k * stride
    } else {
        t * stride
    };
    let shared = if has("shared_out") { u64::from(p.num_shared) * t * stride } else { 0 };
    4 * (routed + shared + t * width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::matmul::MatmulChoice;
    use crate::model::activation::Activation;
    use crate::model::config::{LayerExtras, MoeConfig, Norm, SharedExperts, SharedGate};
    use crate::model::formats::WeightFormat;
    use crate::model::routing::Routing;
    use crate::plan::{DeviceProfile, LayerPlan, MatmulRequest};

    const H: u64 = 16;
    const I: u64 = 8;

    /// hidden 16, intermediate 8, 5 experts, top 2, in f16, by tiles of 4 rows x 8 packed columns.
    fn plan(num_tokens: u32, choice: MatmulChoice) -> Plan {
        let config = MoeConfig::new(H as u32, I as u32, 5, 2, Routing::softmax(true), Activation::SWIGLU);
        let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
        let device = DeviceProfile::webgpu_floor();
        let layer = LayerPlan::new(&config.expect("valid sizes"), WeightFormat::F16, &device, &request);
        layer.and_then(|layer| layer.plan(num_tokens)).expect("a tiny layer fits")
    }

    fn bytes(requests: &[StageRequests], name: &str) -> (u32, u64) {
        let stage = requests.iter().find(|stage| stage.name == name).expect("the stage runs");
        (stage.dispatches, stage.bytes)
    }

    #[test]
    fn sorted_counted_by_hand() {
        let plan = plan(20, MatmulChoice::Tiled { tile_m: 4, tile_n: 8 });
        let requests = plan.requests(&[20, 11, 0, 8, 1]);
        // Tiles of 4 rows: 5 + 3 + 0 + 2 + 1, in a list for any routing: (40 + 5 x 3) / 4.
        let (tiles, slots) = (11, 13);
        // 16 packed columns in 2 column tiles: each row's 16 inputs, its token, and each slot, twice.
        let gate_up = tiles * 16 * H * 2 + 2 * (40 * (H * 4 + 4) + slots * 12) + 40 * I * 4;
        assert_eq!(bytes(&requests, "gate_up"), (1, gate_up));
        // 16 columns in 2 column tiles: each row's 8 inputs and each slot twice.
        let down = tiles * 16 * I * 2 + 2 * (40 * I * 4 + slots * 12) + 40 * H * 4;
        assert_eq!(bytes(&requests, "down"), (1, down));
        // 5 workgroups of 4 tokens read the 5 rows; each token is read once, and its logits and 2 x 2 choices written.
        assert_eq!(bytes(&requests, "router"), (1, 4 * (5 * 5 * H + 20 * H + 20 * 5 + 20 * 4)));
        // One workgroup: 40 choices read, 6 offsets, 40 places, 40 rows, 13 tiles.
        assert_eq!(bytes(&requests, "permute"), (1, 4 * (40 + 6 + 40 + 40) + slots * 12));
        // A workgroup for each token: 2 rows' places and weights, then the rows, then y.
        assert_eq!(bytes(&requests, "combine"), (1, 4 * (20 * 2 * 2 + 40 * H + 20 * H)));
    }

    #[test]
    fn unsorted_counted_by_hand() {
        let plan = plan(3, MatmulChoice::Vec { workgroup_size: 16, k_lanes: 8, sorted: false });
        // Everybody chose the first two.
        let requests = plan.requests(&[3, 3, 0, 0, 0]);
        assert!(requests.iter().all(|stage| stage.name != "permute"));
        // 6 slots in 2 column tiles look through 6 assignments; two tiles, 6 rows.
        let gate_up = 2 * 16 * H * 2 + 2 * (6 * H * 4 + 6 * 6 * 4) + 6 * I * 4;
        assert_eq!(bytes(&requests, "gate_up"), (1, gate_up));
    }

    /// One row of outputs, not one for each expert.
    #[test]
    fn a_fused_sum_is_written_once() {
        let config = MoeConfig::new(512, 8, 5, 2, Routing::softmax(true), Activation::SWIGLU).expect("valid sizes");
        let choice = MatmulChoice::VecSubgroup { subgroup_size: 8, sorted: false };
        let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
        let device = DeviceProfile { software: true, subgroup_size: Some(8), ..DeviceProfile::webgpu_floor() };
        let layer = LayerPlan::new(&config, WeightFormat::F16, &device, &request).expect("tiny");
        let requests = layer.plan(1).expect("one token").requests(&[1, 0, 0, 1, 0]);
        // Two tiles of 512 columns x 8 inputs; in 16 column tiles both rows, both slots and the two weights.
        let fused = 2 * 512 * 8 * 2 + 16 * (2 * 8 * 4 + 2 * 2 * 4 + 2 * 4) + 512 * 4;
        assert_eq!(bytes(&requests, "down_combine"), (1, fused));
    }

    /// What stands around the experts, too.
    #[test]
    fn no_stage_requests_less_than_the_least() {
        let shared =
            |gate| SharedExperts { num: 2, intermediate_size: 6, activation: Activation::SWIGLU, gate, average: false };
        let norm = Some(Norm { epsilon: 1e-5, scale_first: false });
        for (latent_size, output_norm, gate, choice) in [
            (None, None, SharedGate::None, MatmulChoice::Tiled { tile_m: 4, tile_n: 8 }),
            (Some(5), None, SharedGate::Sigmoid, MatmulChoice::Subgroup { subgroup_size: 4 }),
            (Some(5), norm, SharedGate::Sigmoid, MatmulChoice::VecSubgroup { subgroup_size: 4, sorted: true }),
        ] {
            let extras = LayerExtras { latent_size, output_norm, shared: Some(shared(gate)), ..LayerExtras::default() };
            let config = MoeConfig::new(10, 7, 5, 2, Routing::softmax(true), Activation::SWIGLU);
            let config = config.and_then(|config| config.with_extras(extras)).expect("valid");
            let device = DeviceProfile { software: true, subgroup_size: Some(4), ..DeviceProfile::webgpu_floor() };
            let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
            let layer = LayerPlan::new(&config, WeightFormat::F16, &device, &request).expect("tiny");
            for num_tokens in [1, 17, 300] {
                let plan = layer.plan(num_tokens).expect("it fits");
                let requests = plan.requests(&even_rows(2 * num_tokens, 5));
                for (request, cost) in requests.iter().zip(&plan.stages) {
                    assert!(request.dispatches > 0 && request.bytes >= cost.bytes, "{request:?} {cost:?}");
                }
                assert!(requests.iter().any(|request| request.name == "shared_down"));
            }
        }
    }

    #[test]
    fn larger_tiles_request_less() {
        let of = |tile_m, tile_n| {
            let plan = plan(200, MatmulChoice::Tiled { tile_m, tile_n });
            bytes(&plan.requests(&even_rows(400, 5)), "gate_up").1
        };
        assert!(of(4, 8) > of(8, 8) && of(8, 8) > of(8, 16));
    }

    #[test]
    fn even_rows_are_as_equal_as_can_be() {
        assert_eq!(even_rows(7, 3), [3, 2, 2]);
        assert_eq!(even_rows(2, 4), [1, 1, 0, 0]);
        assert_eq!(even_rows(0, 0), [0; 0]);
    }
}
