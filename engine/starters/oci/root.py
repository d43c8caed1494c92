"""The runtime's own directory (`runc --root`): one for each boot, and never one that was copied along.

The runtime keeps pids in it, and signals what it finds by them. After a reboot those are other processes, and in a copy
of a state directory they are the original's. So the directory's name says which one it is: boot, pid namespace, and
device and inode of itself. One whose name is not true of it is never given to a runtime.
"""

import os
import re
import threading
from collections.abc import Sequence

from limpet.engine.state.durable import make_directory, make_one_directory, remove_tree, temporary_path
from limpet.recovery.host import read_boot_id, read_pid_namespace
from limpet.schema.errors import InvalidInputError, StateDirectoryError, quote, quote_path

_KEPT = frozenset({"state.json", "status", "config.json", "exec.fifo"})
"""What runc and crun keep of a container."""
_SAFE = re.compile(r"[A-Za-z0-9_.-]", re.ASCII)
_UNCHANGED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", re.ASCII)
_LONGEST = 180
"""Of the 255 bytes of a file name: a cgroup's name has more in front."""


def to_oci_id(container_id: str) -> str:
    """Return the id that the runtime knows a container by: `+XX` stands for each byte that runc's ids cannot have.

    Raises InvalidInputError for an id that grows too long.
    """
    encoded = container_id if _UNCHANGED.fullmatch(container_id) else _encode(container_id)
    if len(encoded) > _LONGEST:
        raise InvalidInputError(
            f"id {quote(container_id)}: it is too long for an OCI runtime: {len(encoded)} of {_LONGEST} bytes"
        )
    return encoded


def _encode(container_id: str) -> str:
    return "".join(
        chr(byte) if _SAFE.fullmatch(chr(byte)) and (index or byte not in b".-") else f"+{byte:02x}"
        for index, byte in enumerate(container_id.encode())
    )


def from_oci_id(name: str) -> str:
    """Return the id that `to_oci_id` made this of."""
    data = re.sub(rb"\+([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), name.encode())
    return data.decode(errors="replace")


class RuntimeRoot:
    """The runtime's directory below `above`, made when it is first needed."""

    def __init__(self, above: str) -> None:
        self.above = above
        self._path = ""
        self._making = threading.Lock()

    def entries(self) -> Sequence[str]:
        """Return the ids of the containers that the runtime has something of. Raises OSError."""
        path = self.find()
        return [from_oci_id(name) for name in sorted(os.listdir(path))] if path else []

    def entry(self, container_id: str) -> str:
        """Return the runtime's directory of a container, "" if it has none."""
        path = self.find()
        entry = os.path.join(path, to_oci_id(container_id)) if path else ""
        return entry if entry and os.path.isdir(entry) else ""

    def find(self) -> str:
        """Return the directory of this boot, "" if none was made yet."""
        if not self._path and os.path.isdir(self.above):
            names = os.listdir(self.above)
            paths = (os.path.join(self.above, name) for name in names)
            self._path = next((path for path in paths if os.path.basename(path) == _true_name(path)), "")
        return self._path

    def make(self) -> str:
        """Return the directory of this boot, made if there is none. Raises StateDirectoryError."""
        with self._making:  # of two that began at once, one would not be found again, with a container in it
            try:
                if not self.find():
                    make_directory(os.path.dirname(self.above))
                    make_directory(self.above)
                    temporary = temporary_path(self.above)
                    make_one_directory(temporary)
                    path = os.path.join(self.above, _true_name(temporary))
                    os.rename(temporary, path)
                    self._path = path
            except OSError as error:
                raise StateDirectoryError(f"{quote_path(error.filename or self.above)}: {error.strerror}") from error
            return self._path

    def remove_old(self) -> None:
        """Remove the directories of boots that are over: nothing that they name is there. Raises OSError."""
        boot_id = read_boot_id()
        if boot_id is None or not os.path.isdir(self.above):
            return
        for name in os.listdir(self.above):
            path = os.path.join(self.above, name)
            if re.fullmatch(r"[0-9a-f-]{36}(\.[0-9a-f]+){3}", name) and not name.startswith(boot_id):
                remove_tree(path)


def remove_entry(path: str) -> bool:
    """Remove the runtime's directory of a container that has ended; say whether that was done.

    One with anything that is not known here is left whole. It may be repeated. Raises OSError.
    """
    names = os.listdir(path)
    if not _KEPT.issuperset(names):
        return False
    for name in names:
        os.unlink(os.path.join(path, name))
    os.rmdir(path)
    return True


def _true_name(path: str) -> str:
    """Return the name that the directory `path` must have to be used: it is not one that came with a copy."""
    found = os.lstat(path)
    boot_id = read_boot_id()
    if boot_id is None:
        raise StateDirectoryError("the boot id cannot be read: make /proc readable")
    return f"{boot_id}.{read_pid_namespace():x}.{found.st_dev:x}.{found.st_ino:x}"
