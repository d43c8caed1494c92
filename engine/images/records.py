"""One small file for each image name. It is written last: an image exists once its record does."""

import hashlib
import os

import msgspec

from limpet.engine.images.oci import MAX_DOCUMENT_BYTES, require_digest
from limpet.engine.state.durable import make_directory, sync_directory, write_file
from limpet.recovery.files import read_small_file
from limpet.schema.errors import NotFoundError, StoreDamagedError
from limpet.schema.image import ImageConfig, ImageName
from limpet.schema.layout import TEMPORARY_PREFIX

_SUFFIX = ".json"


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an image name refers to: a manifest among the blobs, or a built-in image."""

    name: ImageName
    digest: str = ""
    """The manifest's digest; empty for a built-in image."""
    index_digest: str = ""
    """The digest of the index that it was loaded by, if any: what a registry calls the image of all platforms."""
    config: ImageConfig = ImageConfig()
    """A built-in image's config; other images have theirs in a blob."""


class RecordDirectory:
    """The directory images/ below `root`. OSError passes through."""

    def __init__(self, root: str) -> None:
        self._directory = os.path.join(root, "images")
        make_directory(self._directory)

    def get(self, name: ImageName) -> ImageRecord:
        """Return the record of a name. Raises NotFoundError, StoreDamagedError."""
        path = self._path(name)
        try:
            record = _read(path)
        except FileNotFoundError as error:
            raise NotFoundError(f"image {name} is not in the store; load it first") from error
        if (record.name.repository, record.name.tag) != (name.repository, name.tag):
            raise StoreDamagedError(f"{path} contains the record of {record.name}, not of {name}; remove the file")
        if name.digest and name.digest != record.digest:
            raise NotFoundError(f"image {name} is not in the store: the stored image has digest {record.digest!r}")
        return record

    def put(self, record: ImageRecord) -> None:
        """Write a record, durable on return."""
        write_file(self._path(record.name), msgspec.json.encode(record))

    def remove(self, name: ImageName) -> None:
        """Remove the record of a name, durable on return. Raises FileNotFoundError if there is no such record."""
        os.unlink(self._path(name))
        sync_directory(self._directory)

    def all(self) -> list[ImageRecord]:
        """Return all records, sorted by name. Raises StoreDamagedError."""
        names = [name for name in os.listdir(self._directory) if name.endswith(_SUFFIX)]
        records = [_read(os.path.join(self._directory, name)) for name in names]
        return sorted(records, key=lambda record: str(record.name))

    def sweep(self) -> None:
        """Remove the leftovers of unfinished writes."""
        for name in os.listdir(self._directory):
            if name.startswith(TEMPORARY_PREFIX):
                os.unlink(os.path.join(self._directory, name))

    def _path(self, name: ImageName) -> str:
        # A name can have slashes, any length, any letters; its hash is always a valid file name.
        key = f"{name.repository}:{name.tag}".encode("utf-8", "surrogatepass")
        return os.path.join(self._directory, hashlib.sha256(key).hexdigest() + _SUFFIX)


def _read(path: str) -> ImageRecord:
    try:
        record = msgspec.json.decode(read_small_file(path, MAX_DOCUMENT_BYTES), type=ImageRecord)
        if record.digest:
            require_digest(record.digest)
        return record
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # ValueError: from msgspec, or from require_digest
        raise StoreDamagedError(f"{path} is damaged: {error}; remove the file and load the image again") from error
