//! Pages: one file each, with nothing to fetch, no scripts, in light and dark.
//!
//! Whatever comes from a file (names of devices, presets, labels of tokens) is text of unknown origin. It goes through
//! [`text::escape`] on its way into a page, and through [`text::clean`] on its way into a chart, whose crate escapes it.

mod axis;
mod chart;
mod heat;
mod page;
mod text;

pub use axis::Axis;
pub use chart::{Chart, Extent, Ink, Mark, Shape};
pub use heat::{Heat, LONGEST_SIDE};
pub use page::{Figure, Key, Page, Table, Tile};
pub use text::compact;
