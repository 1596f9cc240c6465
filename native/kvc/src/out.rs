//! Standard output.

use std::io::{self, BufWriter, ErrorKind, IsTerminal, Write};

use anyhow::Context;

/// Standard output, buffered. If its reader closes it (`kvc ls DIR | head -1`), later writes are
/// dropped without an error, so that a command with work left, such as a check, still does it.
pub(crate) struct Out {
    to: BufWriter<Box<dyn Write>>,
    closed: bool,
}

impl Out {
    /// For text: strips colours unless they are wanted.
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

    /// Whether the reader has closed it.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether it is a terminal.
    pub(crate) fn is_terminal() -> bool {
        io::stdout().is_terminal()
    }

    /// Flushes the buffer. Dropping it would hide the error.
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
