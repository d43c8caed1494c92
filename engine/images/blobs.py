"""Blobs on disk, named by digest. A blob gets its name once it is complete and flushed, so no partial blob is found."""

import os
import stat
from collections.abc import Collection

from limpet.engine.images.oci import DIGEST_ALGORITHMS, Descriptor, blob_path
from limpet.engine.images.streams import CHUNK_BYTES, ByteStream, HashingReader, require_match
from limpet.engine.state.durable import make_directory, open_made, sync_directory, temporary_path
from limpet.schema.errors import StoreDamagedError


class BlobDirectory:
    """The directory blobs/ below `root`, laid out as in an OCI image layout. OSError passes through."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._directories = [os.path.join(root, "blobs", algorithm) for algorithm in DIGEST_ALGORITHMS]
        for directory in self._directories:
            make_directory(directory)

    def path(self, digest: str) -> str:
        """Return the path of a blob, whether it exists or not."""
        return os.path.join(self._root, blob_path(digest))

    def has(self, blob: Descriptor) -> bool:
        """Return whether the blob exists in its full size. Its content is verified whenever it is read."""
        try:
            status = os.stat(self.path(blob.digest), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == blob.size

    def read(self, digest: str) -> bytes:
        """Return a small blob's content. Raises StoreDamagedError if it is missing or its digest does not match."""
        try:
            with open(self.path(digest), "rb") as file:
                reader = HashingReader(file, digest)
                data = reader.read(-1)
        except FileNotFoundError as error:
            raise StoreDamagedError(f"the blob {self.path(digest)} is missing") from error
        if reader.digest != digest:
            raise StoreDamagedError(f"the blob {self.path(digest)} is damaged: its digest is {reader.digest}")
        return data

    def put(self, blob: Descriptor, stream: ByteStream) -> None:
        """Store the content of `stream` once its size and digest are verified; durable on return.

        Raises InvalidInputError, and stores nothing, if they do not match. A blob that is already stored and
        undamaged is kept, and `stream` is not read.
        """
        if self.has(blob) and self._is_undamaged(blob):
            # The process that renamed it may have been killed before this sync.
            sync_directory(os.path.dirname(self.path(blob.digest)))
            return
        directory = os.path.dirname(self.path(blob.digest))
        temporary = temporary_path(directory)
        descriptor = open_made(temporary, os.O_WRONLY | os.O_EXCL)
        try:
            with os.fdopen(descriptor, "wb") as file:
                reader = HashingReader(stream, blob.digest)
                while reader.size <= blob.size and (chunk := reader.read(CHUNK_BYTES)):
                    file.write(chunk)
                require_match(blob, reader)
                file.flush()
                os.fsync(descriptor)
            os.rename(temporary, self.path(blob.digest))
        except BaseException:
            os.unlink(temporary)
            raise
        sync_directory(directory)

    def keep_only(self, digests: Collection[str]) -> None:
        """Remove all other blobs, and the leftovers of unfinished writes."""
        wanted = {self.path(digest) for digest in digests}
        for directory in self._directories:
            with os.scandir(directory) as entries:
                unwanted = [entry.path for entry in entries if entry.is_file() and entry.path not in wanted]
            for path in unwanted:
                os.unlink(path)

    def _is_undamaged(self, blob: Descriptor) -> bool:
        with open(self.path(blob.digest), "rb") as file:
            reader = HashingReader(file, blob.digest)
            reader.drain()
        return reader.digest == blob.digest
