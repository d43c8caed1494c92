"""The image store on disk: blobs by digest, and one record for each name.

A record is written once all blobs of its image are durable, so a crash leaves a complete image or none.
Blobs that no record needs, and leftovers of a crash, are removed by `remove` and when the store is next opened.
"""

import fcntl
import io
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import NamedTuple

import msgspec

from limpet.engine.images.blobs import BlobDirectory
from limpet.engine.images.files import open_files
from limpet.engine.images.layout import find_images
from limpet.engine.images.limits import Budget
from limpet.engine.images.manifests import (
    FoundImage,
    read_configuration,
    read_manifest,
    require_runnable,
    unique_blobs,
)
from limpet.engine.images.oci import DIGEST_ALGORITHMS, Configuration, Descriptor, Manifest
from limpet.engine.images.records import ImageRecord, RecordDirectory
from limpet.engine.images.store import ImageSummary
from limpet.engine.images.unpack import LayerFile, unpack
from limpet.engine.state.descriptors import close_all, system_errors_told
from limpet.engine.state.durable import make_directory, make_one_directory, open_made, remove_tree, temporary_path
from limpet.engine.state.entries import require_entries
from limpet.engine.state.holders import find_stopped
from limpet.engine.state.steps import whole
from limpet.recovery.mounts import find_mounts
from limpet.schema.errors import (
    AlreadyExistsError,
    InvalidInputError,
    InvalidStateError,
    LimpetError,
    NotFoundError,
    StateDirectoryError,
    StoreDamagedError,
    UnsupportedError,
    escape,
    quote,
    quote_path,
)
from limpet.schema.image import DEFAULT_TAG, ImageConfig, ImageManifest, ImageName, MountType
from limpet.schema.layout import TEMPORARY_PREFIX

_MOUNT_TYPES = (MountType.PLAIN,)
_MAX_REASON = 2000
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.0005, 0.005
"""Between two tries to get the lock. flock(2) can wait by itself, but looks at nobody meanwhile."""
_PATIENCE_SECONDS = 1.0
"""Between two looks at who has it."""
_ID = re.compile("[0-9a-f]{6,128}")
"""With fewer digits, words such as "cafe" would be ids."""
_ENTRIES = {"lock": False, "images": True, "blobs": True, "blobs/sha256": True, "blobs/sha512": True}
"""Each entry, and whether it is a directory."""


class _Image(NamedTuple):
    """An image in the store."""

    manifest: Manifest
    configuration: Configuration

    @property
    def blobs(self) -> list[Descriptor]:
        """Configuration and layers."""
        return [self.manifest.config, *(self.manifest.layers or [])]

    @property
    def volumes(self) -> Sequence[str]:
        """Directories that the image's programs count on, whether a layer has them or not."""
        config = self.configuration.config
        return tuple(config.volumes or ()) if config else ()


class DirectoryImageStore:
    """An ImageStore in the directory `root`, which is created if missing. Processes and threads may share it.

    What a crash has left in it is removed, unless `sweep` is False. All methods raise StateDirectoryError if the
    directory cannot be used, DiskFullError, and ResourcesError if no descriptor is free.
    """

    def __init__(self, root: str, *, sweep: bool = True) -> None:
        self._root = os.path.abspath(root)
        with self._translated("open the image store"):
            make_directory(self._root)
            require_entries(self._root, _ENTRIES)
            self._blobs = BlobDirectory(self._root)
            self._records = RecordDirectory(self._root)
            if sweep:
                self._sweep_unless_busy()

    @whole
    def register_builtin(self, name: ImageName, config: ImageConfig = ImageConfig()) -> None:  # noqa: B008 - frozen
        """Add an image without layers, whose containers run the host's own binaries; durable on return.

        Registering it again replaces its config. Raises InvalidInputError if the name is malformed or has a digest,
        AlreadyExistsError if a loaded image has the name.
        """
        _require_plain(name)
        record = ImageRecord(name=name, config=config)
        with self._translated(f"register image {name}"), self._locked(fcntl.LOCK_SH):
            if self._find_record(name) == record:
                return  # as at most openings, which wait for no load then
        with self._translated(f"register image {name}"), self._locked(fcntl.LOCK_EX):
            present = self._find_record(name)
            if present and present.digest:
                raise AlreadyExistsError(f"image {name} is a loaded image; remove it first")
            if present != record:
                self._records.put(record)

    def check(self, name: ImageName | str) -> bool:
        """Return whether the image is complete: its documents verified, its layers present in full size.

        The layers' content is verified whenever it is read.
        """
        name = ImageName.of(name)
        with self._translated(f"check image {name}"), self._locked(fcntl.LOCK_SH):
            try:
                record = self._find(name)
                return not record.digest or all(self._blobs.has(blob) for blob in self._open(record.digest).blobs)
            except (NotFoundError, StoreDamagedError):
                return False

    @whole
    def manifest(self, name: ImageName | str) -> ImageManifest:
        """Return what a container records of the image. Raises NotFoundError, StoreDamagedError."""
        name = ImageName.of(name)
        with self._translated(f"read image {name}"), self._locked(fcntl.LOCK_SH):
            record = self._find(name)
            if not record.digest:
                return ImageManifest(name=record.name, config=record.config)
            image = self._open(record.digest)
            config = image.configuration.config
            return ImageManifest(
                name=record.name,
                digest=record.digest,
                config=config.to_image_config() if config else ImageConfig(),
                layers=tuple(layer.digest for layer in image.manifest.layers or []),
            )

    def mount(self, name: ImageName | str, mount_type: MountType, target: str) -> None:
        """Unpack the image into `target`, and flush nothing: see ImageStore."""
        name = ImageName.of(name)
        if mount_type not in _MOUNT_TYPES:
            raise UnsupportedError(
                f"mount type {quote(mount_type)}: this store supports only {MountType.PLAIN.value!r}"
            )
        _require_empty_directory(target)
        with self._translated(f"mount image {name} at {target}"), self._locked(fcntl.LOCK_SH):
            record = self._find(name)
            if record.digest:
                image = self._open(record.digest)
                unpack(str(name), self._layer_files(image), image.volumes, target, Budget())

    @whole
    def unmount(self, target: str) -> None:
        """Check that nothing is mounted at or below `target`; PLAIN itself mounts nothing."""
        _require_target(target)
        try:
            with self._translated(f"unmount {quote_path(target)}"):
                mounts = find_mounts(target)
        except ValueError as error:  # it contains a NUL or a lone surrogate
            raise InvalidInputError(f"mount target {quote_path(target)}: {error}; give a directory") from error
        if mounts:
            raise InvalidStateError(f"{mounts[0]} is still a mount point; unmount it before removing {target}")

    def load(self, path: str) -> list[ImageName]:
        """Load all images for this machine from an OCI layout or a `docker save` archive: see ImageStore.

        Every image is unpacked once, without the data of its files, so that one that cannot be is refused here.
        A name that another loaded image has moves to the new one. Raises AlreadyExistsError if a built-in image
        has the name.
        """
        try:
            with self._translated(f"load {path}"), self._locked(fcntl.LOCK_SH):
                images = self._take_in(path)
                for name, image in images.items():
                    self._records.put(ImageRecord(name=name, digest=image.digest, index_digest=image.index_digest))
                return list(images)
        except LimpetError:
            with suppress(OSError):  # opening the store tries again
                self._sweep_unless_busy()
            raise

    @whole
    def tag(self, name: ImageName | str, new: ImageName | str) -> None:
        """Give the image another name: see ImageStore."""
        name, new = ImageName.of(name), ImageName.of(new)
        _require_plain(new)
        with self._translated(f"tag image {name}"), self._locked(fcntl.LOCK_EX):
            record = self._find(name)
            self._require_no_builtin([new])
            if not record.digest and self._find_record(new):
                raise AlreadyExistsError(f"image {new} is a loaded image; remove it first")
            self._records.put(msgspec.structs.replace(record, name=new))
            self._sweep()

    @whole
    def remove(self, name: ImageName | str) -> None:
        """Remove the image's name, and the blobs that no other image needs: see ImageStore."""
        name = ImageName.of(name)
        with self._translated(f"remove image {name}"), self._locked(fcntl.LOCK_EX):
            try:
                removed = [self._records.get(name).name]
            except StoreDamagedError:  # what it was is unknown, so it may be removed
                removed = [name]
            except NotFoundError:
                digest = self._find(name).digest
                removed = [record.name for record in self._records.readable() if record.digest == digest]
            for each in removed:
                self._records.remove(each)
            self._sweep()

    @whole
    def list(self) -> list[ImageSummary]:
        """Return all images, sorted by name. Raises StoreDamagedError."""
        with self._translated("list the images"), self._locked(fcntl.LOCK_SH):
            return [self._summary(record) for record in self._records.all()]

    def _summary(self, record: ImageRecord) -> ImageSummary:
        if not record.digest:
            return ImageSummary(name=record.name)
        image = self._open(record.digest)
        return ImageSummary(
            name=record.name,
            digest=record.digest,
            size=sum(blob.size for blob in image.blobs),
            created_at=image.configuration.created_at,
        )

    def _open(self, digest: str) -> _Image:
        manifest = read_manifest(self._blobs.read(digest))
        return _Image(manifest, read_configuration(self._blobs.read(manifest.config.digest), manifest))

    def _take_in(self, path: str) -> dict[ImageName, FoundImage]:
        """Store all blobs of the images at `path`. No image owns them until its record is written."""
        try:
            with open_files(path, self._root) as files:
                images = find_images(files, _label(path))
                self._require_no_builtin(images)
                for name in images:
                    _require_no_digest(name)
                unique = {image.digest: (name, image) for name, image in images.items()}
                for blob, file_name in unique_blobs(blob for _, image in unique.values() for blob in image.blobs):
                    if blob.urls and files.find(file_name) is None:
                        raise InvalidInputError(
                            f"layer {blob.digest} is not in it; the image says where it is: {blob.urls[0]};"
                            f" get it from there, if you trust it, and put it at {file_name}"
                        )
                    with files.open(file_name) as stream:
                        self._blobs.put(blob, stream)
                budget = Budget()
                for name, image in unique.values():
                    manifest = Descriptor(digest=image.digest, size=len(image.manifest))
                    self._blobs.put(manifest, io.BytesIO(image.manifest))
                    self._require_unpackable(name, image.digest, budget)
                return images
        except InvalidInputError as error:
            # The message may quote names and types of any length from the layout's documents.
            reason = escape(str(error) if len(str(error)) <= _MAX_REASON else f"{str(error)[:_MAX_REASON]}...")
            raise InvalidInputError(f"image layout {quote_path(path)}: {reason}") from error

    def _require_unpackable(self, name: ImageName, digest: str, budget: Budget) -> None:
        """Unpack an image into a directory of its own, which is removed again. Raises InvalidInputError."""
        scratch = temporary_path(self._root)
        make_one_directory(scratch)
        try:
            image = self._open(digest)
            require_runnable(image.configuration)
            unpack(str(name), self._layer_files(image), image.volumes, scratch, budget, with_content=False)
        finally:
            remove_tree(scratch)

    def _require_no_builtin(self, names: Iterable[ImageName]) -> None:
        builtin = self._records.builtin_names()
        for name in names:
            if name.normalized in builtin:
                raise AlreadyExistsError(f"image {builtin[name.normalized]} is a built-in image; remove it first")

    def _find(self, name: ImageName) -> ImageRecord:
        """Return the record of the image with this name, digest or id. Raises NotFoundError, StoreDamagedError."""
        prefix = _id_prefix(name)
        if not _is_digest(prefix):  # a whole one is no name, whatever an older version has loaded
            try:
                return self._records.get(name)
            except NotFoundError:
                if not prefix:
                    raise
        found = [each for each in self._records.readable() if self._has_id(each, prefix)]
        if not found:
            raise NotFoundError(f"image {name} is not in the store; load it first")
        if len({record.digest for record in found}) > 1:
            raise NotFoundError(f"several images have an id that begins with {prefix}; give more of it")
        return found[0]

    def _has_id(self, record: ImageRecord, prefix: str) -> bool:
        """Return whether the digest of the image's configuration, manifest or index begins so."""
        if not record.digest:
            return False
        digests = [record.digest, record.index_digest]
        with suppress(StoreDamagedError, InvalidInputError):  # a damaged image may still be known by its manifest
            digests.append(read_manifest(self._blobs.read(record.digest)).config.digest)
        return any(digest.startswith(prefix) or digest.partition(":")[2].startswith(prefix) for digest in digests)

    def _find_record(self, name: ImageName) -> ImageRecord | None:
        try:
            return self._records.get(name)
        except (OSError, NotFoundError, StoreDamagedError):  # then it is written anew, or that says why it cannot be
            return None

    def _layer_files(self, image: _Image) -> Sequence[LayerFile]:
        layers = zip(image.manifest.layers or [], image.configuration.rootfs.diff_ids or [], strict=True)
        return [LayerFile(self._blobs.path(layer.digest), layer.digest, diff_id) for layer, diff_id in layers]

    def _sweep_unless_busy(self) -> None:
        with suppress(BlockingIOError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            self._sweep()

    def _sweep(self) -> None:
        """Remove blobs without an image, and what is unfinished. The caller holds the exclusive lock."""
        for name in os.listdir(self._root):
            if name.startswith(TEMPORARY_PREFIX):
                with suppress(OSError):  # what cannot be removed is in nobody's way
                    remove_tree(os.path.join(self._root, name))
        self._records.sweep()
        try:
            records = [record for record in self._records.all() if record.digest]
            wanted = {record.digest for record in records}
            wanted.update(blob.digest for record in records for blob in self._open(record.digest).blobs)
        except (OSError, StoreDamagedError, InvalidInputError):
            return  # the blobs of an image that is damaged, or cannot be looked at, are unknown, so keep all
        self._blobs.keep_only(wanted)

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Hold the store's lock: shared to read or add blobs, exclusive to remove some.

        The kernel releases it when this process ends, whatever the cause. A load takes as long as its image is large,
        and is waited for; but not a process that has the lock and is stopped.
        """
        descriptor = open_made(os.path.join(self._root, "lock"), os.O_RDONLY)
        try:
            _take(descriptor, how)
            yield
        finally:
            try:
                # Unlock explicitly: a child that was forked meanwhile shares the descriptor until it executes.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            finally:
                close_all([descriptor])

    def _translated(self, what: str) -> AbstractContextManager[None]:
        """Turn OSError into a limpet error that says which operation failed, and where."""
        return system_errors_told(f"cannot {what} in {self._root}")


def _take(lock: int, how: int) -> None:
    """Lock an open file. Raises StateDirectoryError if who has it is stopped, BlockingIOError with LOCK_NB."""
    patient, pause = time.monotonic() + _PATIENCE_SECONDS, _FIRST_PAUSE_SECONDS
    while True:
        try:
            fcntl.flock(lock, how | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if how & fcntl.LOCK_NB:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        if time.monotonic() > patient:
            patient = time.monotonic() + _PATIENCE_SECONDS
            for pid, _ in find_stopped(lock, with_lock=True):
                raise StateDirectoryError(
                    f"the image store is locked by process {pid}, which is stopped by a signal; have it go on"
                    f" (kill -CONT {pid}), or end it, and try again"
                )


def list_images(root: str) -> list[ImageSummary]:
    """Return the images in the directory `root`, sorted by name, and change nothing; none where no store was made.

    Raises StoreDamagedError, StateDirectoryError.
    """
    if all(os.path.isdir(os.path.join(root, name)) for name, is_directory in _ENTRIES.items() if is_directory):
        return DirectoryImageStore(root, sweep=False).list()
    return []


def _label(path: str) -> str:
    """Return the name for an unnamed image: that of its directory or archive."""
    label = os.path.basename(os.path.abspath(os.fsdecode(path)))
    return re.sub(r"(\.tar|\.tgz|\.tar\.(gz|zst))$", "", label)


def _require_plain(name: ImageName) -> None:
    if ImageName.parse(str(name)) != name or name.digest:
        raise InvalidInputError(f"image name {str(name)!r}: it must have a repository and a tag, and no digest")
    _require_no_digest(name)


def _require_no_digest(name: ImageName) -> None:
    """Raise InvalidInputError for a name that is a digest, by which an image could pass for another one."""
    if _is_digest(_id_prefix(name)):
        raise InvalidInputError(f"image name {str(name)!r}: it is a digest, which stands for its image alone")


def _is_digest(prefix: str) -> bool:
    """Return whether what a name may be the beginning of is whole."""
    return len(prefix.rpartition(":")[2]) in DIGEST_ALGORITHMS.values()


def _id_prefix(name: ImageName) -> str:
    """Return the beginning of a digest if a name may be one: sha256:HEX, or HEX alone; else ""."""
    if name.digest:
        return ""
    if name.repository in DIGEST_ALGORITHMS and _ID.fullmatch(name.tag):
        return f"{name.repository}:{name.tag}"
    return name.repository if name.tag == DEFAULT_TAG and _ID.fullmatch(name.repository) else ""


def _require_target(target: object) -> None:
    if not isinstance(target, str | os.PathLike):  # a number is a file descriptor of somebody's
        raise InvalidInputError(f"mount target: give a path, as text, not {type(target).__name__}")


def _require_empty_directory(target: str) -> None:
    _require_target(target)
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"mount target {quote_path(target)}: {reason}; create it as an empty directory first"
        ) from error
    try:
        if os.listdir(descriptor):
            raise InvalidInputError(f"mount target {quote_path(target)} is not empty; give an empty directory")
    finally:
        os.close(descriptor)
