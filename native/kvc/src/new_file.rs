//! A file that gets its name when it is complete.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use tempfile::{NamedTempFile, TempPath};

/// Without any name where the system allows that (`O_TMPFILE`): then nothing is left of it,
/// whatever ends this process. Elsewhere it has a temporary name, which is removed unless the
/// process is killed.
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
    pub(crate) fn persist(self) -> io::Result<()> {
        // Only a name can be renamed over another.
        let name = match self.name {
            Some(name) => name,
            None => tempfile::Builder::new()
                .make_in(self.parent, |name| unnamed::link(&self.file, name))?
                .into_temp_path(),
        };
        name.persist(self.path)?;
        Ok(())
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

    /// `None` where the file system has no such files, or where they could not get a name later.
    pub(super) fn create(parent: &Path) -> Option<File> {
        let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(parent, flags, Mode::RUSR | Mode::WUSR).ok()?;
        let file = File::from(file);
        Path::new(&name_of(&file)).exists().then_some(file)
    }

    pub(super) fn link(file: &File, name: &Path) -> io::Result<()> {
        let flags = AtFlags::SYMLINK_FOLLOW;
        Ok(rustix::fs::linkat(CWD, name_of(file), CWD, name, flags)?)
    }

    /// The way that open(2) names: another needs a capability.
    fn name_of(file: &File) -> String {
        format!("/proc/self/fd/{}", file.as_raw_fd())
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
