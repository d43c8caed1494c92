"""What to do with a directory that no container owns: facts, a table of rules, a verdict.

Limpet removes what is provably its own, unused and old enough. It moves aside what may belong to others. It leaves in
place what a live process or a mount is using: even renaming it would break its user.
"""

import os
import stat
import time
from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

import msgspec

from limpet.recovery.bundles import is_empty, read_marker
from limpet.recovery.mounts import find_mounts
from limpet.recovery.users import Users
from limpet.schema.file_name import file_name

GRACE_SECONDS = 60.0
"""The minimum age for removal: a younger directory may belong to a change in progress, unless the machine was booted
since: a power cut may bring back what was removed shortly before."""

QUARANTINE_MOST = 1000
"""How many entries the quarantine holds at most. What does not fit stays where it is, and is reported."""


class Kind(StrEnum):
    """The file type of the orphan."""

    DIRECTORY = "directory"
    LINK = "link"
    """A symbolic link; it is never followed."""
    OTHER = "other"


class Origin(StrEnum):
    """Who created it."""

    OURS = "ours"
    """It contains limpet's marker with its own name, or holds nothing, like a bundle that was just begun."""
    OTHER_NODE = "another node's"
    """It contains limpet's marker of another node, whose rows this node does not see."""
    UNMARKED = "unmarked"
    """It contains no marker, or one that was made for another directory, as in a copy."""


class Use(StrEnum):
    """Whether a process or mount uses it."""

    UNUSED = "unused"
    IN_USE = "in use"
    """By a live process or a mount."""
    HIDDEN = "hidden"
    """We are not allowed to look."""


class Age(StrEnum):
    """Whether it is older than the grace period, or than this boot."""

    YOUNG = "young"
    OLD = "old"


class Disposal(StrEnum):
    """What is done with it."""

    REMOVE = "remove"
    QUARANTINE = "quarantine"
    LEAVE = "leave"


class OrphanRule(NamedTuple):
    """One row of the table."""

    label: str
    kind: Collection[Kind]
    origin: Collection[Origin]
    use: Collection[Use]
    age: Collection[Age]
    disposal: Disposal
    because: str


_ANY_ORIGIN, _ANY_AGE, _ANY_USE = frozenset(Origin), frozenset(Age), frozenset(Use)
_THIS_NODE = {Origin.OURS, Origin.UNMARKED}
_DIRECTORY, _NO_DIRECTORY = {Kind.DIRECTORY}, {Kind.LINK, Kind.OTHER}

# fmt: off
ORPHAN_RULES: tuple[OrphanRule, ...] = (
    OrphanRule("orphan-in-use", _DIRECTORY, _ANY_ORIGIN, {Use.IN_USE}, _ANY_AGE, Disposal.LEAVE,
     "a live process or a mount uses it"),
    OrphanRule("orphan-other-node", _DIRECTORY, {Origin.OTHER_NODE}, {Use.UNUSED, Use.HIDDEN}, _ANY_AGE, Disposal.LEAVE,
     "another node made it in this state directory, and knows whether it is needed"),
    OrphanRule("orphan-hidden", _DIRECTORY, _THIS_NODE, {Use.HIDDEN}, _ANY_AGE, Disposal.QUARANTINE,
     "it cannot be seen whether it is in use"),
    OrphanRule("orphan-ours", _DIRECTORY, {Origin.OURS}, {Use.UNUSED}, {Age.OLD}, Disposal.REMOVE,
     "limpet made it, its container is deleted, and it is not in use"),
    OrphanRule("orphan-young", _DIRECTORY, {Origin.OURS}, {Use.UNUSED}, {Age.YOUNG}, Disposal.QUARANTINE,
     "limpet made it recently, and no container owns it"),
    OrphanRule("orphan-unmarked", _DIRECTORY, {Origin.UNMARKED}, {Use.UNUSED}, _ANY_AGE, Disposal.QUARANTINE,
     "it has no limpet marker"),
    OrphanRule("orphan-not-directory", _NO_DIRECTORY, _ANY_ORIGIN, _ANY_USE, _ANY_AGE, Disposal.QUARANTINE,
     "it is not a directory; a link itself is moved, never followed"),
)
# fmt: on


class OrphanFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen of an orphan."""

    kind: Kind
    origin: Origin
    use: Use
    age: Age
    detail: str = ""


class Orphan(msgspec.Struct, frozen=True, kw_only=True):
    """One orphan in the report: its path, what was seen, the disposal and the reason."""

    path: str
    facts: OrphanFacts
    rule: str
    disposal: Disposal
    because: str
    error: str = ""
    """Why the disposal failed, if it did."""


def find_orphan_rules(facts: OrphanFacts) -> list[OrphanRule]:
    """Return the rules that match `facts`: always exactly one, which a test proves for every combination."""
    return [
        rule
        for rule in ORPHAN_RULES
        if facts.kind in rule.kind and facts.origin in rule.origin and facts.use in rule.use and facts.age in rule.age
    ]


def judge_orphan(
    path: str, name: str = "", *, node: str, users: Users, now: float, grace_seconds: float = GRACE_SECONDS
) -> Orphan:
    """Observe an orphan and decide what to do with it; `now` in seconds since the epoch. Changes nothing.

    `name` is the name it was made with, where that is another one now. Raises FileNotFoundError if it is gone.
    """
    booted_at = now - time.clock_gettime(time.CLOCK_BOOTTIME)
    facts = _observe(path, name or os.path.basename(path), node, users, max(now - grace_seconds, booted_at))
    (rule,) = find_orphan_rules(facts)
    return Orphan(path=path, facts=facts, rule=rule.label, disposal=rule.disposal, because=rule.because)


def _observe(path: str, name: str, node: str, users: Users, old_at: float) -> OrphanFacts:
    try:
        found = os.lstat(path)
        age = Age.OLD if found.st_mtime <= old_at else Age.YOUNG
        if not stat.S_ISDIR(found.st_mode):
            kind = Kind.LINK if stat.S_ISLNK(found.st_mode) else Kind.OTHER
            return OrphanFacts(kind=kind, origin=Origin.UNMARKED, use=Use.UNUSED, age=age)
        origin = _observe_origin(path, name, node)
        use, detail = _observe_use(path, users)
    except FileNotFoundError:
        raise
    except OSError as error:
        return OrphanFacts(
            kind=Kind.DIRECTORY,
            origin=Origin.UNMARKED,
            use=Use.HIDDEN,
            age=Age.YOUNG,
            detail=f"{error.filename or path}: {error.strerror}",
        )
    return OrphanFacts(kind=Kind.DIRECTORY, origin=origin, use=use, age=age, detail=detail)


def _observe_origin(path: str, name: str, node: str) -> Origin:
    marker = read_marker(path)
    if marker is None:
        return Origin.OURS if is_empty(path) else Origin.UNMARKED
    if file_name(marker.id) != name:
        return Origin.UNMARKED
    return Origin.OURS if marker.node == node else Origin.OTHER_NODE


def _observe_use(path: str, users: Users) -> tuple[Use, str]:
    mounts = find_mounts(path)
    if mounts:
        return Use.IN_USE, f"{mounts[0]} is a mount point"
    if path in users.pids:
        return Use.IN_USE, f"process {users.pids[path]} uses it"
    return (Use.HIDDEN, users.hidden) if users.hidden else (Use.UNUSED, "")
