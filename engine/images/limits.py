"""Limits on unpacking an untrusted image, and the counters for them."""

from limpet.schema.errors import InvalidInputError

MAX_UNPACKED_BYTES = 64 << 30
"""For all layers together, decompressed, of one image or of all images that are loaded together; also for one archive
of a layout."""
MAX_MEMBERS = 4_000_000
"""For the same layers, including their extended headers. Large images have some hundred thousand."""
MAX_NAME_BYTES = 512 << 20
"""For the names in the same layers, because they are kept in memory while a layer is unpacked."""
MAX_STEPS = 20_000_000
"""For the paths in the same layers: directories that are opened, and links that are looked for, on their way. A member
of a layer that another tool made mostly takes one or two, for it comes beside the one before."""
MAX_LAYERS = 1000
"""For one image; a layer may be listed more than once. Other tools stop at about 125."""
MAX_DESCRIPTORS = 100_000
"""For all indexes of one layout together: the entries that are listed, counted each time they are used."""
MAX_DOCUMENTS_BYTES = 64 << 20
"""For all documents of one layout together: indexes, manifests and configurations."""


class Budget:
    """What remains of the limits. Each method takes some, or raises InvalidInputError."""

    def __init__(self) -> None:
        self._bytes = MAX_UNPACKED_BYTES
        self._members = MAX_MEMBERS
        self._names = MAX_NAME_BYTES
        self._steps = MAX_STEPS

    def take_bytes(self, count: int) -> None:
        """Count decompressed bytes, or the holes of a sparse file."""
        self._bytes -= count
        if self._bytes < 0:
            raise InvalidInputError(f"unpacks to more than {MAX_UNPACKED_BYTES} bytes, limpet's limit")

    def take_member(self) -> None:
        """Count a header."""
        self._members -= 1
        if self._members < 0:
            raise InvalidInputError(f"has more than {MAX_MEMBERS} members, limpet's limit")

    def take_name(self, name: bytes) -> None:
        """Count a name that is kept in memory."""
        self._names -= len(name)
        if self._names < 0:
            raise InvalidInputError(f"has more than {MAX_NAME_BYTES} bytes of names, limpet's limit")

    def take_step(self) -> None:
        """Count a name on the way of a path."""
        self._steps -= 1
        if self._steps < 0:
            raise InvalidInputError(f"has paths that take more than {MAX_STEPS} steps, limpet's limit")
