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
use crate::error::{Error, Result};
use crate::model::config::{MAX_EXPERTS, MAX_TOP_K};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::Path;

/// Version of the format.
pub const SCHEMA: u32 = 1;
/// A million tokens of one layer with eight experts each are a fifth of this.
pub const MAX_BYTES: u64 = 512 << 20;

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
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    schema: u32,
    source: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    labels: Option<Vec<String>>,
    layers: Vec<StoredLayer>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredLayer {
    layer: u32,
    num_experts: u32,
    top_k: u32,
    experts: Vec<Vec<i32>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    weights: Option<Vec<Vec<f32>>>,
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
        let text = read(path)?;
        Self::parse(&text).map_err(|wrong| bad(path, wrong))
    }

    /// Checks and writes. A reader finds the old file or the new one, never half of either.
    ///
    /// # Errors
    /// As for [`Trace::read`].
    pub fn write(&self, path: &Path) -> Result<()> {
        self.check().map_err(|wrong| bad(path, wrong))?;
        let stored = Stored {
            schema: SCHEMA,
            source: self.source.clone(),
            labels: self.labels.clone(),
            layers: self.layers.iter().map(StoredLayer::of).collect(),
        };
        let mut text =
            serde_json::to_vec(&stored).map_err(|e| Error::Io { path: path.to_owned(), source: e.into() })?;
        text.push(b'\n');
        if text.len() as u64 > MAX_BYTES {
            return Err(bad(path, too_large(&text.len().to_string())));
        }
        write_atomically(path, &text)
    }

    fn parse(text: &[u8]) -> Result<Self, Wrong> {
        let damaged = |error: serde_json::Error| {
            let expected = "a trace, as src/trace.rs describes it".to_owned();
            Wrong("the content".to_owned(), format!("damaged ({error})"), expected)
        };
        let Head { schema } = serde_json::from_slice(text).map_err(damaged)?;
        if schema != SCHEMA {
            return Err(Wrong("the schema".to_owned(), schema.to_string(), SCHEMA.to_string()));
        }
        let stored: Stored = serde_json::from_slice(text).map_err(damaged)?;
        let layers = stored.layers.into_iter().map(StoredLayer::flatten).collect::<Result<_, _>>()?;
        let trace = Self { source: stored.source, labels: stored.labels, layers };
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

impl StoredLayer {
    fn of(layer: &TraceLayer) -> Self {
        let TraceLayer { layer: number, num_experts, top_k, experts, weights } = layer;
        let k = *top_k as usize;
        Self {
            layer: *number,
            num_experts: *num_experts,
            top_k: *top_k,
            experts: experts.chunks_exact(k).map(<[i32]>::to_vec).collect(),
            weights: weights.as_ref().map(|weights| weights.chunks_exact(k).map(<[f32]>::to_vec).collect()),
        }
    }

    fn flatten(self) -> Result<TraceLayer, Wrong> {
        let Self { layer, num_experts, top_k, experts, weights } = self;
        let length = |what: &str, (t, found): (usize, usize)| {
            let what = format!("the number of {what} of token {t} of layer {layer}");
            Wrong(what, found.to_string(), format!("{top_k}, which is top_k"))
        };
        let other = |(_, found): &(usize, usize)| *found != top_k as usize;
        if let Some(found) = experts.iter().map(Vec::len).enumerate().find(other) {
            return Err(length("experts", found));
        }
        if let Some(found) = weights.iter().flatten().map(Vec::len).enumerate().find(other) {
            return Err(length("weights", found));
        }
        Ok(TraceLayer {
            layer,
            num_experts,
            top_k,
            experts: experts.concat(),
            weights: weights.map(|weights| weights.concat()),
        })
    }
}

fn bad(path: &Path, Wrong(what, found, expected): Wrong) -> Error {
    Error::BadTrace { path: path.to_owned(), what, found, expected }
}

fn too_large(found: &str) -> Wrong {
    let expected = format!("at most {MAX_BYTES}: record fewer tokens or layers");
    Wrong("the size".to_owned(), format!("{found} bytes"), expected)
}

/// A regular file of a sensible size, whole.
fn read(path: &Path) -> Result<Vec<u8>> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(io)?;
    // Opening a pipe would wait for somebody to write to it.
    if !metadata.is_file() {
        let wrong = Wrong("it".to_owned(), "no regular file".to_owned(), "a trace".to_owned());
        return Err(bad(path, wrong));
    }
    if metadata.len() > MAX_BYTES {
        return Err(bad(path, too_large(&metadata.len().to_string())));
    }
    let mut text = Vec::new();
    // A file may grow, and some have no size at all.
    std::fs::File::open(path).map_err(io)?.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(io)?;
    match text.len() as u64 > MAX_BYTES {
        true => Err(bad(path, too_large(&format!("more than {MAX_BYTES}")))),
        false => Ok(text),
    }
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
        assert!(Trace::parse(layer("[[0,1]]").as_bytes()).is_ok());
        for (text, words) in [
            (String::new(), "damaged"),
            ("[]".to_owned(), "damaged"),
            ("\u{0}\u{1}".to_owned(), "damaged"),
            (r#"{"schema":2,"other":1}"#.to_owned(), "the schema is 2, expected 1"),
            (r#"{"schema":1,"source":"","layers":[],"more":1}"#.to_owned(), "damaged"),
            (layer("[[0,1],[2]]"), "the number of experts of token 1 of layer 0 is 1, expected 2"),
            (layer("[[0,1],[]]"), "is 0, expected 2"),
            (layer("[[0,4]]"), "an expert of token 0 of layer 0 is 4"),
            (layer("[]"), "layers with tokens is 0"),
            (layer("[[0,99999999999]]"), "damaged"),
            (layer(r#"[[0,1]],"weights":[[1.0]]"#), "the number of weights of token 0 of layer 0 is 1"),
            (layer(r#"[[0,1]],"weights":[[1.0,1e99]]"#), "a weight of token 0"),
        ] {
            let error = bad(Path::new("t.json"), Trace::parse(text.as_bytes()).expect_err(&text)).to_string();
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
