//! A file that gets its name when it is complete.

use std::fs::File;
use std::io::{self, Seek, Write};
use std::path::Path;

use tempfile::{NamedTempFile, TempPath};

/// Without any name where the system has such files (`O_TMPFILE`): then nothing is left of it,
/// whatever ends this process, unless that is just replacing another file. Elsewhere it has a
/// temporary name, which is removed unless the process is killed.
#[derive(Debug)]
pub(crate) struct NewFile<'a> {
    file: File,
    name: Option<TempPath>,
    path: &'a Path,
    parent: &'a Path,
}

impl<'a> NewFile<'a> {
    /// Creates the file that will be at `path`. Only its owner can read it.
    pub(crate) fn create(path: &'a Path) -> io::Result<NewFile<'a>> {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let (file, name) = match unnamed::create(parent) {
            Some(file) => (file, None),
            None => {
                let (file, name) = NamedTempFile::new_in(parent)?.into_parts();
                (file, Some(name))
            }
        };
        Ok(NewFile {
            file,
            name,
            path,
            parent,
        })
    }

    /// Gives the file its name, in place of a file that has it.
    pub(crate) fn persist(mut self) -> io::Result<()> {
        let name = match self.name.take() {
            Some(name) => name,
            None => match unnamed::link(&self.file, self.path) {
                Ok(()) => return Ok(()),
                // Only a name can be renamed over another.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    tempfile::Builder::new()
                        .make_in(self.parent, |name| unnamed::link(&self.file, name))?
                        .into_temp_path()
                }
                // Some systems create such a file, and allow no link to it.
                Err(_) => self.copy()?,
            },
        };
        name.persist(self.path)?;
        Ok(())
    }

    fn copy(&mut self) -> io::Result<TempPath> {
        let mut named = NamedTempFile::new_in(self.parent)?;
        self.file.rewind()?;
        io::copy(&mut self.file, &mut named)?;
        Ok(named.into_temp_path())
    }
}

impl Write for NewFile<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(target_os = "linux")]
mod unnamed {
    use std::fs::File;
    use std::io;
    use std::os::fd::AsRawFd;
    use std::path::Path;

    use rustix::fs::{AtFlags, CWD, Mode, OFlags};

    /// `None` where the file system has no such files.
    pub(super) fn create(parent: &Path) -> Option<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(parent, flags, Mode::RUSR | Mode::WUSR);
        file.ok().map(File::from)
    }

    /// The way that open(2) names: another needs a capability.
    pub(super) fn link(file: &File, name: &Path) -> io::Result<()> {
        let there = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = AtFlags::SYMLINK_FOLLOW;
        Ok(rustix::fs::linkat(CWD, there, CWD, name, flags)?)
    }
}

#[cfg(not(target_os = "linux"))]
mod unnamed {
    use std::fs::File;
    use std::io;
    use std::path::Path;

    pub(super) fn create(_parent: &Path) -> Option<File> {
        None
    }

    pub(super) fn link(_file: &File, _name: &Path) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_cannot_be_linked_is_copied() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = dir.path().join("new");
        let mut new = NewFile::create(&path).unwrap();
        new.write_all(b"payload").unwrap();
        new.name = Some(new.copy().unwrap());
        new.persist().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"payload");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
