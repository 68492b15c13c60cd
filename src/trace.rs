//! Recorded routing as a file: which experts each token got in which layers. Written by `wgmoe inspect --save-trace`,
//! replayed by `wgmoe bench --trace`, or made by any program that writes JSON.
//!
//! ```text
//! {
//!   "schema": 1,
//!   "source": "where it was recorded",
//!   "labels": ["The", " cat"],              one for each token, or absent
//!   "layers": [{
//!     "layer": 3, "num_experts": 8, "top_k": 2,
//!     "experts": [[5, 0], [7, -1]],         top_k for each token; -1: nobody, as after a drop
//!     "weights": [[0.75, 0.25], [1.0, 0.0]] the same shape, or absent
//!   }]
//! }
//! ```
//!
//! Nobody has to trust such a file: what is read is checked, and a trace that was read can be replayed.

use crate::atomic_file::write_atomically;
use crate::error::{Error, Result, brief};
use crate::model::config::{MAX_EXPERTS, MAX_TOP_K};
use crate::small_file::{self, Unreadable};
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io::{BufReader, Read, Seek};
use std::marker::PhantomData;
use std::path::Path;

/// Version of the format.
pub const SCHEMA: u32 = 1;
/// A million tokens of one layer with eight experts each are a fifth of this.
pub const MAX_BYTES: u64 = 512 << 20;
/// Most experts in a row that is kept: no layer has more.
const MAX_ROW: usize = MAX_EXPERTS as usize;
const MAX_LABELS: usize = 1 << 21;
const MAX_LAYERS: usize = 4096;

/// Who computed for whom, in one layer or several.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Where it was recorded, in words.
    pub source: String,
    /// A text for each token.
    pub labels: Option<Vec<String>>,
    /// At least one; all with the same tokens.
    pub layers: Vec<TraceLayer>,
}

/// The choices of one layer. As [`Front::Assignments`](crate::Front::Assignments) takes them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TraceLayer {
    /// Number of the layer in its model.
    pub layer: u32,
    /// Experts that a token can choose.
    pub num_experts: u32,
    /// Experts for each token.
    pub top_k: u32,
    /// `[num_tokens, top_k]`, below `num_experts` and no expert twice in a token, or -1 for nobody.
    pub experts: Vec<i32>,
    /// `[num_tokens, top_k]`, finite.
    pub weights: Option<Vec<f32>>,
}

impl TraceLayer {
    /// Tokens of the trace.
    pub fn num_tokens(&self) -> usize {
        self.experts.len() / self.top_k.max(1) as usize
    }
}

/// What is written: a row for each token, as a person or another program would write them.
#[derive(Serialize)]
struct Written<'a> {
    schema: u32,
    source: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    labels: Option<&'a [String]>,
    layers: Vec<WrittenLayer<'a>>,
}

#[derive(Serialize)]
struct WrittenLayer<'a> {
    layer: u32,
    num_experts: u32,
    top_k: u32,
    experts: Vec<&'a [i32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights: Option<Vec<&'a [f32]>>,
}

/// What is read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    #[serde(rename = "schema")]
    _schema: IgnoredAny,
    source: String,
    #[serde(default)]
    labels: Option<List<String, MAX_LABELS>>,
    layers: List<StoredLayer, MAX_LAYERS>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredLayer {
    layer: u32,
    num_experts: u32,
    top_k: u32,
    experts: Rows<i32>,
    #[serde(default)]
    weights: Option<Rows<f32>>,
}

/// At most `N` of something that takes more memory than its shortest text has bytes.
struct List<T, const N: usize>(Vec<T>);

/// Rows one after the other: a list of lists takes ten times as much memory as its file.
struct Rows<T> {
    values: Vec<T>,
    /// Of every row before `other`.
    width: Option<usize>,
    /// The first row of another width: its number and its width.
    other: Option<(usize, usize)>,
}

/// What is looked at first: files of another schema may have other fields.
#[derive(Deserialize)]
struct Head {
    schema: u32,
}

/// What is wrong: what, found, expected.
struct Wrong(String, String, String);

impl Trace {
    /// Tokens of every layer.
    pub fn num_tokens(&self) -> usize {
        self.layers.first().map_or(0, TraceLayer::num_tokens)
    }

    /// Reads and checks a file.
    ///
    /// # Errors
    /// [`Error::BadTrace`] for a file that is damaged, too large, of another schema, or whose content is no routing;
    /// [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        let (file, length) = small_file::open(path).map_err(|reason| match reason {
            Unreadable::Io(source) => Error::Io { path: path.to_owned(), source },
            _ => bad(path, Wrong("it".to_owned(), "no regular file".to_owned(), "a trace".to_owned())),
        })?;
        if length > MAX_BYTES {
            return Err(bad(path, too_large(&length.to_string())));
        }
        Self::parse(file).map_err(|wrong| bad(path, wrong))
    }

    /// Checks and writes. A reader finds the old file or the new one, never half of either.
    ///
    /// # Errors
    /// As for [`Trace::read`].
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check().map_err(|wrong| bad(path, wrong))?;
        let layers = self.layers.iter().map(WrittenLayer::of).collect();
        let stored = Written { schema: SCHEMA, source: &self.source, labels: self.labels.as_deref(), layers };
        let mut text =
            serde_json::to_vec(&stored).map_err(|e| Error::Io { path: path.to_owned(), source: e.into() })?;
        text.push(b'\n');
        if text.len() as u64 > MAX_BYTES {
            return Err(bad(path, too_large(&text.len().to_string())));
        }
        write_atomically(path, &text)
    }

    /// Reads `text` from its start, once for the schema and once for the rest: it may be too long to be kept.
    fn parse(mut text: impl Read + Seek) -> Result<Self, Wrong> {
        let damaged = |error: serde_json::Error| {
            let expected = "a trace, as src/trace.rs describes it".to_owned();
            Wrong("the content".to_owned(), format!("damaged ({})", brief(error)), expected)
        };
        let Head { schema } = serde_json::from_reader(BufReader::new(&mut text)).map_err(damaged)?;
        if schema != SCHEMA {
            return Err(Wrong("the schema".to_owned(), schema.to_string(), SCHEMA.to_string()));
        }
        text.rewind().map_err(|error| damaged(serde_json::Error::io(error)))?;
        let stored: Stored = serde_json::from_reader(BufReader::new(&mut text)).map_err(damaged)?;
        let layers = stored.layers.0.into_iter().map(StoredLayer::checked).collect::<Result<_, _>>()?;
        let trace = Self { source: stored.source, labels: stored.labels.map(|labels| labels.0), layers };
        trace.check()?;
        Ok(trace)
    }

    fn check(&self) -> Result<(), Wrong> {
        let wrong =
            |what: &str, found: usize, expected: String| Err(Wrong(what.to_owned(), found.to_string(), expected));
        let tokens = self.num_tokens();
        if tokens == 0 {
            return wrong("the number of layers with tokens", 0, "at least 1".to_owned());
        }
        for layer in &self.layers {
            layer.check()?;
            if layer.num_tokens() != tokens {
                let what = format!("the number of tokens of layer {}", layer.layer);
                return wrong(&what, layer.num_tokens(), format!("{tokens}, as in the first layer"));
            }
        }
        if let Some(labels) = self.labels.as_ref().filter(|labels| labels.len() != tokens) {
            return wrong("the number of labels", labels.len(), format!("{tokens}, one for each token"));
        }
        let mut numbers: Vec<u32> = self.layers.iter().map(|layer| layer.layer).collect();
        numbers.sort_unstable();
        match numbers.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                Err(Wrong(format!("layer {}", pair[0]), "there twice".to_owned(), "each layer once".to_owned()))
            }
            None => Ok(()),
        }
    }
}

impl TraceLayer {
    fn check(&self) -> Result<(), Wrong> {
        let name = |what: &str| format!("{what} of layer {}", self.layer);
        let range = |what: &str, found: u32, most: u32| match (1..=most).contains(&found) {
            true => Ok(()),
            false => Err(Wrong(name(what), found.to_string(), format!("1 to {most}"))),
        };
        range("num_experts", self.num_experts, MAX_EXPERTS)?;
        // More only where all experts are chosen.
        let most = if self.top_k == self.num_experts { self.num_experts } else { self.num_experts.min(MAX_TOP_K) };
        range("top_k", self.top_k, most)?;
        let length = |what: &str, found: usize| match found.is_multiple_of(self.top_k as usize) {
            true => Ok(()),
            false => {
                Err(Wrong(name(what), format!("{found} in number"), format!("top_k, {}, for each token", self.top_k)))
            }
        };
        length("the experts", self.experts.len())?;
        for (t, chosen) in self.experts.chunks_exact(self.top_k as usize).enumerate() {
            for (j, &expert) in chosen.iter().enumerate() {
                let what = || name(&format!("an expert of token {t}"));
                if expert < -1 || expert >= self.num_experts as i32 {
                    let expected = format!("0 to {}, or -1 for nobody", self.num_experts - 1);
                    return Err(Wrong(what(), expert.to_string(), expected));
                }
                if expert >= 0 && chosen[..j].contains(&expert) {
                    return Err(Wrong(what(), format!("{expert} twice"), "different experts".to_owned()));
                }
            }
        }
        let Some(weights) = &self.weights else { return Ok(()) };
        if weights.len() != self.experts.len() {
            let found = format!("{} in number", weights.len());
            return Err(Wrong(name("the weights"), found, format!("{}, as the experts", self.experts.len())));
        }
        match weights.iter().position(|weight| !weight.is_finite()) {
            Some(at) => {
                let what = name(&format!("a weight of token {}", at / self.top_k as usize));
                Err(Wrong(what, weights[at].to_string(), "a finite number".to_owned()))
            }
            None => Ok(()),
        }
    }
}

impl<'a> WrittenLayer<'a> {
    fn of(layer: &'a TraceLayer) -> Self {
        let TraceLayer { layer: number, num_experts, top_k, experts, weights } = layer;
        let k = *top_k as usize;
        Self {
            layer: *number,
            num_experts: *num_experts,
            top_k: *top_k,
            experts: experts.chunks_exact(k).collect(),
            weights: weights.as_ref().map(|weights| weights.chunks_exact(k).collect()),
        }
    }
}

impl StoredLayer {
    fn checked(self) -> Result<TraceLayer, Wrong> {
        let Self { layer, num_experts, top_k, experts, weights } = self;
        let length = |what: &str, (t, found): (usize, usize)| {
            let what = format!("the number of {what} of token {t} of layer {layer}");
            Wrong(what, found.to_string(), format!("{top_k}, which is top_k"))
        };
        if let Some(found) = experts.not_of(top_k) {
            return Err(length("experts", found));
        }
        if let Some(found) = weights.as_ref().and_then(|weights| weights.not_of(top_k)) {
            return Err(length("weights", found));
        }
        let weights = weights.map(|weights| weights.values);
        Ok(TraceLayer { layer, num_experts, top_k, experts: experts.values, weights })
    }
}

impl<T> Rows<T> {
    /// The first row that is not `width` wide, and how wide it is.
    fn not_of(&self, width: u32) -> Option<(usize, usize)> {
        match self.width {
            Some(found) if found != width as usize => Some((0, found)),
            _ => self.other,
        }
    }

    /// Room for one more: a quarter at a time, as these lists are most of what a trace takes.
    fn push(&mut self, value: T) {
        if self.values.len() == self.values.capacity() {
            self.values.reserve_exact((self.values.len() / 4).max(64));
        }
        self.values.push(value);
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Rows<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut rows = Rows { values: Vec::new(), width: None, other: None };
        deserializer.deserialize_seq(All(&mut rows))?;
        Ok(rows)
    }
}

impl<'de, T: Deserialize<'de>, const N: usize> Deserialize<'de> for List<T, N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items<T, const N: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const N: usize> Visitor<'de> for Items<T, N> {
            type Value = List<T, N>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<List<T, N>, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = list.next_element()? {
                    if items.len() == N {
                        return Err(A::Error::custom(format!("more than {N} entries in a list")));
                    }
                    items.push(item);
                }
                Ok(List(items))
            }
        }
        deserializer.deserialize_seq(Items(PhantomData))
    }
}

/// Reads all rows.
struct All<'r, T>(&'r mut Rows<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for All<'_, T> {
    type Value = ();
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list with a list for each token")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some(width) = list.next_element_seed(Row(self.0))? {
            if *self.0.width.get_or_insert(width) != width && self.0.other.is_none() {
                self.0.other = Some((number, width));
            }
            number += 1;
        }
        Ok(())
    }
}

/// Reads one row, and says how wide it is.
struct Row<'r, T>(&'r mut Rows<T>);

impl<'de, T: Deserialize<'de>> DeserializeSeed<'de> for Row<'_, T> {
    type Value = usize;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<usize, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Row<'_, T> {
    type Value = usize;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of one number for each expert of a token")
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<usize, A::Error> {
        let mut width = 0;
        while let Some(value) = list.next_element()? {
            width += 1;
            if width > MAX_ROW {
                return Err(A::Error::custom(format!("more than {MAX_ROW} experts for one token")));
            }
            self.0.push(value);
        }
        Ok(width)
    }
}

fn bad(path: &Path, Wrong(what, found, expected): Wrong) -> Error {
    Error::BadTrace { path: path.to_owned(), what, found, expected }
}

fn too_large(found: &str) -> Wrong {
    let expected = format!("at most {MAX_BYTES}: record fewer tokens or layers");
    Wrong("the size".to_owned(), format!("{found} bytes"), expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trace() -> Trace {
        let layer = |layer| TraceLayer {
            layer,
            num_experts: 8,
            top_k: 2,
            experts: vec![5, 0, 7, -1, -1, -1],
            weights: Some(vec![0.75, 0.25, 1.0, 0.0, 0.0, 0.0]),
        };
        let labels = ["The", " cat", "\n"].map(str::to_owned).to_vec();
        Trace { source: "a test".to_owned(), labels: Some(labels), layers: vec![layer(3), layer(1)] }
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("trace.json");
        let bare = Trace { labels: None, ..trace() };
        let bare = Trace { layers: vec![TraceLayer { weights: None, ..bare.layers[0].clone() }], ..bare };
        for trace in [trace(), bare] {
            trace.write(&path).expect("it is valid");
            assert_eq!(Trace::read(&path).expect("it was just written"), trace);
            assert_eq!(trace.num_tokens(), 3);
        }
    }

    #[test]
    fn what_is_no_routing_is_neither_written_nor_read() {
        type Damage = fn(&mut Trace);
        let damages: [(&str, Damage); 14] = [
            ("an expert of token 1 of layer 3 is 8, expected 0 to 7", |t| t.layers[0].experts[2] = 8),
            ("an expert of token 0 of layer 1 is -2", |t| t.layers[1].experts[1] = -2),
            ("an expert of token 0 of layer 3 is 5 twice", |t| t.layers[0].experts[1] = 5),
            ("a weight of token 2 of layer 3 is NaN", |t| t.layers[0].weights.as_mut().expect("some")[4] = f32::NAN),
            ("the weights of layer 3 is 5", |t| t.layers[0].weights.as_mut().expect("some").truncate(5)),
            ("the experts of layer 3 is 5", |t| t.layers[0].experts.truncate(5)),
            ("the number of tokens of layer 1 is 2, expected 3", |t| {
                t.layers[1].experts.truncate(4);
                t.layers[1].weights = None;
            }),
            ("layer 3 is there twice", |t| t.layers[1].layer = 3),
            ("the number of labels is 2, expected 3", |t| t.labels.as_mut().expect("some").truncate(2)),
            ("num_experts of layer 3 is 0", |t| t.layers[0].num_experts = 0),
            ("num_experts of layer 3 is 1025", |t| t.layers[0].num_experts = 1025),
            ("top_k of layer 3 is 0", |t| t.layers[0].top_k = 0),
            ("top_k of layer 3 is 33, expected 1 to 32", |t| {
                (t.layers[0].num_experts, t.layers[0].top_k) = (64, 33);
                t.labels = None;
                t.layers[0].experts = (0..33).collect();
            }),
            ("the number of layers with tokens is 0", |t| t.layers.clear()),
        ];
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("trace.json");
        for (words, damage) in damages {
            let mut trace = trace();
            damage(&mut trace);
            let error = trace.write(&path).expect_err(words).to_string();
            assert!(error.contains(words), "{error}");
            assert!(!path.exists(), "{words}");
        }
    }

    #[test]
    fn damaged_files_are_typed_errors() {
        let layer = |experts: &str| {
            format!(
                r#"{{"schema":1,"source":"","layers":[{{"layer":0,"num_experts":4,"top_k":2,"experts":{experts}}}]}}"#
            )
        };
        let parse = |text: String| Trace::parse(std::io::Cursor::new(text));
        assert!(parse(layer("[[0,1]]")).is_ok());
        for (text, words) in [
            (String::new(), "damaged"),
            ("[]".to_owned(), "damaged"),
            ("\u{0}\u{1}".to_owned(), "damaged"),
            (r#"{"schema":2,"other":1}"#.to_owned(), "the schema is 2, expected 1"),
            (r#"{"schema":1,"source":"","layers":[],"more":1}"#.to_owned(), "damaged"),
            (layer("[[0,1],[2]]"), "the number of experts of token 1 of layer 0 is 1, expected 2"),
            (layer("[[0,1],[]]"), "is 0, expected 2"),
            (layer("[[],[]]"), "the number of experts of token 0 of layer 0 is 0, expected 2"),
            (layer("[[0,1],[2,3],[0,1,2]]"), "the number of experts of token 2 of layer 0 is 3, expected 2"),
            (layer(&format!("[[{}]]", vec!["0"; 1025].join(","))), "more than 1024 experts for one token"),
            (layer("[[0,4]]"), "an expert of token 0 of layer 0 is 4"),
            (layer("[]"), "layers with tokens is 0"),
            (layer("[[0,99999999999]]"), "damaged"),
            (layer(r#"[[0,1]],"weights":[[1.0]]"#), "the number of weights of token 0 of layer 0 is 1"),
            (layer(r#"[[0,1]],"weights":[[1.0,1e99]]"#), "a weight of token 0"),
        ] {
            let error = bad(Path::new("t.json"), parse(text.clone()).expect_err(&text)).to_string();
            assert!(error.contains(words) && error.contains("t.json") && error.contains("inspect"), "{text}: {error}");
        }
    }

    #[test]
    fn files_that_cannot_be_a_trace() {
        let folder = tempfile::tempdir().expect("a folder");
        assert!(matches!(Trace::read(folder.path()), Err(Error::BadTrace { .. })));
        assert!(matches!(Trace::read(&folder.path().join("none")), Err(Error::Io { .. })));
        let path = folder.path().join("large");
        // A sparse file: nothing of it is stored.
        std::fs::File::create(&path).and_then(|file| file.set_len(MAX_BYTES + 1)).expect("it can be made");
        assert!(Trace::read(&path).expect_err("too large").to_string().contains("at most"));
    }
}
