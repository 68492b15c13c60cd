//! A tuning as a file that a person can read, and that nobody has to trust: what is read is checked like what a caller
//! passes, and a file that is damaged or of something else is a typed error.

use super::{Entry, Identity, Tuning};
use crate::atomic_file::write_atomically;
use crate::context::Context;
use crate::error::{Error, Result, brief};
use crate::gpu::DeviceInfo;
use crate::plan::tuned;
use crate::small_file::{self, Unreadable};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Version of the format.
pub const SCHEMA: u32 = 1;
/// A tuning of every preset at every batch size is a tenth of this.
const MOST_BYTES: u64 = 1 << 20;

/// What is written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    schema: u32,
    device: Identity,
    date: String,
    entries: Vec<Entry>,
}

/// What is looked at first: files of another schema or version may have other fields.
#[derive(Deserialize)]
struct Head {
    schema: u32,
}

#[derive(Deserialize)]
struct DeviceHead {
    device: Identity,
}

impl Tuning {
    /// The file of this device in the user's cache folder: `$XDG_CACHE_HOME/wgmoe` or `~/.cache/wgmoe` on Linux,
    /// `~/Library/Caches/wgmoe` on macOS, `%LOCALAPPDATA%\wgmoe` on Windows. `None`: there is no such folder. The file
    /// need not exist.
    ///
    /// The name has the adapter and its backend, not the driver's version: a tuning of an older driver is found, and
    /// refused with a reason.
    pub fn stored_path(device: &DeviceInfo) -> Option<PathBuf> {
        let mut slug = String::new();
        for c in format!("{} {}", device.name, device.backend).chars() {
            if c.is_ascii_alphanumeric() {
                slug.push(c.to_ascii_lowercase());
            } else if !slug.ends_with('-') && !slug.is_empty() {
                slug.push('-');
            }
        }
        slug.truncate(48);
        let hash = fnv([&device.name, &device.backend]);
        Some(dirs::cache_dir()?.join("wgmoe").join(format!("{}-{hash:016x}.json", slug.trim_end_matches('-'))))
    }

    /// What `wgmoe tune` stored for the context's device. `None`: nothing, or the CPU engine.
    ///
    /// # Errors
    /// Those of [`Tuning::load`].
    pub fn for_context(context: &Context) -> Result<Option<Tuning>> {
        let path = context.gpu().and_then(|_| Self::stored_path(context.device()));
        match path {
            Some(path) if path.exists() => Self::load(&path, context).map(Some),
            _ => Ok(None),
        }
    }

    /// The tuning in `path`, made on the context's device by this version of wgmoe.
    ///
    /// # Errors
    /// [`Error::BadTuning`] for a file that is damaged, too large, of another schema, device, driver or version, or with
    /// a choice that the context's device cannot run; [`Error::Io`]; [`Error::Unsupported`] for the CPU engine.
    pub fn load(path: &Path, context: &Context) -> Result<Tuning> {
        let Some(gpu) = context.gpu() else { return Err(crate::layer::nothing_to_tune()) };
        let text = read(path)?;
        let bad = |what: &str, found: String, expected: String| Error::BadTuning {
            path: path.to_owned(),
            what: what.to_owned(),
            found,
            expected,
        };
        let damaged = |error: serde_json::Error| {
            bad("the content", format!("damaged ({})", brief(error)), "what `wgmoe tune` writes".into())
        };
        let head: Head = serde_json::from_slice(&text).map_err(damaged)?;
        if head.schema != SCHEMA {
            return Err(bad("the schema", head.schema.to_string(), SCHEMA.to_string()));
        }
        let DeviceHead { device } = serde_json::from_slice(&text).map_err(damaged)?;
        if let Some((what, found, expected)) = device.difference(&Identity::of(context.device())) {
            return Err(bad(what, format!("{found:?}"), format!("{expected:?}")));
        }
        let stored: Stored = serde_json::from_slice(&text).map_err(damaged)?;
        if !is_date(&stored.date) {
            return Err(bad("the date", format!("{:?}", stored.date), "a date such as 2026-01-31".to_owned()));
        }
        for (index, entry) in stored.entries.iter().enumerate() {
            let wrong = |found: String, expected: &str| bad(&format!("entry {index}"), found, expected.to_owned());
            if let Err(error) = tuned::check(entry.shape, entry.chosen.choice, gpu.profile()) {
                return Err(wrong(format!("not possible here ({error})"), "a choice that this device can run"));
            }
            let times = [Some(entry.chosen), entry.default, entry.runner_up];
            if let Some(time) = times.iter().flatten().find(|time| !(time.median_s.is_finite() && time.median_s > 0.0))
            {
                return Err(wrong(format!("a time of {} s", time.median_s), "one above zero"));
            }
        }
        let num_entries = stored.entries.len();
        let tuning = Tuning::new(stored.device, stored.date, stored.entries);
        if tuning.entries.len() != num_entries {
            let found = format!("{} for {} classes", num_entries, tuning.entries.len());
            return Err(bad("the number of entries", found, "one for each class and format".to_owned()));
        }
        Ok(tuning)
    }

    /// Writes the tuning to `path`, making its folder if need be. A reader finds the old file or the new one, never half
    /// of either.
    pub fn save(&self, path: &Path) -> Result<()> {
        let io = |source| Error::Io { path: path.to_owned(), source };
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(io)?;
        }
        let stored = Stored {
            schema: SCHEMA,
            device: self.device.clone(),
            date: self.date.clone(),
            entries: self.entries.clone(),
        };
        let mut text = serde_json::to_vec_pretty(&stored).map_err(|error| io(error.into()))?;
        text.push(b'\n');
        write_atomically(path, &text)
    }
}

/// A regular file of a sensible size, whole.
fn read(path: &Path) -> Result<Vec<u8>> {
    let bad = |what: &str, found: String, expected: String| Error::BadTuning {
        path: path.to_owned(),
        what: what.to_owned(),
        found,
        expected,
    };
    small_file::read(path, MOST_BYTES).map_err(|reason| match reason {
        Unreadable::NotPlain => bad("it", "no regular file".to_owned(), "what `wgmoe tune` writes".to_owned()),
        Unreadable::TooLarge => {
            bad("the size", format!("more than {MOST_BYTES} bytes"), format!("at most {MOST_BYTES} bytes"))
        }
        Unreadable::Io(source) => Error::Io { path: path.to_owned(), source },
    })
}

/// FNV-1a (Fowler, Noll and Vo) over texts and the ends between them: the same on every machine and in every release.
fn fnv(texts: [&str; 2]) -> u64 {
    let bytes = texts.iter().flat_map(|text| text.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// Today, in UTC, as 2026-01-31.
pub(super) fn today() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    date_of(since.as_secs() / 86_400)
}

/// Days since 1970-01-01 as a date of the Gregorian calendar, whose leap years repeat every 400 years.
pub(crate) fn date_of(mut days: u64) -> String {
    let is_leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let mut year = 1970;
    while days >= 365 + u64::from(is_leap(year)) {
        days -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let mut month = 1;
    for length in [31, 28 + u64::from(is_leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}", days + 1)
}

/// Looks like a date, so that it can be printed.
fn is_date(text: &str) -> bool {
    text.len() == 10
        && text
            .bytes()
            .enumerate()
            .all(|(at, byte)| if at == 4 || at == 7 { byte == b'-' } else { byte.is_ascii_digit() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let days = [(0, "1970-01-01"), (58, "1970-02-28"), (59, "1970-03-01"), (789, "1972-02-29")];
        let later = [(11_016, "2000-02-29"), (11_017, "2000-03-01"), (20_782, "2026-11-25"), (47_541, "2100-03-01")];
        for (day, date) in days.into_iter().chain(later) {
            assert_eq!(date_of(day), date);
            assert!(is_date(date));
        }
        assert!(is_date(&today()) && today().as_str() > "2026");
        for wrong in ["", "2026-1-31", "2026-01-311", "2026/01/31", "\u{1b}[31m26-01", "20260-1-31"] {
            assert!(!is_date(wrong), "{wrong}");
        }
    }

    #[test]
    fn file_names_are_readable_and_differ() {
        let device = |name: &str, backend: &str| DeviceInfo {
            name: name.to_owned(),
            backend: backend.to_owned(),
            ..DeviceInfo::default()
        };
        let Some(path) = Tuning::stored_path(&device("llvmpipe (LLVM 15.0.6, 256 bits)", "vulkan")) else { return };
        let name = |path: &Path| path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
        assert!(name(&path).starts_with("llvmpipe-llvm-15-0-6-256-bits-vulkan-") && name(&path).ends_with(".json"));
        let all =
            [("a b", "vulkan"), ("a-b", "vulkan"), ("a b", "dx12"), ("a", "b vulkan"), ("", ""), ("../../x", "\0")];
        let mut names: Vec<String> = all
            .iter()
            .filter_map(|(name, backend)| Tuning::stored_path(&device(name, backend)))
            .map(|path| name(&path))
            .collect();
        assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-.".contains(&b))));
        assert!(names.iter().all(|name| !name.contains("..")), "{names:?}");
        names.sort();
        names.dedup();
        assert_eq!(names.len(), all.len());
        let long = Tuning::stored_path(&device(&"x".repeat(4000), "vulkan")).map(|path| name(&path).len());
        assert!(long.is_some_and(|length| length < 80));
    }
}
