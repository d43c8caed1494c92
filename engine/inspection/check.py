"""Checks a state directory for damage, without its lock: while an engine is running, or while none is.

Each aspect is checked separately, so that a broken one does not hide the others. State changes while an engine is
running: a problem is checked a second time, and reported only if it is still there.
"""

import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from enum import StrEnum

import msgspec

from limpet.engine.database.sqlite import require_same_age, sqlite_version
from limpet.engine.inspection.dry_run import find_orphans
from limpet.engine.inspection.snapshot import Snapshot, require_sound_wal, require_state
from limpet.engine.state.directory import find_foreign_entries
from limpet.engine.state.entries import resolve_directory
from limpet.engine.state.lock import find_holder, may_be_held_elsewhere
from limpet.engine.state.names import CONTAINERS, DATABASE, QUARANTINE
from limpet.engine.state.owner import read_owner
from limpet.recovery.bundles import observe_bundle
from limpet.recovery.evidence import Bundle, Stage, classify
from limpet.recovery.orphans import Disposal
from limpet.schema.errors import LimpetError, StoreDamagedError
from limpet.schema.file_name import file_name
from limpet.schema.metadata import DEFAULT_NODE
from limpet.schema.revision import SCHEMA_REVISION

_LOOK_AGAIN_SECONDS = 0.25


class Aspect(StrEnum):
    """What is checked."""

    DIRECTORY = "directory"
    """Owner and permissions of the state directory and its files."""
    WAL = "wal"
    """The write-ahead log: no acknowledged commit in it is lost."""
    DATABASE = "database"
    """Structure and references, checked by SQLite."""
    RECORDS = "records"
    """Each record matches its checksum and can be read; none is missing."""
    BUNDLES = "bundles"
    """Bundles without rows, and rows without bundles."""


STORE = frozenset({Aspect.WAL, Aspect.DATABASE, Aspect.RECORDS})
"""Problems in these are damage to the store."""


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A problem that was found."""

    aspect: Aspect
    message: str
    """What is wrong, where, and what to do about it."""


class CheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a check."""

    state_dir: str
    node: str
    at: int
    """Nanoseconds since the epoch."""
    took_ns: int
    holder: int | None
    """The pid of the process that has the state directory open; None if none is visible."""
    checked: Mapping[Aspect, str]
    """A summary of each checked aspect; aspects that could not be checked are missing."""
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    """Facts worth knowing that are not problems."""

    @property
    def is_damaged(self) -> bool:
        """True if the store itself is damaged."""
        return any(problem.aspect in STORE for problem in self.problems)


def check_state(state_dir: str | os.PathLike[str], *, node: str = DEFAULT_NODE) -> CheckReport:
    """Check all aspects of a state directory. Writes nothing.

    Raises NotFoundError if there is no state here, StateDirectoryError if this user cannot use the directory.
    """
    begun, now = time.monotonic_ns(), time.time_ns()
    path = resolve_directory(state_dir)
    with suppress(StoreDamagedError):  # the aspects report it
        require_state(path)
    checked: dict[Aspect, str] = {}
    problems: dict[str, Problem] = {}
    for aspect, look in _LOOKS.items():
        summary, messages = _look_twice(look, path, node)
        if summary:
            checked[aspect] = summary
        for message in messages:
            problems.setdefault(message, Problem(aspect=aspect, message=message))
    return CheckReport(
        state_dir=path,
        node=node,
        at=now,
        holder=find_holder(path),
        checked=checked,
        problems=tuple(problems.values()),
        notes=tuple(_find_notes(path)),
        took_ns=time.monotonic_ns() - begun,
    )


def find_store_damage(state_dir: str, *, node: str = DEFAULT_NODE) -> list[str]:
    """Return the problems of WAL, database and records, checked once; nobody may have them open. Writes nothing."""
    return [message for aspect in sorted(STORE) for message in _look_once(_LOOKS[aspect], state_dir, node)[1]]


_Look = Callable[[str, str], tuple[str, list[str]]]


def _look_twice(look: _Look, path: str, node: str) -> tuple[str, list[str]]:
    """Return the summary ("" if the aspect could not be checked), and the problems found in both of two checks."""
    summary, messages = _look_once(look, path, node)
    if not messages:
        return summary, messages
    time.sleep(_LOOK_AGAIN_SECONDS)
    summary, again = _look_once(look, path, node)
    return summary, [message for message in messages if message in again]


def _look_once(look: _Look, path: str, node: str) -> tuple[str, list[str]]:
    try:
        return look(path, node)
    except LimpetError as error:
        return "", [str(error)]
    except OSError as error:
        return "", [f"{error.filename or path}: {error.strerror}; check its permissions"]


def _look_at_directory(path: str, _: str) -> tuple[str, list[str]]:
    foreign = find_foreign_entries(path)
    names = [name for name in sorted(os.listdir(path)) if name not in foreign]
    owner = os.lstat(path).st_uid
    problems = [*_find_exposure(path, owner)]
    for name in names:
        problems += _find_exposure(os.path.join(path, name), owner)
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        problems.append(f"{path}: its file system is mounted read-only; no engine can be opened on it")
    return f"private, with all its {len(names)} entries", problems


def _find_exposure(path: str, owner: int) -> Iterator[str]:
    """Yield what is wrong with the owner or permissions of a file or directory."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:  # a live engine has removed it
        return
    mode = stat.S_IMODE(found.st_mode)
    wanted = 0o700 if stat.S_ISDIR(found.st_mode) else 0o600
    if stat.S_ISLNK(found.st_mode):
        yield f"{path} is a symbolic link; replace it with its target"
    elif found.st_uid != owner:
        yield f"{path} belongs to user {found.st_uid}: chown {owner} {path}"
    elif mode & 0o077:
        yield f"{path} is open to other users (mode {mode:04o}): chmod {wanted:o} {path}"
    elif mode & wanted != wanted:
        yield f"{path} is not open to its owner (mode {mode:04o}): chmod {wanted:o} {path}"


def _look_at_wal(path: str, _: str) -> tuple[str, list[str]]:
    require_state(path)
    require_sound_wal(path)
    try:
        size = os.stat(os.path.join(path, f"{DATABASE}-wal")).st_size
    except FileNotFoundError:
        return "none: everything is in the database", []
    return f"{size:,} bytes, no commit lost", []


def _look_at_database(path: str, node: str) -> tuple[str, list[str]]:
    owner = read_owner(path)
    with Snapshot.open(path, node=node) as snapshot:
        require_same_age(path, owner, snapshot.source.ask(lambda reader: reader.epochs()))
        damage = snapshot.source.ask(lambda reader: reader.find_damage() + reader.find_format_damage())
    cure = "copy the state directory elsewhere, then restore a backup"
    return f"schema {SCHEMA_REVISION}, structure and references", [f"{DATABASE}: {each}; {cure}" for each in damage]


def _look_at_records(path: str, node: str) -> tuple[str, list[str]]:
    with Snapshot.open(path, node=node) as snapshot:
        damage = snapshot.source.ask(lambda reader: reader.find_damaged_records())
        return f"checksums and history, containers: {len(snapshot)}", damage


# What a bundle must be, at each stage.
_SOUND = {
    Stage.NEW: Bundle.ABSENT,
    Stage.CREATED: Bundle.WHOLE,
    Stage.RUNNING: Bundle.WHOLE,
    Stage.EXITED: Bundle.WHOLE,
    Stage.RELEASED: Bundle.ABSENT,
}
_CHANGING = {Stage.NEW, Stage.RELEASED}
"""A live engine is creating or removing these bundles, which can take long."""


def _look_at_bundles(path: str, node: str) -> tuple[str, list[str]]:
    bundles = os.path.join(path, CONTAINERS)
    if not os.path.isdir(bundles):
        return "no bundles are kept here", []
    problems = []
    with Snapshot.open(path, node=node) as snapshot:
        may_change = snapshot.holder is not None or may_be_held_elsewhere(path)
        for record, damage in snapshot.checkpoints():
            stage = classify(record.status)
            if damage or (may_change and stage in _CHANGING):
                continue
            found, detail = observe_bundle(os.path.join(bundles, file_name(record.id)), record.id)
            if found is not _SOUND[stage]:
                problems.append(_describe_bundle(record.id, stage, found, detail))
        orphans = find_orphans(snapshot)
    problems += [f"{orphan.path} has no row in the store: {_FATES[orphan.disposal]}" for orphan in orphans]
    return f"rows: {len(snapshot)}, bundles: {len(os.listdir(bundles))}", problems


_FATES = {
    Disposal.REMOVE: "limpet recover removes it",
    Disposal.QUARANTINE: "limpet recover moves it to quarantine",
    Disposal.LEAVE: "it is in use, so it stays",
}


def _describe_bundle(container_id: str, stage: Stage, found: Bundle, detail: str) -> str:
    cure = "stop and release it"
    if stage in _CHANGING:
        cure = "limpet recover removes it"
    if found in {Bundle.FOREIGN, Bundle.HIDDEN}:
        cure = f"{detail}; move it away"
    return f"container {container_id} is {stage.value}, but its bundle is {found.value}: {cure}"


_LOOKS: Mapping[Aspect, _Look] = {
    Aspect.DIRECTORY: _look_at_directory,
    Aspect.WAL: _look_at_wal,
    Aspect.DATABASE: _look_at_database,
    Aspect.RECORDS: _look_at_records,
    Aspect.BUNDLES: _look_at_bundles,
}


def _find_notes(path: str) -> Iterator[str]:
    version = sqlite_version()
    name = ".".join(map(str, version))
    if has_wal_reset_bug(version):
        yield (
            f"SQLite {name} has the WAL-reset bug (fixed in 3.51.3): limpet avoids it by"
            f" having one writer; let no other program write to {DATABASE}"
        )
    else:
        yield f"SQLite {name}"
    holder = find_holder(path)
    if holder is not None:
        yield f"engine {holder} is using it"
    elif may_be_held_elsewhere(path):
        yield "an engine of another pid namespace or host may be using it, which cannot be seen from here"
    else:
        yield "no engine is using it"
    foreign = find_foreign_entries(path)
    if foreign:
        yield f"not limpet's, left alone: {', '.join(foreign)}"
    quarantine = os.path.join(path, QUARANTINE)
    kept = os.listdir(quarantine) if os.path.isdir(quarantine) else []
    if kept:
        yield f"{len(kept)} quarantined in {quarantine}: no container owned them. Delete what you do not need."


def has_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """Return whether this version of SQLite can destroy a database that two connections write to at once.

    From 3.7.0 on; fixed in 3.51.3, 3.50.7 and 3.44.6 (https://sqlite.org/wal.html, "the WAL-reset bug").
    """
    if version >= (3, 51, 3) or version < (3, 7, 0):
        return False
    fixed = {(3, 50): 7, (3, 44): 6}.get(version[:2])
    return fixed is None or version[2] < fixed
