//! Properties of the plan, for any layer on any device, and of the reference, for any input.

#[path = "support/plan_checks.rs"]
mod plan_checks;
mod support;

use plan_checks::{check_pages, check_plan, most_tiles};
use proptest::prelude::*;
use proptest::test_runner::Config;
use std::collections::BTreeSet;
use support::{Values, config};
use wgmoe::kernels::matmul::VEC_ROWS;
use wgmoe::plan::pages::weight_pages;
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest, grid, tile_slots};
use wgmoe::reference::permute::{permute, tiles};
use wgmoe::reference::router::top_k_indices;
use wgmoe::reference::{moe_forward, router};
use wgmoe::{Batch, Error, MatmulVariant, MoeConfig, WeightFormat};

/// Any layer that can exist.
fn any_config(most_size: u32) -> impl Strategy<Value = MoeConfig> {
    let experts = prop_oneof![1..=16u32, 1..=1024u32];
    (1..=most_size, 1..=most_size, experts, any::<u32>(), any::<bool>())
        .prop_map(|(h, i, e, k, renormalize)| config([h, i, e, k % e.min(32) + 1], renormalize))
}

/// Any device that meets the floor, and any part of its binding limit.
fn any_device() -> impl Strategy<Value = DeviceProfile> {
    let subgroup_size = prop_oneof![Just(None), (2..=7u32).prop_map(|log| Some(1 << log))];
    let limit = (12..=31u32, any::<u32>()).prop_map(|(log, low)| (1 << log) + u64::from(low % (1 << log)));
    (limit.clone(), limit, subgroup_size, any::<bool>(), any::<bool>()).prop_map(
        |(max_storage_binding, max_buffer, subgroup_size, software, large)| DeviceProfile {
            max_storage_binding,
            max_buffer,
            subgroup_size,
            software,
            int64: software,
            max_workgroups_per_dimension: if large { 1 << 31 } else { 65_535 },
            ..DeviceProfile::webgpu_floor()
        },
    )
}

fn any_format() -> impl Strategy<Value = WeightFormat> {
    prop::sample::select(WeightFormat::every())
}

/// The same layer, its rows lengthened to whole blocks of the format.
fn in_blocks(config: &MoeConfig, format: WeightFormat) -> MoeConfig {
    let [h, i] = [config.hidden_size(), config.intermediate_size()].map(|n| n.next_multiple_of(format.block()));
    MoeConfig::new(h, i, config.num_experts(), config.top_k(), config.routing(), config.activation()).expect("sound")
}

/// Bytes of four columns, from what each format is made of: bits of a code, then bits of what some inputs share.
fn quad_bytes(format: WeightFormat, inputs: u32) -> u64 {
    let shared: &[(u64, u32)] = match format {
        WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => &[],
        WeightFormat::Int8(groups) | WeightFormat::Int4(groups) => {
            &[(if groups.has_zero_points() { 40 } else { 32 }, groups.size())]
        }
        WeightFormat::Mxfp4 => &[(8, 32)],
        WeightFormat::Nvfp4 => &[(8, 16), (32, u32::MAX)],
        WeightFormat::Fp8 => &[(32, 128)],
        WeightFormat::Q4_0 | WeightFormat::Q8_0 => &[(16, 32)],
        WeightFormat::Q4K => &[(16, 32), (32, 256)],
        WeightFormat::Q6K => &[(8, 16), (16, 256)],
        other => panic!("{other} is not in this test"),
    };
    let code: u64 = match format {
        WeightFormat::F32 => 32,
        WeightFormat::F16 | WeightFormat::Bf16 => 16,
        WeightFormat::Int8(_) | WeightFormat::Fp8 | WeightFormat::Q8_0 => 8,
        WeightFormat::Q6K => 6,
        _ => 4,
    };
    let inputs = inputs.next_multiple_of(4);
    let bits: u64 = shared.iter().map(|&(bits, per)| bits * u64::from(inputs.div_ceil(per))).sum();
    ((u64::from(inputs) * code + bits) * 4 / 8).next_multiple_of(32)
}

proptest! {
    #![proptest_config(Config { cases: 2000, failure_persistence: None, ..Config::default() })]

    #[test]
    fn folded_grids_cover_exactly_enough(workgroups in prop_oneof![0..1u64 << 32, 0..200_000u64], max in 65_535..1u32 << 31) {
        let covered = |[x, y, z]: [u32; 3]| {
            assert!(x.max(y) <= max && z == 1 && x > 0 || workgroups == 0, "{x} {y} {z}");
            let all = u64::from(x) * u64::from(y);
            // Less than one row to spare, and the flat index fits.
            assert!(all >= workgroups && all - workgroups < u64::from(y).max(1) && all <= u64::from(u32::MAX));
        };
        for max in [65_535, max] {
            match grid::fold(workgroups, max) {
                Ok(grid) => covered(grid),
                // Only where rounding up to whole rows leaves u32.
                Err(Error::LimitExceeded { required, .. }) => {
                    prop_assert_eq!(required, workgroups);
                    let rows = workgroups.div_ceil(u64::from(max));
                    prop_assert!(rows > u64::from(max) || workgroups.div_ceil(rows) * rows > u64::from(u32::MAX));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    #[test]
    fn tile_slots_is_the_least_upper_bound(assignments in 0..1u64 << 26, num_experts in 1..=1024u32, log in 2..=8u32) {
        let slots = tile_slots(assignments, num_experts, 1 << log);
        let reached = most_tiles(assignments, num_experts, 1 << log);
        // Reached where all experts but one get one row each, hence not one too many.
        prop_assert_eq!(slots, reached);
    }

    #[test]
    fn no_routing_makes_more_tiles(counts in prop::collection::vec(0..200u64, 1..60), log in 2..=7u32) {
        let assignments = counts.iter().sum();
        let tiles: u64 = counts.iter().map(|n| n.div_ceil(1 << log)).sum();
        prop_assert!(tiles <= tile_slots(assignments, counts.len() as u32, 1 << log));
    }

    #[test]
    fn pages_cover_every_column_once(
        num_experts in 1..=1024u32,
        groups in 1..=2000u32,
        vec4s in 1..=16_000u64,
        limit in prop_oneof![1..1u64 << 31, 1..1u64 << 20],
    ) {
        let (num_columns, quad_bytes) = (4 * groups, vec4s * 16);
        match weight_pages(num_experts, num_columns, quad_bytes, limit) {
            Ok(pages) => check_pages(&pages, num_experts, num_columns, quad_bytes, limit),
            Err(Error::LimitExceeded { required, available, .. }) => {
                prop_assert!(available == limit && required > limit);
                // Eight columns really do not fit, nor does a whole expert.
                prop_assert!(2 * quad_bytes > limit && u64::from(groups) * quad_bytes > limit);
            }
            Err(error) => panic!("{error}"),
        }
    }
}

proptest! {
    #![proptest_config(Config { cases: 400, failure_persistence: None, ..Config::default() })]

    #[test]
    fn plans_stay_within_the_device(
        config in prop_oneof![any_config(64), any_config(20_000), any_config(1 << 17)],
        device in any_device(),
        format in any_format(),
        variant in prop::option::of(prop::sample::select(MatmulVariant::ALL)),
        batch in prop_oneof![1..=40u32, 1..=1u32 << 20],
    ) {
        let request = MatmulRequest { variant, ..MatmulRequest::default() };
        let limit = device.max_buffer_bytes();
        let config = in_blocks(&config, format);
        let plan = match LayerPlan::new(&config, format, &device, &request) {
            Ok(plan) => plan,
            Err(Error::Unsupported { .. }) => {
                prop_assert_eq!((variant, device.subgroup_size), (Some(MatmulVariant::Subgroup), None));
                return Ok(());
            }
            Err(Error::LimitExceeded { required, available, .. }) => {
                prop_assert!(required > available);
                return Ok(());
            }
            Err(error) => panic!("{error}"),
        };
        let (h, i) = (config.hidden_size(), config.intermediate_size());
        let columns = 2 * i.next_multiple_of(4);
        let [first, second] = [h, i].map(|inputs| quad_bytes(format, inputs));
        check_pages(plan.pages("gate_up_weights"), config.num_experts(), columns, first, limit);
        check_pages(plan.pages("down_weights"), config.num_experts(), h.next_multiple_of(4), second, limit);

        let max_tokens = plan.max_tokens();
        prop_assert!(max_tokens > 0);
        for buffer in plan.scratch(max_tokens) {
            prop_assert!(buffer.bytes <= limit, "{:?} above {}", buffer, limit);
        }
        prop_assert!(u64::from(max_tokens) * u64::from(h) * 4 <= limit);
        // Binding part of a caller's buffer takes aligned offsets, where there is more than one pass to bind.
        if max_tokens >= 64 {
            prop_assert_eq!(u64::from(max_tokens) * u64::from(h) * 4 % 256, 0);
        }

        let mut next = 0;
        for (first, tokens) in plan.passes(batch) {
            prop_assert_eq!(first, next);
            prop_assert!((1..=max_tokens).contains(&tokens));
            next = first + tokens;
            if next > 100 * max_tokens {
                next = batch; // the rest goes on like that
                break;
            }
        }
        prop_assert_eq!(next, batch);

        for num_tokens in [1, batch.min(max_tokens), max_tokens] {
            let pass = plan.plan(num_tokens).unwrap_or_else(|error| panic!("{num_tokens} tokens: {error}"));
            check_plan(&plan, &pass, &device);
            // The tile list was allocated for the lowest tiles; others have fewer.
            let tiles = plan.scratch(num_tokens).into_iter().find(|b| b.name == "tiles").expect("there is one");
            prop_assert!(pass.matmul.tile_m() >= VEC_ROWS);
            if pass.matmul.sorted() {
                prop_assert!(tiles.bytes >= u64::from(pass.params.num_tile_slots) * 12);
            }
        }
    }
}

fn shuffled(n: usize, values: &mut Values) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, values.below(last + 1));
    }
    order
}

/// Picks the largest `k` times over, by what the rule says and nothing else.
fn naive_top_k(values: &[f64], k: usize) -> Vec<usize> {
    let beats = |a: f64, b: f64| if b.is_nan() { !a.is_nan() } else { a > b };
    let mut chosen: Vec<usize> = Vec::new();
    for _ in 0..k {
        let mut best: Option<usize> = None;
        for i in (0..values.len()).filter(|i| !chosen.contains(i)) {
            if best.is_none_or(|b| beats(values[i], values[b])) {
                best = Some(i);
            }
        }
        chosen.extend(best);
    }
    chosen
}

proptest! {
    #![proptest_config(Config { cases: 200, failure_persistence: None, ..Config::default() })]

    #[test]
    fn the_best_are_chosen_lowest_index_first(
        values in prop::collection::vec(
            prop::sample::select(vec![0.0, -0.0, 1.0, -1.0, f64::NAN, -f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 5e-324]),
            1..40,
        ),
        k in any::<prop::sample::Index>(),
    ) {
        let k = k.index(values.len()) + 1;
        prop_assert_eq!(top_k_indices(&values, k), naive_top_k(&values, k));
    }

    #[test]
    fn weights_are_probabilities(config in any_config(12), seed in any::<u64>(), num_tokens in 1..10usize) {
        let mut values = Values(seed);
        let weights = values.weights(&config);
        let x = values.floats(num_tokens * config.hidden_size() as usize);
        let routing = router::router(&config, &weights, &Batch::from(&x));
        let k = config.top_k() as usize;
        for (chosen, experts) in routing.topk_weights.chunks_exact(k).zip(routing.topk_experts.chunks_exact(k)) {
            let sum: f64 = chosen.iter().sum();
            if config.routing().renormalize.is_some() || config.top_k() == config.num_experts() {
                prop_assert!((sum - 1.0).abs() < 1e-12, "{}", sum);
            } else {
                prop_assert!(sum < 1.0 + 1e-12 && sum > 0.0);
            }
            prop_assert!(chosen.is_sorted_by(|a, b| a >= b), "{:?}", chosen);
            prop_assert_eq!(experts.iter().collect::<BTreeSet<_>>().len(), k);
        }
        for probs in routing.router_probs.chunks_exact(config.num_experts() as usize) {
            prop_assert!((probs.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_sort_is_a_stable_permutation(
        experts in prop::collection::vec(0..20u32, 0..300),
        tile_m in prop::sample::select(vec![1u32, 4, 16, 32, 64]),
    ) {
        let sorted = permute(&experts, 20);
        prop_assert_eq!(sorted.expert_offsets.len(), 21);
        prop_assert_eq!(sorted.expert_offsets[0], 0);
        prop_assert_eq!(sorted.expert_offsets[20] as usize, experts.len());
        prop_assert!(sorted.expert_offsets.is_sorted());
        for (row, &a) in sorted.assignment_of_row.iter().enumerate() {
            prop_assert_eq!(sorted.row_of_assignment[a as usize] as usize, row);
            prop_assert_eq!(experts[a as usize] as usize, sorted.expert_of_row(row));
        }
        for (rows, e) in sorted.expert_offsets.windows(2).zip(0u32..) {
            let own = &sorted.assignment_of_row[rows[0] as usize..rows[1] as usize];
            prop_assert!(own.is_sorted(), "expert {} is out of order", e);
        }
        // Tiles cover every row once, none empty, and no more of them than slots.
        let mut next = 0;
        let tiles = tiles(&sorted.expert_offsets, tile_m);
        for tile in &tiles {
            prop_assert_eq!(tile.first_row, next);
            prop_assert!((1..=tile_m).contains(&tile.num_rows));
            let rows = tile.first_row as usize..(tile.first_row + tile.num_rows) as usize;
            prop_assert!(rows.clone().all(|row| sorted.expert_of_row(row) == tile.expert as usize));
            next = rows.end as u32;
        }
        prop_assert_eq!(next as usize, experts.len());
        prop_assert!(tiles.len() as u64 <= tile_slots(experts.len() as u64, 20, tile_m));
    }

    #[test]
    fn permuting_tokens_permutes_the_output(config in any_config(9), seed in any::<u64>(), num_tokens in 1..12usize) {
        let mut values = Values(seed);
        let h = config.hidden_size() as usize;
        let weights = values.weights(&config);
        let x = values.floats(num_tokens * h);
        let order = shuffled(num_tokens, &mut values);
        let permuted: Vec<f32> = order.iter().flat_map(|&t| &x[t * h..][..h]).copied().collect();
        let y = moe_forward(&config, &weights, &x).y;
        let expected: Vec<f64> = order.iter().flat_map(|&t| &y[t * h..][..h]).copied().collect();
        prop_assert_eq!(moe_forward(&config, &weights, &permuted).y, expected);
    }

    #[test]
    fn relabelling_experts_changes_nothing(config in any_config(9), seed in any::<u64>(), num_tokens in 1..12usize) {
        let mut values = Values(seed);
        let [h, i, e] = [config.hidden_size(), config.intermediate_size(), config.num_experts()].map(|n| n as usize);
        let mut weights = values.weights(&config);
        weights.router_bias = Some(values.even(e));
        let x = values.floats(num_tokens * h);
        let before = moe_forward(&config, &weights, &x);
        let no_ties = before.router.router_logits.chunks_exact(e).all(|logits| {
            let mut sorted = logits.to_vec();
            sorted.sort_by(f64::total_cmp);
            sorted.windows(2).all(|pair| pair[0] < pair[1])
        });
        prop_assume!(no_ties);
        let order = shuffled(e, &mut values);
        let relabel = |tensor: &[f32], size: usize| -> Vec<f32> {
            order.iter().flat_map(|&e| &tensor[e * size..][..size]).copied().collect()
        };
        let relabelled = wgmoe::MoeWeights {
            router: relabel(&weights.router, h),
            router_bias: weights.router_bias.as_deref().map(|bias| relabel(bias, 1)),
            gate_proj: relabel(&weights.gate_proj, i * h),
            up_proj: relabel(&weights.up_proj, i * h),
            down_proj: relabel(&weights.down_proj, h * i),
            ..wgmoe::MoeWeights::default()
        };
        let after = moe_forward(&config, &relabelled, &x);
        for (&now, &then) in after.router.topk_experts.iter().zip(&before.router.topk_experts) {
            prop_assert_eq!(order[now as usize], then as usize);
        }
        // Softmax adds up its denominator in another order.
        let scale = before.y.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for (now, then) in after.y.iter().zip(&before.y) {
            prop_assert!((now - then).abs() <= 1e-12 * scale, "{} instead of {}", now, then);
        }
    }
}

/// Every number of workgroups at which folding changes.
#[test]
fn folding_is_right_at_its_edges() {
    let max = 65_535u64;
    for rows in [1, 2, 3, 100, max - 1, max] {
        for workgroups in [rows * max - 1, rows * max, rows * max + 1] {
            match grid::fold(workgroups, max as u32) {
                Ok([x, y, 1]) => {
                    let all = u64::from(x) * u64::from(y);
                    assert!(u64::from(x.max(y)) <= max && all >= workgroups && all - workgroups < u64::from(y));
                }
                Ok(grid) => panic!("{grid:?}"),
                Err(_) => assert!(workgroups > (max - 1) * max, "{workgroups}"),
            }
        }
    }
    assert!(grid::fold(max * max + 1, max as u32).is_err());
    assert!(grid::fold(1 << 32, u32::MAX).is_err());
    assert!(grid::fold(u64::MAX, u32::MAX).is_err());
}
