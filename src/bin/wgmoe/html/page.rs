//! The frame of a page: head, headings, tables, figures.

use super::chart::{Chart, Ink, Shape};
use super::heat::Heat;
use super::text::{compact, escape};

/// Rows of a table; of those beyond, a page says how many there are.
const MOST_ROWS: usize = 500;

/// A table with names of its columns and rows. A row of one cell is a heading for those after it.
#[derive(Clone, Debug, Default)]
pub struct Table {
    pub caption: String,
    /// The first column names the rows.
    pub columns: Vec<String>,
    pub rows: Vec<Vec<String>>,
    /// Cells are sentences rather than numbers.
    pub is_text: bool,
}

/// What a colour or a shape stands for.
#[derive(Clone, Debug)]
pub struct Key {
    pub ink: Ink,
    /// None is a line, as of a ceiling.
    pub shape: Option<Shape>,
    pub text: String,
}

/// A chart with what it says, its legend and the numbers behind it.
#[derive(Clone, Debug)]
pub struct Figure {
    pub heading: String,
    pub text: String,
    pub keys: Vec<Key>,
    pub chart: Chart,
    pub table: Table,
}

/// A number worth a large font.
#[derive(Clone, Debug)]
pub struct Tile {
    pub value: String,
    pub text: String,
}

/// A page in the making.
#[derive(Debug)]
pub struct Page {
    title: String,
    body: String,
    num_figures: usize,
}

impl Page {
    /// `title` and a sentence on what this is.
    pub fn new(title: &str, lead: &str) -> Page {
        let body = format!("<header>\n<h1>{}</h1>\n<p class=\"lead\">{}</p>\n</header>\n", escape(title), escape(lead));
        Page { title: title.to_owned(), body, num_figures: 0 }
    }

    pub fn heading(&mut self, text: &str) {
        self.body.push_str(&format!("<h2>{}</h2>\n", escape(text)));
    }

    pub fn paragraph(&mut self, text: &str) {
        self.body.push_str(&format!("<p>{}</p>\n", escape(text)));
    }

    pub fn list(&mut self, items: &[String]) {
        let items: String = items.iter().map(|item| format!("<li>{}</li>\n", escape(item))).collect();
        self.body.push_str(&format!("<ul>\n{items}</ul>\n"));
    }

    pub fn tiles(&mut self, tiles: &[Tile]) {
        let tile =
            |tile: &Tile| format!("<div><dt>{}</dt><dd>{}</dd></div>\n", escape(&tile.text), escape(&tile.value));
        self.body.push_str(&format!("<dl class=\"tiles\">\n{}</dl>\n", tiles.iter().map(tile).collect::<String>()));
    }

    pub fn table(&mut self, table: &Table) {
        self.body.push_str(&table.html());
    }

    /// A table that the reader opens.
    pub fn folded(&mut self, summary: &str, table: &Table) {
        let html = table.html();
        self.body.push_str(&format!("<details><summary>{}</summary>\n{html}</details>\n", escape(summary)));
    }

    pub fn figure(&mut self, figure: &Figure) -> anyhow::Result<()> {
        self.num_figures += 1;
        let chart = figure.chart.html(&format!("figure-{}", self.num_figures))?;
        let keys: String = figure.keys.iter().map(Key::html).collect();
        let legend = if keys.is_empty() { keys } else { format!("<ul class=\"legend\">\n{keys}</ul>\n") };
        let scale = figure.chart.heat.as_ref().map(scale).unwrap_or_default();
        self.body.push_str(&format!(
            "<figure>\n<figcaption><h3>{}</h3>\n<p>{}</p></figcaption>\n{legend}{scale}{chart}\
             <details><summary>The numbers</summary>\n{}</details>\n</figure>\n",
            escape(&figure.heading),
            escape(&figure.text),
            figure.table.html(),
        ));
        Ok(())
    }

    /// The whole file.
    pub fn finish(self) -> String {
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; \
             img-src data:\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n\
             <meta name=\"generator\" content=\"wgmoe {}\">\n<title>{}</title>\n<link rel=\"icon\" href=\"data:,\">\n\
             <style>\n{}</style>\n</head>\n<body>\n<main>\n{}</main>\n<footer>Made by wgmoe {}.</footer>\n</body>\n</html>\n",
            env!("CARGO_PKG_VERSION"),
            escape(&self.title),
            include_str!("style.css"),
            self.body,
            env!("CARGO_PKG_VERSION"),
        )
    }
}

impl Table {
    pub fn new(caption: &str, columns: &[&str]) -> Table {
        let columns = columns.iter().map(|&column| column.to_owned()).collect();
        Table { caption: caption.to_owned(), columns, rows: Vec::new(), is_text: false }
    }

    /// A table of sentences.
    pub fn of_text(caption: &str, columns: &[&str]) -> Table {
        Table { is_text: true, ..Table::new(caption, columns) }
    }

    /// Leaves out a column whose cells are all the same.
    pub fn without_column(&mut self, column: usize) {
        self.columns.remove(column);
        for row in self.rows.iter_mut().filter(|row| row.len() > column) {
            row.remove(column);
        }
    }

    fn html(&self) -> String {
        let head: String = self.columns.iter().map(|text| format!("<th scope=\"col\">{}</th>", escape(text))).collect();
        let body: String = self.rows.iter().take(MOST_ROWS).map(|row| row_html(row, self.columns.len())).collect();
        let more = self.rows.len().saturating_sub(MOST_ROWS);
        let more = if more > 0 {
            format!("<p>{more} more rows are in the file this was made from.</p>\n")
        } else {
            String::new()
        };
        let class = if self.is_text { " class=\"text\"" } else { "" };
        // With a tab stop, so that it can be scrolled by keyboard.
        format!(
            "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{0}\"><table{class}>\n<caption>{0}</caption>\n\
             <thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n{more}",
            escape(&self.caption)
        )
    }
}

fn row_html(row: &[String], num_columns: usize) -> String {
    if let ([heading], 2..) = (row, num_columns) {
        return format!("<tr><th scope=\"rowgroup\" colspan=\"{num_columns}\">{}</th></tr>\n", escape(heading));
    }
    let cell = |(n, text): (usize, &String)| {
        if n == 0 { format!("<th scope=\"row\">{}</th>", escape(text)) } else { format!("<td>{}</td>", escape(text)) }
    };
    format!("<tr>{}</tr>\n", row.iter().enumerate().map(cell).collect::<String>())
}

impl Key {
    fn html(&self) -> String {
        let colour = self.ink.variable();
        let mark = match self.shape {
            Some(shape) => {
                let corners: String =
                    shape.corners(5.5).iter().map(|(x, y)| format!("{:.1},{:.1} ", x + 8.0, y + 8.0)).collect();
                format!("<polygon points=\"{}\" fill=\"{colour}\"/>", corners.trim_end())
            }
            None => format!("<path d=\"M0 8h16\" stroke=\"{colour}\" stroke-width=\"2\"/>"),
        };
        let key = format!("<svg viewBox=\"0 0 16 16\" aria-hidden=\"true\">{mark}</svg>");
        format!("<li>{key}{}</li>\n", escape(&self.text))
    }
}

/// What the colours of a picture stand for.
fn scale(heat: &Heat) -> String {
    format!(
        "<p class=\"scale\"><span>{}</span><span class=\"strip\" style=\"background:linear-gradient(to right, {})\"></span>\
         <span>{}</span></p>\n",
        escape(&compact(heat.range.0)),
        Heat::gradient(),
        escape(&compact(heat.range.1)),
    )
}

#[cfg(test)]
mod tests {
    use super::super::axis::Axis;
    use super::super::chart::{Extent, Mark};
    use super::*;

    const HOSTILE: &str = "</title><script>alert(1)</script><img src=x onerror='alert(2)'>\" onload=\"alert(3)";

    fn page() -> String {
        let text = || HOSTILE.to_owned();
        let mut table = Table::new(HOSTILE, &[HOSTILE]);
        table.rows.push(vec![text(), text()]);
        let (ink, shape) = (Ink::Series(0), Shape(0));
        let marks = vec![
            Mark::Point { at: (1.0, 0.0), ink, shape, label: text() },
            Mark::Bar { x: (1.0, 10.0), y: (0.0, 1.0), ink, label: text(), is_label_after: true },
            Mark::Heading { y: 0.0, text: text() },
        ];
        let chart = Chart {
            title: text(),
            description: text(),
            x: Axis::log(HOSTILE, [1.0, 10.0]).with_ticks([(5.0, text())]),
            y: Axis::places(HOSTILE, [text()]),
            extent: Extent::Rows(1),
            marks,
            heat: Some(Heat::new(&[vec![Some(1.0)]], None)),
        };
        let mut page = Page::new(HOSTILE, HOSTILE);
        page.heading(HOSTILE);
        page.paragraph(HOSTILE);
        page.list(&[text()]);
        page.tiles(&[Tile { value: text(), text: text() }]);
        page.table(&table);
        let keys = vec![Key { ink, shape: Some(shape), text: text() }];
        page.figure(&Figure { heading: text(), text: text(), keys, chart, table }).expect("drawn");
        page.finish()
    }

    #[test]
    fn nothing_that_a_page_is_told_is_markup() {
        let page = page();
        assert!(page.matches("alert(1)").count() >= 24, "the words are there");
        for markup in ["<script", "<img", "onload=\"", "onerror='"] {
            assert!(!page.contains(markup), "{markup} in {page}");
        }
    }

    #[test]
    fn charts_have_names_and_the_colours_of_the_page() {
        let page = page();
        assert_eq!(page.matches("role=\"img\"").count(), 2, "for wide and for narrow screens");
        assert_eq!(page.matches("<title id=").count(), 2);
        assert!(page.contains("fill=\"var(--s1)\""));
        assert!(!page.contains("#0102"), "a colour was not replaced");
    }

    #[test]
    fn long_tables_say_what_is_left_out() {
        let mut table = Table::new("numbers", &["n"]);
        table.rows = (0..MOST_ROWS + 7).map(|n| vec![n.to_string()]).collect();
        let html = table.html();
        assert_eq!(html.matches("<tr>").count(), MOST_ROWS + 1);
        assert!(html.contains("7 more rows"));
    }
}
