"""The documents of an image layout: JSON from a stranger, read within a limit on each and on their sum."""

import io

from limpet.engine.images.files import Files
from limpet.engine.images.limits import MAX_DOCUMENTS_BYTES
from limpet.engine.images.oci import MAX_DOCUMENT_BYTES, Descriptor, blob_path
from limpet.engine.images.streams import HashingReader, require_match
from limpet.schema.errors import InvalidInputError


class Documents:
    """Reads documents. Both methods raise InvalidInputError if one is missing, or a limit is exceeded."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._left = MAX_DOCUMENTS_BYTES

    def read(self, name: str) -> bytes:
        """Return a whole file."""
        with self._files.open(name) as stream:
            data = stream.read(MAX_DOCUMENT_BYTES + 1)
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InvalidInputError(f"{name} is larger than {MAX_DOCUMENT_BYTES} bytes, the limit for a document")
        self._left -= len(data)
        if self._left < 0:
            raise InvalidInputError(
                f"its documents have more than {MAX_DOCUMENTS_BYTES} bytes together, limpet's limit"
            )
        return data

    def read_blob(self, blob: Descriptor) -> bytes:
        """Return a whole blob. Raises InvalidInputError also if it does not match its descriptor."""
        data = self.read(blob_path(blob.digest))
        reader = HashingReader(io.BytesIO(data), blob.digest)
        reader.drain()
        require_match(blob, reader)
        return data
