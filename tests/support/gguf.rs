//! GGUF files for tests: a writer that can lie, and decoders of blocks that are written down from what the types'
//! publisher says of them, number by number.
#![allow(dead_code, reason = "not every test binary needs all of it")]

use half::f16;

/// Numbers of tensor types.
pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const Q4_0: u32 = 2;
pub const Q8_0: u32 = 8;
pub const Q4_K: u32 = 12;
pub const Q5_K: u32 = 13;
pub const Q6_K: u32 = 14;
pub const I32: u32 = 26;
pub const BF16: u32 = 30;
pub const MXFP4: u32 = 39;

/// A metadata value.
#[derive(Clone, Debug)]
pub enum Meta {
    U8(u8),
    U16(u16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Text(String),
    U64(u64),
    F64(f64),
    /// Type of the entries, and they.
    List(u32, Vec<Meta>),
    /// Type and bytes, as they are.
    Raw(u32, Vec<u8>),
}

impl Meta {
    pub fn text(text: &str) -> Self {
        Meta::Text(text.to_owned())
    }

    pub fn u32s(numbers: &[u32]) -> Self {
        Meta::List(4, numbers.iter().map(|&n| Meta::U32(n)).collect())
    }

    pub fn f32s(numbers: &[f32]) -> Self {
        Meta::List(6, numbers.iter().map(|&n| Meta::F32(n)).collect())
    }

    pub fn texts(texts: &[&str]) -> Self {
        Meta::List(8, texts.iter().map(|text| Meta::text(text)).collect())
    }

    fn kind(&self) -> u32 {
        match self {
            Meta::U8(_) => 0,
            Meta::U16(_) => 2,
            Meta::U32(_) => 4,
            Meta::I32(_) => 5,
            Meta::F32(_) => 6,
            Meta::Bool(_) => 7,
            Meta::Text(_) => 8,
            Meta::List(..) => 9,
            Meta::U64(_) => 10,
            Meta::F64(_) => 12,
            Meta::Raw(kind, _) => *kind,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        match self {
            Meta::U8(v) => v.to_le_bytes().to_vec(),
            Meta::U16(v) => v.to_le_bytes().to_vec(),
            Meta::U32(v) => v.to_le_bytes().to_vec(),
            Meta::I32(v) => v.to_le_bytes().to_vec(),
            Meta::F32(v) => v.to_le_bytes().to_vec(),
            Meta::Bool(v) => vec![u8::from(*v)],
            Meta::Text(text) => string(text.as_bytes()),
            Meta::U64(v) => v.to_le_bytes().to_vec(),
            Meta::F64(v) => v.to_le_bytes().to_vec(),
            Meta::List(kind, entries) => {
                let mut bytes = kind.to_le_bytes().to_vec();
                bytes.extend((entries.len() as u64).to_le_bytes());
                entries.iter().for_each(|entry| bytes.extend(entry.bytes()));
                bytes
            }
            Meta::Raw(_, bytes) => bytes.clone(),
        }
    }
}

/// A length and bytes.
pub fn string(bytes: &[u8]) -> Vec<u8> {
    [&(bytes.len() as u64).to_le_bytes(), bytes].concat()
}

#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: Vec<u8>,
    /// The usual order: the file has it reversed.
    pub shape: Vec<u64>,
    pub kind: u32,
    pub data: Vec<u8>,
    /// Instead of the one that it would have.
    pub offset: Option<u64>,
}

/// A file, before it is written.
#[derive(Clone, Debug)]
pub struct Gguf {
    pub magic: [u8; 4],
    pub version: u32,
    /// Instead of how many there are.
    pub num_tensors: Option<u64>,
    pub num_keys: Option<u64>,
    pub metadata: Vec<(Vec<u8>, Meta)>,
    pub tensors: Vec<Tensor>,
    /// What tensors are placed by. A key of its own says so in the file.
    pub alignment: usize,
    /// After the last tensor.
    pub pad_end: bool,
}

impl Gguf {
    pub fn new(architecture: &str) -> Self {
        Self {
            magic: *b"GGUF",
            version: 3,
            num_tensors: None,
            num_keys: None,
            metadata: vec![(b"general.architecture".to_vec(), Meta::text(architecture))],
            tensors: Vec::new(),
            alignment: 32,
            pad_end: true,
        }
    }

    /// With keys of an architecture.
    pub fn with(mut self, architecture: &str, keys: &[(&str, Meta)]) -> Self {
        for (key, value) in keys {
            self.key(&format!("{architecture}.{key}"), value.clone());
        }
        self
    }

    pub fn key(&mut self, key: &str, value: Meta) {
        self.metadata.push((key.as_bytes().to_vec(), value));
    }

    pub fn set(&mut self, key: &str, value: Meta) {
        match self.metadata.iter_mut().find(|(known, _)| known == key.as_bytes()) {
            Some((_, known)) => *known = value,
            None => self.key(key, value),
        }
    }

    pub fn remove(&mut self, key: &str) {
        self.metadata.retain(|(known, _)| known != key.as_bytes());
    }

    pub fn tensor(&mut self, name: &str, kind: u32, shape: &[usize], data: Vec<u8>) {
        let shape = shape.iter().map(|&n| n as u64).collect();
        self.tensors.push(Tensor { name: name.as_bytes().to_vec(), shape, kind, data, offset: None });
    }

    pub fn f32(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.tensor(name, F32, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    }

    /// Where the parts of the header end: after the first words, each key and each tensor; then the file.
    pub fn boundaries(&self) -> (Vec<usize>, Vec<u8>) {
        let mut bytes = self.magic.to_vec();
        let mut ends = vec![0, 4];
        for word in [self.version.to_le_bytes().to_vec(), self.count(self.num_tensors, self.tensors.len())] {
            bytes.extend(word);
            ends.push(bytes.len());
        }
        bytes.extend(self.count(self.num_keys, self.metadata.len()));
        ends.push(bytes.len());
        for (key, value) in &self.metadata {
            for part in [string(key), value.kind().to_le_bytes().to_vec(), value.bytes()] {
                bytes.extend(part);
                ends.push(bytes.len());
            }
        }
        let mut offset = 0;
        for tensor in &self.tensors {
            let dims = tensor.shape.iter().rev().flat_map(|n| n.to_le_bytes()).collect();
            let rank = (tensor.shape.len() as u32).to_le_bytes().to_vec();
            let at = tensor.offset.unwrap_or(offset as u64).to_le_bytes().to_vec();
            for part in [string(&tensor.name), rank, dims, tensor.kind.to_le_bytes().to_vec(), at] {
                bytes.extend(part);
                ends.push(bytes.len());
            }
            offset = (offset + tensor.data.len()).next_multiple_of(self.alignment);
        }
        let pad = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(self.alignment), 0);
        for (n, tensor) in self.tensors.iter().enumerate() {
            pad(&mut bytes);
            ends.push(bytes.len());
            bytes.extend(&tensor.data);
            if self.pad_end && n + 1 == self.tensors.len() {
                pad(&mut bytes);
            }
        }
        (ends, bytes)
    }

    fn count(&self, claimed: Option<u64>, actual: usize) -> Vec<u8> {
        claimed.unwrap_or(actual as u64).to_le_bytes().to_vec()
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.boundaries().1
    }
}

/// Numbers and bytes of a block.
pub fn block(kind: u32) -> (usize, usize) {
    match kind {
        F32 => (1, 4),
        F16 | BF16 => (1, 2),
        Q4_0 => (32, 18),
        Q8_0 => (32, 34),
        Q4_K => (256, 144),
        Q6_K => (256, 210),
        MXFP4 => (32, 17),
        other => panic!("no block of type {other}"),
    }
}

/// Blocks of `count` numbers that are about as large as weights are, from any bytes.
pub fn random_blocks(kind: u32, count: usize, mut byte: impl FnMut() -> u8) -> Vec<u8> {
    let (numbers, size) = block(kind);
    let mut blocks: Vec<u8> = (0..count / numbers * size).map(|_| byte()).collect();
    let half = |v: f32| f16::from_f32(v).to_le_bytes();
    for block in blocks.chunks_exact_mut(size) {
        // 1 to 2
        let near_one = 1.0 + f32::from(block[0]) / 255.0;
        match kind {
            F32 => block.copy_from_slice(&(f32::from(block[1]) / 1024.0 - 0.125).to_le_bytes()),
            F16 => block.copy_from_slice(&half(f32::from(block[1]) / 1024.0 - 0.125)),
            BF16 => block.copy_from_slice(&half::bf16::from_f32(f32::from(block[1]) / 1024.0 - 0.125).to_le_bytes()),
            Q4_0 => block[..2].copy_from_slice(&half(near_one / 64.0)),
            Q8_0 => block[..2].copy_from_slice(&half(near_one / 1024.0)),
            Q4_K => {
                block[..2].copy_from_slice(&half(near_one / 4096.0));
                block[2..4].copy_from_slice(&half(near_one / 512.0));
            }
            Q6_K => block[208..].copy_from_slice(&half(near_one / 32768.0)),
            _ => block[0] = 121 + block[0] % 4,
        }
    }
    blocks
}

/// The numbers of blocks, one after the other, as the publisher of the types defines them.
pub fn decode(kind: u32, bytes: &[u8]) -> Vec<f32> {
    let half = |b: &[u8]| f16::from_le_bytes([b[0], b[1]]).to_f32();
    let mut y = Vec::new();
    for x in bytes.chunks_exact(block(kind).1) {
        match kind {
            F32 => y.push(f32::from_le_bytes([x[0], x[1], x[2], x[3]])),
            F16 => y.push(half(x)),
            BF16 => y.push(half::bf16::from_le_bytes([x[0], x[1]]).to_f32()),
            Q4_0 => {
                let (d, q) = (half(x), &x[2..]);
                y.extend(q.iter().map(|b| (i32::from(b % 16) - 8) as f32 * d));
                y.extend(q.iter().map(|b| (i32::from(b / 16) - 8) as f32 * d));
            }
            Q8_0 => y.extend(x[2..].iter().map(|&b| f32::from(b as i8) * half(x))),
            MXFP4 => {
                // Twice the value of each code, and half of the scale. Code 8 is minus zero, by the standard of the
                // type; ggml's table has zero.
                const TWICE: [f64; 16] =
                    [0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, -0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0];
                let d = 2f64.powi(i32::from(x[0]) - 128);
                y.extend(x[1..].iter().map(|b| (TWICE[usize::from(b % 16)] * d) as f32));
                y.extend(x[1..].iter().map(|b| (TWICE[usize::from(b / 16)] * d) as f32));
            }
            Q4_K => {
                let (d, dmin, packed, q) = (half(x), half(&x[2..]), &x[4..16], &x[16..]);
                // Eight scales and eight minima of six bits: four of each in the low bits of a byte, and what is left of
                // four bytes, whose upper bits are the upper ones of the other eight.
                let (mut scales, mut mins) = ([0u8; 8], [0u8; 8]);
                for j in 0..4 {
                    scales[j] = packed[j] & 0x3f;
                    mins[j] = packed[4 + j] & 0x3f;
                    scales[4 + j] = (packed[8 + j] & 0x0f) | ((packed[j] & 0xc0) >> 2);
                    mins[4 + j] = (packed[8 + j] >> 4) | ((packed[4 + j] & 0xc0) >> 2);
                }
                // 64 numbers at a time from 32 bytes.
                for (pair, q) in q.chunks_exact(32).enumerate() {
                    for (group, shift) in [(2 * pair, 0), (2 * pair + 1, 4)] {
                        let (d1, m1) = (d * f32::from(scales[group]), dmin * f32::from(mins[group]));
                        y.extend(q.iter().map(|b| d1 * f32::from(b >> shift & 15) - m1));
                    }
                }
            }
            _ => {
                let d = half(&x[208..]);
                // 128 numbers at a time: four runs of 32 that share 64 bytes of low and 32 bytes of high bits.
                for n in 0..2 {
                    let (ql, qh, sc) = (&x[64 * n..][..64], &x[128 + 32 * n..][..32], &x[192 + 8 * n..][..8]);
                    let mut runs = [[0f32; 32]; 4];
                    for l in 0..32 {
                        let quants = [
                            (ql[l] & 15) | (qh[l] & 3) << 4,
                            (ql[l + 32] & 15) | (qh[l] >> 2 & 3) << 4,
                            (ql[l] >> 4) | (qh[l] >> 4 & 3) << 4,
                            (ql[l + 32] >> 4) | (qh[l] >> 6 & 3) << 4,
                        ];
                        for (run, q) in quants.into_iter().enumerate() {
                            let scale = sc[l / 16 + 2 * run] as i8;
                            runs[run][l] = d * f32::from(scale) * (i32::from(q) - 32) as f32;
                        }
                    }
                    y.extend(runs.concat());
                }
            }
        }
    }
    y
}
