"""The name of the directory that belongs to an id. Ids of other runtimes hold anything, also "/" and 256 characters.

An id that is a safe file name is its own name. Any other is written with %XX, as in a URL, behind a leading "%", which
no safe name begins with. Where that grows too long it is cut, and the id's SHA-256 follows.
"""

import re
from collections.abc import Collection, Iterable
from hashlib import sha256
from urllib.parse import quote

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_LONGEST = 200
"""Of the 255 bytes of a file name; others put something before or behind it."""
_KEPT = 120


def file_name(id: str) -> str:
    """Return the name of the id's directory: another one for each id, and never one that leads elsewhere."""
    if _SAFE.fullmatch(id):
        return id
    escaped = f"%{quote(id, safe='', errors='surrogatepass')}"
    if len(escaped) <= _LONGEST:
        return escaped
    return f"{escaped[:_KEPT]}%%{sha256(id.encode(errors='surrogatepass')).hexdigest()}"  # no escaped name has "%%"


def find_owners(names: Iterable[str], ids: Collection[str]) -> dict[str, str]:
    """Return which of the ids the directories with these names belong to, by name; without those of none."""
    names = list(names)
    owners = {name: name for name in names if _SAFE.fullmatch(name) and name in ids}
    if any(name.startswith("%") for name in names):
        wanted = set(names)
        odd = {file_name(owner): owner for owner in list(ids) if not _SAFE.fullmatch(owner)}  # others may come and go
        owners |= {name: owner for name, owner in odd.items() if name in wanted}
    return owners
