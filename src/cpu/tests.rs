//! Layers whose experts come one by one.

use super::*;
use crate::model::activation::{Activation, Function};
use crate::model::config::{LayerExtras, SharedExperts, SharedGate};
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use crate::model::source::{ExpertKind, ExpertMatrix, ExpertSource, HostSource, Projection};
use crate::model::weights::{ExtraWeights, MoeWeights};

pub(super) fn values(len: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| value() * 0.1).collect()
}

/// A layer of three experts and two shared ones, with or without gates.
fn layer(activation: Activation, shared: Activation) -> (MoeConfig, MoeWeights) {
    let extras = LayerExtras {
        shared: Some(SharedExperts {
            num: 2,
            intermediate_size: 512,
            activation: shared,
            gate: SharedGate::None,
            average: false,
        }),
        ..LayerExtras::default()
    };
    let config = MoeConfig::new(256, 256, 3, 2, Routing::softmax(true), activation).and_then(|c| c.with_extras(extras));
    let gate = |activation: Activation, len, seed| {
        if activation.is_gated() { values(len, seed) } else { Vec::new() }
    };
    let (routed, both) = (3 * 256 * 256, 2 * 512 * 256);
    let weights = MoeWeights {
        router: values(3 * 256, 1),
        gate_proj: gate(activation, routed, 2),
        up_proj: values(routed, 3),
        down_proj: values(routed, 4),
        extras: ExtraWeights {
            shared_gate_proj: gate(shared, both, 5),
            shared_up_proj: values(both, 6),
            shared_down_proj: values(both, 7),
            ..ExtraWeights::default()
        },
        ..MoeWeights::default()
    };
    (config.expect("the sizes are valid"), weights)
}

fn forward(layer: &CpuLayer) -> Vec<f32> {
    let x = values(5 * 256, 8);
    let mut y = vec![f32::NAN; x.len()];
    layer.forward_into(&x, &mut y).expect("the input is valid");
    y
}

/// From another source, that fails in some place or has some matrix too short.
struct Broken<'a> {
    source: HostSource<'a>,
    fails_at: ExpertMatrix,
    is_short: bool,
}

impl Broken<'_> {
    fn broken(&self, matrix: ExpertMatrix, mut rows: Vec<u8>) -> Result<Vec<u8>> {
        match matrix == self.fails_at {
            true if self.is_short => {
                rows.pop();
                Ok(rows)
            }
            true => Err(Error::config("expert", matrix.expert, "another")),
            false => Ok(rows),
        }
    }
}

impl ExpertSource for Broken<'_> {
    fn formats(&self) -> LayerFormats {
        self.source.formats
    }

    fn first(&mut self, kind: ExpertKind, expert: usize) -> Result<[Vec<u8>; 2]> {
        let [gate, up] = self.source.first(kind, expert)?;
        Ok([gate, self.broken(ExpertMatrix { kind, projection: Projection::First, expert }, up)?])
    }

    fn down(&mut self, kind: ExpertKind, expert: usize) -> Result<Vec<u8>> {
        let down = self.source.down(kind, expert)?;
        self.broken(ExpertMatrix { kind, projection: Projection::Down, expert }, down)
    }
}

#[test]
fn experts_that_come_one_by_one_make_the_same_layer() {
    let (gated, plain) = (Activation::SWIGLU, Activation::plain(Function::Relu2));
    for (activation, shared) in [(gated, gated), (gated, plain), (plain, gated)] {
        let (config, weights) = layer(activation, shared);
        for format in WeightFormat::every() {
            let whole = CpuLayer::new(config.clone(), &weights, format).expect("the weights are valid");
            let mut source = HostSource { config: &config, weights: &weights, formats: format.into() };
            // Everything but the experts' matrices, as a checkpoint has it.
            let extras = ExtraWeights::default();
            let others = MoeWeights { router: weights.router.clone(), extras, ..MoeWeights::default() };
            let mut told = Vec::new();
            let layer = CpuLayer::from_source(config.clone(), &others, &mut source, &mut |done, total| {
                told.push((done, total))
            });
            let layer = layer.expect("the weights are valid");
            assert!(forward(&layer).iter().zip(forward(&whole)).all(|(a, b)| a.to_bits() == b.to_bits()), "{format}");
            assert_eq!(told.len(), 2 * (3 + 2), "each projection of each expert");
            assert!(told.is_sorted());
            assert_eq!(told.last(), Some(&(layer.weight_bytes(), layer.weight_bytes())), "{format}");
        }
    }
}

#[test]
fn each_matrix_has_the_format_that_its_source_says() {
    let (config, weights) = layer(Activation::SWIGLU, Activation::SWIGLU);
    let formats = LayerFormats {
        gate_up: WeightFormat::INT4,
        down: WeightFormat::Q6K,
        shared_gate_up: WeightFormat::Bf16,
        shared_down: WeightFormat::Fp8,
    };
    let mut source = HostSource { config: &config, weights: &weights, formats };
    let mixed = CpuLayer::from_source(config.clone(), &weights, &mut source, &mut |_, _| {});
    let mut mixed = mixed.expect("the weights are valid");
    assert_eq!(mixed.formats(), formats);
    let bits = (2.0 * 5.0 + 6.5625) * (3 * 256 * 256) as f64 + (2.0 * 16.0 + 8.25) * (2 * 512 * 256) as f64;
    assert_eq!(mixed.weight_bytes() as f64 * 8.0, bits);
    // What each of them becomes, as f32 and in one format.
    let mut stored = weights.clone();
    let rounded = |format| weights.rounded(&config, format).expect("the format holds them");
    let (int4, q6_k) = (rounded(WeightFormat::INT4), rounded(WeightFormat::Q6K));
    let (bf16, fp8) = (rounded(WeightFormat::Bf16), rounded(WeightFormat::Fp8));
    (stored.gate_proj, stored.up_proj, stored.down_proj) = (int4.gate_proj, int4.up_proj, q6_k.down_proj);
    stored.extras.shared_gate_proj = bf16.extras.shared_gate_proj;
    stored.extras.shared_up_proj = bf16.extras.shared_up_proj;
    stored.extras.shared_down_proj = fp8.extras.shared_down_proj;
    let floats = CpuLayer::new(config.clone(), &stored, WeightFormat::F32).expect("the weights are valid");
    // Every weight to the bit.
    let stored_bits = |layer: &CpuLayer| -> Vec<u32> {
        let experts = [(&layer.experts, 3), (layer.shared.as_ref().expect("there are some"), 2)];
        let matrices = experts.into_iter().flat_map(|(experts, num)| {
            (0..num).flat_map(|e| [&experts.first, &experts.down].map(|matrix| matrix.unpack(pulp::Scalar, e)))
        });
        matrices.flatten().map(f32::to_bits).collect()
    };
    assert!(stored_bits(&mixed) == stored_bits(&floats));
    let unrounded = CpuLayer::new(config.clone(), &weights, WeightFormat::F32).expect("the weights are valid");
    assert!(stored_bits(&mixed) != stored_bits(&unrounded), "unrounded weights are others");
    // The outputs not: sums of codes are scaled, where f32 adds up scaled weights.
    let difference = |a: &CpuLayer, b: &CpuLayer| {
        let (a, b) = (forward(a), forward(b));
        let largest = a.iter().fold(0.0f32, |largest, a| largest.max(a.abs()));
        a.iter().zip(b).map(|(a, b)| (a - b).abs() / largest).fold(0.0, f32::max)
    };
    assert!(difference(&mixed, &floats) < 1e-6, "{}", difference(&mixed, &floats));
    // The finest format: were any of the others not what its source says, it would show.
    stored.extras.shared_gate_proj = weights.extras.shared_gate_proj.clone();
    let other = CpuLayer::new(config.clone(), &stored, WeightFormat::F32).expect("the weights are valid");
    assert!(difference(&mixed, &other) > 1e-5, "{}", difference(&mixed, &other));

    // An expert that is added gets the same formats.
    let expert = crate::ExpertWeights {
        gate_proj: values(256 * 256, 21),
        up_proj: values(256 * 256, 22),
        down_proj: values(256 * 256, 23),
        router_row: values(256, 24),
        ..crate::ExpertWeights::default()
    };
    let mut all = weights.clone();
    let grown = all.insert_expert(&config, 3, &expert).expect("it fits");
    mixed.add_expert(&expert).expect("it fits");
    let mut source = HostSource { config: &grown, weights: &all, formats };
    let anew = CpuLayer::from_source(grown.clone(), &all, &mut source, &mut |_, _| {});
    let same = |a: &CpuLayer, b: &CpuLayer| forward(a).iter().zip(forward(b)).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same(&mixed, &anew.expect("the weights are valid")));
}

#[test]
fn a_source_that_fails_gives_its_error() {
    let (config, weights) = layer(Activation::SWIGLU, Activation::SWIGLU);
    let broken = |kind, projection, expert, is_short| {
        let source = HostSource { config: &config, weights: &weights, formats: WeightFormat::INT8.into() };
        let mut source = Broken { source, fails_at: ExpertMatrix { kind, projection, expert }, is_short };
        CpuLayer::from_source(config.clone(), &weights, &mut source, &mut |_, _| {}).map(|_| ())
    };
    for projection in [Projection::First, Projection::Down] {
        for (kind, expert) in [(ExpertKind::Routed, 0), (ExpertKind::Routed, 2), (ExpertKind::Shared, 1)] {
            match broken(kind, projection, expert, false) {
                Err(Error::InvalidConfig { field: "expert", found, .. }) => assert_eq!(found, expert.to_string()),
                other => panic!("{kind:?} {projection:?} {expert}: {other:?}"),
            }
            match broken(kind, projection, expert, true) {
                Err(Error::LengthMismatch { expected, found, .. }) => assert_eq!(found + 1, expected),
                other => panic!("{kind:?} {projection:?} {expert}: {other:?}"),
            }
        }
    }
    assert!(broken(ExpertKind::Routed, Projection::Down, 3, false).is_ok(), "there is no such expert");
}

#[test]
fn rows_that_a_format_cannot_pack_are_refused() {
    let config = MoeConfig::new(250, 256, 3, 2, Routing::softmax(true), Activation::SWIGLU).expect("valid sizes");
    let weights = MoeWeights { router: values(3 * 250, 1), ..MoeWeights::default() };
    let mut source = HostSource { config: &config, weights: &weights, formats: WeightFormat::INT4.into() };
    match CpuLayer::from_source(config.clone(), &weights, &mut source, &mut |_, _| {}) {
        Err(Error::InvalidConfig { field: "gate_up_proj", .. }) => {}
        other => panic!("{:?}", other.map(|_| ())),
    }
}
