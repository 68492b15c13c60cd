use super::super::decode;
use super::super::small_floats::e2m1;
use super::*;

/// What a checkpoint says about a matrix, before any layout.
struct Known {
    rows: usize,
    inputs: usize,
    group: usize,
    bits: u32,
    /// `[rows, inputs]`, unsigned.
    codes: Vec<u32>,
    /// `[rows, groups]`, unsigned.
    zeros: Vec<u32>,
    /// `[rows, groups]`, numbers that f16 holds.
    scales: Vec<f32>,
}

/// Numbers below `most` that look random.
fn numbers(seed: u32, most: u32) -> impl FnMut() -> u32 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % most
    }
}

impl Known {
    /// With zero points, unless they are those of symmetric integers. None is 0, which not all of GPTQ can store.
    fn new((rows, inputs, group, bits): (usize, usize, usize, u32), symmetric: bool) -> Self {
        let mut code = numbers(5, 1 << bits);
        let mut zero = numbers(7, (1 << bits) - 1);
        let mut scale = numbers(11, 2000);
        let groups = inputs / group;
        Self {
            rows,
            inputs,
            group,
            bits,
            codes: (0..rows * inputs).map(|_| code()).collect(),
            zeros: (0..rows * groups).map(|_| if symmetric { 1 << (bits - 1) } else { zero() + 1 }).collect(),
            scales: (0..rows * groups).map(|_| f16::from_f32((scale() + 1) as f32 * 1e-4).to_f32()).collect(),
        }
    }

    fn groups(&self) -> usize {
        self.inputs / self.group
    }

    fn values(&self) -> Vec<f32> {
        let value = |at: usize| {
            let (n, k) = (at / self.inputs, at % self.inputs);
            let g = n * self.groups() + k / self.group;
            (self.codes[at] as f32 - self.zeros[g] as f32) * self.scales[g]
        };
        (0..self.rows * self.inputs).map(value).collect()
    }

    /// `[outer, inner]` items of `item(outer, inner)`, packed along inner (or else outer) in the order of `order`.
    fn words(
        &self,
        [outer, inner]: [usize; 2],
        along_inner: bool,
        order: &[usize],
        item: impl Fn(usize, usize) -> u32,
    ) -> Vec<u8> {
        let per = order.len();
        let mut bytes = Vec::new();
        let (outers, inners) = if along_inner { (outer, inner.div_ceil(per)) } else { (outer.div_ceil(per), inner) };
        for o in 0..outers {
            for i in 0..inners {
                let mut word = 0u32;
                for (position, &of) in order.iter().enumerate() {
                    let (o, i) = if along_inner { (o, i * per + of) } else { (o * per + of, i) };
                    let item = if o < outer && i < inner { item(o, i) } else { 0 };
                    word += item << (position as u32 * self.bits);
                }
                bytes.extend(word.to_le_bytes());
            }
        }
        bytes
    }

    fn in_order(&self) -> Vec<usize> {
        (0..(32 / self.bits) as usize).collect()
    }

    /// Scales `[G, N]`.
    fn scales_by_group(&self) -> Vec<f32> {
        let scale = |at: usize| self.scales[at % self.rows * self.groups() + at / self.rows];
        (0..self.rows * self.groups()).map(scale).collect()
    }

    fn trivial_index(&self) -> Vec<u8> {
        (0..self.inputs).flat_map(|k| ((k / self.group) as i32).to_le_bytes()).collect()
    }

    fn integers<'a>(&self, codes: &'a [u8], scales: &'a [f32], zeros: Option<&'a [u8]>) -> Integers<'a> {
        Integers { rows: self.rows, inputs: self.inputs, bits: self.bits, codes, scales, zeros, group_index: None }
    }

    /// compressed-tensors: signed integers plus the middle, codes along inputs, zero points along columns.
    fn pack_quantized(&self) -> (Vec<u8>, Vec<u8>) {
        let middle = 1i32 << (self.bits - 1);
        let stored = |code: u32| {
            let signed = code as i32 - middle;
            assert!((-middle..middle).contains(&signed));
            (signed + middle) as u32
        };
        let order = self.in_order();
        let codes = self.words([self.rows, self.inputs], true, &order, |n, k| stored(self.codes[n * self.inputs + k]));
        let zeros =
            self.words([self.rows, self.groups()], false, &order, |n, g| stored(self.zeros[n * self.groups() + g]));
        (codes, zeros)
    }

    fn gptq(&self, less: u32) -> (Vec<u8>, Vec<u8>) {
        let order = self.in_order();
        let codes = self.words([self.inputs, self.rows], false, &order, |k, n| self.codes[n * self.inputs + k]);
        let zero = |g: usize, n: usize| self.zeros[n * self.groups() + g] - less;
        (codes, self.words([self.groups(), self.rows], true, &order, zero))
    }

    fn awq(&self) -> (Vec<u8>, Vec<u8>) {
        let order = [0, 2, 4, 6, 1, 3, 5, 7];
        let codes = self.words([self.inputs, self.rows], true, &order, |k, n| self.codes[n * self.inputs + k]);
        let zero = |g: usize, n: usize| self.zeros[n * self.groups() + g];
        (codes, self.words([self.groups(), self.rows], true, &order, zero))
    }

    fn assert_holds(&self, (format, packed): (WeightFormat, Vec<u8>), name: &str) {
        let values = decode(format, self.inputs, &packed);
        for (at, (value, expected)) in values.iter().zip(self.values()).enumerate() {
            assert_eq!(value.to_bits(), expected.to_bits(), "{name}: {value}, not {expected}, at {at}");
        }
        assert_eq!(values.len(), self.codes.len());
        assert_eq!(format.layout(self.inputs).regions[0].bits, self.bits, "{name}");
    }
}

/// Columns, inputs, inputs of a group, inputs of a packed group.
const SHAPES: [(usize, usize, usize, u32); 7] = [
    (8, 16, 16, 16),
    (40, 96, 32, 32),
    (200, 128, 64, 64),
    (264, 256, 128, 128),
    // Wide groups, and whole rows.
    (8, 512, 256, 128),
    (16, 384, 384, 128),
    (8, 96, 96, 32),
];

#[test]
fn integers_of_every_layout_keep_their_values() {
    for (rows, inputs, group, size) in SHAPES {
        for (bits, symmetric) in [(4, true), (4, false), (8, true), (8, false)] {
            let known = Known::new((rows, inputs, group, bits), symmetric);
            let groups = IntGroups::new(size, !symmetric).expect("a size");
            let format = if bits == 4 { WeightFormat::Int4(groups) } else { WeightFormat::Int8(groups) };
            let index = known.trivial_index();

            let (codes, zeros) = known.pack_quantized();
            let t = known.integers(&codes, &known.scales, (!symmetric).then_some(&*zeros));
            let unset = [0xff; 4].repeat(inputs);
            for group_index in [None, Some(&*index), Some(&*unset)] {
                let rows = pack_quantized_rows(&Integers { group_index, ..t }).expect("what was packed");
                assert_eq!(rows.0, format);
                known.assert_holds(rows, "pack-quantized");
            }

            let scales = known.scales_by_group();
            for (stored, less) in [(GptqZeros::LessOne, 1), (GptqZeros::Plain, 0)] {
                let (codes, zeros) = known.gptq(less);
                let t = Integers { group_index: Some(&index), ..known.integers(&codes, &scales, Some(&zeros)) };
                let rows = gptq_rows(&t, stored, symmetric).expect("what was packed");
                assert_eq!(rows.0, format);
                known.assert_holds(rows, "GPTQ");
            }

            if bits == 4 {
                let (codes, zeros) = known.awq();
                let rows = awq_rows(&known.integers(&codes, &scales, Some(&zeros))).expect("what was packed");
                assert_eq!(rows.0, WeightFormat::Int4(IntGroups::new(size, true).expect("a size")));
                known.assert_holds(rows, "AWQ");
            }
        }
    }
}

/// compressed-tensors is the only layout that keeps columns apart, so that there may be any number of them.
#[test]
fn columns_need_not_fill_the_last_integer_of_zero_points() {
    for bits in [4, 8] {
        let known = Known::new((13, 64, 32, bits), false);
        let (codes, zeros) = known.pack_quantized();
        assert_eq!(zeros.len(), if bits == 4 { 2 * 2 * 4 } else { 4 * 2 * 4 });
        let t = known.integers(&codes, &known.scales, Some(&zeros));
        known.assert_holds(pack_quantized_rows(&t).expect("what was packed"), "pack-quantized");
        let error = gptq_rows(&t, GptqZeros::Plain, false).expect_err("13 columns");
        assert_eq!(error, format!("the matrix has 13 rows, expected a multiple of {}", 32 / bits));
    }
}

/// Integers as published packers write them, worked out by hand.
#[test]
fn integers_hold_items_where_the_publishers_put_them() {
    let scales = [1.0f32; 8];
    let integers = |codes, zeros| Integers {
        rows: 8,
        inputs: 16,
        bits: 4,
        codes,
        scales: &scales,
        zeros: Some(zeros),
        group_index: None,
    };
    // Column n has codes n, and those of input 1 are 8 more; its zero point is n.
    let code = |n: usize, k: usize| n as f32 + if k == 1 { 8.0 } else { 0.0 };
    let expected: Vec<f32> = (0..128).map(|at| code(at / 16, at % 16) - (at / 16) as f32).collect();

    let zeros = 0x7531_6420u32.to_le_bytes();
    let mut awq: Vec<u8> = zeros.repeat(16);
    awq[4..8].copy_from_slice(&0xfdb9_eca8u32.to_le_bytes());
    let (format, packed) = awq_rows(&integers(&awq, &zeros)).expect("good sizes");
    assert_eq!(decode(format, 16, &packed), expected);

    let row = |n: u32, first: bool| (n * 0x1111_1111 + if first { 0x80 } else { 0 }).to_le_bytes();
    let gptq: Vec<u8> = [true, false].iter().flat_map(|&first| (0..8).flat_map(move |n| row(n, first))).collect();
    let plain = integers(&gptq, &[0x10, 0x32, 0x54, 0x76]);
    let (format, packed) = gptq_rows(&plain, GptqZeros::Plain, false).expect("good sizes");
    assert_eq!(decode(format, 16, &packed), expected);

    let codes: Vec<u8> = (0..8).flat_map(|n| [row(n, true), row(n, false)]).flatten().collect();
    let (format, packed) = pack_quantized_rows(&integers(&codes, &[0x10, 0x32, 0x54, 0x76])).expect("good sizes");
    assert_eq!(decode(format, 16, &packed), expected);
}

#[test]
fn what_does_not_fit_is_refused() {
    let known = Known::new((8, 64, 32, 4), true);
    let (codes, zeros) = known.pack_quantized();
    let good = known.integers(&codes, &known.scales, None);
    assert!(pack_quantized_rows(&good).is_ok());
    let error = |t: Integers<'_>| pack_quantized_rows(&t).expect_err("wrong");

    assert_eq!(error(Integers { codes: &codes[1..], ..good }), "codes have 255 bytes, expected 256");
    assert_eq!(error(Integers { bits: 8, ..good }), "codes have 256 bytes, expected 512");
    assert_eq!(error(Integers { bits: 2, ..good }), "codes have 2 bits, expected 4 or 8");
    assert_eq!(error(Integers { zeros: Some(&zeros[4..]), ..good }), "zero points have 4 bytes, expected 8");
    assert_eq!(error(Integers { rows: 0, ..good }), "the matrix is [0, 64], expected at least one row and one input");
    assert_eq!(
        error(Integers { scales: &known.scales[1..], ..good }),
        "there are 15 scales, expected 8 rows times a number of groups that divides 64 inputs"
    );
    let wide = [1.0; 64];
    assert_eq!(
        error(Integers { scales: &wide, ..good }),
        "groups have 8 inputs, expected 16, 32, 64, 128 or a multiple of one of these"
    );
    assert!(error(Integers { scales: &wide[..24], ..good }).starts_with("there are 24 scales"));

    for (scale, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-f32::INFINITY, "-inf"), (1e38, "1")] {
        let mut scales = known.scales.clone();
        scales[13] = scale;
        let error = error(Integers { scales: &scales, ..good });
        assert!(error.starts_with(&format!("the scale at element 13 is {name}")), "{error}");
        assert!(error.ends_with(", expected finite scales, also times 15"), "{error}");
    }

    let mut index = known.trivial_index();
    index[40 * 4] = 0;
    assert_eq!(
        error(Integers { group_index: Some(&index), ..good }),
        "the group index has group 0 for input 40, expected 1: inputs in order, no activation reordering"
    );
    assert_eq!(
        error(Integers { group_index: Some(&index[4..]), ..good }),
        "the group index have 252 bytes, expected 256"
    );

    let shape: Vec<u8> = [8u64, 64].iter().flat_map(|n| n.to_le_bytes()).collect();
    assert_eq!(check_shape(&shape, 8, 64), Ok(()));
    assert_eq!(check_shape(&shape, 64, 8), Err("weight_shape is [8, 64], expected [64, 8]".to_owned()));
    assert!(check_shape(&shape[8..], 8, 64).is_err());
}

#[test]
fn zero_points_that_mean_different_things_are_refused() {
    let known = Known::new((8, 64, 32, 4), true);
    let (codes, zeros) = known.gptq(1);
    let scales = known.scales_by_group();
    let good = known.integers(&codes, &scales, Some(&zeros));
    assert!(gptq_rows(&good, GptqZeros::LessOne, true).is_ok());
    // The wrong version of the format shows where integers are symmetric.
    assert_eq!(
        gptq_rows(&good, GptqZeros::Plain, true),
        Err("the zero point of column 0, group 0 is 7, expected 8, as sym is true".to_owned())
    );
    let mut ambiguous = zeros.clone();
    ambiguous[5] |= 0xf0;
    assert_eq!(
        gptq_rows(&Integers { zeros: Some(&ambiguous), ..good }, GptqZeros::LessOne, false),
        Err("the zero point of column 3, group 1 is stored as 15, expected less, or checkpoint_format gptq_v2"
            .to_owned())
    );
    let absent = Integers { zeros: None, ..good };
    assert!(gptq_rows(&absent, GptqZeros::LessOne, true).is_ok());
    assert_eq!(
        gptq_rows(&absent, GptqZeros::LessOne, false),
        Err("there are no zero points, expected qzeros, as sym is false".to_owned())
    );
    assert_eq!(awq_rows(&absent), Err("there are no zero points, expected qzeros".to_owned()));
    let eight = [0; 512];
    let eight = Integers { bits: 8, codes: &eight, ..good };
    assert_eq!(awq_rows(&eight), Err("codes have 8 bits, expected 4".to_owned()));
}

#[test]
fn nvfp4_of_both_publishers_keeps_its_values() {
    let (rows, inputs) = (5, 48);
    let (mut code, mut scale) = (numbers(3, 16), numbers(13, 127));
    let items: Vec<u8> = (0..rows * inputs).map(|_| code() as u8).collect();
    let codes: Vec<u8> = items.chunks_exact(2).map(|pair| pair[0] + pair[1] * 16).collect();
    let scales: Vec<u8> = (0..rows * inputs / 16).map(|_| scale() as u8).collect();
    for (matrix_scale, factor) in [
        (MatrixScale::Factor(0.0123), 0.0123),
        (MatrixScale::Divisor(2688.0), 1.0 / 2688.0),
        (MatrixScale::Factor(0.0), 0.0),
    ] {
        let t = Nvfp4 { rows, inputs, codes: &codes, scales: &scales, matrix_scale };
        let (format, packed) = nvfp4_rows(&t).expect("good sizes");
        assert_eq!(format, WeightFormat::Nvfp4);
        for (at, value) in decode(format, inputs, &packed).into_iter().enumerate() {
            assert_eq!(value.to_bits(), (e2m1(items[at]) * (e4m3(scales[at / 16]) * factor)).to_bits(), "at {at}");
        }
    }

    let good = Nvfp4 { rows, inputs, codes: &codes, scales: &scales, matrix_scale: MatrixScale::Factor(1.0) };
    let error = |t: Nvfp4<'_>| nvfp4_rows(&t).expect_err("wrong");
    assert_eq!(error(Nvfp4 { codes: &codes[1..], ..good }), "codes have 119 bytes, expected 120");
    assert_eq!(error(Nvfp4 { scales: &scales[1..], ..good }), "scales have 14 bytes, expected 15");
    assert!(error(Nvfp4 { inputs: 40, ..good }).ends_with("a multiple of 16 inputs"));
    for bits in [0x7f, 0xff] {
        let mut scales = scales.clone();
        scales[9] = bits;
        assert_eq!(error(Nvfp4 { scales: &scales, ..good }), "the scale at element 9 is NaN, expected a number");
    }
    for (matrix_scale, found) in [
        (MatrixScale::Factor(f32::NAN), "weight_scale_2 is NaN"),
        (MatrixScale::Factor(f32::MAX), "weight_scale_2 is 3"),
        (MatrixScale::Factor(-1.0), "weight_scale_2 is -1"),
        (MatrixScale::Divisor(0.0), "weight_global_scale is 0"),
        (MatrixScale::Divisor(f32::INFINITY), "weight_global_scale is inf"),
        (MatrixScale::Divisor(-2.0), "weight_global_scale is -2"),
    ] {
        let error = error(Nvfp4 { matrix_scale, ..good });
        assert!(error.starts_with(found) && error.ends_with("of which every weight is finite"), "{error}");
    }
}

#[test]
fn scales_are_widened_without_rounding() {
    let halves = [1.0, -0.25, 6e-8, 65504.0].map(f16::from_f32);
    let bytes = halves.map(f16::to_le_bytes);
    assert_eq!(widened(Dtype::F16, bytes.as_flattened()), Ok(halves.map(f16::to_f32).to_vec()));
    let halves = [1.0, -0.25, 1e-40, 3e38].map(bf16::from_f32);
    let bytes = halves.map(bf16::to_le_bytes);
    assert_eq!(widened(Dtype::BF16, bytes.as_flattened()), Ok(halves.map(bf16::to_f32).to_vec()));
    assert_eq!(widened(Dtype::F32, &0.1f32.to_le_bytes()), Ok(vec![0.1]));
    assert_eq!(widened(Dtype::F16, &[0; 3]), Err("scales have 3 bytes, expected a multiple of 2".to_owned()));
    assert_eq!(widened(Dtype::U8, &[0; 4]), Err("scales are U8, expected F32, F16 or BF16".to_owned()));
}

#[test]
fn names_and_shapes_tell_layouts_apart() {
    let kind = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| format!("experts.3.gate_proj.{name}")).collect();
        detect(|name| names.iter().any(|other| other == name), "experts.3.gate_proj")
    };
    assert_eq!(kind(&["weight_packed", "weight_scale", "weight_shape"]), Some(Kind::PackQuantized));
    assert_eq!(
        kind(&["weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"]),
        Some(Kind::Nvfp4PackQuantized)
    );
    assert_eq!(kind(&["weight", "weight_scale", "weight_scale_2", "input_scale"]), Some(Kind::ModelOptNvfp4));
    assert_eq!(kind(&["qweight", "qzeros", "scales", "g_idx"]), Some(Kind::Qweight));
    // Plain weights, fp8, and MXFP4 of compressed-tensors.
    for other in [&["weight"][..], &["weight", "weight_scale"], &["weight_packed", "weight_scale"], &["qweight"]] {
        assert_eq!(kind(other), None, "{other:?}");
    }
    assert_eq!(unsupported(|name| name == "a.pre_quant_scale", "a"), Some("pre_quant_scale"));
    assert_eq!(unsupported(|_| false, "a"), None);

    assert_eq!(qweight(&[256, 768], 768, 2048), Ok(Qweight::Gptq { bits: 4 }));
    assert_eq!(qweight(&[512, 768], 768, 2048), Ok(Qweight::Gptq { bits: 8 }));
    assert_eq!(qweight(&[2048, 96], 768, 2048), Ok(Qweight::Awq));
    assert_eq!(
        qweight(&[768, 256], 768, 2048),
        Err("qweight has shape [768, 256], expected [2048/8, 768] or [2048/4, 768] (GPTQ), or [2048, 768/8] (AWQ)"
            .to_owned())
    );
}
