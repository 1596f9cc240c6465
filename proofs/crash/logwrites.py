"""Reads the log of a dm-log-writes device.

The log begins with a super block. Each entry has a sector of its own, with the text of a mark in
it, and then the data. Everything is little-endian.

Where a write stands in the log says when it was safe, not when it was made: a write that no flush
has confirmed yet is held back until the next flush has ended. So between two flushes stand, at
their own time, marks and writes that go past the disk's cache (FUA), and, right before the second,
the writes that it made safe: of those a power cut before its end may leave any or none.
"""
import struct

SECTOR = 512
SUPER = struct.Struct("<QQQI")    # magic, version, entries, sector size
ENTRY = struct.Struct("<QQQQ")    # sector, sectors, flags, bytes of a mark's text
MAGIC = 0x6A736677736872
FLUSH, FUA, DISCARD, MARK = 1, 2, 4, 8


class Entry:
    def __init__(self, sector, sectors, flags, text, at):
        self.sector, self.sectors, self.flags, self.text = sector, sectors, flags, text
        self.at = at              # of the data in the log

    def data(self, log):
        """Its bytes; a discard has none, and leaves what was there."""
        return b"" if self.flags & DISCARD else log.pread(self.sectors * SECTOR, self.at)


class Log:
    def __init__(self, path):
        self.file = open(path, "rb", buffering=0)
        magic, version, self.count, sector = SUPER.unpack(self.pread(SUPER.size, 0))
        if (magic, version, sector) != (MAGIC, 1, SECTOR):
            raise ValueError("not a log of version 1 with sectors of 512 bytes")

    def pread(self, size, at):
        self.file.seek(at)
        data = b""
        while len(data) < size:
            more = self.file.read(size - len(data))
            if not more:
                raise ValueError("the log ends early")
            data += more
        return data

    def __iter__(self):
        at = SECTOR
        for _ in range(self.count):
            block = self.pread(SECTOR, at)
            sector, sectors, flags, length = ENTRY.unpack_from(block)
            text = block[ENTRY.size:ENTRY.size + length].rstrip(b"\0").decode()
            at += SECTOR
            yield Entry(sector, sectors, flags, text, at)
            if not flags & DISCARD:
                at += sectors * SECTOR
