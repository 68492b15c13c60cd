//! What the comparisons are worth: kernels with a fault in their own text, run on the device by the same code, have to be
//! caught. Where a fault's text is no longer part of the kernel, its test fails.

use super::case::Case;
use super::exact::Integers;
use super::rows::check_choices_of;
use super::verdict::words;
use crate::bench::workload::Workload;
use crate::context::Context;
use crate::error::Result;
use crate::gpu::harness::{Harness, Output};
use crate::gpu::{DeviceChoice, Gpu};
use crate::kernels::matmul::MatmulChoice;
use crate::kernels::{Kernel, Stage};
use crate::model::activation::{Activation, Function};
use crate::model::config::MoeConfig;
use crate::model::formats::WeightFormat;
use crate::model::routing::Routing;
use crate::plan::{LayerPlan, MatmulRequest, Plan};
use std::io::Write;

/// As in `tests/support`: the device that tests run on, or a loud skip where there is none.
fn gpu() -> Option<Context> {
    let choice = DeviceChoice::from_env();
    let context = Context::new(&choice).unwrap_or_else(|error| panic!("WGMOE_ADAPTER={choice}: {error}"));
    if context.gpu().is_none() {
        let required = std::env::var("WGMOE_REQUIRE_ADAPTER").is_ok_and(|value| value == "1");
        assert!(!required, "WGMOE_REQUIRE_ADAPTER=1, but {}", context.choice_reason());
        let _ = writeln!(std::io::stderr(), "SKIPPED: no GPU adapter");
        return None;
    }
    Some(context)
}

/// A fault: what of which file becomes what.
#[derive(Clone, Copy)]
struct Fault {
    name: &'static str,
    file: &'static str,
    from: &'static str,
    to: &'static str,
}

const fn fault(name: &'static str, file: &'static str, from: &'static str, to: &'static str) -> Fault {
    Fault { name, file, from, to }
}

/// The kernel with the fault, under a name of its own, as pipelines are kept by their names.
fn break_kernel(kernel: &mut Kernel, fault: Fault) {
    let part = kernel.parts.iter_mut().find(|part| part.file == fault.file);
    let part = part.unwrap_or_else(|| panic!("{}: {} has no part {}", fault.name, kernel.label, fault.file));
    assert!(part.source.contains(fault.from), "{}: {} does not contain {:?}", fault.name, fault.file, fault.from);
    part.source = Box::leak(part.source.replacen(fault.from, fault.to, 1).into_boxed_str());
    kernel.label = format!("{} with {}", kernel.label, fault.name);
}

fn with_fault(plan: &Plan, stage: Stage, fault: Fault) -> Plan {
    let mut plan = plan.clone();
    for dispatch in plan.dispatches.iter_mut().filter(|dispatch| dispatch.kernel.stage == stage) {
        break_kernel(&mut dispatch.kernel, fault);
    }
    plan
}

/// What `check` says of a kernel as it is, and of the same with each fault.
fn assert_caught(gpu: &Gpu, case: &Case<'_>, choice: MatmulChoice, stage: Stage, faults: &[Fault]) {
    let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
    let run = async |fault: Option<Fault>| -> Result<Option<String>> {
        let layer = case.plan(gpu.profile(), &request)?;
        let plan = layer.plan(case.num_tokens())?;
        let plan = fault.map_or(plan.clone(), |fault| with_fault(&plan, stage, fault));
        let harness = Harness::new(gpu, &layer, case.weights).await?;
        Ok(case.check(&harness, &plan, stage).await?.reason)
    };
    let right = pollster::block_on(run(None)).expect("the kernel runs");
    assert_eq!(right, None, "{} {choice:?}", stage.name());
    for &fault in faults {
        // A shader that does not compile would be "caught" for the wrong reason.
        let reason = pollster::block_on(run(Some(fault))).expect("the faulty kernel runs");
        let reason = reason.unwrap_or_else(|| panic!("{} with {} passed", choice.label(), fault.name));
        let compared =
            ["element", "wrote outside", "expert_offsets", "of_row", "of_assignment", "tiles", "choice", "padding"];
        assert!(compared.iter().any(|word| reason.contains(word)), "{}: {reason}", fault.name);
    }
}

fn workload(h: u32, i: u32, e: u32, k: u32) -> Workload {
    let config = MoeConfig::new(h, i, e, k, Routing::softmax(true), Activation::SWIGLU).expect("sound sizes");
    Workload::new(config, 0.5, 3).expect("small")
}

const F16_SUMS: Fault = fault(
    "sums in f16",
    "step",
    "return fma(x.xxxx, w[0], fma(x.yyyy, w[1], fma(x.zzzz, w[2], fma(x.wwww, w[3], sums))));",
    "let next = fma(x.xxxx, w[0], fma(x.yyyy, w[1], fma(x.zzzz, w[2], fma(x.wwww, w[3], sums))));
    return vec4<f32>(unpack2x16float(pack2x16float(next.xy)), unpack2x16float(pack2x16float(next.zw)));",
);

/// The next expert's weights.
const fn wrong_expert(file: &'static str) -> Fault {
    fault("the next expert", file, "place_of(tile.expert)", "(place_of(tile.expert) + 1u) % params.num_experts")
}

#[test]
fn faults_in_the_grouped_matmul_are_caught() {
    let Some(context) = gpu() else { return };
    let gpu = context.gpu().expect("it is one");
    // Several rounds over the inputs, several tiles of rows and columns, and tails of each.
    let workload = workload(101, 75, 3, 2);
    let x = workload.input(41).expect("small");
    let case = Case::new(&workload, &x, WeightFormat::F32).expect("sound");
    let tiled = [
        F16_SUMS,
        wrong_expert("matmul_tiled"),
        fault("no last K tile", "matmul_tiled", "k < params.k4; k += TILE_K4", "k + TILE_K4 < params.k4; k += TILE_K4"),
        fault(
            "a K tile too early",
            "matmul_tiled",
            "let at = k + i % TILE_K4;",
            "let at = max(k, 1u) - 1u + i % TILE_K4;",
        ),
        fault("no last row", "matmul_tiled", "if i < tile.num_rows {", "if i + 1u < tile.num_rows {"),
        fault(
            "the next row",
            "tiles_sorted",
            "return tile.first_row + min(i, tile.num_rows - 1u);",
            "return tile.first_row + min(i + 1u, tile.num_rows);",
        ),
        fault(
            "no last column",
            "matmul_tiled",
            "if column >= params.end_column",
            "if column + 4u >= params.end_column",
        ),
        fault(
            "a neighbour's row",
            "matmul_tiled",
            "tile_x[row * STRIDE + i % TILE_K4] = value;",
            "tile_x[(row + 1u) % TILE_M * STRIDE + i % TILE_K4] = value;",
        ),
    ];
    assert_caught(gpu, &case, MatmulChoice::Tiled { tile_m: 16, tile_n: 64 }, Stage::Down, &tiled);
    let tall = [wrong_expert("matmul_tiled"), tiled[2], tiled[4]];
    assert_caught(gpu, &case, MatmulChoice::TiledTall { tile_m: 32, tile_n: 64 }, Stage::GateUp, &tall);
    let vec = [
        F16_SUMS,
        wrong_expert("matmul_vec"),
        fault(
            "no last input",
            "matmul_vec",
            "let w = load_weights4x4",
            "if k + 1u == params.k4 { continue; } let w = load_weights4x4",
        ),
        fault("no lane's last sum", "reduce", "half > 0u", "half > 1u"),
    ];
    let choice = MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: true };
    assert_caught(gpu, &case, choice, Stage::Down, &vec);
    let Some(subgroup_size) = gpu.profile().subgroup_size else { return };
    let subgroup = [
        F16_SUMS,
        wrong_expert("matmul_subgroup"),
        fault("no last row", "matmul_subgroup", "if i >= tile.num_rows", "if i + 1u >= tile.num_rows"),
        fault(
            "no second quad",
            "matmul_subgroup",
            "if columns.y < params.end_column",
            "if columns.y + 4u < params.end_column",
        ),
    ];
    assert_caught(gpu, &case, MatmulChoice::Subgroup { subgroup_size }, Stage::Down, &subgroup);
    let vec = [F16_SUMS, wrong_expert("matmul_vec_subgroup")];
    assert_caught(gpu, &case, MatmulChoice::VecSubgroup { subgroup_size, sorted: true }, Stage::Down, &vec);
}

#[test]
fn faults_of_other_stages_are_caught() {
    let Some(context) = gpu() else { return };
    let gpu = context.gpu().expect("it is one");
    let choice = MatmulChoice::Tiled { tile_m: 16, tile_n: 64 };
    let workload = workload(102, 20, 6, 2);
    let x = workload.input(37).expect("small");
    let case = Case::new(&workload, &x, WeightFormat::F32).expect("sound");
    let combine = [
        fault(
            "a word past the end",
            "combine",
            "y[first] = value.x;",
            "y[first] = value.x; y[params.num_tokens * params.hidden_size] = 1.0;",
        ),
        fault("an element not written", "combine", "    if width > 1u", "    if width > 2u"),
        fault(
            "a choice left out",
            "rows_weighted",
            "a < (token + 1u) * params.top_k",
            "a + 1u < (token + 1u) * params.top_k",
        ),
        fault("no weights", "rows_weighted", "weight = topk_weights[a]", "weight = 1.0 + 0.0 * topk_weights[a]"),
    ];
    assert_caught(gpu, &case, choice, Stage::Combine, &combine);
    let permute = [
        fault(
            "no stable order",
            "permute",
            "let earlier = vec4<u32>(i, i + 1u, i + 2u, i + 3u) < vec4<u32>(lane);",
            "let earlier = vec4<u32>(i, i + 1u, i + 2u, i + 3u) > vec4<u32>(lane);",
        ),
        fault("a tile's rows", "permute", "min(height, end - row)", "min(height + 1u, end - row)"),
        fault(
            "a wrong offset",
            "permute",
            "if group == 0u { expert_offsets[e] = before.x; }",
            "if group == 0u { expert_offsets[e] = before.y; }",
        ),
        fault(
            "a word past the end",
            "permute",
            "expert_offsets[params.num_weighted] = total.x;",
            "expert_offsets[params.num_weighted] = total.x; expert_offsets[params.num_weighted + 1u] = total.x;",
        ),
    ];
    assert_caught(gpu, &case, choice, Stage::Permute, &permute);
    let router = [
        fault(
            "a swapped pair of ids",
            "choose_top_k",
            "topk_experts[at.token * params.top_k + j] = last.y",
            "topk_experts[at.token * params.top_k + (j ^ 1u)] = last.y",
        ),
        F16_SUMS,
    ];
    assert_caught(gpu, &case, choice, Stage::Router, &router);
}

/// The bounds let a single wrong bit pass; small integers do not.
#[test]
fn one_flipped_bit_is_caught_by_integers() {
    let Some(context) = gpu() else { return };
    let gpu = context.gpu().expect("it is one");
    let flip = fault(
        "one flipped bit",
        "down",
        "= add_bias(expert, column, sums);",
        "= bitcast<vec4<f32>>(bitcast<vec4<u32>>(add_bias(expert, column, sums)) ^ vec4<u32>(1u, 0u, 0u, 0u));",
    );
    let choice = MatmulChoice::Tiled { tile_m: 16, tile_n: 64 };
    let layer = Integers::new(WeightFormat::F32, (37, 3, 1), Function::Relu, false, 1).expect("sound");
    let case = Case::exact(&layer.config, &layer.weights, layer.format, layer.batch()).expect("sound");
    assert_caught(gpu, &case, choice, Stage::Down, &[flip]);
}

/// Router and permute on rows of every kind: NaN first, ties to the last, masked experts weighed.
#[test]
fn faults_in_rankings_are_caught() {
    let Some(context) = gpu() else { return };
    let gpu = context.gpu().expect("it is one");
    let faults = [
        fault("ties to the last", "choose_top_k", "b.y < a.y", "b.y > a.y"),
        fault(
            "NaN first",
            "router",
            "if magnitude > 0x7f800000u { return 0u; }",
            "if magnitude > 0x7f800000u { return 0xffffffffu; }",
        ),
        fault("zeros with signs", "router", "if magnitude == 0u { return 0x80000000u; }", ""),
        fault("a choice twice", "choose_top_k", "candidate.y > last.y", "candidate.y >= last.y"),
        fault("rows not counted", "router", "if weigh(at, after) {", "if weigh(at, after) && false {"),
    ];
    let reasons = pollster::block_on(async {
        let mut reasons = vec![("nothing", check_choices_of(gpu, |_| {}).await.expect("the kernel runs"))];
        for fault in faults {
            let broken = check_choices_of(gpu, |plan| *plan = with_fault(plan, Stage::Router, fault));
            reasons.push((fault.name, broken.await.expect("the faulty kernel runs")));
        }
        reasons
    });
    for (n, (name, reason)) in reasons.iter().enumerate() {
        assert_eq!(reason.is_some(), n > 0, "{name}: {reason:?}");
    }
}

/// A kernel whose sums depend on who comes first gives other bits in other runs: here each lane of the router takes a
/// ticket, which says with which of its inputs it begins.
#[test]
fn sums_in_order_of_arrival_differ_between_runs() {
    const TOKENS: u32 = 1024;
    let Some(context) = gpu() else { return };
    let gpu = context.gpu().expect("it is one");
    let choice = MatmulChoice::Tiled { tile_m: 16, tile_n: 64 };
    let workload = workload(1024, 1, 8, 2);
    let x = workload.input(TOKENS).expect("small");
    let request = MatmulRequest { choice: Some(choice), ..MatmulRequest::default() };
    let layer = LayerPlan::new(&workload.config, WeightFormat::F32, gpu.profile(), &request).expect("sound");
    let plan = layer.plan(TOKENS).expect("sound");
    let zeros = "var sums = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));";
    let ticket = "let turn = atomicAdd(&status[1], 1u);
        var sums = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));";
    let weights = "let w = load_router4x4(first_expert, k4, k);";
    let turned = "let k = (k + turn * K_LANES) % k4; let w = load_router4x4(first_expert, k4, k);";
    let by_arrival = with_fault(&plan, Stage::Router, fault("tickets", "products_fused", zeros, ticket));
    let by_arrival = with_fault(&by_arrival, Stage::Router, fault("turns", "products_fused", weights, turned));
    let outputs = [
        Output::poisoned("router_logits", TOKENS as usize * 8),
        Output::poisoned("topk_experts", TOKENS as usize * 2),
        Output::poisoned("topk_weights", TOKENS as usize * 2),
        Output::zeroed("status", 4),
    ];
    let differs = |plan: &Plan, runs: usize| {
        pollster::block_on(async {
            let harness = Harness::new(gpu, &layer, &workload.weights).await.expect("it fits");
            let mut first = None;
            for _ in 0..runs {
                let inputs = [("x", words(&x))];
                let out = harness.run(plan, Stage::Router, &inputs, &outputs).await.expect("it runs");
                if *first.get_or_insert_with(|| out[0].clone()) != out[0] {
                    return true;
                }
            }
            false
        })
    };
    assert!(!differs(&plan, 20), "the router itself");
    assert!(differs(&by_arrival, 200), "the same bits 200 times, although lanes take turns");
}
