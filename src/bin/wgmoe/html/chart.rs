//! Charts as SVG: points, lines, bars and pictures between two axes.
//!
//! Colours are names until the end: the plotting crate draws with a number for each, and the finished text gets the page's
//! variables in their place, so that a chart follows light and dark as all else does.

use super::axis::Axis;
use super::heat::Heat;
use super::text::{clean, escape};
use anyhow::anyhow;
use plotters::coord::Shift;
use plotters::element::{Circle, DashedPathElement, PathElement, Polygon, Rectangle, Text};
use plotters::prelude::{ChartBuilder, DrawingArea, IntoDrawingArea, RGBColor, SVGBackend};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{Color, IntoFont, TextStyle};

/// Series with a colour of their own; later ones repeat.
pub const NUM_SERIES: usize = 8;
/// Width of a character by the size of its font: what is left free for a text.
const CHARACTER: f64 = 0.58;
/// Height of a row where an axis has places.
const ROW: u32 = 26;
/// Room to the right of an axis, for half of its last label.
const RIGHT: i32 = 20;
/// The plotting crate makes fonts smaller by this.
const FONT: f64 = 1.24;

/// Colours by what they are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ink {
    Text,
    Muted,
    Rule,
    /// What the chart stands on.
    Ground,
    /// Text on a series' colour.
    OnSeries,
    /// A series, by its number.
    Series(usize),
}

impl Ink {
    /// The variable of the page's style.
    pub fn variable(self) -> String {
        match self {
            Ink::Text => "var(--ink)".to_owned(),
            Ink::Muted => "var(--muted)".to_owned(),
            Ink::Rule => "var(--rule)".to_owned(),
            Ink::Ground => "var(--card)".to_owned(),
            Ink::OnSeries => "var(--on-series)".to_owned(),
            Ink::Series(n) => format!("var(--s{})", n % NUM_SERIES + 1),
        }
    }

    fn all() -> impl Iterator<Item = Ink> {
        let others = [Ink::Text, Ink::Muted, Ink::Rule, Ink::Ground, Ink::OnSeries];
        others.into_iter().chain((0..NUM_SERIES).map(Ink::Series))
    }

    /// What the plotting crate takes for it.
    fn stand_in(self) -> RGBColor {
        let number = match self {
            Ink::Series(n) => 5 + (n % NUM_SERIES) as u8,
            other => Ink::all().position(|ink| ink == other).unwrap_or(0) as u8,
        };
        RGBColor(1, 2, number)
    }
}

/// Forms of points, so that a colour is never the only difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape(pub usize);

impl Shape {
    fn is_round(self) -> bool {
        self.0.is_multiple_of(6)
    }

    /// Corners around the middle.
    pub fn corners(self, radius: f64) -> Vec<(f64, f64)> {
        let regular = |corners: u32, turn: f64, scale: f64| {
            let angle = move |n: u32| (f64::from(n) + turn) / f64::from(corners) * std::f64::consts::TAU;
            (0..corners).map(|n| (angle(n).sin() * radius * scale, -angle(n).cos() * radius * scale)).collect()
        };
        match self.0 % 6 {
            0 => regular(20, 0.0, 1.0),
            1 => regular(4, 0.5, 1.2),
            2 => regular(3, 0.0, 1.3),
            3 => regular(4, 0.0, 1.3),
            4 => regular(3, 0.5, 1.3),
            _ => regular(6, 0.0, 1.15),
        }
    }
}

/// One thing in a chart, where values of the axes say.
#[derive(Clone, Debug)]
pub enum Mark {
    Line {
        points: Vec<(f64, f64)>,
        ink: Ink,
        is_dashed: bool,
    },
    /// With its label beside it, where there is room.
    Point {
        at: (f64, f64),
        ink: Ink,
        shape: Shape,
        label: String,
    },
    /// With its label within, or after its end where `is_label_after`.
    Bar {
        x: (f64, f64),
        y: (f64, f64),
        ink: Ink,
        label: String,
        is_label_after: bool,
    },
    /// Words at the left edge of the chart.
    Heading {
        y: f64,
        text: String,
    },
}

/// How much room a chart takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Wider than high.
    Landscape,
    /// As many rows, one under the other.
    Rows(usize),
    /// As high as wide, for matrices.
    Square,
    /// As wide as a landscape, this high.
    Band(u32),
}

/// A chart, not yet drawn.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Name, for those who do not see it.
    pub title: String,
    /// What it shows, for those who do not see it.
    pub description: String,
    pub x: Axis,
    pub y: Axis,
    pub extent: Extent,
    pub marks: Vec<Mark>,
    /// Fills the whole chart.
    pub heat: Option<Heat>,
}

/// Screens that a chart is drawn for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Screen {
    Wide,
    Narrow,
}

impl Screen {
    fn class(self) -> &'static str {
        match self {
            Screen::Wide => "wide",
            Screen::Narrow => "narrow",
        }
    }
}

impl Chart {
    /// The chart for wide and for narrow screens, of which the page's style shows one. `id` is the page's only one.
    pub fn html(&self, id: &str) -> anyhow::Result<String> {
        let both = [Screen::Wide, Screen::Narrow].map(|screen| self.svg(id, screen));
        both.into_iter().collect()
    }

    fn size(&self, screen: Screen) -> (u32, u32) {
        let width = if screen == Screen::Wide { 880 } else { 340 };
        match self.extent {
            Extent::Landscape => (width, if screen == Screen::Wide { 420 } else { 320 }),
            Extent::Rows(rows) => (width, (rows as u32).saturating_mul(ROW).saturating_add(70)),
            Extent::Square if screen == Screen::Wide => (620, 620),
            Extent::Square => (width, width),
            Extent::Band(height) => (width, height),
        }
    }

    fn svg(&self, id: &str, screen: Screen) -> anyhow::Result<String> {
        let size = self.size(screen);
        let mut svg = String::new();
        let mut picture = String::new();
        {
            let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            let mut canvas =
                Canvas { root: &root, font: if screen == Screen::Wide { 12.5 } else { 11.0 }, taken: Vec::new() };
            let frame = canvas.axes(self, size).map_err(|error| anyhow!("a chart cannot be drawn: {error}"))?;
            canvas.marks(self, &frame).map_err(|error| anyhow!("a chart cannot be drawn: {error}"))?;
            root.present().map_err(|error| anyhow!("a chart cannot be drawn: {error}"))?;
            if let Some(heat) = &self.heat {
                picture = frame.picture(&heat.data_uri()?);
            }
        }
        Ok(self.finish(&svg, &picture, &format!("{id}-{}", screen.class()), screen, size))
    }

    /// The drawn text with names for those who do not see it, the picture, and the page's colours.
    fn finish(&self, drawn: &str, picture: &str, id: &str, screen: Screen, (width, height): (u32, u32)) -> String {
        let begin = drawn.find('>').map_or(0, |end| end + 1);
        let mut inner = drawn[begin..].replace("</svg>\n", "");
        for ink in Ink::all() {
            let RGBColor(r, g, b) = ink.stand_in();
            inner = inner.replace(&format!("=\"#{r:02X}{g:02X}{b:02X}\""), &format!("=\"{}\"", ink.variable()));
        }
        format!(
            "<svg class=\"{} {}\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-labelledby=\"{id}-t {id}-d\">\n\
             <title id=\"{id}-t\">{}</title>\n<desc id=\"{id}-d\">{}</desc>\n{picture}{inner}</svg>\n",
            screen.class(),
            if self.extent == Extent::Square { "square" } else { "chart" },
            escape(&self.title),
            escape(&self.description),
        )
    }
}

type Root<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn<T> = Result<T, plotters::drawing::DrawingAreaErrorKind<std::io::Error>>;

/// A box of pixels: left, top, right, bottom.
type Area = (i32, i32, i32, i32);

/// Where the axes are, in pixels.
struct Frame {
    x: (f64, f64),
    y: (f64, f64),
    area: Area,
}

impl Frame {
    fn at(&self, chart: &Chart, (x, y): (f64, f64)) -> (i32, i32) {
        let part = |axis: &Axis, value: f64, (low, high): (f64, f64)| (axis.position(value) - low) / (high - low);
        let (left, top, right, bottom) = self.area;
        let along = |from: i32, to: i32, part: f64| from + (part * f64::from(to - from)).round() as i32;
        (along(left, right, part(&chart.x, x, self.x)), along(bottom, top, part(&chart.y, y, self.y)))
    }

    fn picture(&self, uri: &str) -> String {
        let (left, top, right, bottom) = self.area;
        format!(
            "<image x=\"{left}\" y=\"{top}\" width=\"{}\" height=\"{}\" preserveAspectRatio=\"none\" href=\"{uri}\"/>\n",
            right - left,
            bottom - top
        )
    }
}

/// What is being drawn on, and where there is something already.
struct Canvas<'a, 'b> {
    root: &'a Root<'b>,
    font: f64,
    taken: Vec<Area>,
}

impl Canvas<'_, '_> {
    fn style(&self, ink: Ink, h: HPos, v: VPos) -> TextStyle<'static> {
        let font = ("sans-serif", self.font * FONT).into_font();
        TextStyle { font, color: ink.stand_in().to_backend_color(), pos: Pos::new(h, v) }
    }

    fn width_of(&self, text: &str) -> i32 {
        // The widest letters take half as much again.
        let of = |c: char| if matches!(c, 'M' | 'W' | 'm' | 'w' | '%' | '@') { 1.5 } else { 1.0 };
        (text.chars().map(of).sum::<f64>() * self.font * CHARACTER).ceil() as i32
    }

    fn text(&self, text: &str, at: (i32, i32), ink: Ink, h: HPos, v: VPos) -> Drawn<()> {
        self.root.draw(&Text::new(text.to_owned(), at, self.style(ink, h, v)))
    }

    /// Axes with ticks, grid and titles.
    fn axes(&mut self, chart: &Chart, (width, height): (u32, u32)) -> Drawn<Frame> {
        let labels = chart.y.ticks().iter().map(|(_, label)| self.width_of(label)).max().unwrap_or(0);
        let left = (labels + 12).min(width as i32 / 2);
        let top = if chart.y.title.is_empty() { 8 } else { 26 };
        let area = (left, top, width as i32 - RIGHT, height as i32 - if chart.x.title.is_empty() { 26 } else { 48 });
        let mut builder = ChartBuilder::on(self.root);
        builder
            .margin_top(area.1)
            .margin_right(RIGHT)
            .x_label_area_size(height as i32 - area.3)
            .y_label_area_size(left);
        let x = self.spread(&chart.x, area.2 - area.0);
        let y = chart.y.clone().map_labels(|label| self.fitted(label, left - 10));
        let mut drawn = builder.build_cartesian_2d(x, y)?;
        let mut mesh = drawn.configure_mesh();
        mesh.light_line_style(RGBColor(0, 0, 0).mix(0.0))
            .bold_line_style(Ink::Rule.stand_in())
            .axis_style(Ink::Rule.stand_in())
            .label_style(self.style(Ink::Muted, HPos::Left, VPos::Top));
        if !chart.x.has_grid {
            mesh.disable_x_mesh();
        }
        if !chart.y.has_grid {
            mesh.disable_y_mesh();
        }
        mesh.draw()?;
        let middle = (area.0 + area.2) / 2;
        self.text(&chart.x.title, (middle, height as i32 - 6), Ink::Muted, HPos::Center, VPos::Bottom)?;
        self.text(&chart.y.title, (0, 4), Ink::Muted, HPos::Left, VPos::Top)?;
        Ok(Frame { x: chart.x.ends(), y: chart.y.ends(), area })
    }

    /// The text, or what of its beginning fits in `width`.
    fn fitted(&self, text: &str, width: i32) -> String {
        if self.width_of(text) <= width {
            return text.to_owned();
        }
        let room = (f64::from(width) / (self.font * CHARACTER)) as usize;
        text.chars().take(room.saturating_sub(1)).chain(['…']).collect()
    }

    /// The axis with those ticks whose labels do not run into each other.
    fn spread(&self, axis: &Axis, length: i32) -> Axis {
        let (low, high) = axis.ends();
        let mut end = i32::MIN;
        axis.clone().retain_ticks(|at, label| {
            let middle = ((at - low) / (high - low) * f64::from(length)) as i32;
            let half = self.width_of(label) / 2;
            let is_free = middle - half > end && middle + half < length + RIGHT;
            if is_free {
                end = middle + half + 8;
            }
            is_free
        })
    }

    fn marks(&mut self, chart: &Chart, frame: &Frame) -> Drawn<()> {
        // What points cover is known before the first label looks for a place.
        for mark in &chart.marks {
            if let Mark::Point { at, .. } = mark {
                let (x, y) = frame.at(chart, *at);
                self.taken.push((x - 6, y - 6, x + 6, y + 6));
            }
        }
        for mark in &chart.marks {
            match mark {
                Mark::Line { points, ink, is_dashed } => {
                    let points: Vec<(i32, i32)> = points.iter().map(|&at| frame.at(chart, at)).collect();
                    self.line(&points, *ink, *is_dashed)?;
                }
                Mark::Point { at, ink, shape, .. } => self.point(frame.at(chart, *at), *ink, *shape)?,
                Mark::Bar { x, y, ink, label, is_label_after } => {
                    let corners = [frame.at(chart, (x.0, y.0)), frame.at(chart, (x.1, y.1))];
                    self.bar(corners, *ink, &clean(label), *is_label_after)?;
                }
                Mark::Heading { y, text } => {
                    let (_, y) = frame.at(chart, (f64::NAN, *y));
                    let text = self.fitted(&clean(text), frame.area.2);
                    self.text(&text, (0, y), Ink::Text, HPos::Left, VPos::Center)?;
                }
            }
        }
        for mark in &chart.marks {
            if let Mark::Point { at, label, .. } = mark {
                self.label(frame.at(chart, *at), &clean(label), frame.area)?;
            }
        }
        Ok(())
    }

    fn line(&self, points: &[(i32, i32)], ink: Ink, is_dashed: bool) -> Drawn<()> {
        let style = ink.stand_in().stroke_width(2);
        if is_dashed {
            return self.root.draw(&DashedPathElement::new(points.to_vec(), 4, 4, ink.stand_in().stroke_width(1)));
        }
        self.root.draw(&PathElement::new(points.to_vec(), style))
    }

    /// With a rim, so that points that touch stay apart.
    fn point(&self, (x, y): (i32, i32), ink: Ink, shape: Shape) -> Drawn<()> {
        for (radius, ink) in [(7.0, Ink::Ground), (5.5, ink)] {
            let corner = |(dx, dy): (f64, f64)| (x + dx.round() as i32, y + dy.round() as i32);
            let corners: Vec<(i32, i32)> = shape.corners(radius).into_iter().map(corner).collect();
            if shape.is_round() {
                self.root.draw(&Circle::new((x, y), radius as u32, ink.stand_in().filled()))?;
            } else {
                self.root.draw(&Polygon::new(corners, ink.stand_in()))?;
            }
        }
        Ok(())
    }

    fn bar(&self, corners: [(i32, i32); 2], ink: Ink, label: &str, is_label_after: bool) -> Drawn<()> {
        let [(x0, y0), (x1, y1)] = corners;
        self.root.draw(&Rectangle::new(corners, ink.stand_in().filled()))?;
        let middle = (y0 + y1) / 2;
        if is_label_after {
            self.text(label, (x1 + 5, middle), Ink::Text, HPos::Left, VPos::Center)
        } else if self.width_of(label) + 8 <= x1 - x0 {
            self.text(label, ((x0 + x1) / 2, middle), Ink::OnSeries, HPos::Center, VPos::Center)
        } else {
            Ok(())
        }
    }

    /// Beside a point: right, left, above or below, wherever nothing is yet; nowhere if there is something everywhere.
    fn label(&mut self, (x, y): (i32, i32), label: &str, (left, top, right, bottom): Area) -> Drawn<()> {
        let (width, half) = (self.width_of(label), (self.font * 0.6) as i32);
        let places = [
            (x + 9, y, HPos::Left, x + 9),
            (x - 9, y, HPos::Right, x - 9 - width),
            (x, y - 14, HPos::Center, x - width / 2),
            (x, y + 14, HPos::Center, x - width / 2),
        ];
        for (text_x, text_y, anchor, start) in places {
            let area = (start, text_y - half, start + width, text_y + half);
            let is_inside = area.0 >= left && area.1 >= top && area.2 <= right && area.3 <= bottom;
            if !label.is_empty() && is_inside && !self.taken.iter().any(|&other| overlap(area, other)) {
                self.taken.push(area);
                return self.text(label, (text_x, text_y), Ink::Muted, anchor, VPos::Center);
            }
        }
        Ok(())
    }
}

fn overlap(a: Area, b: Area) -> bool {
    a.0 < b.2 && b.0 < a.2 && a.1 < b.3 && b.1 < a.3
}
