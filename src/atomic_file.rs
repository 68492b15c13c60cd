//! A file that appears under its name complete or not at all.

use crate::error::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Written under a temporary name beside `path`, until [`AtomicFile::commit`]. Dropped without it, nothing is left.
pub(crate) struct AtomicFile {
    path: PathBuf,
    temporary: PathBuf,
    file: Option<BufWriter<File>>,
}

impl AtomicFile {
    /// # Errors
    /// [`Error::Io`], as for all of its functions.
    pub fn create(path: &Path) -> Result<Self> {
        let temporary = temporary_name(path);
        let file = File::create(&temporary).map_err(|source| Error::Io { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), temporary, file: Some(BufWriter::with_capacity(1 << 20, file)) })
    }

    /// Appends.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let written = self.file.as_mut().map_or(Ok(()), |file| file.write_all(bytes));
        written.map_err(|source| Error::Io { path: self.path.clone(), source })
    }

    /// Gives the file its name, whatever had it before.
    pub fn commit(mut self) -> Result<()> {
        let io = |source| Error::Io { path: self.path.clone(), source };
        if let Some(mut file) = self.file.take() {
            file.flush().map_err(io)?;
            file.get_ref().sync_all().map_err(io)?;
        }
        std::fs::rename(&self.temporary, &self.path).map_err(io)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        // After a commit there is none. Otherwise the error before this is the one to tell.
        let _ = std::fs::remove_file(&self.temporary);
    }
}

/// All of a file at once.
pub(crate) fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = AtomicFile::create(path)?;
    file.write(content)?;
    file.commit()
}

/// A name beside `path`, so that renaming stays on one file system, and with the process in it, so that two runs
/// do not write to one file.
pub(crate) fn temporary_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_there_complete_or_not_at_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("f");
        let entries = || std::fs::read_dir(folder.path()).expect("it is there").count();
        let mut dropped = AtomicFile::create(&path).expect("it can be written");
        dropped.write(b"half").expect("it can be written");
        assert_eq!((path.exists(), entries()), (false, 1));
        drop(dropped);
        assert_eq!(entries(), 0);
        write_atomically(&path, b"old").expect("it can be written");
        write_atomically(&path, b"new").expect("it can be replaced");
        assert_eq!((std::fs::read(&path).expect("it is there"), entries()), (b"new".to_vec(), 1));
        let nowhere = folder.path().join("no/such/folder");
        assert!(matches!(write_atomically(&nowhere, b""), Err(Error::Io { path, .. }) if path == nowhere));
        // A folder cannot be replaced by a file, and keeps its content.
        std::fs::remove_file(&path).expect("it is there");
        std::fs::create_dir(&path).expect("the name is free");
        assert!(write_atomically(&path, b"file").is_err());
        assert_eq!(entries(), 1);
    }
}
