"""What limpet asks of an image store: seven calls that any other store can offer just as well."""

from typing import Protocol

import msgspec

from limpet.schema.image import ImageManifest, ImageName, MountType


class ImageSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One line of a list of images."""

    name: ImageName
    digest: str = ""
    """Of the OCI image manifest; empty for a built-in image."""
    size: int = 0
    """Bytes that its layers, configuration and manifest take in the store, as compressed as they came."""
    created_at: int = 0
    """When the image was built, in nanoseconds since the epoch; 0 where it does not say."""


class ImageStore(Protocol):
    """Keeps images, and makes root file systems of them. Safe to call from several threads.

    A name with a digest means the image of that name only while it has that digest.
    """

    def check(self, name: ImageName) -> bool:
        """Tell whether the image is here and whole."""
        ...

    def manifest(self, name: ImageName) -> ImageManifest:
        """Return what a container keeps of the image. Raises NotFoundError, StoreDamagedError."""
        ...

    def mount(self, name: ImageName, mount_type: MountType, target: str) -> None:
        """Make the image's root file system in `target`, an existing and empty directory; durable on return.

        A built-in image leaves it empty. After an error, `target` may hold a part of the tree, which the
        caller removes. Raises NotFoundError; InvalidInputError for an image or a target that won't do;
        StoreDamagedError where the image on disk is not what was loaded; DiskFullError.
        """
        ...

    def unmount(self, target: str) -> None:
        """Undo what mount did, as far as it must be undone before the directory is removed.

        A target that is gone is fine. Raises InvalidStateError where something is still mounted there.
        """
        ...

    def load(self, path: str) -> list[ImageName]:
        """Take in all images of an OCI layout, a directory or a tar archive of one; durable on return.

        Raises InvalidInputError for what is no such thing, or damaged: no image of it is taken in then.
        """
        ...

    def remove(self, name: ImageName) -> None:
        """Forget the image and free its space. Root file systems made of it stay. Raises NotFoundError."""
        ...

    def list(self) -> list[ImageSummary]:
        """Return all images, by name. Raises StoreDamagedError."""
        ...
