"""One small file for each image name. It is written last: an image exists once its record does."""

import hashlib
import os
from contextlib import suppress

import msgspec

from limpet.engine.images.oci import MAX_DOCUMENT_BYTES, require_digest
from limpet.engine.state.durable import make_directory, sync_directory, write_file
from limpet.recovery.files import WRONG, read_small_file
from limpet.schema.decoders import make_decoder
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


_record = make_decoder(ImageRecord)


class RecordDirectory:
    """The directory images/ below `root`. OSError passes through.

    A loaded image's file is named after its normalized name, a built-in image's after its name as written: it never
    answers to another spelling. Older versions named all files after the name as written, and those are still found.
    """

    def __init__(self, root: str) -> None:
        self._directory = os.path.join(root, "images")
        make_directory(self._directory)

    def get(self, name: ImageName) -> ImageRecord:
        """Return the record of a name in any spelling. Raises NotFoundError, StoreDamagedError.

        A name with a digest is that of any image of the repository that has the digest, or has it in its index.
        """
        record = self._get_by_file(name)
        if record is None or not _has_digest(record, name):
            same = [each for each in self.readable() if _is_named(each, name) and _has_digest(each, name)]
            if not same:
                there = f": the stored image has digest {record.digest!r}" if record else "; load it first"
                raise NotFoundError(f"image {name} is not in the store{there}")
            record = same[0]
        return record

    def _get_by_file(self, name: ImageName) -> ImageRecord | None:
        found, damage = [], None
        for path in self._paths(name):
            try:
                found.append(_read(path))
            except FileNotFoundError:
                continue
            except StoreDamagedError as error:
                damage = error
        # A built-in image first: what an older version loaded by another spelling of its name must not replace it.
        for record in sorted(found, key=lambda each: each.digest != ""):
            if _is_named(record, ImageName(name.repository, name.tag)):
                return record
        if damage:
            raise damage
        if found:
            path = self._paths(name)[0]
            raise StoreDamagedError(f"{path} contains the record of {found[0].name}, not of {name}; remove the file")
        return None

    def put(self, record: ImageRecord) -> None:
        """Write a record, durable on return."""
        normalized, *written = self._paths(record.name)
        if not record.digest:
            write_file([normalized, *written][-1], msgspec.json.encode(record))
            return
        write_file(normalized, msgspec.json.encode(record))
        for path in written:
            # Not a built-in image: nothing is loaded by its name.
            with suppress(FileNotFoundError):
                os.unlink(path)

    def remove(self, name: ImageName) -> None:
        """Remove the record of a name, durable on return. Raises NotFoundError if there is none."""
        self.sweep()
        for path in reversed(self._paths(name)):  # a built-in image's file first, as `get` has it
            with suppress(FileNotFoundError):
                os.unlink(path)
                break
        else:
            raise NotFoundError(f"image {name} is not in the store")
        sync_directory(self._directory)

    def all(self) -> list[ImageRecord]:
        """Return all records, sorted by name. Raises StoreDamagedError."""
        return self._sorted([self._read_file(file_name) for file_name in self._file_names()])

    def readable(self) -> list[ImageRecord]:
        """Return all records that can be read, sorted by name."""
        return self._sorted(list(self._readable_files().values()))

    def builtin_names(self) -> dict[ImageName, ImageName]:
        """Return the names of the built-in images, by normalized name."""
        return {record.name.normalized: record.name for record in self.readable() if not record.digest}

    def sweep(self) -> None:
        """Remove the leftovers of unfinished writes, and records whose name has moved to another image since."""
        for file_name in os.listdir(self._directory):
            if file_name.startswith(TEMPORARY_PREFIX):
                os.unlink(os.path.join(self._directory, file_name))
        for file_name, record in self._readable_files().items():
            newest = self._paths(record.name)[0]
            if record.digest and os.path.basename(newest) != file_name and os.path.exists(newest):
                os.unlink(os.path.join(self._directory, file_name))

    def _sorted(self, records: list[ImageRecord]) -> list[ImageRecord]:
        """Return the records, of those of one normalized name that whose file is named after it."""
        unique: dict[tuple[bool, ImageName], ImageRecord] = {}
        for record in records:
            key = (True, record.name.normalized) if record.digest else (False, record.name)
            if key in unique:
                with suppress(OSError, StoreDamagedError):
                    record = _read(self._paths(record.name)[0])  # noqa: PLW2901 - the one that counts
            unique[key] = record
        return sorted(unique.values(), key=lambda record: str(record.name))

    def _readable_files(self) -> dict[str, ImageRecord]:
        files = {}
        for file_name in self._file_names():
            with suppress(OSError, StoreDamagedError):
                files[file_name] = self._read_file(file_name)
        return files

    def _file_names(self) -> list[str]:
        return [file_name for file_name in os.listdir(self._directory) if file_name.endswith(_SUFFIX)]

    def _read_file(self, file_name: str) -> ImageRecord:
        return _read(os.path.join(self._directory, file_name))

    def _paths(self, name: ImageName) -> list[str]:
        """Return the file named after the normalized name, and the one named after the name as written."""
        # A name can have slashes, any length, any letters; its hash is always a valid file name.
        keys = [f"{each.repository}:{each.tag}".encode("utf-8", "surrogatepass") for each in (name.normalized, name)]
        paths = [os.path.join(self._directory, hashlib.sha256(key).hexdigest() + _SUFFIX) for key in keys]
        return list(dict.fromkeys(paths))


def _is_named(record: ImageRecord, name: ImageName) -> bool:
    """Return whether a name, in any spelling, is the record's; a name with a digest may have any tag."""
    if not record.digest:
        return (record.name.repository, record.name.tag) == (name.repository, name.tag)
    stored, wanted = record.name.normalized, name.normalized
    return stored.repository == wanted.repository and (stored.tag == wanted.tag or name.digest != "")


def _has_digest(record: ImageRecord, name: ImageName) -> bool:
    return not name.digest or name.digest in {record.digest, record.index_digest}


def _read(path: str) -> ImageRecord:
    try:
        record = _record.decode(read_small_file(path, MAX_DOCUMENT_BYTES))
        if record.digest:
            require_digest(record.digest)
        return record
    except (OSError, ValueError, RecursionError) as error:  # ValueError: from msgspec, or from require_digest
        if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno not in WRONG):
            raise  # it could not be looked at, which says nothing of it
        raise StoreDamagedError(f"{path} is damaged: {error}; remove the file and load the image again") from error
