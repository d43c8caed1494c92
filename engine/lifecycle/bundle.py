"""Bundles: the directories that the engine makes for containers and sandboxes, and removes again.

A directory is made after its row is durable, marked as ours before anything goes into it, and whole once its
config.json is there. So a kill at any step leaves what recovery can name: nothing, a half-made bundle of a known
container, or a whole one. Only what bears our marker for this very container is ever removed, and what holds nothing.

Flushes are few, because each waits for the disk. A container's marker is flushed by itself only before an image is
unpacked: until config.json is durable, which carries the same marker, a power cut leaves empty directories and perhaps
an empty marker, and those hold nothing. A removal is not flushed at all: its row says already that nothing is wanted
here, so what a power cut brings back is removed once more.
"""

import json
import os
import stat
from contextlib import suppress

import msgspec

from limpet.engine.state.descriptors import to_limpet_error
from limpet.engine.state.durable import (
    make_one_directory,
    remove_unflushed,
    sync_directory,
    sync_file,
    write_file,
    write_unflushed,
    write_with_tree,
)
from limpet.engine.state.presence import is_directory, is_there
from limpet.recovery.bundles import is_begun, observe_bundle, read_marker
from limpet.recovery.evidence import Bundle as Found
from limpet.recovery.files import read_small_file
from limpet.recovery.mounts import find_mounts, is_no_mount_point
from limpet.schema.cri import LinuxContainerResources
from limpet.schema.decoders import make_decoder
from limpet.schema.errors import InvalidInputError, InvalidStateError, LimpetError, StateDirectoryError
from limpet.schema.layout import (
    CONFIG_BYTES,
    CONFIG_FILE,
    LIMITS_FILE,
    MARKER_ANNOTATION,
    MARKER_FILE,
    ROOTFS,
    TEMPORARY_PREFIX,
    WORKING,
    BundleMarker,
)
from limpet.schema.metadata import require_id

_limits = make_decoder(LinuxContainerResources)


class Bundle:
    """A directory with our marker."""

    kind = "sandbox"

    def __init__(self, path: str, owner_id: str, node: str) -> None:
        self.path = path
        self._marker = msgspec.json.encode(BundleMarker(limpet=self.kind, id=owner_id, node=node))
        self._id = owner_id

    def make(self) -> None:
        """Make the directory and mark it, durably; one of ours that is there already is kept.

        Raises StateDirectoryError if something else is in the way or the disk refuses, DiskFullError, InvalidInputError
        for an invalid id.
        """
        try:
            self._make_directory()
            write_file(self._marker_path, self._marker)
            sync_directory(os.path.dirname(self.path))
        except OSError as error:
            raise _translate(self.path, error) from error

    def is_missing(self) -> bool:
        """Say whether the directory is not there, or not marked yet. Raises StateDirectoryError."""
        try:
            if os.path.islink(self.path) or not is_directory(self.path):
                return not is_there(self.path)
            return is_begun(self.path)
        except OSError as error:
            raise _translate(self.path, error) from error

    def holds_ours(self) -> bool:
        """Say whether something is there that `remove` may remove. Raises StateDirectoryError, also if it is hidden."""
        try:
            return is_there(self.path) and not os.path.islink(self.path) and self._may_remove()
        except NotADirectoryError:
            return False
        except OSError as error:
            raise _translate(self.path, error) from error

    def remove(self) -> None:
        """Remove the directory and all in it; links are not followed. One that is gone is fine.

        A power cut may bring back what holds nothing but the marker. Raises InvalidStateError if it is not ours or
        something is mounted in it, InvalidInputError for an invalid id; all that holds anything is then left alone.
        """
        require_id(self._id)
        try:
            if not is_there(self.path):
                return
            if os.path.islink(self.path) or not self._may_remove():
                raise InvalidStateError(f"{self.path} is not ours; it was left alone, move it away yourself")
            if self._remove_bare():
                return
            mounts = find_mounts(self.path)
            if mounts:
                raise InvalidStateError(f"{mounts[0]} is mounted; it was left alone, unmount it and try again")
            # The marker and what carries it go last, so that a kill on the way leaves a directory that is still known
            # as ours. Without the flush a power cut might take them and leave the content.
            names = set(os.listdir(self.path)) - {CONFIG_FILE, MARKER_FILE}
            content = [name for name in names if not self._remove_if_empty(name)]
            for name in content:
                _remove(os.path.join(self.path, name))
            if content:
                sync_directory(self.path)
            if not self._remove_last():
                remove_unflushed(self.path)
        except OSError as error:
            raise _translate(self.path, error) from error

    @property
    def _marker_path(self) -> str:
        return os.path.join(self.path, MARKER_FILE)

    def _remove_bare(self) -> bool:
        """Remove a bundle in which nothing is but what it begins and ends with; say whether that was so.

        What is mounted is not looked for: the kernel removes nothing that something is in, or is mounted on.
        """
        if not is_no_mount_point(self.path):
            return False
        names = sorted(set(os.listdir(self.path)) - {CONFIG_FILE, MARKER_FILE})
        return all(map(self._remove_if_empty, names)) and self._remove_last()

    def _remove_if_empty(self, name: str) -> bool:
        """Remove one of the directories that a bundle begins with if nothing is in it; say whether that was so."""
        if name not in {ROOTFS, WORKING}:
            return False
        try:
            os.rmdir(os.path.join(self.path, name))
        except OSError:  # it holds something, or is none: that is told when it is removed in earnest
            return False
        return True

    def _remove_last(self) -> bool:
        """Remove the directory with its config.json and marker, all that is left of it; say whether that was so."""
        try:
            for name in (CONFIG_FILE, MARKER_FILE):
                with suppress(FileNotFoundError):
                    os.unlink(os.path.join(self.path, name))
            os.rmdir(self.path)
        except OSError:  # something is left, or may not be removed so: that is told when it is removed in earnest
            return False
        return True

    def _may_remove(self) -> bool:
        return self._is_ours() or is_begun(self.path)

    def _is_ours(self) -> bool:
        found = read_marker(self.path)
        return found is not None and msgspec.json.encode(found) == self._marker

    def _make_directory(self) -> None:
        """Make the directory, or take one that is ours; nothing is flushed."""
        require_id(self._id)  # a row that somebody else wrote may lead anywhere
        try:
            make_one_directory(self.path)
        except FileExistsError as error:
            if not stat.S_ISDIR(os.lstat(self.path).st_mode) or not (is_begun(self.path) or self._is_ours()):
                raise StateDirectoryError(f"{self.path} is not ours; move it away and try again") from error
            for name in os.listdir(self.path):
                if name.startswith(TEMPORARY_PREFIX):  # a kill came while the marker was written
                    os.unlink(os.path.join(self.path, name))


class ContainerBundle(Bundle):
    """A container's bundle: its root file system, its working directory, and what is to be run in them."""

    kind = "container"

    @property
    def rootfs(self) -> str:
        """The directory that an image is unpacked into; there is none for a built-in image."""
        return os.path.join(self.path, ROOTFS)

    @property
    def working(self) -> str:
        """The directory that a built-in image's program without a working directory of its own is started in."""
        return os.path.join(self.path, WORKING)

    def make(self) -> None:
        """Make the directory and mark it, but flush nothing: see `Bundle.make`, also for the errors raised."""
        try:
            self._make_directory()
            write_unflushed(self._marker_path, self._marker)
        except OSError as error:
            raise _translate(self.path, error) from error

    def begin(self, *, has_root: bool = True) -> None:
        """Make the bundle, with an empty `rootfs`, or `working` where it has no root file system of its own.

        What a create that was cut short has left is removed first.
        """
        found, _ = observe_bundle(self.path, self._id)
        if found in {Found.PARTIAL, Found.WHOLE}:
            self.remove()
        self.make()
        try:
            make_one_directory(self.rootfs if has_root else self.working, 0o755)
        except OSError as error:
            raise _translate(self.path, error) from error

    def flush_marker(self) -> None:
        """Make the marker durable: to be called before anything is put into the directories ahead of `finish`."""
        try:
            sync_file(self._marker_path)
            sync_directory(self.path)
        except OSError as error:
            raise _translate(self.path, error) from error

    def finish(self, config: bytes, *, has_content: bool = False) -> None:
        """Write config.json with the marker, durably: from now on the bundle is whole.

        The flush of the bundle's directory takes the names of all that is in it along, the one of its parent its own.
        With `has_content`, what a starter has put into the root file system is flushed before config.json is there.
        """
        path, data = os.path.join(self.path, CONFIG_FILE), _annotate(config, self._marker)
        try:
            if has_content:
                write_with_tree(path, data)
            else:
                write_file(path, data)
                sync_directory(os.path.dirname(self.path))
        except OSError as error:
            raise _translate(self.path, error) from error

    def note_limits(self, limits: LinuxContainerResources) -> None:
        """Write down which limits are about to be in force: a kill leaves that, and the next engine finishes it.

        Raises InvalidInputError for what are none, StateDirectoryError.
        """
        try:
            data = msgspec.json.encode(limits)
            _limits.decode(data)
            write_unflushed(self._limits_path, data)
        except (msgspec.MsgspecError, TypeError, ValueError) as error:
            raise InvalidInputError(f"limits: {error}") from error
        except OSError as error:
            raise _translate(self.path, error) from error

    def read_limits(self) -> LinuxContainerResources | None:
        """Return what `note_limits` has written; None if that is nothing, or damaged. Raises StateDirectoryError."""
        try:
            return _limits.decode(read_small_file(self._limits_path, CONFIG_BYTES))
        except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError, UnicodeDecodeError):
            return None
        except OSError as error:
            raise _translate(self.path, error) from error

    def forget_limits(self) -> None:
        """Remove what `note_limits` has written. What cannot be removed is done again by the next engine."""
        with suppress(OSError):
            os.unlink(self._limits_path)

    @property
    def _limits_path(self) -> str:
        return os.path.join(self.path, LIMITS_FILE)


def _annotate(config: bytes, marker: bytes) -> bytes:
    """Return a config.json with the marker among its annotations."""
    # Not msgspec: it refuses half a surrogate pair, by which JSON can name bytes that are no text.
    document = json.loads(config)
    document["annotations"] = {**document.get("annotations", {}), MARKER_ANNOTATION: marker.decode()}
    return json.dumps(document, separators=(",", ":")).encode()


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        remove_unflushed(path)
    else:
        os.unlink(path)


def _translate(path: str, error: OSError) -> LimpetError:
    return to_limpet_error(f"bundle {path}", error)
