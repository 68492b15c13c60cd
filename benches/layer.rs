//! Whole forward passes on resident weights and input, router included: decode and prefill batches, on the default
//! device and on the CPU engine. Gelem/s in the output is GFLOP/s.
//!
//! ```text
//! cargo bench --bench layer
//! cargo bench --bench layer -- --test     runs each once: is everything right?
//! ```

mod support;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use support::{BATCHES, MEASUREMENT_TIME, Subject, WARM_UP_TIME, contexts};

fn layer(criterion: &mut Criterion) {
    for (device, context) in contexts() {
        let subject = Subject::new(&context);
        let mut group = criterion.benchmark_group(format!("layer/{device}"));
        group.sample_size(10).measurement_time(MEASUREMENT_TIME).warm_up_time(WARM_UP_TIME);
        for (phase, num_tokens) in BATCHES {
            let layer = subject.checked(num_tokens);
            let plan = layer.plan(num_tokens).expect("the plan of a pass that worked");
            group.throughput(Throughput::Elements(plan.stages.iter().map(|stage| stage.flops).sum()));
            group.bench_function(BenchmarkId::new(phase, num_tokens), |bencher| {
                bencher.iter_custom(|runs| (0..runs).map(|_| layer.run_resident().expect("it ran before")).sum());
            });
        }
        group.finish();
    }
}

criterion_group!(benches, layer);
criterion_main!(benches);
