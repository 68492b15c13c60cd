//! The table of docs/performance.md is what the plan computes.

use std::fmt::Write as _;
use wgmoe::bench::presets::{self, Preset};
use wgmoe::forecast::DeviceFacts;
use wgmoe::kernels::matmul::MatmulChoice;
use wgmoe::plan::predict::{Footprint, Rates};
use wgmoe::plan::{DeviceProfile, LayerPlan, MatmulRequest, StageCost};
use wgmoe::{MoeConfig, WeightFormat};

/// The devices that `wgmoe plan` knows by their data sheets, with their rates.
fn devices() -> Vec<(String, Rates)> {
    let of = |name| DeviceFacts::built_in(name).and_then(|facts| Some((facts.name, facts.rates?)));
    ["xe-lp", "apple-m2", "rtx-4070"].map(|name| of(name).expect("it has a data sheet")).into()
}

/// The stages of gate_up for such a batch, and the predicted fraction of the peak that the memory alone allows.
fn gate_up(config: &MoeConfig, format: WeightFormat, tokens: u32) -> StageCost {
    let plan = LayerPlan::new(config, format, &DeviceProfile::webgpu_floor(), &MatmulRequest::default());
    let plan = plan.and_then(|layer| layer.plan(tokens)).expect("a preset has a plan");
    *plan.stages.iter().find(|stage| stage.name == "gate_up").expect("every layer has it")
}

fn table() -> String {
    let devices = devices();
    let preset = Preset::find("qwen3-30b-a3b").expect("it is in the list");
    let config = preset.config().expect("it is valid");
    let vec = MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: false };
    let [small, square, tall, wide] = [
        MatmulChoice::Tiled { tile_m: 16, tile_n: 64 },
        MatmulChoice::Tiled { tile_m: 64, tile_n: 64 },
        MatmulChoice::TiledTall { tile_m: 64, tile_n: 64 },
        MatmulChoice::TiledTall { tile_m: 128, tile_n: 64 },
    ];
    let mut table = "| tokens | weights | variant | registers | workgroup memory | FLOPs / requested byte |".to_owned();
    for (name, _) in &devices {
        let _ = write!(table, " {name} |");
    }
    table.push_str("\n| ---: | --- | --- | ---: | ---: | ---: |");
    table.push_str(&" ---: |".repeat(devices.len()));
    for (tokens, choice) in [(1, vec), (256, small), (2048, square), (2048, tall), (2048, wide)] {
        for format in [WeightFormat::F16, WeightFormat::INT4] {
            let cost = gate_up(&config, format, tokens);
            let rows = (tokens * config.top_k()).div_ceil(config.num_experts());
            let footprint = Footprint::of(choice, format, config.hidden_size(), rows);
            let _ = write!(
                table,
                "\n| {tokens} | {} | {} {} | {} | {} B | {:.1} |",
                format.name(),
                choice.label(),
                choice.sizes(),
                footprint.registers,
                footprint.workgroup_bytes,
                footprint.flops_per_requested_byte,
            );
            for (_, rates) in &devices {
                let attainable = footprint.attainable(rates, cost.flops, cost.bytes);
                let roofline = rates.gflops.min(cost.flops as f64 / cost.bytes as f64 * rates.memory);
                let _ = write!(table, " {:.0} GFLOP/s, {:.0} % |", attainable, 100.0 * attainable / roofline);
            }
        }
    }
    table.push('\n');
    table
}

#[test]
fn the_document_has_the_plans_predictions() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance.md");
    let document = std::fs::read_to_string(path).expect("docs/performance.md is there");
    let table = table();
    assert!(document.contains(&table), "docs/performance.md should have this table:\n{table}");
}

/// A workgroup for each multiprocessor of an H100, and bytes below which it would not matter: 16 MiB are 5 us at 3.3 TB/s.
const MANY_WORKGROUPS: u64 = 132;
const FEW_BYTES: u64 = 16 << 20;

/// The reason why sums are not split across workgroups (docs/adr/0020).
#[test]
fn few_tokens_fill_a_gpu() {
    let device = DeviceProfile { max_storage_binding: 1 << 32, max_buffer: 1 << 32, ..DeviceProfile::webgpu_floor() };
    for preset in presets::ALL {
        let config = preset.config().expect("it is valid");
        let layer = LayerPlan::new(&config, WeightFormat::F16, &device, &MatmulRequest::default()).expect("it fits");
        for tokens in [1, 4, 16] {
            let plan = layer.plan(tokens).expect("a preset has a plan");
            for stage in &plan.stages {
                let dispatches = || plan.dispatches.iter().filter(|dispatch| dispatch.name == stage.name);
                if !matches!(stage.name, "gate_up" | "down" | "down_combine") {
                    continue;
                }
                // Pages follow each other.
                let workgroups = |dispatch: &wgmoe::plan::Dispatch| dispatch.grid.into_iter().map(u64::from).product();
                let fewest: u64 = dispatches().map(workgroups).min().expect("the stage runs");
                assert!(
                    fewest >= MANY_WORKGROUPS || stage.bytes < FEW_BYTES,
                    "{}: {} of {tokens} tokens has {fewest} workgroups for {} bytes",
                    preset.name,
                    stage.name,
                    stage.bytes
                );
            }
        }
    }
}
