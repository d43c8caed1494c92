"""Parses the fields of tar headers: pure functions that raise InvalidInputError."""

import re

from limpet.schema.errors import InvalidInputError

_MAX_INTEGER = (1 << 63) - 1
_DECIMAL = re.compile(rb"-?[0-9]{1,19}")
_TIME = re.compile(rb"(-?)([0-9]{1,19})(?:\.([0-9]*))?")
_RECORD_LENGTH = re.compile(rb"([0-9]{1,7}) ")
_CHECKSUM = slice(148, 156)


def show(name: bytes) -> str:
    """Return a member's name for messages: quoted, escaped and shortened."""
    text = repr(name.decode("utf-8", "backslashreplace"))
    return text if len(text) <= 200 else f"{text[:160]}'... ({len(name)} bytes)"


def require_checksum(block: bytes) -> None:
    """Check the header's checksum; some old tars summed signed bytes. Raises InvalidInputError."""
    given = number(block[_CHECKSUM], "checksum")
    total = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    negative = sum(1 for byte in block[:148] + block[156:] if byte >= 128)
    if given not in {total, total - 256 * negative}:
        raise InvalidInputError("a tar header with a wrong checksum")


def number(field: bytes, what: str) -> int:
    """Parse a numeric field: octal digits, or GNU's base 256 if the first bit is set."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big") - (
            1 << (8 * len(field) - 1) if field[0] & 0x40 else 0
        )
    digits = until_nul(field.strip(b" \0")).strip(b" ")
    if digits.strip(b"01234567"):
        raise InvalidInputError(f"a tar header with invalid {what} {field!r}")
    return int(digits or b"0", 8)


def decimal(field: bytes, what: str) -> int:
    """Parse a number in a PAX record."""
    if not _DECIMAL.fullmatch(field):
        raise InvalidInputError(f"a PAX record with invalid {what} {show(field)}")
    return int(field)


def time_ns(field: bytes) -> int:
    """Parse a time in a PAX record (seconds with a fraction) into nanoseconds."""
    match = _TIME.fullmatch(field)
    if not match:
        raise InvalidInputError(f"a PAX record with invalid time {show(field)}")
    sign, seconds, fraction = match.groups()
    value = int(seconds) * 10**9 + int((fraction or b"")[:9].ljust(9, b"0"))
    return -value if sign else value


def clamp_time(time: int) -> int:
    """Return the nearest time, in nanoseconds, that the kernel's calls accept."""
    return max(-_MAX_INTEGER, min(_MAX_INTEGER, time))


def until_nul(field: bytes) -> bytes:
    """Return a text field without its padding."""
    return field.partition(b"\0")[0]


def pax_records(data: bytes) -> dict[bytes, bytes]:
    """Parse PAX records, each a length and key=value; the last of a key wins, an empty value unsets it.

    The repeated records of GNU's oldest sparse format (0.0) are merged into those of the next (0.1).
    """
    records: dict[bytes, bytes] = {}
    sparse: list[bytes] = []
    position = 0
    while position < len(data):
        length = _RECORD_LENGTH.match(data, position)
        end = position + int(length[1]) if length else 0
        if not length or end <= length.end() or end > len(data) or data[end - 1 : end] != b"\n":
            raise InvalidInputError("a PAX header with a malformed record")
        key, equals, value = data[length.end() : end - 1].partition(b"=")
        if not equals or not key:
            raise InvalidInputError("a PAX record without a key")
        if key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}:
            sparse.append(value)
        records[key] = value
        position = end
    if sparse:
        records[b"GNU.sparse.map"] = b",".join(sparse)
    return {key: value for key, value in records.items() if value}
