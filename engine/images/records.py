"""One small file for each image name: written last, it is what makes an image exist."""

import hashlib
import os

import msgspec

from limpet.engine.images.oci import MAX_DOCUMENT_BYTES, require_digest
from limpet.engine.state.durable import TEMPORARY_PREFIX, make_directory, sync_directory, write_file
from limpet.recovery.files import read_small_file
from limpet.schema.errors import NotFoundError, StoreDamagedError
from limpet.schema.image import ImageConfig, ImageName

_SUFFIX = ".json"


class ImageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an image name stands for: a manifest among the blobs, or a built-in image."""

    name: ImageName
    digest: str = ""
    """Of the manifest; empty for a built-in image."""
    config: ImageConfig = ImageConfig()
    """Of a built-in image; that of another is a blob."""


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
            raise StoreDamagedError(f"{path} is the record of {record.name}, not of {name}; remove the file")
        if name.digest and name.digest != record.digest:
            raise NotFoundError(f"image {name} is not in the store: there, it has the digest {record.digest!r}")
        return record

    def put(self, record: ImageRecord) -> None:
        """Write a record, durable on return."""
        write_file(self._path(record.name), msgspec.json.encode(record))

    def remove(self, name: ImageName) -> None:
        """Remove the record of a name, durable on return. FileNotFoundError if there is none."""
        os.unlink(self._path(name))
        sync_directory(self._directory)

    def all(self) -> list[ImageRecord]:
        """Return all records, by name. Raises StoreDamagedError."""
        names = [name for name in os.listdir(self._directory) if name.endswith(_SUFFIX)]
        records = [_read(os.path.join(self._directory, name)) for name in names]
        return sorted(records, key=lambda record: str(record.name))

    def sweep(self) -> None:
        """Remove what unfinished writes left."""
        for name in os.listdir(self._directory):
            if name.startswith(TEMPORARY_PREFIX):
                os.unlink(os.path.join(self._directory, name))

    def _path(self, name: ImageName) -> str:
        # A name may have slashes, any length, any letters; its hash is always a file name.
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
    except (OSError, ValueError, RecursionError) as error:  # ValueError: of msgspec, and ours for a digest
        raise StoreDamagedError(f"{path} is damaged: {error}; remove the file and load the image again") from error
