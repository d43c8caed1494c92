"""Finds out what is at the path of a container's bundle. Changes nothing."""

import json
import os
import stat

import msgspec

from limpet.recovery.evidence import Bundle
from limpet.recovery.files import read_small_file
from limpet.schema.decoders import make_decoder
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
_marker = make_decoder(BundleMarker)


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
    return (Bundle.WHOLE if CONFIG_FILE in names and names & {ROOTFS, WORKING} else Bundle.PARTIAL), ""


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
        return _marker.decode(_read_annotation(path) if _is_hollow(data) else data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def _read_annotation(path: str) -> bytes:
    """Return the marker that config.json carries, empty if there is none."""
    try:
        config = json.loads(read_small_file(os.path.join(path, CONFIG_FILE), CONFIG_BYTES))
        return str(config["annotations"][MARKER_ANNOTATION]).encode()
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, RecursionError):
        return b""
