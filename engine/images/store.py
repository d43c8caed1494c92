"""The interface of an image store: eight calls, which other stores can implement."""

from typing import Protocol

import msgspec

from limpet.schema.image import ImageManifest, ImageName, MountType


class ImageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """An entry in the list of images."""

    name: ImageName
    digest: str = ""
    """The OCI image manifest's digest; empty for a built-in image."""
    size: int = 0
    """Bytes that its layers, configuration and manifest use in the store, compressed as they were loaded."""
    created_at: int = 0
    """When the image was built, in nanoseconds since the epoch; 0 if not given."""


class ImageStore(Protocol):
    """Stores images, and unpacks them into root file systems. Safe to call from several threads.

    An image is found by its name in any spelling (busybox is docker.io/library/busybox:latest), by repository and
    digest (busybox@sha256:...; of its manifest, or of the index that it was loaded by), and by its id (the digest of
    its configuration, with or without sha256:, or the first six digits or more). Names come first. A built-in image
    has its name as written alone.
    """

    def check(self, name: ImageName) -> bool:
        """Return whether the image is stored and complete."""
        ...

    def manifest(self, name: ImageName) -> ImageManifest:
        """Return what a container records of the image. Raises NotFoundError, StoreDamagedError."""
        ...

    def mount(self, name: ImageName, mount_type: MountType, target: str) -> None:
        """Unpack the image's root file system into `target`, an existing empty directory.

        It need not be durable: the bundle's config.json is written only once all on the same file system is.
        A built-in image leaves it empty. After an error, `target` may contain part of the tree, which the caller
        removes. Raises NotFoundError; InvalidInputError if the image or the target is unsuitable;
        StoreDamagedError if the image on disk is not what was loaded; DiskFullError.
        """
        ...

    def unmount(self, target: str) -> None:
        """Undo the parts of mount that must be undone before the directory is removed.

        A missing target is not an error. Raises InvalidStateError if something is still mounted there.
        """
        ...

    def load(self, path: str) -> list[ImageName]:
        """Load all images of an OCI layout, given as a directory or a tar archive; durable on return.

        Raises InvalidInputError if it is not a layout or is damaged; then none of its images is loaded.
        """
        ...

    def tag(self, name: ImageName, new: ImageName) -> None:
        """Give the image the name `new` as well, which another loaded image loses; durable on return.

        Raises NotFoundError; InvalidInputError if `new` is malformed or has a digest; AlreadyExistsError if a
        built-in image has the name, or a loaded one has it and the image is built in.
        """
        ...

    def remove(self, name: ImageName) -> None:
        """Remove the image of this name, given by id with all its names, and free the space that no other needs.

        Root file systems unpacked from it stay. Raises NotFoundError.
        """
        ...

    def list(self) -> list[ImageSummary]:
        """Return all images, sorted by name. Raises StoreDamagedError."""
        ...
