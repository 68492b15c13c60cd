//! How near a device's peak each variant of the grouped matmul can come, on paper: a prediction that the first run on such
//! a device confirms or refutes (docs/performance.md).
//!
//! A roofline with three slopes: memory by what the stage has to move at least, the cache that workgroups share by what
//! they request from it, workgroup memory by what lanes read there. Latency, occupancy and instructions beside the
//! multiply-adds are left out, so it is an upper bound.

use crate::kernels::matmul::{LANE_COLUMNS, MatmulChoice};
use crate::model::formats::WeightFormat;
use serde::{Deserialize, Serialize};

/// Rates of a device, as its makers publish them or as follows from clocks and widths.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rates {
    /// Multiply-adds in f32, in GFLOP/s.
    pub gflops: f64,
    /// Memory, in GB/s.
    pub memory: f64,
    /// The cache that all workgroups share, in GB/s.
    pub cache: f64,
    /// Workgroup memory of the whole device, in GB/s.
    pub workgroup_memory: f64,
}

/// What a choice asks of a device, when a tile has `rows` rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Footprint {
    /// f32 registers of a lane for sums, weights and inputs; addresses come on top.
    pub registers: u32,
    /// Workgroup memory of a workgroup, in bytes.
    pub workgroup_bytes: u64,
    /// FLOPs for each byte of inputs and weights that a workgroup requests.
    pub flops_per_requested_byte: f64,
    /// FLOPs for each byte that lanes read from workgroup memory; infinite where they read nothing from it.
    pub flops_per_workgroup_byte: f64,
}

impl Footprint {
    /// Of tiles with `rows` rows of an expert whose weights are stored as `format`, `inputs` wide.
    pub fn of(choice: MatmulChoice, format: WeightFormat, inputs: u32, rows: u32) -> Self {
        let rows = f64::from(rows.clamp(1, choice.tile_m()));
        // One step of four inputs: a vec4 of each row, a block of each quad.
        let columns = f64::from(choice.tile_n());
        let weights = columns * 4.0 * format.bits_per_weight(inputs) / 8.0;
        let flops_per_requested_byte = 2.0 * rows * columns * 4.0 / (rows * 16.0 + weights);
        let lane_rows = |rows: u32| f64::from(2 * rows * LANE_COLUMNS * 4) / f64::from((rows + 4) * 16);
        let (registers, flops_per_workgroup_byte) = match choice {
            MatmulChoice::Tiled { .. } => (4 * 4 + 16 + 4, lane_rows(4)),
            MatmulChoice::TiledTall { .. } => (8 * 4 + 16 + 4, lane_rows(8)),
            // 32 rows x 8 columns, the weights of 8 columns, a vec4 of each of four rows.
            MatmulChoice::Subgroup { .. } => (32 * 8 + 32 + 16, f64::INFINITY),
            MatmulChoice::Vec { .. } => (4 * 4 + 16 + 16, f64::INFINITY),
            MatmulChoice::VecSubgroup { .. } => (4 * 4 + 16 + 4, f64::INFINITY),
        };
        let workgroup_bytes = choice.workgroup_bytes();
        Self { registers, workgroup_bytes, flops_per_requested_byte, flops_per_workgroup_byte }
    }

    /// The rate that a stage of `flops` FLOPs and `least_bytes` least bytes can reach, in GFLOP/s.
    pub fn attainable(&self, rates: &Rates, flops: u64, least_bytes: u64) -> f64 {
        let by_memory = flops as f64 / least_bytes.max(1) as f64 * rates.memory;
        let by_cache = self.flops_per_requested_byte * rates.cache;
        let by_workgroup_memory = self.flops_per_workgroup_byte * rates.workgroup_memory;
        rates.gflops.min(by_memory).min(by_cache).min(by_workgroup_memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_by_hand() {
        let tiled = Footprint::of(MatmulChoice::Tiled { tile_m: 64, tile_n: 64 }, WeightFormat::F16, 1024, 64);
        // 4 inputs of 64 rows as f32 and of 64 columns as f16: 1024 + 512 bytes for 2 x 64 x 64 x 4 FLOPs.
        assert_eq!(tiled.flops_per_requested_byte, 32768.0 / 1536.0);
        // 4 x 4 x 4 multiply-adds for 8 vec4.
        assert_eq!((tiled.flops_per_workgroup_byte, tiled.registers, tiled.workgroup_bytes), (1.0, 36, 9216));
        let tall = Footprint::of(MatmulChoice::TiledTall { tile_m: 64, tile_n: 64 }, WeightFormat::F16, 1024, 64);
        assert_eq!((tall.flops_per_workgroup_byte, tall.registers), (256.0 / 192.0, 52));
        // A single row: two FLOPs for each weight of two bytes, and an input of 4 bytes for 16 columns.
        let vec = MatmulChoice::Vec { workgroup_size: 64, k_lanes: 16, sorted: false };
        let vec = Footprint::of(vec, WeightFormat::F16, 1024, 1);
        assert_eq!(vec.flops_per_requested_byte, 128.0 / (16.0 + 128.0));
    }

    #[test]
    fn the_lowest_slope_counts() {
        let footprint = Footprint {
            registers: 0,
            workgroup_bytes: 0,
            flops_per_requested_byte: 10.0,
            flops_per_workgroup_byte: 2.0,
        };
        let rates = Rates { gflops: 1000.0, memory: 100.0, cache: 200.0, workgroup_memory: 600.0 };
        assert_eq!(footprint.attainable(&rates, 1000, 10), 1000.0);
        assert_eq!(footprint.attainable(&rates, 1000, 1000), 100.0);
        assert_eq!(footprint.attainable(&Rates { cache: 50.0, ..rates }, 1000, 10), 500.0);
        assert_eq!(footprint.attainable(&Rates { workgroup_memory: 300.0, ..rates }, 1000, 10), 600.0);
    }
}
