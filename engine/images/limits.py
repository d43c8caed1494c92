"""How much of a stranger's image is unpacked before limpet gives up, and the count of it."""

from limpet.schema.errors import InvalidInputError

MAX_UNPACKED_BYTES = 64 << 30
"""Of all layers of one image together, decompressed; and of one archive of a layout."""
MAX_MEMBERS = 4_000_000
"""Of all layers together, their extended headers included. Large images have some hundred thousand."""
MAX_NAME_BYTES = 512 << 20
"""Of all names together, since they are remembered while a layer is unpacked."""


class Budget:
    """What is left of the bounds for one image. Each method takes some, or raises InvalidInputError."""

    def __init__(self) -> None:
        self._bytes = MAX_UNPACKED_BYTES
        self._members = MAX_MEMBERS
        self._names = MAX_NAME_BYTES

    def take_bytes(self, count: int) -> None:
        """Account for bytes that came out of a decompressor, or for the holes of a sparse file."""
        self._bytes -= count
        if self._bytes < 0:
            raise InvalidInputError(f"unpacks to more than {MAX_UNPACKED_BYTES} bytes, which limpet refuses")

    def take_member(self) -> None:
        """Account for one more header."""
        self._members -= 1
        if self._members < 0:
            raise InvalidInputError(f"has more than {MAX_MEMBERS} members, which limpet refuses")

    def take_name(self, name: bytes) -> None:
        """Account for a name that is remembered."""
        self._names -= len(name)
        if self._names < 0:
            raise InvalidInputError(f"has names of more than {MAX_NAME_BYTES} bytes together, which limpet refuses")
