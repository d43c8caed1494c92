"""Damaged states: a store's files with flipped bits, or with parts lost, swapped or replaced; checked, opened, judged.

A case is named damage:SEED:NUMBER, and its name determines the state, the damage and the place; or damage:bits:NUMBER,
one of all the bits of a database. Allowed outcomes: all acknowledged state is there; or the store refuses to open, says
what it found, and does not change the database; or it opens and reports each damaged record as damaged. The check must
find whatever opening finds. A WAL that ends early cannot be detected: after a flipped bit it lacks the last
transaction, like one that a power cut tore; after truncation it may lack more.
"""

import os
import random
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Final, NamedTuple

from msgspec.structs import replace

from limpet.engine.drill.opening import open_store, replace_pragmas
from limpet.engine.drill.records import IDENTITY, RUNNING, SANDBOX, Answer, make_metadata
from limpet.engine.inspection.check import find_store_damage
from limpet.engine.inspection.snapshot import Snapshot
from limpet.engine.reconcile import recover
from limpet.engine.state.names import DATABASE
from limpet.engine.store import Store
from limpet.recovery.evidence import Process
from limpet.schema.errors import InvalidInputError, LimpetError, StoreDamagedError
from limpet.schema.status import Status
from limpet.testing.pool import Mark
from limpet.testing.run import run_jobs
from limpet.testing.tree import empty, scratch
from limpet.testing.workload import Finding, Progress, Report, Violation

Files = Mapping[str, bytes]
"""The files of a state directory, by name."""

_WAL: Final = f"{DATABASE}-wal"
_SHM: Final = f"{DATABASE}-shm"  # derived from the others; not used after a reboot
_OWNER: Final = "owner.json"
_NAMES: Final = tuple(f"k{number}" for number in range(8))
_CASES_PER_JOB: Final = 50
_BITS: Final = "bits"
_NEAR: Final = 24
"""Free space this close to other data is not skipped."""
_WAL_PAGES: Final = 20
_SECTOR, _PAGE, _WAL_HEADER, _FRAME = 512, 4096, 32, 24 + 4096


class Outcome(StrEnum):
    """The outcome of a damaged state. The last two are losses that cannot be detected."""

    UNHARMED = "unharmed"
    REFUSED = "refused"
    FLAGGED = "flagged"
    LAST_UNSEEN = "the last transaction is missing, unseen"
    END_UNSEEN = "the end of a WAL is missing, unseen"


@dataclass(frozen=True)
class _State:
    """An undamaged state, as files."""

    files: Files
    checkpoints: int
    """How many were acknowledged; the store's content after each of them is known."""
    is_in_wal: bool
    """Whether the newest of them are only in the WAL."""


class _Case(NamedTuple):
    name: str
    words: str
    files: Files
    state: _State
    unseen: int
    """How many of the last checkpoints may be missing."""


def damage_states(*, count: int, seed: int, workers: int = 1, progress: Progress | None = None) -> Report:
    """Damage a state `count` times, each time differently, and judge the outcome."""
    return _check_all(partial(_draw, _make_states(), seed), range(count), workers, progress)


def flip_bits(*, every: int = 1, workers: int = 1, progress: Progress | None = None) -> Report:
    """Flip each bit (or every `every`th) of a closed database, one at a time, except within free space."""
    state = _make_states()[0]
    places = _find_used(state.files[DATABASE])
    return _check_all(partial(_flip_one, state, places), range(0, 8 * len(places), every), workers, progress)


def replay_damage(point: str) -> Report:
    """Judge one case again, by its name. Raises InvalidInputError if the name is invalid."""
    states = _make_states()
    try:
        _, seed, number = point.split(":")
        if seed == _BITS:
            case = _flip_one(states[0], _find_used(states[0].files[DATABASE]), int(number))
        else:
            case = _draw(states, int(seed), int(number))
    except (ValueError, IndexError):
        raise InvalidInputError(f"{point!r}: expected damage:SEED:NUMBER or damage:bits:NUMBER") from None
    with scratch() as directory:
        return sum(_check([case], f"{directory}/0", lambda _: None), Report())


def survey(*, count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Yield a description of each damage and its outcome. Raises Violation."""
    states = _make_states()
    with scratch() as directory:
        for number in range(count):
            case = _draw(states, seed, number)
            yield case.words, _judge(case, f"{directory}/0")


def _check_all(draw: Callable[[int], _Case], numbers: range, workers: int, progress: Progress | None) -> Report:
    jobs = [numbers[first : first + _CASES_PER_JOB] for first in range(0, len(numbers), _CASES_PER_JOB)]
    with scratch() as directory:

        def worker(index: int) -> Callable[[range, Mark], Iterator[Report]]:
            return lambda job, mark: _check(map(draw, job), f"{directory}/{index}", mark)

        return run_jobs(
            worker, jobs, counted=Report(damaged=1), workers=workers, deadline_seconds=60.0, progress=progress
        )


def _check(cases: Iterable[_Case], place: str, mark: Mark) -> Iterator[Report]:
    for case in cases:
        findings = []
        mark(case.name)
        try:
            _judge(case, place)
        except Violation as violation:
            findings.append(Finding(case.name, violation.kind, f"{case.words}: {violation}"))
        except Exception as error:  # noqa: BLE001  # any other error would be a defect
            findings.append(Finding(case.name, "other", f"{case.words}: {type(error).__name__}: {error}"))
        yield Report.of(findings, damaged=1, acknowledged=len(_NAMES))


def _judge(case: _Case, place: str) -> Outcome:
    """Check and open the state; return the outcome. Raises Violation."""
    _materialise(case.files, place)
    told = find_store_damage(place)
    _look_beside(place)
    if any(_read_files(place).get(name) != content for name, content in case.files.items() if name != _SHM):
        raise Violation("other", "looking has changed a file")
    try:
        store = Store.open(place)
    except LimpetError as error:
        if not told:
            raise Violation("other", f"the check found nothing, but opening failed: {error}") from error
        if _read_files(place).get(DATABASE) != case.files.get(DATABASE):
            raise Violation("other", f"a refused database was changed: {error}") from error
        return Outcome.REFUSED
    try:
        with store:
            outcome, damaged = _compare(store, case)
    except LimpetError as error:
        outcome, damaged = Outcome.FLAGGED, [str(error)]
    if damaged and not told:
        raise Violation("other", f"the check found nothing, but the store reports damage: {damaged}")
    return Outcome.FLAGGED if damaged else outcome


def _look_beside(place: str) -> None:
    """Read as `limpet ps` does; this may fail with one of limpet's errors."""
    try:
        with Snapshot.open(place) as snapshot:
            list(snapshot.checkpoints())
    except LimpetError:
        return


def _compare(store: Store, case: _Case) -> tuple[Outcome, list[str]]:
    """Return how much is there, and which records are reported damaged. Raises Violation if one is wrong."""
    store.last_report()
    recover(store, probe=Answer(Process.ALIVE))
    found = {record.id: record.status for record in store.list()}
    damaged = [key for key in found if store.is_damaged(key)]
    for missing in range(case.unseen + 1):
        model = model_after(case.state.checkpoints - missing)
        said = {key: status for key, status in found.items() if key not in damaged}
        if found.keys() >= model.keys() and said == {key: model.get(key) for key in said}:
            break
    else:
        pids = {key: status.pid for key, status in found.items()}
        expected = {key: status.pid for key, status in model_after(case.state.checkpoints).items()}
        raise Violation("lost", f"{pids}, damaged {damaged}; expected {expected}")
    return _LOSSES[min(missing, 2)], damaged + _find_damaged_histories(store) + _find_damaged_metadata(store)


_LOSSES: Final = (Outcome.UNHARMED, Outcome.LAST_UNSEEN, Outcome.END_UNSEEN)


def _find_damaged_histories(store: Store) -> list[str]:
    damaged = []
    for record in store.list():
        try:
            store.history(record.id)
        except StoreDamagedError:
            damaged.append(f"the history of {record.id}")
    return damaged


def _find_damaged_metadata(store: Store) -> list[str]:
    damaged = []
    for record in store.list():
        try:
            metadata = record.metadata
        except StoreDamagedError:
            damaged.append(f"the metadata of {record.id}")
        else:
            if metadata != make_metadata(record.id):
                raise Violation("other", f"the metadata of {record.id} has changed")
    known = store.list_sandboxes()
    if known and known != [SANDBOX]:
        raise Violation("other", f"the sandbox has changed: {known}")
    if not known and not store.sandbox_ids:
        raise Violation("lost", "the sandbox is gone")
    return damaged if known else [*damaged, "the sandbox"]


def model_after(checkpoints: int) -> dict[str, Status]:
    """Return the status of each container after that many checkpoints."""
    model = {key: _status(index, -1) for index, key in enumerate(_NAMES)}
    model.update((_NAMES[turn % len(_NAMES)], _status(turn % len(_NAMES), turn)) for turn in range(checkpoints))
    return model


def _status(index: int, turn: int) -> Status:
    """Return a status that contains the turn's number. Every other container has ended."""
    if index % 2:
        return Status(created_at=1, started_at=2, finished_at=3, exit_code=turn + 1, reason="Error", message="it ended")
    return replace(RUNNING, pid=turn + 2, identity=replace(IDENTITY, pid=turn + 2))


def _live(state_dir: str, lives: Sequence[int], *, is_closed: bool) -> None:
    """Run a store in `state_dir`, once for each number of checkpoints that must exist by then.

    In a separate process: its WAL restarts early, so that old frames follow the new ones.
    """
    pragmas = replace_pragmas(wal_autocheckpoint=(str(_WAL_PAGES), _WAL_PAGES))
    done = 0
    for number, checkpoints in enumerate(lives):
        store = open_store(state_dir, pragmas)
        if number == 0:
            store.add_sandbox(SANDBOX)
            for key, status in model_after(0).items():
                store.add(make_metadata(key), status)
        for turn in range(done, checkpoints):
            index = turn % len(_NAMES)
            store.checkpoint(_NAMES[index], _status(index, turn))
        done = checkpoints
        if number < len(lives) - 1 or is_closed:
            store.close()


def _make_states() -> list[_State]:
    """Run stores in separate processes, some of which end without closing theirs."""
    return [
        _make_state(lives, is_closed=is_closed)
        for lives, is_closed in (((0, 20), True), ((0, 9), False), ((5, 30), False), ((0, 60), False), ((4, 12), True))
    ]


def _make_state(lives: Sequence[int], *, is_closed: bool) -> _State:
    with scratch() as directory:
        state_dir = f"{directory}/state"
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _live(state_dir, lives, is_closed=is_closed)
                status = 0
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1]:
            raise LimpetError("a store to be damaged could not be created")
        files = _read_files(state_dir)
        files.pop(_SHM, None)
        return _State(files, lives[-1], not is_closed)


def _read_files(directory: str) -> dict[str, bytes]:
    found = {}
    for entry in os.scandir(directory):
        if entry.is_file(follow_symlinks=False) and entry.name != "lock":
            with open(entry.path, "rb") as file:
                found[entry.name] = file.read()
    return found


def _materialise(files: Files, directory: str) -> None:
    empty(directory)
    for name, content in files.items():
        with open(os.open(f"{directory}/{name}", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as file:
            file.write(content)


_Damage = Callable[[random.Random, bytes], bytes]


def _flip(rng: random.Random, content: bytes) -> bytes:
    where = rng.randrange(len(content))
    return content[:where] + bytes([content[where] ^ 1 << rng.randrange(8)]) + content[where + 1 :]


def _overwrite(unit: int, fill: Callable[[random.Random, int], bytes]) -> _Damage:
    def damage(rng: random.Random, content: bytes) -> bytes:
        where = rng.randrange(max(1, len(content) // unit)) * unit
        return content[:where] + fill(rng, min(unit, len(content) - where)) + content[where + unit :]

    return damage


def _zeros(_: random.Random, size: int) -> bytes:
    return bytes(size)


def _garbage(rng: random.Random, size: int) -> bytes:
    return rng.randbytes(size)


def _swap(unit: int, offset: int = 0) -> _Damage:
    def damage(rng: random.Random, content: bytes) -> bytes:
        units = [content[start : start + unit] for start in range(offset, len(content), unit)]
        if len(units) > 1:
            one, other = rng.sample(range(len(units)), 2)
            units[one], units[other] = units[other], units[one]
        return content[:offset] + b"".join(units)

    return damage


def _cut(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _grow(rng: random.Random, content: bytes) -> bytes:
    return content + rng.randbytes(rng.randrange(1, 3 * _PAGE))


def _nothing(_: random.Random, __: bytes) -> bytes:
    return b""


_ONE, _MANY = 1, 1 << 30
_DAMAGES: Final[Sequence[tuple[int, str, str, _Damage, int]]] = (
    (12, "a flipped bit", DATABASE, _flip, 0),
    (12, "a flipped bit", _WAL, _flip, _ONE),
    (2, "a flipped bit", _OWNER, _flip, 0),
    (3, "a sector of zeros", DATABASE, _overwrite(_SECTOR, _zeros), 0),
    (3, "a sector of garbage", DATABASE, _overwrite(_SECTOR, _garbage), 0),
    (2, "a page of zeros", DATABASE, _overwrite(_PAGE, _zeros), 0),
    (2, "a page of garbage", DATABASE, _overwrite(_PAGE, _garbage), 0),
    (2, "two pages swapped", DATABASE, _swap(_PAGE), 0),
    (2, "cut short", DATABASE, _cut, 0),
    (1, "grown", DATABASE, _grow, 0),
    (1, "empty", DATABASE, _nothing, 0),
    (1, "all garbage", DATABASE, lambda rng, content: rng.randbytes(len(content)), 0),
    (2, "a sector of zeros", _WAL, _overwrite(_SECTOR, _zeros), _MANY),
    (2, "a sector of garbage", _WAL, _overwrite(_SECTOR, _garbage), _MANY),
    (2, "two frames swapped", _WAL, _swap(_FRAME, _WAL_HEADER), _MANY),
    (2, "cut short", _WAL, _cut, _MANY),
    (1, "grown", _WAL, _grow, 0),
    (1, "empty", _WAL, _nothing, _MANY),
    (1, "all garbage", _OWNER, lambda rng, content: rng.randbytes(len(content)), 0),
    (1, "cut short", _OWNER, _cut, 0),
)
"""Weight, description, file, the damage, and how many of the last checkpoints may then be missing undetected."""

_SQL: Final = (
    ("UPDATE container_status SET exit_code = exit_code + 1 WHERE id = 'k1'", "another exit code"),
    ("UPDATE container_status SET pid = 1 WHERE id = 'k0'", "another pid"),
    ("UPDATE container_status SET finished_at = 9 WHERE id = 'k2'", "an exit that did not happen"),
    ("UPDATE container_status SET message = CAST(x'fffe' AS TEXT) WHERE id = 'k3'", "text that is not UTF-8"),
    ("UPDATE container_status SET resources = '{' WHERE id = 'k4'", "invalid JSON"),
    ("UPDATE container_status SET checksum = 0", "wrong checksums"),
    ("UPDATE container_status SET seq = -1 WHERE id = 'k5'", "a number out of range"),
    ("DELETE FROM container_status WHERE id = 'k6'", "a missing status"),
    ("UPDATE container SET config = '{}' WHERE id = 'k7'", "another config"),
    ("UPDATE container SET name = 'other' WHERE id = 'k7'", "another name"),
    ("UPDATE sandbox SET config = 'x'", "an invalid sandbox config"),
    ("UPDATE sandbox SET created_at = 7", "another creation time of a sandbox"),
    ("PRAGMA application_id = 7", "another application's id"),
    ("UPDATE alembic_version SET version_num = '9999'", "a newer schema"),
    ("DELETE FROM alembic_version", "no schema version"),
    ("DROP TABLE alembic_version", "no table of the schema version"),
    ("UPDATE node SET epoch = 0", "an older epoch"),
    ("DELETE FROM node", "no epoch"),
)
"""What another program may do to a closed database, with a description."""


def _draw(states: Sequence[_State], seed: int, number: int) -> _Case:
    """Return the case with this name."""
    name = f"damage:{seed}:{number}"
    rng = random.Random(name)  # noqa: S311  # repeatable by its name
    state = rng.choice(states)
    kind = rng.random()
    if kind < 0.08:
        return _replace_file(name, rng, state)
    if kind < 0.2 and not state.is_in_wal:
        statement, words = rng.choice(_SQL)
        return _Case(name, words, _change_by_sql(state.files, statement), state, 0)
    possible = [damage for damage in _DAMAGES if state.files.get(damage[2])]
    (_, words, file, act, unseen) = rng.choices(possible, [damage[0] for damage in possible])[0]
    files = {**state.files, file: act(rng, state.files[file])}
    return _Case(name, f"{file}: {words}", files, state, min(unseen, state.checkpoints))


def _find_used(content: bytes) -> list[int]:
    """Return the offset of each byte that is not within free space, which is zero."""
    return [where for where in range(len(content)) if content[max(0, where - _NEAR) : where + _NEAR + 1].strip(b"\0")]


def _flip_one(state: _State, places: Sequence[int], number: int) -> _Case:
    """Return the case in which one bit of the database is flipped."""
    where, content = places[number // 8], state.files[DATABASE]
    flipped = content[:where] + bytes([content[where] ^ 1 << number % 8]) + content[where + 1 :]
    return _Case(f"damage:{_BITS}:{number}", "a flipped bit", {**state.files, DATABASE: flipped}, state, 0)


def _replace_file(name: str, rng: random.Random, state: _State) -> _Case:
    """Remove a file, or put another in its place."""
    choices = [
        ("the database is missing", {key: state.files[key] for key in state.files if key != DATABASE}),
        ("-shm is garbage", {**state.files, _SHM: rng.randbytes(32768)}),
        ("owner.json is missing", {key: state.files[key] for key in state.files if key != _OWNER}),
    ]
    if state.is_in_wal:
        choices.append(("the WAL is missing", {key: state.files[key] for key in state.files if key != _WAL}))
    words, files = rng.choice(choices)
    return _Case(name, words, files, state, 0)


def _change_by_sql(files: Files, statement: str) -> Files:
    with scratch() as directory:
        path = f"{directory}/{DATABASE}"
        with open(path, "wb") as file:
            file.write(files[DATABASE])
        connection = sqlite3.connect(path)
        connection.execute("PRAGMA journal_mode = delete")
        connection.execute(statement)
        connection.commit()
        connection.execute("PRAGMA journal_mode = wal")
        connection.close()
        with open(path, "rb") as file:
            return {**files, DATABASE: file.read()}
