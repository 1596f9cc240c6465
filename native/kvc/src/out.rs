//! Standard output.

use std::io::{self, BufWriter, ErrorKind, IsTerminal, Write};

use anyhow::Context;

/// Standard output, buffered. When the reader has gone (`kvc ls DIR | head -1`), what is written is
/// dropped: that is no error, and who still has work to do, such as a check, goes on with it.
pub(crate) struct Out {
    to: BufWriter<Box<dyn Write>>,
    closed: bool,
}

impl Out {
    /// For text: colours are taken out where they are not wanted.
    pub(crate) fn text() -> Out {
        Out::new(Box::new(anstream::AutoStream::auto(io::stdout())))
    }

    /// For bytes.
    pub(crate) fn bytes() -> Out {
        Out::new(Box::new(io::stdout()))
    }

    fn new(to: Box<dyn Write>) -> Out {
        Out {
            to: BufWriter::new(to),
            closed: false,
        }
    }

    /// Whether nobody reads any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether a person reads it.
    pub(crate) fn is_terminal() -> bool {
        io::stdout().is_terminal()
    }

    /// Writes what is left. Dropped without, an error would go unseen.
    pub(crate) fn finish(&mut self) -> anyhow::Result<()> {
        self.flush().context("standard output")
    }

    fn unless_closed<T>(&mut self, result: io::Result<T>, instead: T) -> io::Result<T> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(instead)
            }
            result => result,
        }
    }
}

impl Write for Out {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.closed {
            return Ok(buf.len());
        }
        let result = self.to.write(buf);
        self.unless_closed(result, buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let result = self.to.flush();
        self.unless_closed(result, ())
    }
}
