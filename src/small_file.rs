//! A file that is read whole, as all are but those of tensors: plain, and of a size that was expected.

use crate::error::Error;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Why a file was not read.
#[derive(Debug)]
pub(crate) enum Unreadable {
    /// A folder, a pipe or a device.
    NotPlain,
    /// It has more bytes than are accepted.
    TooLarge,
    /// The system's words.
    Io(io::Error),
}

impl Unreadable {
    /// As an error of a file; `what` it was expected to be.
    pub fn bad_file(self, path: &Path, limit: u64, what: &str) -> Error {
        let bad = |message| Error::BadFile { path: path.to_owned(), message };
        match self {
            Unreadable::NotPlain => bad(format!("no plain file, expected {what}")),
            Unreadable::TooLarge => bad(format!("more than {limit} bytes, expected {what}")),
            Unreadable::Io(source) => Error::Io { path: path.to_owned(), source },
        }
    }
}

/// Opens a plain file. Anything else is refused before it: a pipe would wait for somebody to write to it.
pub(crate) fn open(path: &Path) -> Result<(File, u64), Unreadable> {
    let is_plain = |metadata: &std::fs::Metadata| metadata.is_file().then_some(()).ok_or(Unreadable::NotPlain);
    is_plain(&std::fs::metadata(path).map_err(Unreadable::Io)?)?;
    let file = File::open(path).map_err(Unreadable::Io)?;
    // The length of what was opened: the name may have got another file in the meantime.
    let metadata = file.metadata().map_err(Unreadable::Io)?;
    is_plain(&metadata)?;
    Ok((file, metadata.len()))
}

/// All of a file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>, Unreadable> {
    let (file, length) = open(path)?;
    if length > limit {
        return Err(Unreadable::TooLarge);
    }
    let mut bytes = Vec::with_capacity(length as usize);
    // A file may grow, and some have more than they say.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Unreadable::Io)?;
    if bytes.len() as u64 > limit { Err(Unreadable::TooLarge) } else { Ok(bytes) }
}

/// A file that nobody named but another file beside it: if it is a link, then to something in the same folder, or in
/// the store that a hub's cache keeps beside its snapshots. An error is what is wrong, in words.
pub(crate) fn check_neighbour(path: &Path) -> Result<(), String> {
    let is_link = path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Where a link leads nowhere, opening it will say so.
    let (true, Ok(target), Ok(folder)) = (is_link, path.canonicalize(), folder.canonicalize()) else {
        return Ok(());
    };
    let snapshots = folder.parent().filter(|parent| parent.ends_with("snapshots"));
    let store = snapshots.and_then(Path::parent).map(|model| model.join("blobs"));
    if target.starts_with(&folder) || store.is_some_and(|store| target.starts_with(store)) {
        return Ok(());
    }
    let name = path.file_name().unwrap_or_default();
    Err(format!("{name:?} is a link to {target:?}, outside of its folder; put the file itself there"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_files_of_the_expected_size_are_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("f");
        assert!(matches!(read(folder.path(), 10), Err(Unreadable::NotPlain)));
        assert!(matches!(read(&path, 10), Err(Unreadable::Io(_))));
        std::fs::write(&path, b"0123456789").expect("it can be written");
        assert_eq!(read(&path, 10).expect("it fits"), b"0123456789");
        assert!(matches!(read(&path, 9), Err(Unreadable::TooLarge)));
        // Its metadata say that it is empty.
        #[cfg(target_os = "linux")]
        {
            assert!(!read(Path::new("/proc/self/status"), 1 << 20).expect("it is there").is_empty());
            assert!(matches!(read(Path::new("/proc/self/status"), 16), Err(Unreadable::TooLarge)));
            assert!(matches!(read(Path::new("/dev/zero"), 16), Err(Unreadable::NotPlain)));
        }
        let message = Unreadable::TooLarge.bad_file(&path, 9, "a thing").to_string();
        assert!(message.ends_with("f: more than 9 bytes, expected a thing"), "{message}");
    }

    #[cfg(unix)]
    #[test]
    fn links_stay_in_their_folder_or_in_the_cache_of_a_hub() {
        use std::os::unix::fs::symlink;
        let root = tempfile::tempdir().expect("a folder");
        let make = |path: &str| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().expect("it has one")).expect("it can be made");
            path
        };
        let [blob, secret, inside] = ["m/blobs/b", "secret", "m/snapshots/1/real"].map(make);
        for path in [&blob, &secret, &inside] {
            std::fs::write(path, b"x").expect("it can be written");
        }
        let link = |name: &str, target: &str| {
            let path = inside.with_file_name(name);
            symlink(target, &path).expect("it can be made");
            check_neighbour(&path)
        };
        assert_eq!(check_neighbour(&inside), Ok(()));
        assert_eq!(link("blob", "../../blobs/b"), Ok(()));
        assert_eq!(link("sibling", "real"), Ok(()));
        assert_eq!(link("nowhere", "none"), Ok(()), "opening it says so");
        for (name, target) in [("up", "../../../secret"), ("twice", "up"), ("root", "/proc/self/status")] {
            let message = link(name, target).expect_err("it leads out");
            assert!(message.contains(name) && message.contains("outside of its folder"), "{message}");
        }
        // A folder that is none of a hub has no store.
        let path = make("m/other/1/blob");
        symlink("../../blobs/b", &path).expect("it can be made");
        assert!(check_neighbour(&path).is_err());
    }
}
