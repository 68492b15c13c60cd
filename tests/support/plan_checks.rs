//! What every plan promises, for any layer on any device: used by properties and by the fuzz target of the plan.

use std::collections::BTreeSet;
use wgmoe::kernels::params::Uniform;
use wgmoe::kernels::{Stage, combine, router as router_kernel};
use wgmoe::plan::pages::WeightPage;
use wgmoe::plan::{DeviceProfile, LayerPlan, Plan, StageCost, cost, requests};

/// The routing that needs the most tiles: one assignment for each expert, the rest on the last.
pub fn most_tiles(assignments: u64, num_experts: u32, tile_m: u64) -> u64 {
    let experts = u64::from(num_experts).min(assignments);
    if experts == 0 { 0 } else { experts - 1 + (assignments - (experts - 1)).div_ceil(tile_m) }
}

/// Pages cover each (expert, column) once, in order, within the limit.
pub fn check_pages(pages: &[WeightPage], num_experts: u32, num_columns: u32, quad_bytes: u64, limit: u64) {
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
pub fn check_plan(layer: &LayerPlan, plan: &Plan, device: &DeviceProfile) {
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
