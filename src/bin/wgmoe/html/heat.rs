//! Matrices of numbers as pictures.

use base64::prelude::{BASE64_STANDARD, Engine as _};
use plotters::prelude::{RGBColor, ViridisRGB};

/// Cells along one side of a picture. Larger matrices show the means of neighbouring cells: a screen does not show more of
/// them apart, and a picture is at most 64 KiB before it is compressed.
pub const LONGEST_SIDE: usize = 256;

/// Colours of the map. The number after them is that of cells without a value, which are transparent.
const NUM_COLOURS: u8 = 255;

/// A matrix of values in colours.
#[derive(Clone, Debug)]
pub struct Heat {
    /// `[num_rows][num_columns]`; cells without a value are `None`.
    rows: Vec<Vec<Option<f64>>>,
    /// Rows and columns of the matrix that are one cell here: 1, or more where it was too large.
    pub block: [usize; 2],
    /// The values of the darkest and the lightest colour.
    pub range: (f64, f64),
}

impl Heat {
    /// `rows` all as long as the first; `range` is that of the values if there is none.
    pub fn new(rows: &[Vec<Option<f64>>], range: Option<(f64, f64)>) -> Heat {
        let block = [rows.len(), rows.first().map_or(0, Vec::len)].map(|side| side.div_ceil(LONGEST_SIDE).max(1));
        let rows = means_of_blocks(rows, block);
        let values = || rows.iter().flatten().flatten().copied();
        let found = || values().reduce(f64::min).zip(values().reduce(f64::max)).unwrap_or((0.0, 1.0));
        let range = range.unwrap_or_else(found);
        Heat { rows, block, range }
    }

    pub fn num_rows(&self) -> usize {
        self.rows.len()
    }

    pub fn num_columns(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }

    /// The picture, one pixel for each cell, as the address of an image.
    pub fn data_uri(&self) -> anyhow::Result<String> {
        let pixels: Vec<u8> = self.rows.iter().flatten().map(|&value| self.colour_of(value)).collect();
        let mut file = Vec::new();
        let mut encoder = png::Encoder::new(&mut file, self.num_columns() as u32, self.num_rows() as u32);
        encoder.set_color(png::ColorType::Indexed);
        encoder.set_compression(png::Compression::High);
        encoder.set_palette((0..=NUM_COLOURS).flat_map(colour).collect::<Vec<u8>>());
        encoder.set_trns((0..=NUM_COLOURS).map(|index| if index < NUM_COLOURS { 255 } else { 0 }).collect::<Vec<u8>>());
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&pixels)?;
        writer.finish()?;
        Ok(format!("data:image/png;base64,{}", BASE64_STANDARD.encode(file)))
    }

    fn colour_of(&self, value: Option<f64>) -> u8 {
        let (low, high) = self.range;
        let Some(value) = value else { return NUM_COLOURS };
        let part = if high > low { (value - low) / (high - low) } else { 0.5 };
        (part.clamp(0.0, 1.0) * f64::from(NUM_COLOURS - 1)).round() as u8
    }

    /// The colours from low to high, as stops of a CSS gradient.
    pub fn gradient() -> String {
        let stops = (0..=8).map(|n| {
            let [r, g, b] = colour((u32::from(NUM_COLOURS - 1) * n / 8) as u8);
            format!("rgb({r} {g} {b})")
        });
        stops.collect::<Vec<_>>().join(", ")
    }
}

fn colour(index: u8) -> [u8; 3] {
    let RGBColor(r, g, b) = ViridisRGB::get_color(f64::from(index.min(NUM_COLOURS - 1)) / f64::from(NUM_COLOURS - 1));
    [r, g, b]
}

/// The mean of each block of so many rows and columns; those without a value do not count.
fn means_of_blocks(rows: &[Vec<Option<f64>>], [height, width]: [usize; 2]) -> Vec<Vec<Option<f64>>> {
    let num_columns = rows.first().map_or(0, Vec::len);
    let mean = |rows: &[Vec<Option<f64>>], start: usize| {
        let cells = rows.iter().flat_map(|row| row.iter().skip(start).take(width)).flatten();
        let (count, sum) = cells.filter(|v| v.is_finite()).fold((0, 0.0), |(count, sum), v| (count + 1, sum + v));
        (count > 0).then(|| sum / f64::from(count))
    };
    rows.chunks(height).map(|rows| (0..num_columns).step_by(width).map(|start| mean(rows, start)).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(heat: &Heat) -> (u32, u32, Vec<u8>) {
        let uri = heat.data_uri().expect("a picture");
        let base64 = uri.strip_prefix("data:image/png;base64,").expect("an image");
        let file = BASE64_STANDARD.decode(base64).expect("base64");
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().expect("a header");
        let mut pixels = vec![0; reader.output_buffer_size().expect("a size")];
        reader.next_frame(&mut pixels).expect("pixels");
        (reader.info().width, reader.info().height, pixels)
    }

    #[test]
    fn cells_are_pixels() {
        let heat =
            Heat::new(&[vec![Some(0.0), Some(2.0), None], vec![Some(1.0), Some(-9.0), Some(9.0)]], Some((0.0, 2.0)));
        assert_eq!(decoded(&heat), (3, 2, vec![0, 254, 255, 127, 0, 254]));
        assert_eq!((heat.block, heat.num_rows(), heat.num_columns()), ([1, 1], 2, 3));
    }

    #[test]
    fn the_range_is_that_of_the_values() {
        assert_eq!(Heat::new(&[vec![Some(3.0), None, Some(-1.0)]], None).range, (-1.0, 3.0));
        assert_eq!(Heat::new(&[vec![None]], None).range, (0.0, 1.0));
        assert_eq!(decoded(&Heat::new(&[vec![Some(7.0)]], None)).2, [127], "one value is neither low nor high");
    }

    #[test]
    fn large_matrices_become_means_of_blocks() {
        let side = 2 * LONGEST_SIDE + 1;
        let row = |r: usize| (0..side).map(|c| Some((r / 3 * 1000 + c / 3) as f64)).collect();
        let heat = Heat::new(&(0..side).map(row).collect::<Vec<_>>(), None);
        assert_eq!((heat.block, heat.num_rows(), heat.num_columns()), ([3, 3], 171, 171));
        assert_eq!(heat.rows[2][5], Some(2005.0));
        let size = heat.data_uri().expect("a picture").len();
        assert!(size < 2 * LONGEST_SIDE * LONGEST_SIDE, "{size} bytes");
    }
}
