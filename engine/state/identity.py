"""Which directory this is: a copy of a state directory is told from the original, and from one that was moved.

Its path does not tell: a directory can be renamed, mounted elsewhere, or copied with all that is in it. So it has a
random id, and its device, inode and path are recorded with that. Where these differ, either the directory was moved to
another file system, or it is a copy. It is a copy if the original is still there: at its recorded path, renamed beside
it or beside us, or anywhere that a keeper or a conmon looks after its containers.
"""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice

import msgspec
from msgspec.structs import replace

from limpet.engine.state.durable import write_file
from limpet.engine.state.names import IDENTITY
from limpet.engine.state.served import find_served
from limpet.engine.state.surroundings import may_access
from limpet.recovery.files import find_small_file
from limpet.schema.decoders import make_converter

_RECORD_BYTES = 1 << 16
_MOST_NEIGHBOURS = 10_000


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The record in a state directory that says which one it is."""

    id: str
    """Random; a copy gets another one."""
    device: int
    inode: int
    path: str
    original: str = ""
    """Where the directory was that this one is a copy of; empty if it is none."""
    settled_nodes: tuple[str, ...] = ()
    """In a copy: the nodes whose containers are known to be the original's."""


_to_identity = make_converter(Identity)


def read_identity(path: str) -> Identity | None:
    """Return the record in the state directory `path`, None if there is none, or no valid one.

    Raises OSError if it cannot be read now: a copy whose record is not seen would be taken for its original.
    """
    data = find_small_file(os.path.join(path, IDENTITY), _RECORD_BYTES)
    try:
        return None if data is None else _to_identity(json.loads(data))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None


def find_original(path: str, node: str) -> str:
    """Return the path of the original if this is a copy of which `node` has not been told yet; else nothing.

    Writes nothing. Raises OSError if the directory itself cannot be looked at.
    """
    record = read_identity(path)
    if record is None:
        return ""
    here = os.stat(path)
    if (here.st_dev, here.st_ino) == (record.device, record.inode):
        return record.original if record.original and node not in record.settled_nodes else ""
    found = next((other for other in _find_candidates(path, record) if _is_original(other, record, here)), "")
    return os.path.realpath(found) if found.startswith("/proc/") else found


def make_copy(path: str, original: str) -> Identity:
    """Record, durably, that the directory is a copy of another one, of which no node was told yet. Raises OSError."""
    here = os.stat(path)
    made = Identity(id=os.urandom(16).hex(), device=here.st_dev, inode=here.st_ino, path=path, original=original)
    _write(path, made)
    return made


def settle_identity(path: str, node: str, original: str) -> None:
    """Record, durably, which directory this is. `original` is what `find_original` returned. Raises OSError."""
    old, here = read_identity(path), os.stat(path)
    new = old
    if new is None or (original and original != new.original):
        new = Identity(id=os.urandom(16).hex(), device=0, inode=0, path=path, original=original)
    if original:
        new = replace(new, settled_nodes=(*new.settled_nodes, node))
    new = replace(new, device=here.st_dev, inode=here.st_ino, path=path)
    if new != old:
        _write(path, new)


def _write(path: str, record: Identity) -> None:
    # Not by msgspec: a path may hold bytes that are no UTF-8, which json escapes.
    write_file(os.path.join(path, IDENTITY), json.dumps(msgspec.to_builtins(record)).encode())


def _find_candidates(path: str, record: Identity) -> Iterator[str]:
    """Yield the paths at which the recorded directory may be."""
    yield record.path
    for parent in dict.fromkeys((os.path.dirname(record.path), os.path.dirname(path))):
        try:
            with os.scandir(parent) as entries:
                yield from (each.path for each in islice(entries, _MOST_NEIGHBOURS) if each.inode() == record.inode)
        except (FileNotFoundError, NotADirectoryError, PermissionError):  # not there any more, or not ours to read
            continue
    yield from find_served(record.device, record.inode)


def _is_original(path: str, record: Identity, here: os.stat_result) -> bool:
    try:
        found = os.lstat(path)
    except OSError:
        return False
    if not stat.S_ISDIR(found.st_mode) or os.path.samestat(found, here):
        return False
    other = None
    with suppress(PermissionError):
        other = read_identity(path)
    if other is not None:
        return other.id == record.id
    # One that we may not read is taken for it where its numbers are the recorded ones.
    is_readable = may_access(path, os.R_OK | os.X_OK)
    return (found.st_dev, found.st_ino) == (record.device, record.inode) and not is_readable
