//! Where words go: people read standard output, or standard error while JSON has standard output.
//!
//! A reader that goes away (`wgmoe check | head`) ends the words, not the work: the exit code still counts.

use crate::{must_be_writable, unusable};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::cell::Cell;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tracing_subscriber::fmt::format::FmtSpan;
use wgmoe::bench::results::{write_json, write_text};

/// Standard output and error, and the JSON file.
pub struct Output {
    json: Option<PathBuf>,
    /// Which option has standard output for what it writes, other than `--json`.
    taken: Option<&'static str>,
    /// Nothing is for people.
    quiet: bool,
    reader_left: bool,
}

/// Words can be those of a file, which must not steer a terminal. Nothing of our own has control characters.
fn harmless(text: &str) -> String {
    let is_hostile = |c: char| c.is_control() && c != '\n' && c != '\t';
    let escape = |c: char| if is_hostile(c) { c.escape_default().to_string() } else { c.to_string() };
    if text.contains(is_hostile) { text.chars().map(escape).collect() } else { text.to_owned() }
}

/// Set by `--quiet`: no progress either.
static QUIET: AtomicBool = AtomicBool::new(false);

impl Output {
    pub fn new(json: Option<PathBuf>, quiet: bool) -> Self {
        QUIET.store(quiet, Ordering::Relaxed);
        Output { json, taken: None, quiet, reader_left: false }
    }

    /// Refuses a `--json` that could not be written, before any work.
    pub fn check_target(&self) -> anyhow::Result<()> {
        match self.json.as_deref() {
            Some(path) if path.as_os_str().is_empty() => Err(unusable("--json: the name of a file is missing")),
            Some(path) if path != Path::new("-") => must_be_writable("--json", path),
            _ => Ok(()),
        }
    }

    /// From here on standard output is for what `option` writes, and words go to standard error.
    pub fn take_stdout(&mut self, option: &'static str) -> anyhow::Result<()> {
        let other = self.taken.or(self.json_on_stdout().then_some("--json"));
        if let Some(other) = other {
            return Err(unusable(format!("{option} -: {other} has standard output already; give one of them a file")));
        }
        self.taken = Some(option);
        Ok(())
    }

    fn json_on_stdout(&self) -> bool {
        self.json.as_deref() == Some(Path::new("-"))
    }

    /// One line, or several, for people.
    pub fn line(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        let text = format!("{}\n", harmless(text));
        if self.json_on_stdout() || self.taken.is_some() {
            // Standard error is the last resort; there is nobody left to tell.
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
        } else {
            self.bytes(text.as_bytes());
        }
    }

    /// The product of a command that has one (a shader's text): standard output, whatever else goes there.
    pub fn bytes(&mut self, bytes: &[u8]) {
        if self.reader_left {
            return;
        }
        let mut stdout = std::io::stdout().lock();
        match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.reader_left = true,
            Err(error) => {
                self.reader_left = true;
                let _ = writeln!(std::io::stderr(), "warning: standard output: {error}");
            }
            Ok(()) => {}
        }
    }

    /// The results for programs, where they were asked for.
    pub fn json(&mut self, value: &impl Serialize) -> anyhow::Result<()> {
        let Some(path) = self.json.clone() else { return Ok(()) };
        if self.json_on_stdout() {
            let mut text = serde_json::to_vec_pretty(value)?;
            text.push(b'\n');
            self.bytes(&text);
        } else {
            write_json(&path, value)?;
            self.line(&format!("results saved in {}", path.display()));
        }
        Ok(())
    }

    /// Saves a page, and says where.
    pub fn page(&mut self, path: &Path, html: &str) -> anyhow::Result<()> {
        write_text(path, html)?;
        self.line(&format!("page saved in {} ({} kB)", path.display(), html.len().div_ceil(1000)));
        Ok(())
    }

    /// Whether `--json` was given.
    pub fn wants_json(&self) -> bool {
        self.json.is_some()
    }
}

/// A line of progress on standard error. It shows on terminals only and leaves nothing behind.
pub struct Status {
    bar: ProgressBar,
    /// When it will be over, if somebody knows.
    end: Cell<Option<Instant>>,
    began: Instant,
}

impl Status {
    pub fn new() -> Self {
        let bar = on_terminal(ProgressBar::new_spinner());
        bar.set_style(ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}").expect("the template is fixed"));
        bar.enable_steady_tick(Duration::from_millis(120));
        Status { bar, end: Cell::new(None), began: Instant::now() }
    }

    /// From here on it is a bar, with what is left of this time.
    pub fn expect(&self, left: Duration) {
        let template = "{bar:24} {prefix} {wide_msg} {elapsed}";
        self.bar.set_style(ProgressStyle::with_template(template).expect("the template is fixed"));
        self.end.set(Some(Instant::now() + left));
    }

    pub fn set(&self, message: impl Into<String>) {
        if let Some(end) = self.end.get() {
            let left = end.saturating_duration_since(Instant::now());
            self.bar.set_length((end - self.began).as_millis() as u64);
            self.bar.set_position(self.began.elapsed().as_millis() as u64);
            self.bar.set_prefix(format!("about {} s left,", left.as_secs()));
        }
        self.bar.set_message(message.into());
    }

    /// Nothing else wakes up while it is timed.
    pub fn quiet(&self) {
        self.bar.disable_steady_tick();
        self.bar.tick();
    }

    pub fn lively(&self) {
        self.bar.enable_steady_tick(Duration::from_millis(120));
    }

    /// Lets `print` write lines without the progress line in between.
    pub fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }
}

impl Drop for Status {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A bar of bytes with their rate and the time that is left, as [`Status`].
pub struct Bytes(ProgressBar);

impl Bytes {
    /// `what` stands in front of the bar.
    pub fn new(what: &'static str) -> Self {
        let bar = on_terminal(ProgressBar::new(0));
        let template = "{prefix} {bar:32} {bytes} of {total_bytes}, {binary_bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is fixed"));
        bar.set_prefix(what);
        Bytes(bar)
    }

    pub fn set(&self, done: u64, total: u64) {
        self.0.set_length(total);
        self.0.set_position(done);
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// Where nobody wants words, nobody wants progress.
fn on_terminal(bar: ProgressBar) -> ProgressBar {
    if QUIET.load(Ordering::Relaxed) {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    bar
}

/// From here on, what the library does goes to standard error with the time that it took.
pub fn tell_spans() {
    let spans = tracing_subscriber::fmt().with_writer(std::io::stderr).with_max_level(tracing::Level::DEBUG);
    // It could only fail if there were one already.
    let _ = spans.with_span_events(FmtSpan::CLOSE).with_target(false).with_ansi(false).try_init();
}

/// Something that did not go as planned, and that the work goes on without.
pub fn warn(message: &str) {
    // There is nobody left to tell.
    let _ = writeln!(std::io::stderr().lock(), "warning: {message}");
}

/// An error with what caused it, and what to do.
pub fn report(error: &anyhow::Error) {
    let mut text = format!("error: {error}\n");
    let mut above = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        // Many errors already quote their source.
        if !above.contains(&cause) {
            text.push_str(&format!("  because: {cause}\n"));
        }
        above = cause;
    }
    if let Some(hint) = hint(error) {
        text.push_str(&format!("  hint: {hint}\n"));
    }
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

fn hint(error: &anyhow::Error) -> Option<&'static str> {
    if error.is::<crate::Unusable>() {
        return Some("--help lists the options and their values");
    }
    match error.downcast_ref::<wgmoe::Error>()? {
        wgmoe::Error::NoDevice { .. } => Some("`wgmoe info` lists the devices; --device cpu works everywhere"),
        wgmoe::Error::DeviceLost { .. } | wgmoe::Error::Timeout { .. } => {
            Some("try fewer --tokens, another --device, or --device cpu")
        }
        wgmoe::Error::OutOfMemory { .. } => Some("--weights f16 halves the weights; --experts makes the layer smaller"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_cannot_steer_a_terminal() {
        assert_eq!(harmless("a\tb\nMoE × 2"), "a\tb\nMoE × 2");
        assert_eq!(harmless("\u{1b}[2J\u{9b}31m\r\0"), "\\u{1b}[2J\\u{9b}31m\\r\\u{0}");
    }
}
