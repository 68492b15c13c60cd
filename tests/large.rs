//! Batches as large as they are promised: 2^22 assignments in one pass, 65,536 tokens, and grids above 65,535.

mod support;

use wgmoe::bench::Workload;
use wgmoe::reference::{self, router};
use wgmoe::{Activation, Batch, LayerOptions, MatmulVariant, MoeConfig, MoeLayer, Routing};

/// A whole batch against the reference, which is given the device's own routing: near-ties may go either way, but the
/// choice has to be a right one for the device's own logits.
fn check(num_tokens: u32, [hidden, intermediate, experts, top_k]: [u32; 4], skew: f64, variant: Option<MatmulVariant>) {
    let Some(context) = support::gpu_context() else { return };
    let routing = Routing::softmax(true);
    let config =
        MoeConfig::new(hidden, intermediate, experts, top_k, routing, Activation::SWIGLU).expect("valid sizes");
    let workload = Workload::new(config.clone(), skew, 3).expect("small weights");
    let x = workload.input(num_tokens).expect("memory for the input");
    let options = LayerOptions { matmul: variant, ..Default::default() };
    let layer = MoeLayer::with_options(&context, config.clone(), &workload.weights, &options).expect("a layer");
    assert_eq!(layer.num_passes(num_tokens), 1, "the batch should fit one pass");
    let y = layer.forward(&x).expect("a forward pass");
    assert!(layer.pass_stats().dispatches <= 7, "{:?}", layer.pass_stats());

    let decision = layer.routing().expect("the routing");
    let logits = decision.router_logits.iter().map(|&l| f64::from(l)).collect();
    let logits = router::Logits { experts: logits, shared: Vec::new() };
    let own = router::route(&config, &workload.weights, logits, &Batch::from(&x));
    assert!(own.topk_experts == decision.topk_experts, "the choice is not the top-k of the device's own logits");
    assert_eq!(decision.tokens_per_expert.iter().sum::<u32>(), num_tokens * top_k);
    let expected = reference::forward_with_routing(&config, &workload.weights, &x, own).y;
    let most = expected.iter().fold(0.0f64, |most, v| most.max(v.abs()));
    support::assert_close("y", &y, &expected, |_| 1e-5 * most);
}

#[test]
fn four_million_assignments_in_one_pass() {
    check(1 << 17, [4, 4, 64, 32], 0.5, None);
}

#[test]
fn sixty_five_thousand_tokens() {
    check(1 << 16, [64, 24, 16, 2], 0.0, None);
}

/// expert_out would be 256 MiB, twice what WebGPU guarantees for a binding: down and combine run for two slices of its
/// columns, and the pass still takes seven dispatches.
#[test]
fn wide_rows_in_slices() {
    check(1 << 14, [1024, 4, 8, 4], 0.0, None);
}

/// Tiles of four rows of one crowded expert: more workgroups than one axis of a grid has.
#[test]
fn a_folded_grid() {
    check(1 << 18, [8, 12, 2, 1], 6.0, Some(MatmulVariant::Vec));
}
