"""Finds out what is at the path of a container's bundle, and which processes use a directory. Changes nothing."""

import json
import os
import stat

import msgspec

from limpet.recovery.evidence import Bundle
from limpet.recovery.files import read_small_file
from limpet.schema.layout import (
    CONFIG_BYTES,
    CONFIG_FILE,
    MARKER_ANNOTATION,
    MARKER_FILE,
    ROOTFS,
    TEMPORARY_PREFIX,
    WORKING,
    BundleMarker,
)

_MARKER_BYTES = 4096


def observe_bundle(path: str, container_id: str) -> tuple[Bundle, str]:
    """Return what is at `path`, where the bundle of `container_id` belongs, and what prevented a closer look."""
    try:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            return Bundle.FOREIGN, f"{path} is not a directory"
        names = set(os.listdir(path))
        if is_begun(path):
            return Bundle.PARTIAL, ""
        marker = read_marker(path)
    except FileNotFoundError:
        return Bundle.ABSENT, ""
    except OSError as error:
        return Bundle.HIDDEN, f"{path}: {error.strerror}"
    if marker is None or (marker.limpet, marker.id) != ("container", container_id):
        return Bundle.FOREIGN, f"{path} does not contain limpet's marker for this container"
    return (Bundle.WHOLE if {CONFIG_FILE, ROOTFS} <= names else Bundle.PARTIAL), ""


def is_begun(path: str) -> bool:
    """Return whether this is a bundle without its marker, such as a kill or a power cut can leave. Raises OSError.

    Creating a bundle starts with an empty directory; removing one ends with it.
    """
    names = {name for name in os.listdir(path) if not name.startswith(TEMPORARY_PREFIX)}
    return names <= {MARKER_FILE, ROOTFS, WORKING} and all(_holds_nothing(path, name) for name in names)


def is_empty(path: str) -> bool:
    """Return whether nothing is in the directory `path`, or only what holds nothing. Raises OSError."""
    return all(_holds_nothing(path, name) for name in os.listdir(path))


def _holds_nothing(directory: str, name: str) -> bool:
    """Return whether an entry is one of those that limpet makes without a flush, and without any content."""
    path = os.path.join(directory, name)
    try:
        if name in {ROOTFS, WORKING}:
            return stat.S_ISDIR(os.lstat(path).st_mode) and not os.listdir(path)
        return name == MARKER_FILE and _is_hollow(read_small_file(path, _MARKER_BYTES))
    except FileNotFoundError:  # removed in the meantime
        return True


def _is_hollow(data: bytes) -> bool:
    """Return whether this is what a power cut leaves of a marker that was not flushed: JSON has no NUL."""
    return not data or b"\0" in data


def read_marker(path: str) -> BundleMarker | None:
    """Return the marker in the directory `path`, or else in its config.json; None if none can be read.

    Raises OSError.
    """
    try:
        data = read_small_file(os.path.join(path, MARKER_FILE), _MARKER_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        data = b""
    try:
        return msgspec.json.decode(_read_annotation(path) if _is_hollow(data) else data, type=BundleMarker)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _read_annotation(path: str) -> bytes:
    """Return the marker that config.json carries, empty if there is none."""
    try:
        config = json.loads(read_small_file(os.path.join(path, CONFIG_FILE), CONFIG_BYTES))
        return str(config["annotations"][MARKER_ANNOTATION]).encode()
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return b""


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
