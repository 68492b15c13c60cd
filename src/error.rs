//! The one error type. Every variant carries what was found, what was expected and the way out,
//! so that a caller can act on it and a user can read it.

use std::fmt;
use std::path::PathBuf;

/// Everything that can go wrong in this crate. A panic is a bug in the crate, never an answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A size or option of the layer that no device could run.
    #[error("{field} is {}, expected {expected}", Brief(found))]
    InvalidConfig {
        /// Name of the field, as in [`MoeConfig`](crate::MoeConfig) or a configuration file.
        field: &'static str,
        /// The value that was given.
        found: String,
        /// The values that are allowed.
        expected: String,
    },
    /// A slice's length does not fit the layer.
    #[error("{tensor} has {found} elements, expected {expected} = {shape}")]
    LengthMismatch {
        /// Name of the tensor or argument.
        tensor: &'static str,
        /// The expected shape, written out.
        shape: String,
        /// Elements expected.
        expected: usize,
        /// Elements found.
        found: usize,
    },
    /// A value that is NaN or infinite where only numbers make sense.
    #[error("{tensor} holds {value} at element {index}; only finite values are accepted")]
    NonFinite {
        /// Name of the tensor or argument.
        tensor: String,
        /// Position of the first such value, in elements.
        index: usize,
        /// The value itself.
        value: f32,
    },
    /// Finite inputs whose router logits overflowed or became NaN.
    #[error(
        "the router logits of {num_tokens} token(s) are NaN or infinite, so their expert weights mean nothing; \
         scale the activations or the router weights down"
    )]
    NonFiniteLogits {
        /// Tokens concerned.
        num_tokens: u32,
    },
    /// A weight that the chosen storage format cannot hold.
    #[error(
        "{tensor} holds {value} at element {index}, which {format} cannot represent; use a format with wider scales, such as bf16 or f32"
    )]
    NotRepresentable {
        /// Name of the tensor.
        tensor: String,
        /// Position of the first such value, in elements.
        index: usize,
        /// The value itself.
        value: f32,
        /// The storage format.
        format: String,
    },
    /// What the run needs is more than the adapter allows.
    #[error("{what} needs {required}, the device allows {available}; {hint}")]
    LimitExceeded {
        /// The resource.
        what: String,
        /// How much the run needs.
        required: u64,
        /// How much there is.
        available: u64,
        /// What the caller can do about it.
        hint: &'static str,
    },
    /// No device answers to the request.
    #[error("no device matches {wanted:?}; found: {}; the embedded CPU engine is always there as \"cpu\"", list(found))]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// The adapters that exist, with their indices.
        found: Vec<String>,
    },
    /// The driver refused to open the device.
    #[error("{adapter} could not be opened: {message}")]
    DeviceRequest {
        /// The adapter's name.
        adapter: String,
        /// The driver's words.
        message: String,
    },
    /// WGSL that the driver refused: a bug in this crate or in the driver.
    #[error("kernel {kernel} did not compile:\n{message}")]
    Kernel {
        /// The kernel's label.
        kernel: String,
        /// The compiler's words.
        message: String,
    },
    /// The device ran out of memory.
    #[error("out of device memory while {during}; use fewer tokens, smaller weights or another device")]
    OutOfMemory {
        /// What was going on.
        during: String,
    },
    /// The device reported an error that is none of the above.
    #[error("the device reported an error while {during}: {message}")]
    Device {
        /// What was going on.
        during: String,
        /// The device's words.
        message: String,
    },
    /// The device is gone: driver reset, removal or a crash. Nothing on it survives.
    #[error("the device was lost ({message}); open a new context and build the layer again")]
    DeviceLost {
        /// The driver's words.
        message: String,
    },
    /// A wait ran out of time.
    #[error("{what} did not finish within {seconds} s")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// The deadline, in seconds.
        seconds: u64,
    },
    /// Something that only a GPU context can do was asked of the CPU engine, or the like.
    #[error("{} is not supported {}; {}", Brief(what), Brief(by), Brief(hint))]
    Unsupported {
        /// What was asked for.
        what: String,
        /// Who cannot do it.
        by: String,
        /// What would work.
        hint: String,
    },
    /// Reading or writing a file failed.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A file whose content cannot be what it claims to be.
    #[error("{path}: {}", Brief(message), path = path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, what was expected, and where.
        message: String,
    },
    /// A tensor that the file should hold.
    #[error("{path}: no tensor \"{}\"; {}", Brief(tensor), Brief(hint), path = path.display())]
    MissingTensor {
        /// The file.
        path: PathBuf,
        /// The name that was looked for.
        tensor: String,
        /// Names that are there, or what to do.
        hint: String,
    },
    /// A tensor whose shape or type is not what the configuration says.
    #[error("{path}: tensor {tensor:?} is {}, expected {}", Brief(found), Brief(expected), path = path.display())]
    BadTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Its type and shape, or what is wrong with it.
        found: String,
        /// What the configuration asks for.
        expected: String,
    },
    /// A tuning file that is not used: damaged, or made by or for something else.
    #[error(
        "{path}: {what} is {}, expected {expected}; `wgmoe tune` makes a new one",
        Brief(found),
        path = path.display()
    )]
    BadTuning {
        /// The file.
        path: PathBuf,
        /// What of it.
        what: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A trace of routing that cannot be used.
    #[error(
        "{path}: {what} is {}, expected {expected}; `wgmoe inspect --save-trace` makes a trace",
        Brief(found),
        path = path.display()
    )]
    BadTrace {
        /// The file.
        path: PathBuf,
        /// What of it.
        what: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
    /// A file of results that cannot be read: damaged, of a newer schema, or something else altogether.
    #[error("{path}: {} is {}, expected {expected}", Brief(what), Brief(found), path = path.display())]
    BadResults {
        /// The file.
        path: PathBuf,
        /// What of it.
        what: String,
        /// What it is.
        found: String,
        /// What it should be, and the way out.
        expected: String,
    },
    /// A family description that cannot be used.
    #[error("{path}: {}", Brief(message), path = path.display())]
    BadFamily {
        /// The TOML file, or the built-in one's name.
        path: PathBuf,
        /// What is wrong and in which line.
        message: String,
    },
}

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Words that may have come from a file: those of a hostile one can be as long as itself, or steer a terminal. What is
/// too long loses its middle, as its end is often the way out.
struct Brief<'a>(&'a str);

impl fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// Characters. The longest message of our own lists every family.
        const START: usize = 1200;
        const END: usize = 600;
        let write = |f: &mut fmt::Formatter<'_>, c: char| match c {
            '\n' => f.write_str("\n"),
            c if c.is_control() => write!(f, "{}", c.escape_default()),
            c => fmt::Write::write_char(f, c),
        };
        let mut left = self.0.chars();
        left.by_ref().take(START).try_for_each(|c| write(f, c))?;
        let left = left.as_str();
        if left.chars().nth(END).is_none() {
            return left.chars().try_for_each(|c| write(f, c));
        }
        let end = left.char_indices().rev().nth(END - 1).map_or(0, |(at, _)| at);
        write!(f, " ({end} bytes left out) ")?;
        left[end..].chars().try_for_each(|c| write(f, c))
    }
}

/// What an error says, without most of what it quotes from a file.
pub(crate) fn brief(error: impl fmt::Display) -> String {
    Brief(&error.to_string()).to_string()
}

fn list(names: &[String]) -> String {
    if names.is_empty() { "no adapters at all".to_owned() } else { names.join(", ") }
}

impl Error {
    /// A configuration error, in one line at the call site.
    pub(crate) fn config(field: &'static str, found: impl ToString, expected: impl Into<String>) -> Self {
        Error::InvalidConfig { field, found: found.to_string(), expected: expected.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_files_are_cut_and_cannot_steer_a_terminal() {
        let of = |text: &str| Brief(text).to_string();
        for text in ["", "plain", "Wörter", &"é".repeat(1800), "two\nlines"] {
            assert_eq!(of(text), text);
        }
        assert_eq!(of("\u{1b}[31m\0\r\u{9b}"), "\\u{1b}[31m\\u{0}\\r\\u{9b}");
        let long = of(&format!("start {} end", "é".repeat(1 << 20)));
        assert!(long.starts_with("start é") && long.ends_with("é end") && long.len() < 4000, "{}", long.len());
        assert!(long.contains("bytes left out"));
        let message = |message: &str| Error::BadFile { path: "f".into(), message: message.to_owned() }.to_string();
        assert!(message(&"x".repeat(1 << 20)).len() < 2000);
        assert_eq!(message("short"), "f: short");
    }
}
