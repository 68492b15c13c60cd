//! GGUF files made to break a reader: each ends in a typed error that names the file and says what is wrong, before
//! anything is allocated by an unchecked number.

#[path = "support/gguf.rs"]
mod gguf_file;

use gguf_file::{F16, Gguf, MXFP4, Meta, Q4_0, Q4_K, Q8_0, block, random_blocks, string};
use proptest::prelude::*;
use proptest::test_runner::Config;
use std::fs;
use tempfile::TempDir;
use wgmoe::{Checkpoint, Error};

/// A sound layer of two experts, with what files have beside it.
fn sound() -> Gguf {
    let mut file = Gguf::new("qwen3moe").with(
        "qwen3moe",
        &[
            ("embedding_length", Meta::U32(32)),
            ("expert_feed_forward_length", Meta::u32s(&[32])),
            ("expert_count", Meta::U32(2)),
            ("expert_used_count", Meta::U16(1)),
            ("expert_weights_scale", Meta::F32(1.0)),
            ("rope.freq_base", Meta::F64(1e6)),
        ],
    );
    file.key("tokenizer.ggml.tokens", Meta::texts(&["<s>", "", "\u{fffd}"]));
    file.key("tokenizer.ggml.add_bos_token", Meta::Bool(true));
    file.f32("blk.0.ffn_gate_inp.weight", &[2, 32], &[0.25; 64]);
    for (n, (name, kind)) in [("gate", Q8_0), ("up", Q8_0), ("down", Q4_0)].into_iter().enumerate() {
        let mut byte = n as u8;
        let data = random_blocks(kind, 2 * 32 * 32, || {
            byte = byte.wrapping_mul(37).wrapping_add(11);
            byte
        });
        file.tensor(&format!("blk.0.ffn_{name}_exps.weight"), kind, &[2, 32, 32], data);
    }
    file
}

/// What reading a layer from these bytes leads to.
fn outcome(folder: &TempDir, bytes: &[u8]) -> Result<(), Error> {
    let path = folder.path().join("hostile.gguf");
    fs::write(&path, bytes).expect("writable");
    let checkpoint = Checkpoint::open(&path)?;
    checkpoint.load_layer(None, 0)?;
    Ok(())
}

#[track_caller]
fn assert_bad(bytes: &[u8], expected: &str) {
    let folder = TempDir::new().expect("temporary folder");
    let error = outcome(&folder, bytes).expect_err(expected);
    let message = error.to_string();
    assert!(matches!(error, Error::BadFile { .. }), "{expected}: {error:?}");
    assert!(message.contains("hostile.gguf") && message.contains(expected), "{expected:?}: {message}");
    assert!(message.len() < 800, "a message must not be as long as a hostile file: {} bytes", message.len());
}

/// The sound file with a change.
#[track_caller]
fn assert_refused(expected: &str, change: impl FnOnce(&mut Gguf)) {
    let mut file = sound();
    change(&mut file);
    assert_bad(&file.bytes(), expected);
}

#[test]
fn the_sound_one_is_read() {
    let folder = TempDir::new().expect("temporary folder");
    outcome(&folder, &sound().bytes()).expect("sound");
    outcome(&folder, &Gguf { version: 2, ..sound() }.bytes()).expect("sound");
    outcome(&folder, &Gguf { pad_end: false, ..sound() }.bytes()).expect("the last padding may be missing");
    for alignment in [1, 8, 64, 4096, 1 << 20] {
        let mut file = Gguf { alignment, ..sound() };
        file.key("general.alignment", Meta::U32(alignment as u32));
        outcome(&folder, &file.bytes()).unwrap_or_else(|error| panic!("{error}"));
    }
}

#[test]
fn first_words() {
    assert_refused("it starts with the bytes [47, 47, 4d, 4c]", |f| f.magic = *b"GGML");
    assert_refused("big-endian", |f| f.magic = *b"FUGG");
    assert_refused("big-endian", |f| f.version = 3u32.swap_bytes());
    assert_refused("big-endian", |f| f.version = 2u32.swap_bytes());
    assert_refused("GGUF version 1", |f| f.version = 1);
    assert_refused("GGUF version 0", |f| f.version = 0);
    assert_refused("GGUF version 4", |f| f.version = 4);
    assert_refused("GGUF version 4294967295", |f| f.version = u32::MAX);
    assert_bad(b"", "the first word, at byte 0, takes 4 bytes");
    assert_bad(b"GGUF", "the version");
}

#[test]
fn counts() {
    assert_refused("9223372036854775808 tensors", |f| f.num_tensors = Some(1 << 63));
    assert_refused("18446744073709551615 tensors", |f| f.num_tensors = Some(u64::MAX));
    assert_refused("65537 tensors, at most 65536", |f| f.num_tensors = Some(65_537));
    assert_refused("60000 tensors, but only", |f| f.num_tensors = Some(60_000));
    assert_refused("9223372036854775808 metadata keys", |f| f.num_keys = Some(1 << 63));
    assert_refused("60000 metadata keys, but only", |f| f.num_keys = Some(60_000));
    // One too many: what follows is read as the next one.
    assert_refused("cut off", |f| f.num_keys = Some(10));
    assert_refused("a tensor's name starts \"\" and has 0 bytes", |f| f.num_tensors = Some(5));
    // One too few: the others' data are where the last one's should be.
    assert_refused("followed by something else", |f| f.num_tensors = Some(3));
}

#[test]
fn keys_and_values() {
    assert_refused("a metadata key starts \"\" and has 0 bytes", |f| f.key("", Meta::U32(0)));
    assert_refused("has 257 bytes", |f| f.key(&"k".repeat(257), Meta::U32(0)));
    assert_refused("has 2000 bytes", |f| f.key(&"k".repeat(2000), Meta::U32(0)));
    assert_refused("printable", |f| f.key("a\nb", Meta::U32(0)));
    assert_refused("printable", |f| f.key("\u{1b}[31mred", Meta::U32(0)));
    assert_refused("is not UTF-8", |f| f.metadata.push((b"k\xff\xfe".to_vec(), Meta::U32(0))));
    assert_refused("is not UTF-8", |f| f.key("general.name", Meta::Raw(8, string(b"caf\xe9"))));
    assert_refused("key \"qwen3moe.expert_count\" appears twice", |f| f.key("qwen3moe.expert_count", Meta::U32(2)));
    assert_refused("key \"a\" appears twice", |f| {
        f.key("a", Meta::texts(&["x"]));
        f.key("a", Meta::U32(0));
    });
    assert_refused("unknown type 13", |f| f.key("a", Meta::Raw(13, vec![0; 8])));
    assert_refused("unknown type 4294967295", |f| f.key("a", Meta::Raw(u32::MAX, vec![0; 8])));
    assert_refused("truth value of 2", |f| f.key("a", Meta::Raw(7, vec![2])));
    assert_refused("truth value of 255", |f| {
        f.key("a", Meta::List(7, vec![Meta::Bool(true), Meta::Raw(7, vec![255])]))
    });
    let length = |bytes: u64| Meta::Raw(8, bytes.to_le_bytes().to_vec());
    assert_refused("takes 1048576 bytes", |f| f.key("a", length(1 << 20)));
    assert_refused("takes 18446744073709551615 bytes", |f| f.key("a", length(u64::MAX)));
    assert_refused("takes 9223372036854775808 bytes", |f| f.metadata.insert(0, (b"x".to_vec(), length(1 << 63))));
}

fn raw_list(kind: u32, count: u64, rest: &[u8]) -> Meta {
    Meta::Raw(9, [&kind.to_le_bytes()[..], &count.to_le_bytes(), rest].concat())
}

#[test]
fn lists() {
    assert_refused("9223372036854775808 entries in metadata key \"a\"", |f| f.key("a", raw_list(4, 1 << 63, &[])));
    assert_refused("60000000 entries in metadata key \"a\", but only", |f| f.key("a", raw_list(0, 60_000_000, &[])));
    assert_refused("67000000 entries in metadata key \"a\", but only", |f| f.key("a", raw_list(8, 67_000_000, &[])));
    assert_refused("unknown type 77", |f| f.key("a", raw_list(77, 1, &[0; 8])));
    // Texts of which the second is longer than the file.
    let texts = [string(b"x"), u64::MAX.to_le_bytes().to_vec()].concat();
    assert_refused("takes 18446744073709551615 bytes", |f| f.key("a", raw_list(8, 2, &texts)));
    let nested = |depth: usize| {
        let mut inner = [&4u32.to_le_bytes()[..], &1u64.to_le_bytes(), &7u32.to_le_bytes()].concat();
        for _ in 1..depth {
            inner = [&9u32.to_le_bytes()[..], &1u64.to_le_bytes(), &inner].concat();
        }
        Meta::Raw(9, inner)
    };
    let folder = TempDir::new().expect("temporary folder");
    for depth in 1..=4 {
        let mut file = sound();
        file.key("a", nested(depth));
        outcome(&folder, &file.bytes()).expect("not looked into");
    }
    for depth in [5, 1000] {
        assert_refused("more than 4 deep", |f| f.key("a", nested(depth)));
    }
    // As many empty lists as fit.
    assert_refused("more than 4 deep", |f| f.key("a", raw_list(9, 2, &[nested(1), nested(6)].map(bytes_of).concat())));
}

fn bytes_of(meta: Meta) -> Vec<u8> {
    if let Meta::Raw(_, bytes) = meta { bytes } else { Vec::new() }
}

#[test]
fn alignments() {
    for value in [
        Meta::U32(0),
        Meta::U32(3),
        Meta::U32(48),
        Meta::U32(1 << 31),
        Meta::U32(1 << 21),
        Meta::U64(1 << 63),
        Meta::I32(-32),
        Meta::F32(32.0),
        Meta::text("32"),
        Meta::u32s(&[32]),
        Meta::Bool(true),
    ] {
        assert_refused("general.alignment is", |f| f.key("general.alignment", value));
    }
    // Sound, but not what the file was written with.
    assert_refused("no multiple of 1048576", |f| f.key("general.alignment", Meta::U32(1 << 20)));
    assert_refused("followed by something else", |f| f.key("general.alignment", Meta::U32(1)));
}

#[test]
fn tensors() {
    let last = |f: &mut Gguf| f.tensors.len() - 1;
    assert_refused("a tensor's name starts \"\"", |f| f.tensors[0].name.clear());
    assert_refused("257 bytes", |f| f.tensors[0].name = vec![b'n'; 257]);
    assert_refused("has 70000 bytes", |f| f.tensors[0].name = vec![b'n'; 70_000]);
    assert_refused("printable", |f| f.tensors[0].name = b"a\tb".to_vec());
    assert_refused("is not UTF-8", |f| f.tensors[0].name = b"blk.\xc0".to_vec());
    assert_refused("tensor \"blk.0.ffn_up_exps.weight\" appears twice", |f| {
        f.tensors[1].name = f.tensors[2].name.clone();
    });
    assert_refused("5 dimensions", |f| f.tensors[0].shape = vec![1, 1, 1, 2, 32]);
    assert_refused("dimensions", |f| f.tensors[0].shape = vec![1; 1000]);
    assert_refused("of which axis 1 is empty", |f| f.tensors[1].shape[1] = 0);
    assert_refused("of which axis 0 is empty", |f| f.tensors[0].shape = vec![0, u64::MAX]);
    assert_refused("more than can be addressed", |f| f.tensors[0].shape = vec![1 << 41, 1]);
    assert_refused("more than can be addressed", |f| f.tensors[1].shape = vec![1 << 40, 1 << 40, 32]);
    assert_refused("more than can be addressed", |f| f.tensors[1].shape = vec![1 << 31, 1 << 31, 32]);
    assert_refused("more than can be addressed", |f| f.tensors[1].shape = vec![u64::MAX, u64::MAX, 32]);
    assert_refused("rows of 31 numbers, and Q8_0 packs 32", |f| f.tensors[1].shape = vec![2, 32, 31]);
    assert_refused("rows of 32 numbers, and Q4_K packs 256", |f| f.tensors[1].kind = Q4_K);
    assert_refused("rows of 1 numbers, and Q8_0 packs 32", |f| f.tensors[1].shape = vec![]);
    // Larger and smaller than their place.
    assert_refused("inside tensor \"blk.0.ffn_gate_exps.weight\"", |f| f.tensors[1].shape[0] = 3);
    assert_refused("expected 1344, after tensor", |f| f.tensors[1].shape[0] = 1);
    assert_refused("cut off, copy it again", |f| {
        let last = last(f);
        f.tensors[last].shape[0] = 3;
    });
    assert_refused("followed by something else", |f| {
        let last = last(f);
        f.tensors[last].shape[0] = 1;
    });
    assert_refused("inside tensor \"blk.0.ffn_gate_exps.weight\"", |f| f.tensors[1].kind = F16);
}

#[test]
fn offsets() {
    assert_refused("lies at 0 of the data, inside tensor", |f| f.tensors[1].offset = Some(0));
    assert_refused("which is no multiple of 32", |f| f.tensors[1].offset = Some(257));
    assert_refused("which is no multiple of 32", |f| f.tensors[1].offset = Some(u64::MAX));
    assert_refused("lies at 32 of the data, expected 0, after the header", |f| f.tensors[0].offset = Some(32));
    assert_refused("lies at 288 of the data, expected 256", |f| f.tensors[1].offset = Some(288));
    assert_refused("cut off", |f| f.tensors[3].offset = Some(1 << 40));
    assert_refused("more than any file has", |f| f.tensors[3].offset = Some(u64::MAX - 31));
    assert_refused("cut off", |f| f.tensors[3].offset = Some(1 << 63));
    // Types that nobody knows: they start inside the file, and not where another one does.
    let unknown = |f: &mut Gguf, offset| {
        f.tensors[3].kind = 12_345;
        f.tensors[3].offset = offset;
    };
    assert_refused("inside tensor", |f| unknown(f, Some(0)));
    assert_refused("inside tensor", |f| unknown(f, Some(64)));
    assert_refused("cut off", |f| unknown(f, Some(1 << 20)));
    assert_refused("no multiple", |f| unknown(f, Some(4641)));
    assert_refused("(ggml type 12345", |f| {
        f.tensors[2].kind = 12_345;
        f.tensors[2].offset = Some(256);
    });
}

#[test]
fn cut_off_anywhere_or_too_long() {
    let (boundaries, bytes) = sound().boundaries();
    let folder = TempDir::new().expect("temporary folder");
    let refused = |length: usize| {
        let error = outcome(&folder, &bytes[..length]).expect_err("cut off");
        assert!(matches!(error, Error::BadFile { .. }), "{length} of {} bytes: {error:?}", bytes.len());
        let message = error.to_string();
        assert!(message.contains("cut off") || length < 4, "{length} of {} bytes: {message}", bytes.len());
    };
    assert!(boundaries.len() > 50);
    for &boundary in boundaries.iter().filter(|&&boundary| boundary < bytes.len()) {
        refused(boundary);
        refused(boundary + 1);
        refused(boundary.saturating_sub(1));
    }
    // The last data are 1152 bytes, a multiple of 32: no padding follows.
    refused(bytes.len() - 1);
    for more in [1, 31, 32, 4096] {
        assert_bad(&[&bytes[..], &vec![0; more]].concat(), "followed by something else");
    }
    let empty = Gguf { tensors: Vec::new(), ..sound() };
    assert_bad(&[empty.bytes(), vec![0; 64]].concat(), "followed by something else");
}

#[test]
fn a_header_without_end() {
    // 70 MB of texts that are passed over.
    let text = string(&[b'x'; 1 << 20]);
    let texts: Vec<u8> = (0..70).flat_map(|_| text.clone()).collect();
    assert_refused("longer than 67108864 bytes", |f| f.key("a", raw_list(8, 70, &texts)));
    // Many short lists of numbers, which are kept only up to some number of them.
    let folder = TempDir::new().expect("temporary folder");
    let mut file = sound();
    for n in 0..100 {
        file.key(
            &format!("list.{n}"),
            Meta::Raw(9, [&0u32.to_le_bytes()[..], &4096u64.to_le_bytes(), &[1; 4096]].concat()),
        );
    }
    outcome(&folder, &file.bytes()).expect("as sound as before");
}

#[test]
fn what_is_wrong_only_for_the_layer() {
    let error = |change: &dyn Fn(&mut Gguf)| {
        let folder = TempDir::new().expect("temporary folder");
        let mut file = sound();
        change(&mut file);
        let error = outcome(&folder, &file.bytes()).expect_err("refused");
        let message = error.to_string();
        assert!(message.contains("hostile.gguf"), "{message}");
        error
    };
    let float = |f: &mut Gguf| f.set("qwen3moe.expert_count", Meta::F32(2.5));
    assert!(matches!(error(&float), Error::BadFile { .. }));
    let negative = |f: &mut Gguf| f.set("qwen3moe.expert_count", Meta::I32(-2));
    assert!(matches!(error(&negative), Error::BadFile { .. }));
    let text = |f: &mut Gguf| f.set("qwen3moe.expert_count", Meta::text("two"));
    assert!(matches!(error(&text), Error::BadFile { .. }));
    let list = |f: &mut Gguf| f.set("qwen3moe.expert_count", Meta::u32s(&[2, 2]));
    assert!(matches!(error(&list), Error::BadFile { .. }));
    let huge = |f: &mut Gguf| f.set("qwen3moe.embedding_length", Meta::U64(u64::MAX));
    assert!(matches!(error(&huge), Error::BadFile { .. }));
    let architecture = |f: &mut Gguf| f.set("general.architecture", Meta::text("qwen3moe\u{1b}[2J"));
    let message = match error(&architecture) {
        error @ Error::Unsupported { .. } => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(!message.contains('\u{1b}'), "control characters reach no terminal: {message:?}");
    // Blocks where single numbers belong.
    let quantised_bias = |f: &mut Gguf| {
        f.set("general.architecture", Meta::text("gpt-oss"));
        for (key, _) in &mut f.metadata {
            *key = String::from_utf8_lossy(key).replace("qwen3moe", "gpt-oss").into_bytes();
        }
        f.set("gpt-oss.embedding_length", Meta::U32(32));
        f.f32("blk.0.ffn_gate_inp.bias", &[2], &[0.0; 2]);
        f.f32("blk.0.ffn_up_exps.bias", &[2, 32], &[0.0; 64]);
        f.f32("blk.0.ffn_down_exps.bias", &[2, 32], &[0.0; 64]);
        f.tensor("blk.0.ffn_gate_exps.bias", Q8_0, &[2, 32], vec![0; 2 * block(Q8_0).1]);
    };
    let message = error(&quantised_bias).to_string();
    assert!(message.contains("ffn_gate_exps.bias") && message.contains("single numbers"), "{message}");
    // Gate and up of different types are read as f32, but not kept as they are.
    let folder = TempDir::new().expect("temporary folder");
    let mut mixed = sound();
    (mixed.tensors[2].kind, mixed.tensors[2].data) = (MXFP4, vec![120; 2 * 32 * block(MXFP4).1]);
    outcome(&folder, &mixed.bytes()).expect("as f32");
    let path = folder.path().join("hostile.gguf");
    let checkpoint = Checkpoint::open(&path).expect("sound");
    let message = checkpoint.layer(None, 0).expect("sound").formats().expect_err("two formats").to_string();
    assert!(message.contains("gate as q8_0 and up as mxfp4"), "{message}");
    // Integers are no weights.
    let integers = |f: &mut Gguf| {
        f.tensors[0].kind = 26;
    };
    assert!(matches!(error(&integers), Error::Unsupported { .. }));
}

proptest! {
    #![proptest_config(Config { cases: 4000, failure_persistence: None, ..Config::default() })]

    /// A few bytes of the header or the data changed, removed or added: an error or a layer, never a panic.
    #[test]
    fn no_change_makes_the_reader_panic(
        changes in prop::collection::vec((0.0..1.0f64, prop::bool::weighted(0.9), any::<u8>(), 0..12u8), 1..5),
    ) {
        let bytes = &mut sound().bytes();
        let header = sound().boundaries().0.into_iter().rev().nth(4).unwrap_or(bytes.len());
        for (at, in_header, byte, kind) in changes {
            let end = if in_header { header.min(bytes.len()) } else { bytes.len() };
            let at = (at * end as f64) as usize;
            match kind {
                0 => drop(bytes.remove(at)),
                1 => bytes.insert(at, byte),
                2 => bytes.truncate(at),
                // A word of eight bytes that is a number near a limit.
                3..6 => {
                    let word = [u64::MAX, 1 << 63, 1 << 40, 65_536, 0][usize::from(byte % 5)].to_le_bytes();
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&word[..end - at]);
                }
                6 => bytes[at] ^= 1 << (byte % 8),
                _ => bytes[at] = byte,
            }
            if bytes.is_empty() {
                break;
            }
        }
        let folder = TempDir::new().expect("temporary folder");
        if let Err(error) = outcome(&folder, bytes) {
            let message = error.to_string();
            let is_printable = message.chars().all(|c| !c.is_control() || c == '\n');
            prop_assert!(message.len() < 4000 && is_printable, "{:?}", message);
        }
    }
}
