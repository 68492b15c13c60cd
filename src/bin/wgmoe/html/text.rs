//! Words and numbers on their way into a page.

/// What stands for a character that must not be in a page.
const REPLACEMENT: char = '\u{fffd}';

/// `text` without characters that are not to be seen: controls, and those that turn the direction of what follows.
pub fn clean(text: &str) -> String {
    let is_hidden = |c: char| {
        c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if is_hidden(c) { REPLACEMENT } else { c }).collect()
}

/// `text` as HTML, in elements and in quoted attributes.
pub fn escape(text: &str) -> String {
    let mut html = String::with_capacity(text.len());
    for c in clean(text).chars() {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            c => html.push(c),
        }
    }
    html
}

/// A number for an axis: short, and exact where it is a round one.
pub fn compact(value: f64) -> String {
    let unit = match value.abs() {
        size if size >= 1e15 || (size > 0.0 && size < 1e-4) => return format!("{value:.0e}"),
        size if size >= 1e12 => (1e12, "T"),
        size if size >= 1e9 => (1e9, "G"),
        size if size >= 1e6 => (1e6, "M"),
        size if size >= 1e4 => (1e3, "k"),
        _ => (1.0, ""),
    };
    format!("{}{}", trimmed(value / unit.0), unit.1)
}

/// Up to four decimals, without zeros at the end.
fn trimmed(value: f64) -> String {
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_text_is_markup() {
        let hostile = "<script>alert('1')</script> & \"x\" \u{202e}\u{0}\n";
        let html = escape(hostile);
        assert_eq!(
            html,
            "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt; &amp; &quot;x&quot; \u{fffd}\u{fffd}\u{fffd}"
        );
        assert_eq!(escape("µs, GB/s, 日本"), "µs, GB/s, 日本");
    }

    #[test]
    fn numbers_are_short() {
        let numbers = [0.0, 0.01, 0.5, 1.0, 2048.0, 10_000.0, 12_500.0, 3e6, 2.5e9, 1e12, 1e17, 1e-6].map(compact);
        let expected = ["0", "0.01", "0.5", "1", "2048", "10k", "12.5k", "3M", "2.5G", "1T", "1e17", "1e-6"];
        assert_eq!(numbers, expected);
    }
}
