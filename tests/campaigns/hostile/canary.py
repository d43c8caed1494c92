"""What lies around the state and must stay as it is: contents, modes, owners, times and links."""

import os
import socket
import stat
from pathlib import Path
from typing import Any

AROUND = "around"


def make_canary(place: Path) -> None:
    """Make the tree that nobody may touch, in `place`/around."""
    around = place / AROUND
    (around / "directory" / "deep").mkdir(parents=True)
    (around / "file").write_bytes(b"do not touch\n")
    (around / "directory" / "deep" / "file").write_bytes(b"nor this\n")
    (around / "empty").mkdir(mode=0o755)
    (around / "private").write_bytes(b"secret")
    (around / "private").chmod(0o640)
    (around / "link").symlink_to("file")
    (around / "dangling").symlink_to("nowhere")
    os.mkfifo(around / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        descriptor = os.open(around, os.O_RDONLY)
        try:
            server.bind(f"/proc/self/fd/{descriptor}/socket")  # the path of a socket may not be long
        finally:
            os.close(descriptor)
    (around / "store.db").write_bytes(b"not a database")


def photograph(place: Path, *, apart_from: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Return all that can be seen of the tree at `place`, without the entries `apart_from` at its top."""
    seen: dict[str, Any] = {}
    pending = [place / name for name in os.listdir(place) if name not in apart_from]
    while pending:
        path = pending.pop()
        found = path.lstat()
        content: Any = None
        if stat.S_ISLNK(found.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(found.st_mode):
            content = path.read_bytes()
        elif stat.S_ISDIR(found.st_mode):
            content = sorted(os.listdir(path))
            pending += [path / name for name in content]
        seen[str(path)] = (found.st_mode, found.st_uid, found.st_gid, found.st_nlink, found.st_mtime_ns, content)
    return seen


def differences(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Say what is not as it was, "" if nothing."""
    changed = [
        f"{path}: {before.get(path, 'not there')} is now {after.get(path, 'not there')}"
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    ]
    return "; ".join(changed)[:600]
