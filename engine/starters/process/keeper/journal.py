"""The keeper's journal: one record a line, each with its checksum. What nobody has acknowledged is found there again.

A record that was written survives the keeper's SIGKILL; one that was flushed survives a power cut. A line that is torn
or damaged says nothing: what it said is not known, which is never wrong.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Iterable
from typing import Any, NoReturn

from .kernel import close_from, end_with_parent

Record = dict[str, Any]
"""`id` names the container; the other fields are added to what is known of it, and `forgotten` ends that."""
_NAME, _NEW_NAME = "journal", ".tmp-journal"
_LONGEST_LINE = 1 << 16
_WORTH_REWRITING = 1 << 20
"""Bytes."""
_FIRST_FREE = 10
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


class Journal:
    """The journal in the directory behind a descriptor. It has one writer: whoever holds the keeper's lock."""

    def __init__(self, directory: int, world: str) -> None:
        """`world` is where pids mean what they mean now: the boot and the pid namespace."""
        self._directory = directory
        self._world = world
        self._file = os.open(_NAME, _FLAGS, 0o600, dir_fd=directory)
        self._unwritten: list[bytes] = []
        self._is_renamed = False
        self._worth = _WORTH_REWRITING

    def load(self) -> dict[str, Record]:
        """Return what is known of each container; of another world, only how they ended."""
        known: dict[str, Record] = {}
        world = ""
        with open(os.dup(self._file), "rb") as file:
            file.seek(0)
            while line := file.readline(_LONGEST_LINE):
                record = _decode(line)
                if record is None:
                    continue
                if "world" in record:
                    world = record["world"]
                    continue
                # A record with a pid says all of a process: what was said of one before it, with that id, is over.
                before = {} if "pid" in record else known.pop(record["id"], {})
                known[record["id"]] = {"world": world} | before | record
                if record.get("forgotten"):
                    del known[record["id"]]
        # A torn last line must not swallow the next record.
        self._unwritten.append(b"\n")
        self.append({"world": self._world})
        return {key: each for key, each in known.items() if each["world"] == self._world or "end" in each}

    def append(self, *records: Record) -> None:
        """Write records; on a disk that refuses they wait in memory for the next time. See `is_written`."""
        self._unwritten += map(_encode, records)
        self.write()

    @property
    def is_written(self) -> bool:
        """True if no record waits in memory."""
        return not self._unwritten

    def write(self) -> None:
        """Write what waits in memory, if the disk takes it."""
        if not self._unwritten:
            return
        data = b"".join(self._unwritten)
        try:
            written = os.write(self._file, data)
        except OSError:
            return
        # What was cut short is written again, whole, on a line of its own.
        self._unwritten = [] if written == len(data) else [b"\n", data]

    def begin_flush(self) -> int:
        """Flush in a child, for a disk may take its time; return the child's pid. Raises OSError."""
        pid = os.fork()
        if not pid:
            self._flush_and_exit()
        return pid

    def _flush_and_exit(self) -> NoReturn:
        try:
            end_with_parent()
            high = [fcntl.fcntl(each, fcntl.F_DUPFD, _FIRST_FREE) for each in (self._file, self._directory)]
            file, directory = (os.dup2(each, number) for number, each in enumerate(high))
            close_from(2)  # a copy of a gate's pipe would keep that gate open
            os.fdatasync(file)
            if self._is_renamed:
                os.fsync(os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory))
            os._exit(0)
        finally:
            os._exit(1)

    def has_grown(self) -> bool:
        """Say whether it may be worth rewriting: to find out for sure takes as long as what is known is long."""
        return os.fstat(self._file).st_size >= self._worth

    def rewrite(self, records: Iterable[Record]) -> None:
        """Replace the journal by these records alone, if it has grown enough to be worth it. Raises OSError.

        Nothing is flushed: only to be called while no record has to survive a power cut.
        """
        if not self.has_grown():
            return
        lines = [_encode({"world": self._world}), *map(_encode, records)]
        self._worth = max(_WORTH_REWRITING, 4 * sum(map(len, lines)))
        if not self.has_grown():
            return
        flags = _FLAGS | os.O_TRUNC
        file = os.open(_NEW_NAME, flags, 0o600, dir_fd=self._directory)
        try:
            data = b"".join(lines)
            if os.write(file, data) < len(data):
                raise OSError("the disk is full")
            os.rename(_NEW_NAME, _NAME, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            os.close(file)
            raise
        os.close(self._file)
        self._file, self._unwritten, self._is_renamed = file, [], True


def _encode(record: Record) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _decode(line: bytes) -> Record | None:
    """Return the record of a line, None if it is torn, damaged or too long."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    record = json.loads(text)
    return record if isinstance(record, dict) and ("id" in record or "world" in record) else None
