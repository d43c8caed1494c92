"""Bundles: the directories that the engine makes for containers and sandboxes, and removes again.

A directory is made after its row is durable, marked as ours before anything goes into it, and whole once
its config.json is there. So a kill at any step leaves what recovery can name: nothing, a half-made bundle of a
known container, or a whole one. Only what bears our marker for this very container is ever removed.
"""

import os

import msgspec

from limpet.engine.state.durable import make_directory, remove_tree, sync_directory, write_file
from limpet.recovery.bundles import is_begun, observe_bundle, read_marker
from limpet.recovery.evidence import Bundle as Found
from limpet.recovery.mounts import find_mounts
from limpet.schema.errors import InvalidStateError, StateDirectoryError
from limpet.schema.layout import CONFIG_FILE, MARKER_FILE, ROOTFS, WORKING, BundleMarker
from limpet.schema.metadata import require_id


class Bundle:
    """A directory with our marker."""

    kind = "sandbox"

    def __init__(self, path: str, owner_id: str, node: str) -> None:
        self.path = path
        self._marker = BundleMarker(limpet=self.kind, id=owner_id, node=node)

    def make(self) -> None:
        """Make the directory and mark it, durably; one of ours that is there already is kept.

        Raises StateDirectoryError if something else is in the way or the disk refuses, InvalidInputError for an
        invalid id.
        """
        require_id(self._marker.id)  # a row that somebody else wrote may lead anywhere
        try:
            make_directory(self.path)
            names = os.listdir(self.path)
            if is_begun(names):
                for name in names:  # a kill came while the marker was written
                    os.unlink(os.path.join(self.path, name))
            elif read_marker(self.path) != self._marker:
                raise StateDirectoryError(f"{self.path} is not ours; move it away and try again")
            write_file(os.path.join(self.path, MARKER_FILE), msgspec.json.encode(self._marker))
        except OSError as error:
            raise _translate(self.path, error) from error

    def is_missing(self) -> bool:
        """Say whether the directory is not there, or not marked yet. Raises OSError."""
        if os.path.islink(self.path) or not os.path.isdir(self.path):
            return not os.path.lexists(self.path)
        return is_begun(os.listdir(self.path))

    def remove(self) -> None:
        """Remove the directory and all in it; links are not followed. One that is gone is fine.

        Raises InvalidStateError if it is not ours or something is mounted in it, InvalidInputError for an invalid
        id; the directory is then left alone.
        """
        require_id(self._marker.id)
        try:
            if not os.path.lexists(self.path):
                return
            if os.path.islink(self.path) or not (
                is_begun(os.listdir(self.path)) or read_marker(self.path) == self._marker
            ):
                raise InvalidStateError(f"{self.path} is not ours; it was left alone, move it away yourself")
            mounts = find_mounts(self.path)
            if mounts:
                raise InvalidStateError(f"{mounts[0]} is mounted; it was left alone, unmount it and try again")
            # The marker goes last, so that a kill on the way leaves a directory that is still known as ours.
            for name in os.listdir(self.path):
                if name != MARKER_FILE:
                    _remove(os.path.join(self.path, name))
            sync_directory(self.path)
            remove_tree(self.path)
        except OSError as error:
            raise _translate(self.path, error) from error


class ContainerBundle(Bundle):
    """A container's bundle: its root file system, its working directory, and what is to be run in them."""

    kind = "container"

    @property
    def rootfs(self) -> str:
        """The directory that an image is unpacked into; empty for a built-in image."""
        return os.path.join(self.path, ROOTFS)

    @property
    def working(self) -> str:
        """The directory that a program without a working directory of its own is started in."""
        return os.path.join(self.path, WORKING)

    def begin(self) -> None:
        """Make the bundle's empty directories; what a create that was cut short has left is removed first."""
        found, _ = observe_bundle(self.path, self._marker.id)
        if found in {Found.PARTIAL, Found.WHOLE}:
            self.remove()
        self.make()
        make_directory(self.rootfs, 0o755)
        make_directory(self.working, 0o755)

    def finish(self, config: bytes) -> None:
        """Write config.json, durably: from now on the bundle is whole."""
        try:
            write_file(os.path.join(self.path, CONFIG_FILE), config)
        except OSError as error:
            raise _translate(self.path, error) from error


def _remove(path: str) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        remove_tree(path)
    else:
        os.unlink(path)


def _translate(path: str, error: OSError) -> StateDirectoryError:
    return StateDirectoryError(f"bundle {path}: {error.strerror or error} ({error.filename or path})")
