"""Finds out what is at the path of a container's bundle, and which processes use a directory. Changes nothing."""

import os
import stat
from collections.abc import Iterable

import msgspec

from limpet.recovery.evidence import Bundle
from limpet.recovery.files import read_small_file
from limpet.schema.layout import CONFIG_FILE, MARKER_FILE, ROOTFS, TEMPORARY_PREFIX, BundleMarker

_MARKER_BYTES = 4096


def observe_bundle(path: str, container_id: str) -> tuple[Bundle, str]:
    """Return what is at `path`, where the bundle of `container_id` belongs, and what prevented a closer look."""
    try:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            return Bundle.FOREIGN, f"{path} is not a directory"
        names = set(os.listdir(path))
        if is_begun(names):
            return Bundle.PARTIAL, ""
        marker = read_marker(path)
    except FileNotFoundError:
        return Bundle.ABSENT, ""
    except OSError as error:
        return Bundle.HIDDEN, f"{path}: {error.strerror}"
    if marker is None or (marker.limpet, marker.id) != ("container", container_id):
        return Bundle.FOREIGN, f"{path} does not contain limpet's marker for this container"
    return (Bundle.WHOLE if {CONFIG_FILE, ROOTFS} <= names else Bundle.PARTIAL), ""


def is_begun(names: Iterable[str]) -> bool:
    """Return whether these are the entries of a bundle without its marker, such as a kill can leave behind.

    Creating a bundle starts with an empty directory; removing one ends with it.
    """
    return all(name.startswith(TEMPORARY_PREFIX) for name in names)


def read_marker(path: str) -> BundleMarker | None:
    """Return the marker in the directory `path`, None if it has no readable one. Raises OSError."""
    try:
        return msgspec.json.decode(read_small_file(os.path.join(path, MARKER_FILE), _MARKER_BYTES), type=BundleMarker)
    except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def find_users(path: str) -> tuple[list[int], list[int]]:
    """Return the pids of live processes that use the directory `path`, and of those that we may not inspect.

    A process uses it as its root, its working directory, its program or an open file. Another user's process
    cannot reach into our private directory, so only our own count as hidden. Raises OSError.
    """
    path = os.path.realpath(path)
    users, hidden = [], []
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            if _uses(f"/proc/{name}", path):
                users.append(int(name))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
        except PermissionError:
            # An init that we may not inspect is the machine's, with more rights than ours.
            if name != "1" and _is_ours(name):
                hidden.append(int(name))
    return users, hidden


def _uses(process: str, path: str) -> bool:
    links = [f"{process}/{name}" for name in ("root", "cwd", "exe")]
    links += [f"{process}/fd/{name}" for name in os.listdir(f"{process}/fd")]
    for link in links:
        try:
            target = os.readlink(link)
        except FileNotFoundError:  # a kernel thread's program, a descriptor closed since
            continue
        if target == path or target.startswith(path + "/"):
            return True
    return False


def _is_ours(pid: str) -> bool:
    try:
        return os.stat(f"/proc/{pid}").st_uid == os.geteuid()
    except FileNotFoundError:
        return False
