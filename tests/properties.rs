//! Properties of the plan, for any layer on any device, and of the reference, for any input.

mod support;

use proptest::prelude::*;
use proptest::test_runner::Config;
use std::collections::BTreeSet;
use support::{Values, config};
use wgmoe::kernels::matmul::VEC_ROWS;
use wgmoe::kernels::params::Uniform;
use wgmoe::kernels::{Stage, combine, router as router_kernel};
use wgmoe::plan::pages::{WeightPage, weight_pages};
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest, Plan, StageCost, cost, grid, requests, tile_slots};
use wgmoe::reference::permute::{permute, tiles};
use wgmoe::reference::router::top_k_indices;
use wgmoe::reference::{moe_forward, router};
use wgmoe::{Batch, Error, MatmulVariant, MoeConfig, WeightFormat};

/// The routing that needs the most tiles: one assignment for each expert, the rest on the last.
fn most_tiles(assignments: u64, num_experts: u32, tile_m: u64) -> u64 {
    let experts = u64::from(num_experts).min(assignments);
    if experts == 0 { 0 } else { experts - 1 + (assignments - (experts - 1)).div_ceil(tile_m) }
}

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

/// Pages cover each (expert, column) once, in order, within the limit.
fn check_pages(pages: &[WeightPage], num_experts: u32, num_columns: u32, quad_bytes: u64, limit: u64) {
    let mut next = (0, 0);
    for page in pages {
        assert_eq!((page.first_expert, page.first_column), next, "{page:?}");
        assert!(page.end_expert > page.first_expert && page.num_columns > 0, "{page:?}");
        let rows = u64::from(page.end_expert - page.first_expert) * u64::from(page.num_columns);
        assert_eq!(page.bytes, rows / 4 * quad_bytes, "{page:?}");
        assert!(page.bytes <= limit, "{page:?}");
        // Gate and up columns alternate and a lane owns four of them: neither may be torn apart.
        assert_eq!(page.first_column % 8, 0, "{page:?}");
        let end = page.first_column + page.num_columns;
        assert!(page.num_columns % 8 == 0 || end == num_columns, "{page:?}");
        if end == num_columns {
            next = (page.end_expert, 0);
            assert!(page.first_column == 0 || page.end_expert == page.first_expert + 1, "{page:?}");
        } else {
            assert_eq!(page.end_expert, page.first_expert + 1, "{page:?}");
            next = (page.first_expert, end);
        }
    }
    assert_eq!(next, (num_experts, 0));
}

/// Every kernel of the pass gets enough workgroups, and every index that it forms fits a u32.
fn check_plan(layer: &LayerPlan, plan: &Plan, device: &DeviceProfile) {
    let config = layer.config();
    let params = &plan.params;
    let tokens = u64::from(plan.num_tokens);
    let assignments = tokens * u64::from(config.top_k());
    assert_eq!(u64::from(params.num_assignments), assignments);
    let tile_m = u64::from(plan.matmul.tile_m());
    assert_eq!(u64::from(params.tile_m), tile_m);
    if plan.matmul.sorted() {
        assert!(u64::from(params.num_tile_slots) >= most_tiles(assignments, config.num_experts(), tile_m));
    } else {
        // Any assignment may start a tile.
        assert_eq!(params.num_tile_slots, params.num_assignments);
    }
    let mut stages = Vec::new();
    // Columns of y that are done, and columns of all experts that gate_up and down compute.
    let (mut combined, mut computed) = (0, [0u64; 2]);
    for dispatch in &plan.dispatches {
        let [x, y, z] = dispatch.grid.map(u64::from);
        let workgroups = x * y;
        assert!(x.max(y) <= u64::from(device.max_workgroups_per_dimension) && z == 1, "{:?}", dispatch.grid);
        assert!(workgroups <= u64::from(u32::MAX), "{:?}", dispatch.grid);
        if dispatch.name == "logits" {
            continue; // one dense matmul, for the router
        }
        let stage = dispatch.kernel.stage;
        let lanes = u64::from(dispatch.kernel.workgroup_size);
        match stage {
            Stage::Router => assert!(workgroups * u64::from(router_kernel::TOKENS) >= tokens),
            Stage::Permute => {
                assert!(workgroups * u64::from(params.chunk_len) >= assignments);
                assert_eq!(y, 1, "permute does not unfold its grid");
                assert_eq!(u64::from(params.chunk_len) % lanes, 0);
                let experts = dispatch.kernel.overrides.iter().find(|o| o.0 == "NUM_EXPERTS").expect("it has one").1;
                assert!(experts >= config.num_experts());
                // llvmpipe ends an invocation's loops after 65,535 rounds in all: 64 to rank the lanes of each round and
                // the round itself, the count, the tiles with their searches, the experts.
                let rounds = u64::from(params.chunk_len) / lanes * 65
                    + assignments.div_ceil(lanes)
                    + u64::from(params.num_tile_slots).div_ceil(workgroups * lanes) * 11
                    + 3 * u64::from(experts.div_ceil(256))
                    + 8;
                assert!(rounds < 65_535, "{rounds} rounds for {assignments} assignments");
                // Workgroups past the end still form the index of their first assignment.
                assert!(workgroups * u64::from(params.chunk_len) <= u64::from(u32::MAX));
            }
            Stage::Combine => {
                let Uniform::Moe(uniform) = dispatch.uniform else { panic!("not the uniform of combine") };
                // Each lane takes four elements.
                assert!(workgroups * u64::from(4 * combine::WG_SIZE) >= tokens * u64::from(uniform.hidden_stride));
                assert_eq!(uniform.first_column, combined, "slices follow each other");
                combined += uniform.hidden_stride;
                assert!(tokens * u64::from(config.hidden_size()) <= u64::from(u32::MAX));
            }
            Stage::GateUp | Stage::Down => {
                let Uniform::Matmul(uniform) = dispatch.uniform else { panic!("not the uniform of a matmul") };
                let page = layer.pages(dispatch.buffer("weights"))[dispatch.page];
                assert_eq!([uniform.first_expert, uniform.end_expert], [page.first_expert, page.end_expert]);
                assert_eq!(uniform.num_columns, page.num_columns);
                assert!(uniform.begin_column < uniform.end_column && uniform.end_column <= page.num_columns);
                assert_eq!([uniform.begin_column % 4, uniform.end_column % 4], [0, 0]);
                // In the output, the page's columns stand where the slice has them, within its width.
                let slice = if stage == Stage::Down { combined } else { 0 };
                assert_eq!(uniform.first_column, page.first_column.wrapping_sub(slice));
                let out_width = if stage == Stage::Down { uniform.out_stride } else { 2 * uniform.out_stride };
                assert!(uniform.first_column.wrapping_add(uniform.end_column) <= out_width);
                let experts = u64::from(page.end_expert - page.first_expert);
                computed[usize::from(stage == Stage::Down)] +=
                    experts * u64::from(uniform.end_column - uniform.begin_column);
                assert_eq!(uniform.num_tile_slots, params.num_tile_slots);
                assert!(
                    u64::from(uniform.num_column_tiles) * u64::from(plan.matmul.tile_n())
                        >= u64::from(uniform.end_column - uniform.begin_column)
                );
                let needed = u64::from(uniform.num_tile_slots) * u64::from(uniform.num_column_tiles);
                if device.software && plan.matmul.walks() {
                    // A workgroup goes from tile to tile: two rounds for each vec4 of inputs, and a scan without a sort.
                    let scan = if plan.matmul.sorted() { 0 } else { assignments };
                    let rounds = needed.div_ceil(workgroups) * (2 * u64::from(uniform.k4) + 2 * scan + 1);
                    assert!(rounds < 65_535, "{rounds} rounds in {workgroups} workgroups for {needed} tiles");
                    assert!(needed + workgroups <= u64::from(u32::MAX));
                } else {
                    assert!(workgroups >= needed);
                }
                assert!(uniform.k4 * 4 >= uniform.x_stride && uniform.out_stride % 4 == 0);
                // Rows of the input, rows of the output, and the words of a page, as the kernels index them.
                let input_rows = if stage == Stage::Down { assignments } else { tokens };
                for elements in [
                    input_rows * u64::from(uniform.x_stride),
                    assignments * u64::from(uniform.out_stride),
                    page.bytes / 4,
                ] {
                    assert!(elements <= u64::from(u32::MAX), "{elements} elements");
                }
            }
            Stage::DownCombine => {
                let Uniform::Matmul(uniform) = dispatch.uniform else { panic!("not the uniform of a matmul") };
                assert_eq!((tokens, layer.pages("down_weights").len()), (1, 1));
                assert_eq!(uniform.num_tile_slots, config.top_k());
                assert_eq!([uniform.begin_column, uniform.end_column], [0, uniform.num_columns]);
                assert!(workgroups * u64::from(plan.matmul.tile_n()) >= u64::from(uniform.end_column));
                assert_eq!(uniform.out_stride, config.hidden_size());
                combined += uniform.end_column;
                computed[1] += u64::from(config.num_experts()) * u64::from(uniform.end_column);
            }
            other => panic!("{} is no part of a pass", other.name()),
        }
        stages.push(stage);
    }
    let names: BTreeSet<&str> = stages.iter().map(|stage| stage.name()).collect();
    let next = |pair: &[Stage]| pair[0] <= pair[1] || pair == [Stage::Combine, Stage::Down]; // the next slice
    assert!(stages.windows(2).all(next), "{stages:?}");
    let padded = |n: u32| u64::from(n.next_multiple_of(4));
    assert_eq!(u64::from(combined), padded(config.hidden_size()), "y is complete");
    let columns = [2 * padded(config.intermediate_size()), padded(config.hidden_size())];
    assert_eq!(computed, columns.map(|n| n * u64::from(config.num_experts())), "every expert's columns, once");
    assert_eq!(names.contains("permute"), plan.matmul.sorted());
    let costed: Vec<&str> = plan.stages.iter().map(|cost| cost.name).filter(|&name| name != "logits").collect();
    assert_eq!(costed.iter().copied().collect::<BTreeSet<_>>(), names);
    let of_matmuls = |cost: &&StageCost| ["gate_up", "down", "down_combine"].contains(&cost.name);
    let sums = if costed.contains(&"down_combine") { 2 * assignments * u64::from(config.hidden_size()) } else { 0 };
    let flops: u64 = plan.stages.iter().filter(of_matmuls).map(|cost| cost.flops).sum::<u64>() - sums;
    let matmuls = assignments * 3 * u64::from(config.hidden_size()) * u64::from(config.intermediate_size());
    assert_eq!(flops, 2 * matmuls);
    check_requests(layer, plan);
}

/// No stage requests less than the least, whether routing is even or as uneven as can be.
fn check_requests(layer: &LayerPlan, plan: &Plan) {
    let config = layer.config();
    let check = |rows_of_expert: &[u32], costs: &[StageCost]| {
        let requests = plan.requests(rows_of_expert);
        assert_eq!(requests.len(), costs.len());
        for (request, cost) in requests.iter().zip(costs) {
            let count = plan.dispatches.iter().filter(|dispatch| dispatch.name == cost.name).count();
            assert_eq!((request.name, request.dispatches as usize), (cost.name, count));
            assert!(count > 0 && request.bytes >= cost.bytes, "{request:?} {cost:?}");
        }
    };
    check(&requests::even_rows(plan.params.num_assignments, config.num_experts()), &plan.stages);
    let mut uneven = vec![0; config.num_experts() as usize];
    uneven[..config.top_k() as usize].fill(plan.num_tokens);
    let active = Some(config.top_k());
    let how = cost::Dispatched::of(&plan.stages);
    let costs = cost::stages(config, &layer.formats(), plan.num_tokens, active, how);
    check(&uneven, &costs);
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
