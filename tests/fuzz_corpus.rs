//! What the fuzz targets start from, and what they once found, run again: each file is an answer or an error, never a
//! panic. `scripts/fuzz.sh` looks for more.

#[path = "../fuzz/src/readers.rs"]
mod readers;
mod support;

use std::fs;
use std::path::Path;
use wgmoe::Context;

#[test]
fn every_file_of_the_corpus_is_an_answer_or_an_error() {
    let context = support::gpu_context().unwrap_or_else(Context::cpu);
    type Target = (&'static str, fn(&[u8], &Context));
    let targets: [Target; 10] = [
        ("safetensors", readers::safetensors),
        ("index", readers::index),
        ("gguf", readers::gguf),
        ("config", readers::config),
        ("family", readers::family),
        ("tuning", readers::tuning),
        ("results", readers::results),
        ("trace", readers::trace),
        ("golden", readers::golden),
        ("device", readers::device_facts),
    ];
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut bytes = 0;
    for (name, run) in targets {
        let files = fs::read_dir(corpus.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut files: Vec<_> = files.map(|file| file.expect("readable").path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has a corpus");
        for file in files {
            println!("{}", file.display());
            let data = fs::read(&file).expect("readable");
            bytes += data.len();
            run(&data, &context);
        }
    }
    fs::remove_dir_all(readers::folder()).expect("it was made");
    assert!(bytes < 300 << 10, "the corpus is small: {bytes} bytes");
}
