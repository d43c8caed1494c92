"""Hostile values: texts, numbers, JSON and bytes that have broken programs before. Drawn from a seeded Random."""

import json
from random import Random
from typing import Any

TEXTS = (
    "",
    " ",
    ".",
    "..",
    "/",
    "//",
    "../../around/file",
    "a/../../around",
    "/etc/passwd",
    "/proc/self/root",
    "~root",
    "-",
    "--",
    "-rf",
    "--state-dir",
    "\0",
    "a\0b",
    "a\nb",
    "\r\x1b[2J\x07",
    "\x7f",
    "\udc80",
    "\ud800\udfff",
    "\ufeff",
    "\u202eevil",
    "é",
    "e\u0301",
    "İı",
    "ß",
    "١٢٣",
    "😀" * 40,
    "%s%n%x",
    "{0.__class__}",
    "$(true)",
    "';--",
    "*",
    "?x=1#y",
    "%2e%2e%2f",
    "null",
    "CON",
    "a" * 127,
    "a" * 128,
    "a" * 129,
    "a" * 255,
    "a" * 256,
    "a/" * 3000,
    "x" * 70_000,
    "0" * 5000,
    "9" * 5000,
    "cgroup.procs",
    ".tmp-0",
    "A",
    "a",
)
NUMBERS = (
    0,
    -1,
    1,
    127,
    255,
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**63),
    -(2**63) - 1,
    2**64 - 1,
    2**64,
    10**400,
    -(10**19),
)
ODDITIES: tuple[Any, ...] = (None, True, False, 0.5, -0.0, 1e308, [], {}, [[]], [None], {"": None}, "0", "-1", "1e3")


def text(random: Random) -> str:
    """Draw a text: one that is known to hurt, one spoilt, or one made of any characters."""
    match random.randrange(6):
        case 0 | 1 | 2:
            return random.choice(TEXTS)
        case 3:
            return random.choice(TEXTS)[:200] + random.choice(TEXTS)[:200]
        case 4:
            letters = [chr(random.choice((random.randrange(128), random.randrange(0x3000)))) for _ in range(8)]
            return "".join(letters[: random.randrange(9)])
    good = "web-1.example_com"
    place = random.randrange(len(good))
    return good[:place] + random.choice(TEXTS)[:100] + good[place:]


def argument(random: Random) -> str:
    """Draw a text that a command line can carry: no NUL, and not much longer than one argument may be."""
    return text(random).replace("\0", "").encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")


def file_name(random: Random) -> bytes:
    """Draw a name that a directory can hold, of whatever bytes."""
    name = text(random).encode("utf-8", "surrogatepass").replace(b"/", b"_").replace(b"\0", b"_")[:255]
    return b"\xff\xfe" if name in {b"", b".", b".."} else name


def scalar(random: Random) -> Any:
    """Draw a value of any JSON type that is not deep."""
    return random.choice((text(random), random.choice(NUMBERS), random.choice(ODDITIES)))


def nest(random: Random, depth: int) -> Any:
    """Return a value inside `depth` lists or objects."""
    value = scalar(random)
    for _ in range(depth):
        value = [value] if random.random() < 0.5 else {"a": value}
    return value


def spoil_bytes(random: Random, data: bytes, times: int = 0) -> bytes:
    """Return `data` flipped, cut, doubled or mixed with noise in a few places."""
    for _ in range(times or random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(data) + 1)
        match random.randrange(7):
            case 0 if data:
                at = random.randrange(len(data))
                data = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
            case 1:
                data = data[:at]
            case 2:
                data = data[:at] + random.randbytes(random.randrange(1, 9)) + data[at:]
            case 3:
                data = data[:at] + data[at : at + 64] * 2 + data[at + 64 :]
            case 4:
                data = data[:at] + data[at + random.randrange(1, 64) :]
            case 5:
                data = data[:at] + random.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\0", b'"', b"{")) + data[at:]
            case _:
                data = data[:at] + bytes(random.randrange(1, 16)) + data[at + 8 :]
    return data


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each member of a JSON value, its own included."""
    found = [path]
    if isinstance(value, dict):
        for key, member in value.items():
            found += places(member, (*path, key))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            found += places(member, (*path, index))
    return found


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return a JSON value with another one at `path`."""
    if not path:
        return new
    step, *rest = path
    if isinstance(value, dict):
        return {**value, step: replaced(value.get(step), tuple(rest), new)}
    return [replaced(each, tuple(rest), new) if index == step else each for index, each in enumerate(value)]


def spoil_json(random: Random, value: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a JSON value with one member replaced, added or nested; and where."""
    path = random.choice(places(value))
    match random.randrange(8):
        case 0:
            return replaced(value, path, nest(random, random.choice((1, 3, 50)))), path
        case 1:
            return replaced(value, (*path[:-1], text(random)), scalar(random)) if _in_object(value, path) else (
                replaced(value, path, scalar(random))
            ), path
    return replaced(value, path, scalar(random)), path


def _in_object(value: Any, path: tuple[Any, ...]) -> bool:
    return bool(path) and isinstance(path[-1], str)


def to_json(random: Random, value: Any) -> bytes:
    """Write JSON as a careless or malicious client might: escapes or raw, keys twice, nonsense around it."""
    data = json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    match random.randrange(12):
        case 0 if data.startswith(b"{") and len(data) > 2:
            return data[:-1] + b"," + data[1:]  # every key twice
        case 1:
            return b"[" * 100_000 + data
        case 2:
            return random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b" " * 10, b"\0", b"#", b"---\n")) + data
        case 3:
            return spoil_bytes(random, data)
        case 4:
            return data + random.choice((b"{}", b"\0", b"]", b"\n\n", b"NaN"))
        case 5:
            return data.decode("utf-8", "surrogatepass").encode("utf-16", "surrogatepass")
        case 6:
            return b'{"metadata":{"name":"x","attempt":' + random.choice((b"1" * 5000, b"1e9999", b"-Infinity")) + b"}}"
        case 7:
            return b'{"a":' * random.choice((10, 900, 50_000)) + b"1"
    return data


DEEP_JSON = '{"x":' + "[" * 100_000 + "]" * 100_000 + "}"
"""Nested deeper than any decoder follows."""
