//! The stages of a pass one by one, as `MoeLayer::profile` times them: by GPU timestamps where the device has them.
//! Stages that a small batch skips are left out.
//!
//! ```text
//! cargo bench --bench stages
//! cargo bench --bench stages -- --test     runs each once: is everything right?
//! ```

mod support;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use support::{BATCHES, MEASUREMENT_TIME, Subject, WARM_UP_TIME, contexts};
use wgmoe::MoeLayer;

fn stages(criterion: &mut Criterion) {
    for (device, context) in contexts() {
        let subject = Subject::new(&context);
        let mut group = criterion.benchmark_group(format!("stages/{device}"));
        group.sample_size(10).measurement_time(MEASUREMENT_TIME).warm_up_time(WARM_UP_TIME);
        for (_, num_tokens) in BATCHES {
            let layer = subject.checked(num_tokens);
            for stage in layer.plan(num_tokens).expect("the plan of a pass that worked").stages {
                // Sorting computes nothing; its speed is that of memory.
                group.throughput(match stage.flops {
                    0 => Throughput::Bytes(stage.bytes),
                    flops => Throughput::Elements(flops),
                });
                group.bench_function(BenchmarkId::new(stage.name, num_tokens), |bencher| {
                    bencher.iter_custom(|runs| (0..runs).map(|_| time_of(layer, stage.name)).sum());
                });
            }
        }
        group.finish();
    }
}

/// How long `stage` takes in one pass.
fn time_of(layer: &MoeLayer, stage: &str) -> Duration {
    let times = layer.profile().expect("it ran before");
    let seconds = times.iter().filter(|time| time.name == stage).map(|time| time.seconds).sum();
    // Clocks can be coarser than a short stage, and criterion cannot work with zero.
    Duration::from_secs_f64(seconds).max(Duration::from_nanos(1))
}

criterion_group!(benches, stages);
criterion_main!(benches);
