//! What follows from the experts' weights: what each adds to a token, and how alike they are.
//!
//! Experts are read one by one, as f32, and at most [`HELD_BYTES`] of them are kept at a time: layers larger than that are
//! read again for each further part.

use super::{Contributions, Similarity};
use crate::bench::memory;
use crate::cpu::rows_times_rows;
use crate::error::Result;
use crate::model::config::{MoeConfig, Norm, SpecialKind};
use crate::model::formats::decode_matrix;
use crate::model::routing::RoutingDecision;
use crate::model::source::{ExpertKind, ExpertSource};
use crate::model::weights::MoeWeights;
use crate::reference;
use rayon::prelude::*;

/// Weights of experts that are compared with the others while those are read.
const HELD_BYTES: usize = 1 << 30;
/// Experts that are read before they are compared.
const READ_AT_A_TIME: usize = 4;
/// Products that are summed in f32 before the sums are summed in f64.
const BLOCK: usize = 1 << 14;

/// A layer whose experts can be read, and what it did with some tokens.
pub(crate) struct Layer<'a> {
    pub config: &'a MoeConfig,
    /// All but the experts' matrices.
    pub weights: &'a MoeWeights,
    /// `[num_tokens, hidden_size]`
    pub x: &'a [f32],
    pub routing: &'a RoutingDecision,
}

/// An expert's matrices: gate (empty without one) and up `[intermediate_size, expert_size]`, down `[expert_size,
/// intermediate_size]`.
struct Expert {
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
}

/// What the experts add and how alike they are: the latter by at most `rows` rows of each matrix, spread evenly; `None`:
/// by all. `progress(done, total)` counts experts that were read.
pub(crate) fn examine(
    layer: &Layer<'_>,
    source: &mut dyn ExpertSource,
    rows: Option<usize>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(Contributions, Option<Similarity>)> {
    let c = layer.config;
    let num_experts = c.num_weighted_experts() as usize;
    let mut sums = Sums::new(layer)?;
    let [d, i] = [c.expert_size(), c.intermediate_size()].map(|n| n as usize);
    let matrices = [(i, d), (i, d), (d, i)];
    let matrices = if c.activation().is_gated() { &matrices[..] } else { &matrices[1..] };
    let compared: usize = matrices.iter().map(|&(count, width)| rows.unwrap_or(count).min(count) * width).sum();
    let held_at_a_time = (HELD_BYTES / (4 * compared)).clamp(1, num_experts);
    let starts: Vec<usize> = (0..num_experts).step_by(held_at_a_time).collect();
    let total = starts.iter().map(|start| (num_experts - start) as u64).sum();
    let mut done = 0;
    let mut dots = vec![vec![0.0; num_experts]; num_experts];
    for &start in &starts {
        let mut held: Vec<Vec<f32>> = Vec::new();
        let end = (start + held_at_a_time).min(num_experts);
        let mut others: Vec<Vec<f32>> = Vec::new();
        for e in start..num_experts {
            let expert = read(layer, source, e)?;
            // Each is read in the first round.
            if start == 0 {
                sums.add(layer, e, &expert);
            }
            let sample = expert.sample([d, i], rows);
            if e < end {
                held.push(sample)
            } else {
                others.push(sample)
            }
            done += 1;
            progress(done, total);
            if e + 1 == end {
                put(&mut dots, start, start, &products(&held, &held));
            } else if others.len() == READ_AT_A_TIME || (e + 1 == num_experts && !others.is_empty()) {
                put(&mut dots, start, e + 1 - others.len(), &products(&held, &others));
                others.clear();
            }
        }
    }
    let weights_of_expert: usize = matrices.iter().map(|(count, width)| count * width).sum();
    let similarity = (num_experts > 1).then(|| similarity(&dots, compared as u64, weights_of_expert as u64));
    Ok((sums.contributions(layer), similarity))
}

fn read(layer: &Layer<'_>, source: &mut dyn ExpertSource, e: usize) -> Result<Expert> {
    let formats = source.formats();
    let [d, i] = [layer.config.expert_size(), layer.config.intermediate_size()].map(|n| n as usize);
    let [gate, up] = source.first(ExpertKind::Routed, e)?;
    let down = source.down(ExpertKind::Routed, e)?;
    Ok(Expert {
        gate: decode_matrix(formats.gate_up, d, &gate),
        up: decode_matrix(formats.gate_up, d, &up),
        down: decode_matrix(formats.down, i, &down),
    })
}

impl Expert {
    /// At most `rows` rows of each matrix, spread evenly, one after the other.
    fn sample(&self, [d, i]: [usize; 2], rows: Option<usize>) -> Vec<f32> {
        let mut values = Vec::new();
        for (matrix, width) in [(&self.gate, d), (&self.up, d), (&self.down, i)] {
            let count = matrix.len() / width;
            let taken = rows.unwrap_or(count).min(count);
            for row in (0..taken).map(|n| n * count / taken) {
                values.extend_from_slice(&matrix[row * width..][..width]);
            }
        }
        values
    }
}

/// `a[m] . b[n]` for each pair: `[m, n]`
fn products(a: &[Vec<f32>], b: &[Vec<f32>]) -> Vec<Vec<f64>> {
    let (m, n) = (a.len(), b.len());
    let mut sums = vec![vec![0.0; n]; m];
    let len = a.first().map_or(0, Vec::len);
    let part = |vectors: &[Vec<f32>], at: std::ops::Range<usize>| -> Vec<f32> {
        let mut part = Vec::with_capacity(vectors.len() * at.len());
        vectors.iter().for_each(|vector| part.extend_from_slice(&vector[at.clone()]));
        part
    };
    for start in (0..len).step_by(BLOCK) {
        let at = start..(start + BLOCK).min(len);
        let mut block = vec![0.0; m * n];
        rows_times_rows([m, n, at.len()], &part(a, at.clone()), &part(b, at), &mut block);
        for (sums, block) in sums.iter_mut().zip(block.chunks_exact(n)) {
            sums.iter_mut().zip(block).for_each(|(sum, &product)| *sum += f64::from(product));
        }
    }
    sums
}

/// Products of experts `row..` with experts `column..`, and of these with those.
fn put(dots: &mut [Vec<f64>], row: usize, column: usize, products: &[Vec<f64>]) {
    for (m, products) in products.iter().enumerate() {
        for (n, &product) in products.iter().enumerate() {
            dots[row + m][column + n] = product;
            dots[column + n][row + m] = product;
        }
    }
}

/// From the products of all pairs, at least two experts.
fn similarity(dots: &[Vec<f64>], weights_compared: u64, weights_of_expert: u64) -> Similarity {
    let length = |e: usize| dots[e][e].sqrt().max(f64::MIN_POSITIVE);
    let cosine = |a: usize, b: usize| if a == b { 1.0 } else { dots[a][b] / (length(a) * length(b)) };
    let experts = 0..dots.len();
    let pairs: Vec<(usize, usize)> = experts.clone().flat_map(|a| (0..a).map(move |b| (b, a))).collect();
    let most = pairs.iter().copied().max_by(|a, b| cosine(a.0, a.1).total_cmp(&cosine(b.0, b.1)));
    let (a, b) = most.unwrap_or_default();
    Similarity {
        cosine: experts.clone().map(|a| experts.clone().map(|b| cosine(a, b) as f32).collect()).collect(),
        mean: pairs.iter().map(|&(a, b)| cosine(a, b)).sum::<f64>() / pairs.len().max(1) as f64,
        most_alike: [a as u32, b as u32],
        weights_compared,
        weights_of_expert,
    }
}

/// What experts add to each token.
struct Sums {
    /// What they read: `[num_tokens, expert_size]`
    expert_in: Vec<f32>,
    /// Assignments of each expert: `[num_experts][..]`
    assignments: Vec<Vec<usize>>,
    /// Output times weight, zero until the expert was there: `[num_tokens, top_k, expert_size]`
    added: Vec<f32>,
}

impl Sums {
    fn new(layer: &Layer<'_>) -> Result<Self> {
        let Layer { config: c, weights, x, routing } = layer;
        let [h, d] = [c.hidden_size(), c.expert_size()].map(|n| n as usize);
        let num_assignments = routing.topk_experts.len();
        memory::check("what each expert adds to each token", (num_assignments * d * 4) as u64)?;
        let projected = match &weights.extras.latent_in {
            Some(projection) => {
                let mut projected = vec![0.0; x.len() / h * d];
                rows_times_rows([x.len() / h, d, h], x, projection, &mut projected);
                projected
            }
            None => x.to_vec(),
        };
        let expert_in = normed(c.extras().expert_norm, &weights.extras.expert_norm, projected);
        let mut assignments = vec![Vec::new(); c.num_experts() as usize];
        for (a, &expert) in routing.topk_experts.iter().enumerate() {
            if let Some(of_expert) = assignments.get_mut(expert as usize) {
                of_expert.push(a);
            }
        }
        let mut sums = Self { expert_in, assignments, added: vec![0.0; num_assignments * d] };
        if c.extras().special_kind == SpecialKind::Identity {
            for e in c.num_weighted_experts() as usize..c.num_experts() as usize {
                let rows = sums.rows(layer, e, false);
                sums.put(layer, e, &rows);
            }
        }
        Ok(sums)
    }

    /// What expert `e` reads, or, if `weighed`, what it reads where weights are applied there.
    fn rows(&self, layer: &Layer<'_>, e: usize, weighed: bool) -> Vec<f32> {
        let [d, top_k] = [layer.config.expert_size(), layer.config.top_k()].map(|n| n as usize);
        let weight = |a: usize| if weighed { layer.routing.topk_weights[a] } else { 1.0 };
        let row = |&a: &usize| self.expert_in[a / top_k * d..][..d].iter().map(move |v| v * weight(a));
        self.assignments[e].iter().flat_map(row).collect()
    }

    /// The outputs of expert `e`, `[its assignments, expert_size]`, times their weights.
    fn put(&mut self, layer: &Layer<'_>, e: usize, outputs: &[f32]) {
        let d = layer.config.expert_size() as usize;
        for (&a, output) in self.assignments[e].iter().zip(outputs.chunks_exact(d)) {
            // Where it was applied to the input, it is in the output already.
            let weight = if layer.config.routing().weigh_input { 1.0 } else { layer.routing.topk_weights[a] };
            self.added[a * d..][..d].iter_mut().zip(output).for_each(|(added, v)| *added = weight * v);
        }
    }

    fn add(&mut self, layer: &Layer<'_>, e: usize, expert: &Expert) {
        let n = self.assignments[e].len();
        if n == 0 {
            return;
        }
        let Layer { config: c, weights, .. } = layer;
        let extras = &weights.extras;
        let [d, i] = [c.expert_size(), c.intermediate_size()].map(|n| n as usize);
        let rows = self.rows(layer, e, c.routing().weigh_input);
        let times = |matrix: &[f32], bias: &Option<Vec<f32>>, [out, width]: [usize; 2], rows: &[f32]| {
            let mut products = vec![0.0; n * out];
            if matrix.is_empty() {
                return products;
            }
            rows_times_rows([n, out, width], rows, matrix, &mut products);
            if let Some(bias) = bias.as_ref().and_then(|bias| bias.get(e * out..(e + 1) * out)) {
                let rows = products.chunks_exact_mut(out);
                rows.for_each(|row| row.iter_mut().zip(bias).for_each(|(v, bias)| *v += bias));
            }
            products
        };
        let gate = times(&expert.gate, &extras.gate_bias, [i, d], &rows);
        let mut inner = times(&expert.up, &extras.up_bias, [i, d], &rows);
        let activation = c.activation();
        let activate = |(up, gate): (&mut f32, &f32)| *up = activation.apply((*gate).into(), (*up).into()) as f32;
        inner.par_iter_mut().zip(&gate).for_each(activate);
        let out = times(&expert.down, &extras.down_bias, [d, i], &inner);
        let out = normed(c.extras().expert_out_norm, &extras.expert_out_norm, out);
        self.put(layer, e, &out);
    }

    fn contributions(&self, layer: &Layer<'_>) -> Contributions {
        let [d, top_k, num_experts] =
            [layer.config.expert_size(), layer.config.top_k(), layer.config.num_experts()].map(|n| n as usize);
        let (mut squares, mut along) = (vec![0.0; num_experts], vec![0.0; num_experts]);
        let mut all = 0.0;
        for (t, added) in self.added.chunks_exact(top_k * d).enumerate() {
            let mut sum = vec![0.0; d];
            added.chunks_exact(d).for_each(|row| sum.iter_mut().zip(row).for_each(|(s, &v)| *s += f64::from(v)));
            all += sum.iter().map(|s| s * s).sum::<f64>();
            for (row, &expert) in added.chunks_exact(d).zip(&layer.routing.topk_experts[t * top_k..]) {
                let Some(square) = squares.get_mut(expert as usize) else { continue };
                *square += row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
                along[expert as usize] += row.iter().zip(&sum).map(|(&v, s)| f64::from(v) * s).sum::<f64>();
            }
        }
        Contributions {
            norm: squares.into_iter().map(f64::sqrt).collect(),
            share: along.into_iter().map(|along| if all > 0.0 { along / all } else { 0.0 }).collect(),
            routed_norm: all.sqrt(),
            output_norm: 0.0,
        }
    }
}

fn normed(norm: Option<Norm>, weight: &Option<Vec<f32>>, rows: Vec<f32>) -> Vec<f32> {
    let (Some(norm), Some(weight)) = (norm, weight) else { return rows };
    let wide: Vec<f64> = rows.into_iter().map(f64::from).collect();
    reference::norm::norm(norm, weight, &wide).into_iter().map(|v| v as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_all_pairs() {
        let vector = |seed: usize| (0..BLOCK + 5).map(|n| ((n * 31 + seed * 7) % 13) as f32 - 6.0).collect::<Vec<_>>();
        let (a, b) = ([vector(1), vector(2)], [vector(3), vector(4), vector(5)]);
        let found = products(&a, &b);
        for (a, row) in a.iter().zip(&found) {
            for (b, &found) in b.iter().zip(row) {
                // Whole numbers: exact, whatever the order.
                assert_eq!(found, a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>());
            }
        }
    }

    #[test]
    fn a_sample_takes_rows_from_all_of_a_matrix() {
        let expert = Expert { gate: Vec::new(), up: (0..12).map(|n| n as f32).collect(), down: vec![9.0; 12] };
        assert_eq!(expert.sample([2, 6], Some(2)), [[0.0, 1.0, 6.0, 7.0].to_vec(), vec![9.0; 12]].concat());
        assert_eq!(expert.sample([2, 6], None).len(), 24);
    }

    #[test]
    fn similarity_counted_by_hand() {
        let dots = vec![vec![4.0, 3.0, 0.0], vec![3.0, 9.0, -6.0], vec![0.0, -6.0, 16.0]];
        let found = similarity(&dots, 10, 20);
        assert_eq!((found.cosine[0][1], found.cosine[2][1], found.cosine[2][2]), (0.5, -0.5, 1.0));
        assert_eq!((found.mean, found.most_alike), (0.0, [0, 1]));
        let zero = similarity(&[vec![0.0, 0.0], vec![0.0, 1.0]], 1, 1);
        assert_eq!(zero.cosine[0][1], 0.0, "nothing is like no weights at all");
    }
}
