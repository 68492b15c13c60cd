//! Layers that between them use every part of the router: for lists and tests.

use super::router::{FrontKind, Products};
use super::{Input, Kernel, router};
use crate::model::activation::Activation;
use crate::model::config::{LayerExtras, MoeConfig, SharedExperts, SharedGate};
use crate::model::routing::{
    Capacity, CapacityLimit, GroupScore, Groups, Masked, Noise, Priority, Routing, Scores, Selection,
};

/// Some capacity.
pub(super) const CAPACITY: Capacity = Capacity {
    limit: CapacityLimit::Number(1),
    per_sequence: false,
    priority: Priority::Position,
    renormalize_after: false,
    pass_through: false,
};

/// One router of each kind.
pub(super) fn routers() -> Vec<Kernel> {
    let plain = |scores| Routing::new(scores, false);
    let softmax = plain(Scores::Softmax);
    let sigmoid = plain(Scores::Sigmoid);
    let groups = Some(Groups { num_groups: 4, keep: 2, score: GroupScore::SumTop2, masked: Masked::NegInfinity });
    let all_groups = groups.map(|groups| Groups { keep: 4, ..groups });
    let routings = [
        (softmax, false),
        (Routing::softmax(true), false),
        (plain(Scores::SoftmaxSelected), false),
        (sigmoid, false),
        (sigmoid, true),
        (plain(Scores::SqrtSoftplus), true),
        (plain(Scores::Raw), false),
        (Routing { groups, ..sigmoid }, true),
        (Routing { logit_scale: 0.5, logit_softcap: Some(3.0), ..sigmoid }, false),
        (Routing { selection: Selection::Sparsemixer { jitter: 0.01 }, ..softmax }, false),
        (Routing { selection: Selection::Given, ..sigmoid }, false),
        (Routing { scores: Scores::Hierarchical, groups: all_groups, selection: Selection::Dense, ..softmax }, false),
        (Routing { noise: Noise::Jitter { epsilon: 0.01 }, ..softmax }, false),
        (Routing { noise: Noise::NoisyTopK, ..softmax }, false),
        (Routing { noise: Noise::RandomSecond, ..softmax }, false),
        (Routing { capacity: Some(Capacity { priority: Priority::Score, ..CAPACITY }), ..softmax }, false),
    ];
    let mut kernels = Vec::new();
    for (routing, bias) in routings {
        let top_k = if routing.is_dense() { 8 } else { 2 };
        let Ok(config) = MoeConfig::new(64, 32, 8, top_k, routing, Activation::SWIGLU) else { continue };
        let noise = routing.noise != Noise::None;
        for products in [Products::Fused(Input::Vec4), Products::Fused(Input::Scalar), Products::Ready] {
            if products != Products::Ready || !matches!(routing.noise, Noise::Jitter { .. }) {
                let kernel = router::kernel(&config, bias, FrontKind::Router, noise, products, 64, 8);
                kernels.push(router::dropping(kernel.clone()));
                kernels.push(kernel);
            }
        }
    }
    for gate in [SharedGate::Sigmoid, SharedGate::Joint, SharedGate::Mix] {
        let activation = Activation::SWIGLU;
        let shared = Some(SharedExperts { num: 1, intermediate_size: 32, activation, gate, average: false });
        let config = MoeConfig::new(64, 32, 8, 2, sigmoid, activation);
        let config = config.and_then(|config| config.with_extras(LayerExtras { shared, ..LayerExtras::default() }));
        let Ok(config) = config else { continue };
        let products = Products::Fused(Input::Vec4);
        kernels.push(router::kernel(&config, true, FrontKind::Router, false, products, 64, 8));
        if gate == SharedGate::Sigmoid {
            kernels.push(router::kernel(&config, true, FrontKind::Assignments, false, products, 64, 8));
        }
    }
    // Some routings are the same kernel.
    let mut labels = std::collections::HashSet::new();
    kernels.retain(|kernel| labels.insert(kernel.label.clone()));
    kernels
}
