use super::*;

fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut value = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    // Sums of uniform numbers: roughly normal, as trained weights are.
    (0..count).map(|_| (value() + value() + value()) * 0.02).collect()
}

#[test]
fn names_are_read_back() {
    for format in WeightFormat::every() {
        assert_eq!(format.name().parse::<WeightFormat>().expect("its own name"), format);
    }
    assert_eq!("int4:g128".parse::<WeightFormat>().expect("a name").name(), "int4:g128");
    assert_eq!("int8:g32:zp".parse::<WeightFormat>().expect("a name").name(), "int8:zp");
    for wrong in ["", "f17", "int4:g48", "int4:32", "f16:g32", "mxfp4:zp", "int4:zp:zp", "int4:zp:g32", "int4:g16:g16"]
    {
        assert!(wrong.parse::<WeightFormat>().is_err(), "{wrong}");
    }
}

/// Largest errors relative to the largest weight of what shares a scale, a bit above half a step of each format.
#[test]
fn encoding_loses_at_most_half_a_step() {
    let (rows, inputs) = (130, 512);
    let values = values(rows * inputs, 7);
    for format in WeightFormat::every() {
        let group = format.scaled_inputs().map_or(256, |n| n as usize);
        let step = match format {
            WeightFormat::F32 => 0.0,
            WeightFormat::F16 => 1.0 / 2048.0,
            WeightFormat::Bf16 => 1.0 / 256.0,
            WeightFormat::Int8(_) | WeightFormat::Q8_0 => 0.5 / 126.0,
            WeightFormat::Int4(groups) if groups.has_zero_points() => 1.1 / 15.0,
            WeightFormat::Int4(_) => 0.5 / 6.9,
            // The largest may lie beyond the last code; powers of two as scales cost up to a factor of 2.
            WeightFormat::Mxfp4 => 0.26,
            WeightFormat::Nvfp4 => 0.18,
            WeightFormat::Fp8 => 1.0 / 15.0,
            WeightFormat::Q4_0 => 1.01 / 8.0,
            WeightFormat::Q4K => 0.09,
            WeightFormat::Q6K => 0.04,
        };
        let packed = encode(format, inputs, &values).expect("moderate values");
        assert_eq!(packed.len(), rows * format.layout(inputs).bytes);
        let stored = decode(format, inputs, &packed);
        for (stored, values) in stored.chunks(group).zip(values.chunks(group)) {
            let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
            for (stored, value) in stored.iter().zip(values) {
                assert!((stored - value).abs() <= step * largest, "{format}: {value} became {stored}, of {largest}");
            }
        }
        // What was stored once is stored again without loss where scales come out the same: floats, and zeros anywhere.
        let zeros = encode(format, inputs, &vec![0.0; inputs]).expect("zeros");
        assert!(decode(format, inputs, &zeros).iter().all(|&v| v == 0.0), "{format}");
    }
}

#[test]
fn what_cannot_be_stored_is_found() {
    let mut values = vec![1.0; 2 * 256];
    values[300] = 1e30;
    for format in [WeightFormat::F16, WeightFormat::Q4_0, WeightFormat::Q8_0, WeightFormat::Q4K, WeightFormat::Q6K] {
        let at = encode(format, 256, &values).expect_err("1e30").index;
        assert_eq!(at / 256, 1, "{format}: element {at}");
    }
    values[300] = f32::MAX;
    assert_eq!(encode(WeightFormat::Bf16, 256, &values), Err(Unrepresentable { index: 300, value: f32::MAX }));
    values[300] = 1e37;
    for format in [WeightFormat::INT8, WeightFormat::INT4, WeightFormat::Mxfp4, WeightFormat::Nvfp4, WeightFormat::Fp8]
    {
        let packed = encode(format, 256, &values).expect("scales are wide enough");
        assert!(decode(format, 256, &packed).iter().all(|v| v.is_finite()), "{format}");
    }
}

#[test]
fn interleaved_rows_hold_each_columns_items_side_by_side() {
    for format in WeightFormat::every() {
        let inputs = 512;
        let packed = encode(format, inputs, &values(3 * inputs, 3)).expect("moderate values");
        let row_bytes = format.layout(inputs).bytes;
        let row = |n: usize| Some(&packed[n * row_bytes..][..row_bytes]);
        let mut quad = vec![0xaa; format.quad_bytes(inputs as u32) as usize];
        interleave(format, inputs, [row(0), None, row(1), row(2)], |_, place| place, &mut quad);
        // The same layout, with four times as many items.
        let mut at = 0;
        for region in format.layout(inputs).regions {
            let wide = Region { items: 4 * region.items, at, ..region };
            for item in 0..region.items {
                for (place, n) in [(0, Some(0)), (1, None), (2, Some(1)), (3, Some(2))] {
                    let expected = n.and_then(row).map_or(0, |row| region.get(row, item));
                    assert_eq!(wide.get(&quad, 4 * item + place), expected, "{format}: item {item}, place {place}");
                }
            }
            at += wide.bytes();
        }
        assert_eq!(at.next_multiple_of(32), quad.len(), "{format}");
    }
}

/// Bytes of one block of each GGUF type, and what the format's publisher computes from them.
#[test]
fn ggml_blocks_mean_what_they_should() {
    let mut state = 11u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    for number in [2, 8, 12, 14, 39] {
        let blocks = GgmlBlocks::of_type(number).expect("a known type");
        let mut bytes: Vec<u8> = (0..2 * blocks.bytes).map(|_| byte()).collect();
        let one_and_a_half = half::f16::from_f32(1.5).to_le_bytes();
        for block in bytes.chunks_exact_mut(blocks.bytes) {
            match blocks.format {
                WeightFormat::Q6K => block[208..].copy_from_slice(&one_and_a_half),
                WeightFormat::Mxfp4 => block[0] = 129,
                WeightFormat::Q4K => {
                    block[..2].copy_from_slice(&one_and_a_half);
                    block[2..4].copy_from_slice(&one_and_a_half);
                }
                _ => block[..2].copy_from_slice(&one_and_a_half),
            }
        }
        let inputs = 2 * blocks.inputs;
        let mut packed = vec![0; blocks.format.layout(inputs).bytes];
        ggml_row(&blocks, &bytes, &mut packed);
        let values = decode(blocks.format, inputs, &packed);
        for (at, &value) in values.iter().enumerate() {
            let block = &bytes[at / blocks.inputs * blocks.bytes..][..blocks.bytes];
            let k = at % blocks.inputs;
            let expected = match blocks.format {
                WeightFormat::Q4_0 => (f32::from(block[2 + k % 16] >> (k / 16 * 4) & 15) - 8.0) * 1.5,
                WeightFormat::Mxfp4 => small_floats::e2m1(block[1 + k % 16] >> (k / 16 * 4) & 15) * 4.0,
                WeightFormat::Q8_0 => f32::from(block[2 + k] as i8) * 1.5,
                WeightFormat::Q4K => {
                    let code = block[16 + k / 64 * 32 + k % 32] >> (k % 64 / 32 * 4) & 15;
                    let (s, j) = (&block[4..16], k / 32);
                    let wide = |low: u8, high: u8| f32::from((low & 15) + (high >> 6) * 16);
                    let (scale, least) = match j {
                        0..4 => (f32::from(s[j] % 64), f32::from(s[j + 4] % 64)),
                        _ => (wide(s[j + 4], s[j - 4]), wide(s[j + 4] >> 4, s[j])),
                    };
                    1.5 * scale * f32::from(code) - 1.5 * least
                }
                _ => {
                    let (low, high) = (&block[k / 128 * 64..][..64], &block[128 + k / 128 * 32..][..32]);
                    let k128 = k % 128;
                    let code = (low[k128 % 64] >> (k128 / 64 * 4) & 15) + (high[k128 % 32] >> (k128 / 32 * 2) & 3) * 16;
                    1.5 * f32::from(block[192 + k / 16] as i8) * (f32::from(code) - 32.0)
                }
            };
            assert_eq!(value, expected, "{} at {at}", blocks.name);
        }
    }
}

/// Rows of any bytes, most of which hold something that is not finite.
#[test]
fn rows_that_are_taken_for_finite_are() {
    let mut state = 5u32;
    let mut byte = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    for format in WeightFormat::every() {
        let inputs = format.block().max(32) as usize;
        let layout = format.layout(inputs);
        let (mut fine, mut broken) = (0, 0);
        for case in 0..4000 {
            // Of every second row only a few bytes are random: many of those are fine.
            let mut row = vec![0; layout.bytes];
            for _ in 0..if case % 2 == 0 { 2 } else { layout.bytes } {
                let at = (usize::from(byte()) * 256 + usize::from(byte())) % layout.bytes;
                row[at] = byte();
            }
            let is_finite = decode(format, inputs, &row).iter().all(|v| v.is_finite());
            match (may_not_be_finite(format, &layout, &row), is_finite) {
                (false, false) => panic!("{format}: {row:?}"),
                (false, true) => fine += 1,
                (true, false) => broken += 1,
                (true, true) => {}
            }
        }
        assert!(fine > 100, "{format}: {fine} rows were fine");
        assert!(broken > 10 || matches!(format, WeightFormat::Int4(_)), "{format}: {broken} rows were broken");
    }
}

#[test]
fn items_are_read_as_they_were_written() {
    let items: Vec<u8> = (0..37).map(|n| (n * 7 + 3) as u8).collect();
    for bits in [2, 4, 8] {
        let items: Vec<u8> = items.iter().map(|item| item & (u8::MAX >> (8 - bits))).collect();
        let region = Region { bits, per: 1, items: 45, at: 3 };
        let (mut one_by_one, mut at_once) = (vec![0; 3 + 45], vec![0; 3 + 45]);
        items.iter().enumerate().for_each(|(n, &item)| region.set(&mut one_by_one, 8 + n, item.into()));
        region.put(&mut at_once, 8, &items);
        assert_eq!(one_by_one, at_once, "{bits} bits");
        let mut read = vec![0xff; 37];
        region.take(&at_once, 8, &mut read);
        assert_eq!(read, items, "{bits} bits");
        assert!((0..37).all(|n| region.get(&at_once, 8 + n) == u32::from(items[n])), "{bits} bits");
    }
}
