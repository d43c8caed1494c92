"""What to do with a directory that no container owns: facts, a table of rules, a verdict.

Removing is for what is provably ours, unused and old enough. Moving aside is for what may be somebody's.
What a live process or a mount is using is left where it is: taking it away, even by renaming, would break it.
"""

import os
import stat
from collections.abc import Collection
from enum import StrEnum
from typing import NamedTuple

import msgspec

from limpet.recovery.bundles import find_mounts, find_users, read_marker

GRACE_SECONDS = 60.0
"""How old an orphan must be to be removed: a directory this young may belong to a change under way."""


class Kind(StrEnum):
    """What the orphan is."""

    DIRECTORY = "directory"
    LINK = "link"
    """A symbolic link: it is never followed."""
    OTHER = "other"


class Origin(StrEnum):
    """Who made it."""

    OURS = "ours"
    """It bears our marker, or is empty as a bundle is when it is begun."""
    UNMARKED = "unmarked"


class Use(StrEnum):
    """Whether somebody uses it."""

    UNUSED = "unused"
    IN_USE = "in use"
    """By a live process or a mount."""
    HIDDEN = "hidden"
    """We may not look."""


class Age(StrEnum):
    """Older than the grace period, or not."""

    YOUNG = "young"
    OLD = "old"


class Disposal(StrEnum):
    """What becomes of it."""

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
_DIRECTORY, _NO_DIRECTORY = {Kind.DIRECTORY}, {Kind.LINK, Kind.OTHER}

# fmt: off
ORPHAN_RULES: tuple[OrphanRule, ...] = (
    OrphanRule("orphan-in-use", _DIRECTORY, _ANY_ORIGIN, {Use.IN_USE}, _ANY_AGE, Disposal.LEAVE,
     "a live process or a mount is in it"),
    OrphanRule("orphan-hidden", _DIRECTORY, _ANY_ORIGIN, {Use.HIDDEN}, _ANY_AGE, Disposal.QUARANTINE,
     "whether somebody uses it cannot be seen"),
    OrphanRule("orphan-ours", _DIRECTORY, {Origin.OURS}, {Use.UNUSED}, {Age.OLD}, Disposal.REMOVE,
     "we made it, its container is deleted, and nobody uses it"),
    OrphanRule("orphan-young", _DIRECTORY, {Origin.OURS}, {Use.UNUSED}, {Age.YOUNG}, Disposal.QUARANTINE,
     "we made it not long ago, and no container owns it"),
    OrphanRule("orphan-unmarked", _DIRECTORY, {Origin.UNMARKED}, {Use.UNUSED}, _ANY_AGE, Disposal.QUARANTINE,
     "it does not bear our marker"),
    OrphanRule("orphan-not-directory", _NO_DIRECTORY, _ANY_ORIGIN, _ANY_USE, _ANY_AGE, Disposal.QUARANTINE,
     "it is not a directory; a link is moved itself, and never followed"),
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
    """One orphan in the report: where it is, what was seen, what is done with it and why."""

    path: str
    facts: OrphanFacts
    rule: str
    disposal: Disposal
    because: str
    error: str = ""
    """Why what was decided could not be done, if so."""


def find_orphan_rules(facts: OrphanFacts) -> list[OrphanRule]:
    """Return the rules that answer `facts`: always exactly one, which a test proves for every combination."""
    return [
        rule
        for rule in ORPHAN_RULES
        if facts.kind in rule.kind and facts.origin in rule.origin and facts.use in rule.use and facts.age in rule.age
    ]


def judge_orphan(path: str, *, now: float, grace_seconds: float = GRACE_SECONDS) -> Orphan:
    """Look at an orphan and say what to do with it. `now` in seconds since the epoch. Touches nothing.

    Raises FileNotFoundError if it is gone.
    """
    facts = _observe(path, now, grace_seconds)
    (rule,) = find_orphan_rules(facts)
    return Orphan(path=path, facts=facts, rule=rule.label, disposal=rule.disposal, because=rule.because)


def _observe(path: str, now: float, grace_seconds: float) -> OrphanFacts:
    try:
        found = os.lstat(path)
        age = Age.OLD if 0 <= grace_seconds <= now - found.st_mtime else Age.YOUNG
        if not stat.S_ISDIR(found.st_mode):
            kind = Kind.LINK if stat.S_ISLNK(found.st_mode) else Kind.OTHER
            return OrphanFacts(kind=kind, origin=Origin.UNMARKED, use=Use.UNUSED, age=age)
        ours = not os.listdir(path) or read_marker(path) is not None
        use, detail = _observe_use(path)
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
    origin = Origin.OURS if ours else Origin.UNMARKED
    return OrphanFacts(kind=Kind.DIRECTORY, origin=origin, use=use, age=age, detail=detail)


def _observe_use(path: str) -> tuple[Use, str]:
    mounts = find_mounts(path)
    if mounts:
        return Use.IN_USE, f"{mounts[0]} is a mount point"
    users, hidden = find_users(path)
    if users:
        return Use.IN_USE, f"process {users[0]} is in it"
    if hidden:
        return Use.HIDDEN, f"process {hidden[0]} may not be looked into"
    return Use.UNUSED, ""
