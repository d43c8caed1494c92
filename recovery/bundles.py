"""Finds out what is at the path of a container's bundle. Changes nothing."""

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
